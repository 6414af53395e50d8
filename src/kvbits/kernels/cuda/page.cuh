// One warp attends to one page: scores of up to 8 * TILES query rows, their softmax so far, the weighted sum of values.
//
// Both products have the codes as their left operand, 16 lanes of a page (tokens, then channels) by 16 reduced elements,
// and the rows of queries as columns. Lane 4 m + t of the warp loads four neighbouring lanes of the page, 4 m to 4 m + 3,
// of the octets t; so whole words of a page are operands as they are and never pass through shared memory.
#pragma once
#include <codes.cuh>

constexpr float LIFT = 14.f;       // weights are 2^LIFT times as large, for what float16 can hold
constexpr float NOTHING = -1e30f;  // below every logit, and no infinity: differences stay numbers

constexpr int KEY_PARAMS = KEYS == RAW ? 0 : KEYS == NF4 ? 64 + 2 * DIM : 4 * DIM;
constexpr int VALUE_PARAMS = VALUES == RAW ? 0 : VALUES == NF4 ? 64 : VALUES == INT8 ? 128 : 256;
constexpr int KEY_CODES = 8 * DIM * bits_of(KEYS), VALUE_CODES = 8 * DIM * bits_of(VALUES);
constexpr int VALUES_AT = (KEY_CODES + KEY_PARAMS + 63) / 64 * 64;
constexpr int HEAD_BYTES = VALUES_AT + (VALUE_CODES + VALUE_PARAMS + 63) / 64 * 64;
constexpr int ROWS = 8 * TILES, OCTETS = DIM / 32, BLOCKS = DIM / 32;
constexpr int CHUNK = DIM * TILES > 256 && KEYS != RAW && VALUES != RAW ? 4 : 8;  // loads of a buffer; there are two

// Query rows as right operands, a uint4 for each octet, tile and lane: `plain` in the order of channels, `coded` in that of
// rotated codes (NF4).
struct Rows {
  const uint4* plain;
  const uint4* coded;
};

// What a lane has of rows 2 t and 2 t + 1 of each tile, and of four channels of each block for them.
struct Sums {
  float sum[BLOCKS][2][TILES][4];
  float most[TILES][2], total[TILES][2], zeros[TILES][2];
};

struct Logits {
  float scale[TILES][2];     // product -> logit to base 2
  int low[TILES][2], high[TILES][2];  // positions that a row sees
};

INLINE float capped(float x, float cap2) {
  // tanh by one exponential; where that overflows the quotient is 0
  return cap2 * (1.f - 2.f / (exp2_(x * (2.f * 1.4426950408889634f / cap2)) + 1.f));
}

// Token that load `h` of a lane begins at.
template <int V>
INLINE constexpr int token_base(int h) { return V == INT2 ? 8 * h : 32 * h; }
template <int V>
INLINE constexpr int token_lane(int m) { return V == INT2 ? 16 * (m >> 1) + 4 * (m & 1) : 4 * m; }
template <int V>
INLINE int token_start(int h, int m) { return token_base<V>(h) + token_lane<V>(m); }

// How the loads of a page follow one another: chunks of keys, then of values.
template <int K, int V, int HALVES>
struct Plan {
  static constexpr int key_unit = HALVES * rows_of(K), value_unit = V == INT2 ? 1 : HALVES * rows_of(V);
  static constexpr int key_units = OCTETS / octets_of(K), value_units = BLOCKS;
  static constexpr int keys_at_once = CHUNK / key_unit < key_units ? CHUNK / key_unit : key_units;
  static constexpr int values_at_once = CHUNK / value_unit < value_units ? CHUNK / value_unit : value_units;
  static constexpr int key_chunks = key_units / keys_at_once, value_chunks = value_units / values_at_once;
  static constexpr int chunks = key_chunks + value_chunks;
  static_assert(V != INT2 || HALVES == 2, "values of two bits have both halves in a word");
};

// `source` knows the lane; what it is asked for are the parts of group, token and channel that all lanes share.
template <int K, int V, int HALVES, class Source>
INLINE void load_chunk(const Source& source, int n, uint4 (&to)[CHUNK]) {
  using P = Plan<K, V, HALVES>;
  if (n < P::key_chunks) {
    UNROLL for (int u = 0; u < P::keys_at_once; u++) UNROLL for (int h = 0; h < HALVES; h++)
      UNROLL for (int r = 0; r < rows_of(K); r++) {
        int octet = (n * P::keys_at_once + u) * octets_of(K);
        int group = octet_base<K>(octet) * bits_of(K) / 32 + r;
        to[(u * HALVES + h) * rows_of(K) + r] = source.key_words(group, token_base<V>(h));
      }
  } else {
    constexpr int halves = V == INT2 ? 1 : HALVES;
    UNROLL for (int u = 0; u < P::values_at_once; u++) UNROLL for (int h = 0; h < halves; h++)
      UNROLL for (int r = 0; r < rows_of(V); r++) {
        int block = (n - P::key_chunks) * P::values_at_once + u;
        int group = octet_base<V>(h * octets_of(V)) * bits_of(V) / 32 + r;
        to[(u * halves + h) * rows_of(V) + r] = source.value_words(group, 32 * block);
      }
  }
}

// The two products of 16 lanes by an octet: lanes `x` (rows 0 to 7) and `y` (rows 8 to 15).
template <int KIND>
INLINE void multiply(float (&d)[4], const u32 (&x)[4], const u32 (&y)[4], const u32 (&b)[4]) {
  UNROLL for (int k = 0; k < 4; k += 2) {
    if (KIND == RAW) mma_bf16(d, x[k], y[k], x[k + 1], y[k + 1], b[k], b[k + 1]);
    else mma_f16(d, x[k], y[k], x[k + 1], y[k + 1], b[k], b[k + 1]);
  }
}

INLINE u32 word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

template <int KIND, bool KEY>
INLINE void unpack_lane(const uint4* loads, int i, int part, u32 (&c)[4]) {
  u32 w[rows_of(KIND)];
  UNROLL for (int r = 0; r < rows_of(KIND); r++) w[r] = word(loads[r], i);
  unpack<KIND, KEY>(w, part, c);
}

// Keys of a chunk: `scores` [half][pair of tokens][tile], `shift` the part of a score that all tokens of the page share.
template <int K, int V, int HALVES>
INLINE void chunk_of_keys(int n, const uint4 (&loads)[CHUNK], const Rows& rows, const u8* params, int lane,
                          float (&scores)[HALVES][2][TILES][4], float (&shift)[TILES][4]) {
  using P = Plan<K, V, HALVES>;
  int t = lane & 3;
  UNROLL for (int u = 0; u < P::keys_at_once; u++) UNROLL for (int part = 0; part < octets_of(K); part++) {
    int octet = (n * P::keys_at_once + u) * octets_of(K) + part;
    u32 b[TILES][4];
    UNROLL for (int tile = 0; tile < TILES; tile++) {
      uint4 q = rows.plain[(octet * TILES + tile) * 32 + lane];
      u32 x[4] = {q.x, q.y, q.z, q.w};
      if (K == RAW) {
        arrange<K>(x, b[tile]);
      } else {  // what a channel's zero, or center, adds to every token
        int at = 2 * octet_start<K>(octet, t) + (K == NF4 ? 64 : 2 * DIM);
        uint4 z = *(const uint4*)(params + at);
        u32 zeros[4] = {z.x, z.y, z.z, z.w};
        multiply<INT8>(shift[tile], zeros, zeros, x);
        if (K == NF4) {
          uint4 c = rows.coded[(octet * TILES + tile) * 32 + lane];
          b[tile][0] = c.x, b[tile][1] = c.y, b[tile][2] = c.z, b[tile][3] = c.w;
        } else {
          uint4 s = *(const uint4*)(params + 2 * octet_start<K>(octet, t));
          x[0] = mul_f16(x[0], s.x), x[1] = mul_f16(x[1], s.y), x[2] = mul_f16(x[2], s.z), x[3] = mul_f16(x[3], s.w);
          arrange<K>(x, b[tile]);
        }
      }
    }
    UNROLL for (int h = 0; h < HALVES; h++) UNROLL for (int pair = 0; pair < 2; pair++) {
      const uint4* of = &loads[(u * HALVES + h) * rows_of(K)];
      u32 x[4], y[4];
      unpack_lane<K, true>(of, 2 * pair, part, x);
      unpack_lane<K, true>(of, 2 * pair + 1, part, y);
      UNROLL for (int tile = 0; tile < TILES; tile++) multiply<K>(scores[h][pair][tile], x, y, b[tile]);
    }
  }
}

// float16 scales, or zeros, of the four tokens of a load, two a word
template <int V>
INLINE void token_params(const u8* params, int token, u32 (&x)[2]) {
  if (V == NF4) {  // float16 without its sign and its last seven bits
    u32 bytes = *(const u32*)(params + token);
    x[0] = permute(bytes, 0, 0x4140) << 7, x[1] = permute(bytes, 0, 0x4342) << 7;
  } else {
    uint2 v = *(const uint2*)(params + 2 * token);
    x[0] = v.x, x[1] = v.y;
  }
}
INLINE float element(const u32 (&x)[2], int i) { return i & 1 ? high_f16(x[i >> 1]) : low_f16(x[i >> 1]); }

// Scores become weights times the values' scales, transposed into right operands `weights` [half][tile] in the order of V.
template <int K, int V, int HALVES>
INLINE void softmax(float (&scores)[HALVES][2][TILES][4], const float (&shift)[TILES][4], const Logits& logits,
                    const u8* key_params, const u8* value_params, int position, bool masked, float cap2, int m, Sums& sums,
                    u32 (&weights)[HALVES][TILES][4]) {
  u32 scales[HALVES][2];
  int exponent = 0;  // values' scales are below 2^exponent
  if (V != RAW) {
    UNROLL for (int h = 0; h < HALVES; h++) token_params<V>(value_params, token_start<V>(h, m), scales[h]);
    u32 most = max_f16(scales[0][0], scales[0][1]);
    UNROLL for (int h = 1; h < HALVES; h++) most = max_f16(most, max_f16(scales[h][0], scales[h][1]));
    u32 low = most & 0xffff, high = most >> 16;
    exponent = (int)(warp_max(low > high ? low : high) >> 10) - 14;
  }
  UNROLL for (int tile = 0; tile < TILES; tile++) UNROLL for (int e = 0; e < 2; e++) {
    float scale = logits.scale[tile][e], add = shift[tile][e] * scale, peak = NOTHING;
    UNROLL for (int h = 0; h < HALVES; h++) {
      int first = token_start<V>(h, m);
      u32 of_keys[2];
      if (K == NF4) token_params<NF4>(key_params, first, of_keys);
      UNROLL for (int i = 0; i < 4; i++) {
        float& x = scores[h][i >> 1][tile][2 * (i & 1) + e];
        if (K == NF4) x *= element(of_keys, i);
        x = x * scale + add;
        if (SOFTCAP) x = capped(x, cap2);
      }
    }
    if (masked) {
      UNROLL for (int h = 0; h < HALVES; h++) UNROLL for (int i = 0; i < 4; i++) {
        int at = position + token_start<V>(h, m) + i;
        bool seen = at >= logits.low[tile][e] && at <= logits.high[tile][e];
        float& x = scores[h][i >> 1][tile][2 * (i & 1) + e];
        x = seen ? x : 2.f * NOTHING;
      }
    }
    UNROLL for (int h = 0; h < HALVES; h++) UNROLL for (int i = 0; i < 4; i++) {
      peak = fmaxf(peak, scores[h][i >> 1][tile][2 * (i & 1) + e]);
    }
    UNROLL for (int lanes = 4; lanes < 32; lanes *= 2) {
      float other = from_lane_xor(peak, lanes);
      peak = fmaxf(peak, other);
    }
    peak += exponent;
    float before = sums.most[tile][e], most = fmaxf(peak, before);
    sums.most[tile][e] = most;
    float fade = exp2_(before - most);
    sums.total[tile][e] *= fade, sums.zeros[tile][e] *= fade;
    UNROLL for (int block = 0; block < BLOCKS; block++) UNROLL for (int pair = 0; pair < 2; pair++) {
      sums.sum[block][pair][tile][e] *= fade, sums.sum[block][pair][tile][2 + e] *= fade;
    }
    float base = LIFT - most;
    UNROLL for (int h = 0; h < HALVES; h++) {
      u32 zeros[2];
      if (V == INT4 || V == INT2) token_params<V>(value_params + 128, token_start<V>(h, m), zeros);
      UNROLL for (int i = 0; i < 4; i++) {
        float& x = scores[h][i >> 1][tile][2 * (i & 1) + e];
        float weight = exp2_(x + base);
        sums.total[tile][e] += weight;
        if (V == INT4 || V == INT2) sums.zeros[tile][e] += weight * element(zeros, i);
        x = V == RAW ? weight : weight * element(scales[h], i);
      }
    }
  }
  UNROLL for (int tile = 0; tile < TILES; tile++) UNROLL for (int h = 0; h < HALVES; h++) {
    u32 x[4];
    UNROLL for (int i = 0; i < 4; i++) {
      const float(&s)[4] = scores[h][i >> 1][tile];
      float low = s[2 * (i & 1)], high = s[2 * (i & 1) + 1];
      x[i] = transpose(V == RAW ? pack_bf16(low, high) : pack_f16(low, high));
    }
    arrange_split<V>(x, weights[h][tile]);
  }
}

template <int K, int V, int HALVES>
INLINE void chunk_of_values(int n, const uint4 (&loads)[CHUNK], const u32 (&weights)[HALVES][TILES][4], Sums& sums) {
  using P = Plan<K, V, HALVES>;
  UNROLL for (int u = 0; u < P::values_at_once; u++) UNROLL for (int h = 0; h < HALVES; h++)
    UNROLL for (int pair = 0; pair < 2; pair++) {
      int block = n * P::values_at_once + u;
      const uint4* of = V == INT2 ? &loads[u] : &loads[(u * HALVES + h) * rows_of(V)];
      u32 x[4], y[4];
      unpack_lane<V, false>(of, 2 * pair, h, x);
      unpack_lane<V, false>(of, 2 * pair + 1, h, y);
      UNROLL for (int tile = 0; tile < TILES; tile++) multiply<V>(sums.sum[block][pair][tile], x, y, weights[h][tile]);
    }
}
