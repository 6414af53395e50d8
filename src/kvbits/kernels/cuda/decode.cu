// Decode: attention of few query rows of each sequence over its sealed pages, and over their own page in 16 bit.
//
// Compiled for one format of keys (KEYS) and values (VALUES), a head size DIM, 8 * TILES query rows, with or without
// SOFTCAP. Grid (items, KV heads): an item is some sealed pages of a tile of queries, the tile's own page, or both one
// after the other. Its four warps take a page each in turn; their sums become one partial result (the own page's another
// one), and the last block of a tile and head to finish merges those of all items, in their order.
#include <page.cuh>

constexpr int WARPS = 4;
constexpr int STAGES = 2;
constexpr int PARAMS = (KEY_PARAMS + VALUE_PARAMS + 63) / 64 * 64;
constexpr int ITEM = 4, TILE = 8;  // int32 of an item and of a tile
// The own page's sums are added to those of sealed pages; rotated ones are rotated back before, in a second round.
constexpr bool TOGETHER = VALUES != NF4;

struct Step {
  const u16 *query, *key, *value;  // bfloat16
  u16* out;
  u8* cache;
  const int *items;        // tile, slot, first page, end; ~end: and the own page (unless TOGETHER in slot 0)
  const int *tiles;        // sequence, first row, queries, position of the first, first slot, slots, items
  const int *sealed;       // frames, [sequences, sealed_columns]
  const int *starts, *first_rows, *open_frames;  // of each sequence
  const float* sinks;      // a logit of each query head, or none
  float* partial;          // [slots, KV heads, ROWS, DIM + 2]
  u32* arrived;            // [tiles, KV heads]: 0 before and after
  i64 query_row, query_head, key_row, key_head, value_row, value_head, out_row, out_head;  // strides in elements
  i64 frame_bytes, sealed_at, open_at, sealed_columns;
  int kv_heads, group, window, stores;  // `stores`: rows go to the open pages
  float scale, cap;        // to base 2
};

struct Tile {
  int sequence, first_row, count, position, first_slot, slots, items;
};

INLINE Tile tile_of(const Step& step, int index) {
  const int* p = step.tiles + TILE * index;
  return {p[0], p[1], p[2], p[3], p[4], p[5], p[6]};
}

// Where a lane's loads begin: word groups of keys and values, token, channel.
template <int K, int V>
struct Lane {
  int key_group, value_group, token, channel;
};
template <int K, int V>
INLINE Lane<K, V> lane_of(int lane) {
  int m = lane >> 2, t = lane & 3;
  return {octet_lane<K>(t) * bits_of(K) / 32, octet_lane<V>(t) * bits_of(V) / 32, token_lane<V>(m), 4 * m};
}

// A sealed page of one head; pointers to what a lane loads first.
struct Sealed {
  const u8 *keys, *values;
  INLINE Sealed(const u8* block, const Lane<KEYS, VALUES>& lane)
      : keys(block + 4 * (lane.key_group * 64 + lane.token)),
        values(block + VALUES_AT + 4 * (lane.value_group * DIM + lane.channel)) {}
  INLINE uint4 key_words(int group, int token) const { return stream(keys + 4 * (group * 64 + token)); }
  INLINE uint4 value_words(int group, int channel) const { return stream(values + 4 * (group * DIM + channel)); }
};

// The own page: older tokens in the open page, the step's where the model put them, zeros behind them.
struct Own {
  const u8* block;
  const u16 *key, *value;  // of the page's first token, were it one of the step's
  i64 key_row, value_row;
  int token0, old, end;    // tokens from `old` on are the step's, up to `end`
  Lane<RAW, RAW> lane;

  INLINE u32 key_word(int pair, int token) const {
    if (token < old) return *(const u32*)(block + 4 * (pair * 64 + token));
    return token < end ? *(const u32*)(key + token * key_row + 2 * pair) : 0;
  }
  INLINE uint4 key_words(int group, int token) const {
    int pair = group + lane.key_group, at = token0 + token + lane.token;
    return {key_word(pair, at), key_word(pair, at + 1), key_word(pair, at + 2), key_word(pair, at + 3)};
  }
  INLINE u32 value_half(int token, int channel) const {
    if (token < old) return *(const u16*)(block + 128 * DIM + 4 * ((token >> 1) * DIM + channel) + 2 * (token & 1));
    return token < end ? value[token * value_row + channel] : 0;
  }
  INLINE u32 value_word(int token, int channel) const {
    if (token + 1 < old) return *(const u32*)(block + 128 * DIM + 4 * ((token >> 1) * DIM + channel));
    return value_half(token, channel) | value_half(token + 1, channel) << 16;
  }
  INLINE uint4 value_words(int group, int channel) const {
    int at = token0 + 2 * (group + lane.value_group), from = channel + lane.channel;
    return {value_word(at, from), value_word(at, from + 1), value_word(at, from + 2), value_word(at, from + 3)};
  }
};

INLINE float from_bf16(u32 x) { return bits_float(x << 16); }

// In place: SIZE elements of each of `count` rows times the Hadamard matrix over the root of its size.
INLINE void rotate_rows(float* rows, int count) {
  for (int half = 1; half < DIM; half *= 2) {
    for (int i = thread_index(); i < count * DIM / 2; i += 32 * WARPS) {
      int at = (i / half) * 2 * half + i % half;
      float a = rows[at], b = rows[at + half];
      rows[at] = a + b, rows[at + half] = a - b;
    }
    sync_block();
  }
  for (int i = thread_index(); i < count * DIM; i += 32 * WARPS) rows[i] *= DIM == 64 ? 0.125f : DIM == 128 ? 0.08838834764831845f : 0.0625f;
  sync_block();
}

// float16 of `row` at an octet, in the order of channels
INLINE void octet_of_row(const float* row, float factor, u32 (&x)[4]) {
  UNROLL for (int i = 0; i < 4; i++) x[i] = pack_f16(row[2 * i] * factor, row[2 * i + 1] * factor);
}

// The query rows of a tile as right operands. They are scaled by a power of two, so that their products with the scales of
// channels are within float16; `scale` [ROWS] undoes it. `raw`: bfloat16, unscaled, where wanted. `rows`: float32
// [ROWS, DIM], scratch.
template <int K>
INLINE void load_rows(const Step& step, const Tile& tile, int head, float* rows, float* scale, uint4* plain, uint4* coded,
                      uint4* raw) {
  int valid = tile.count * step.group;
  for (int i = 2 * thread_index(); i < ROWS * DIM; i += 64 * WARPS) {
    int row = i / DIM;
    const u16* q = step.query + (tile.first_row + row / step.group) * step.query_row +
                   (head * step.group + row % step.group) * step.query_head;
    u32 pair = row < valid ? *(const u32*)(q + i % DIM) : 0;
    rows[i] = from_bf16(pair), rows[i + 1] = bits_float(pair & 0xffff0000);
  }
  sync_block();
  int lane = thread_index() & 31, m = lane >> 2, t = lane & 3;
  if (K == RAW || raw) {
    for (int i = thread_index(); i < OCTETS * TILES * 32; i += 32 * WARPS) {
      const float* row = rows + (8 * (i / 32 % TILES) + m) * DIM + octet_start<RAW>(i / 32 / TILES, t);
      uint4 x = {pack_bf16(row[0], row[1]), pack_bf16(row[2], row[3]), pack_bf16(row[4], row[5]), pack_bf16(row[6], row[7])};
      (K == RAW ? plain : raw)[i] = x;
    }
  }
  if (K == RAW) {
    if (thread_index() < ROWS) scale[thread_index()] = step.scale;
    sync_block();
    return;
  }
  // the largest magnitude is below 2^reach: a scale of 4-bit codes is at most 131008 / 15, of rotated ones none
  constexpr int reach = K == INT8 ? 6 : K == INT4 ? 2 : K == INT2 ? 0 : 4;
  for (int pass = 0; pass < (K == NF4 ? 2 : 1); pass++) {
    if (pass == 0) {
      for (int row = thread_index() >> 5; row < ROWS; row += WARPS) {
        u32 most = 0;  // of float32 bits, without their sign
        UNROLL for (int c = 0; c < DIM; c += 32) {
          u32 bits = float_bits(rows[row * DIM + c + lane]) & 0x7fffffff;
          most = bits > most ? bits : most;
        }
        most = warp_max(most);
        int exponent = (int)(most >> 23) - 126;  // below 2^exponent
        if (most == 0 || most >= 0x7f800000) exponent = reach;
        // the root of DIM more for what a rotation may add to one channel
        exponent += K == NF4 ? 4 : 0;
        exponent = exponent < reach - 100 ? reach - 100 : exponent;
        if (lane == 0) scale[row] = bits_float((u32)(127 + reach - exponent) << 23);
      }
    }
    if (pass == 1) rotate_rows(rows, ROWS);
    sync_block();
    for (int i = thread_index(); i < OCTETS * TILES * 32; i += 32 * WARPS) {
      int row = 8 * (i / 32 % TILES) + m;
      u32 x[4], y[4];
      octet_of_row(rows + row * DIM + octet_start<K>(i / 32 / TILES, t), scale[row], x);
      if (pass == 0) plain[i] = {x[0], x[1], x[2], x[3]};
      else arrange<K>(x, y), coded[i] = {y[0], y[1], y[2], y[3]};
    }
    sync_block();
  }
  if (thread_index() < ROWS) scale[thread_index()] = step.scale / scale[thread_index()];
  sync_block();
}

INLINE void clear(Sums& sums) {
  UNROLL for (int tile = 0; tile < TILES; tile++) {
    UNROLL for (int b = 0; b < BLOCKS; b++) UNROLL for (int pair = 0; pair < 2; pair++)
      UNROLL for (int i = 0; i < 4; i++) sums.sum[b][pair][tile][i] = 0.f;
    UNROLL for (int e = 0; e < 2; e++) sums.most[tile][e] = NOTHING, sums.total[tile][e] = sums.zeros[tile][e] = 0.f;
  }
}

template <int HALVES>
INLINE void clear(float (&scores)[HALVES][2][TILES][4], float (&shift)[TILES][4]) {
  UNROLL for (int tile = 0; tile < TILES; tile++) UNROLL for (int i = 0; i < 4; i++) {
    shift[tile][i] = 0.f;
    UNROLL for (int h = 0; h < HALVES; h++) UNROLL for (int pair = 0; pair < 2; pair++) scores[h][pair][tile][i] = 0.f;
  }
}

// Parameters of a page to shared memory, the keys' first.
INLINE void fetch_params(u8* to, const u8* block, int lane) {
  for (int i = lane; i < PARAMS / 16; i += 32) {
    int at = 16 * i;
    copy_async(to + at, block + (at < KEY_PARAMS ? KEY_CODES + at : VALUES_AT + VALUE_CODES + at - KEY_PARAMS));
  }
}

// What a warp has asked for of its first page before the queries are there.
struct Ahead {
  uint4 loads[2][CHUNK];
  const u8* base;
  int page, frame;  // the frame of the page after `page`
  Sealed now;
};

INLINE Ahead load_ahead(const Step& step, const int* frames, int head, int low, int high, u8* params) {
  int lane = thread_index() & 31, page = low + (thread_index() >> 5);
  const u8* base = step.cache + step.sealed_at + (i64)head * HEAD_BYTES;
  // a warp without a page asks for nothing
  const u8* block = page < high ? base + frames[page] * step.frame_bytes : base;
  Ahead ahead = {{}, base, page, page + WARPS < high ? frames[page + WARPS] : 0, Sealed(block, lane_of<KEYS, VALUES>(lane))};
  if (page < high) {
    fetch_params(params, block, lane);
    load_chunk<KEYS, VALUES, 2>(ahead.now, 0, ahead.loads[0]);
    load_chunk<KEYS, VALUES, 2>(ahead.now, 1, ahead.loads[1]);
  }
  end_of_group();
  return ahead;
}

INLINE void attend_sealed(const Step& step, const Tile& tile, const int* frames, int high, const Rows& rows,
                          const Logits& logits, u8* params, Ahead& ahead, Sums& sums) {
  using P = Plan<KEYS, VALUES, 2>;
  int lane = thread_index() & 31;
  int oldest = step.window > 0 ? tile.position + tile.count - step.window : 0;  // what the last query sees begins here
  Lane<KEYS, VALUES> mine = lane_of<KEYS, VALUES>(lane);
  Sealed now = ahead.now, next = now;
  int stage = 0, frame = ahead.frame;
#pragma unroll 1
  for (int page = ahead.page; page < high; page += WARPS) {
    bool more = page + WARPS < high;
    const u8* block = ahead.base + frame * step.frame_bytes;
    if (more) next = Sealed(block, mine);
    if (page + 2 * WARPS < high) frame = frames[page + 2 * WARPS];
    wait_groups<0>();
    sync_warp();
    const u8* p = params + stage * PARAMS;
    stage ^= 1;
    if (more) fetch_params(params + stage * PARAMS, block, lane);
    end_of_group();
    float scores[2][2][TILES][4], shift[TILES][4];
    u32 weights[2][TILES][4];
    clear<2>(scores, shift);
    UNROLL for (int n = 0; n < P::chunks; n++) {
      auto& loads = ahead.loads[n & 1];
      if (n < P::key_chunks) chunk_of_keys<KEYS, VALUES, 2>(n, loads, rows, p, lane, scores, shift);
      else chunk_of_values<KEYS, VALUES, 2>(n - P::key_chunks, loads, weights, sums);
      if (n + 2 < P::chunks) load_chunk<KEYS, VALUES, 2>(now, n + 2, loads);
      else if (more) load_chunk<KEYS, VALUES, 2>(next, n + 2 - P::chunks, loads);
      if (n == P::key_chunks - 1) {
        softmax<KEYS, VALUES, 2>(scores, shift, logits, p, p + KEY_PARAMS, 64 * page, 64 * page < oldest, step.cap, lane >> 2,
                                 sums, weights);
      }
    }
    if (P::chunks & 1) {  // the next page's first chunk went to the second buffer
      UNROLL for (int i = 0; i < CHUNK; i++) {
        uint4 x = ahead.loads[0][i];
        ahead.loads[0][i] = ahead.loads[1][i], ahead.loads[1][i] = x;
      }
    }
    now = next;
  }
}

// Half of the own page for each of the last two warps, which may have a sealed page less.
INLINE void attend_own(const Step& step, const Tile& tile, int head, const Rows& rows, const Logits& logits, Sums& sums) {
  using P = Plan<RAW, RAW, 1>;
  int lane = thread_index() & 31, half = WARPS - 1 - (thread_index() >> 5);
  int page = tile.position >> 6, start = step.starts[tile.sequence];
  int end = tile.position + tile.count - 64 * page;
  if (half > 1 || 32 * half >= end) return;
  i64 row = (i64)step.first_rows[tile.sequence] + 64 * page - start;
  Own own = {step.cache + step.open_frames[tile.sequence] * step.frame_bytes + step.open_at + (i64)head * 256 * DIM,
             step.key + row * step.key_row + head * step.key_head, step.value + row * step.value_row + head * step.value_head,
             step.key_row, step.value_row, 32 * half, start - 64 * page, end, lane_of<RAW, RAW>(lane)};
  uint4 loads[2][CHUNK];
  load_chunk<RAW, RAW, 1>(own, 0, loads[0]);
  load_chunk<RAW, RAW, 1>(own, 1, loads[1]);
  float scores[1][2][TILES][4], shift[TILES][4];
  u32 weights[1][TILES][4];
  clear<1>(scores, shift);
  UNROLL for (int n = 0; n < P::chunks; n++) {
    if (n < P::key_chunks) chunk_of_keys<RAW, RAW, 1>(n, loads[n & 1], rows, nullptr, lane, scores, shift);
    else chunk_of_values<RAW, RAW, 1>(n - P::key_chunks, loads[n & 1], weights, sums);
    if (n + 2 < P::chunks) load_chunk<RAW, RAW, 1>(own, n + 2, loads[n & 1]);
    if (n == P::key_chunks - 1) {
      softmax<RAW, RAW, 1>(scores, shift, logits, nullptr, nullptr, 64 * page + 32 * half, true, step.cap, lane >> 2, sums,
                           weights);
    }
  }
}

// The step's rows of a tile to its open page, of which all has been read. A page that begins with the step is 0 behind
// them: a weight of 0 must not meet what an earlier owner left there.
INLINE void store_rows(const Step& step, const Tile& tile, int head) {
  int first = tile.position & 63, start = step.starts[tile.sequence], end = first + tile.count;
  int last = start == tile.position && first == 0 ? 64 : end;
  i64 row = (i64)step.first_rows[tile.sequence] + tile.position - start;
  u8* block = step.cache + step.open_frames[tile.sequence] * step.frame_bytes + step.open_at + (i64)head * 256 * DIM;
  for (int i = thread_index(); i < (last - first) * DIM; i += 32 * WARPS) {
    int token = first + i / DIM, channel = i % DIM;
    bool some = token < end;
    i64 of = row + i / DIM;
    u16 k = some ? step.key[of * step.key_row + head * step.key_head + channel] : 0;
    u16 v = some ? step.value[of * step.value_row + head * step.value_head + channel] : 0;
    *(u16*)(block + 4 * ((channel >> 1) * 64 + token) + 2 * (channel & 1)) = k;
    *(u16*)(block + 128 * DIM + 4 * ((token >> 1) * DIM + channel) + 2 * (token & 1)) = v;
  }
}

// The warps' sums as one: `merged` float32 [ROWS, DIM], `ends` [ROWS, 2] (maximum, total).
INLINE void merge_warps(Sums& sums, float* merged, float* ends, float* most_of) {
  int lane = thread_index() & 31, warp = thread_index() >> 5, m = lane >> 2, t = lane & 3;
  UNROLL for (int tile = 0; tile < TILES; tile++) UNROLL for (int e = 0; e < 2; e++) {
    UNROLL for (int lanes = 4; lanes < 32; lanes *= 2) {
      sums.total[tile][e] += from_lane_xor(sums.total[tile][e], lanes);
      sums.zeros[tile][e] += from_lane_xor(sums.zeros[tile][e], lanes);
    }
    if (m == 0) most_of[warp * ROWS + 8 * tile + 2 * t + e] = sums.most[tile][e];
  }
  for (int writer = 0; writer < WARPS; writer++) {
    sync_block();
    if (warp != writer) continue;
    UNROLL for (int tile = 0; tile < TILES; tile++) UNROLL for (int e = 0; e < 2; e++) {
      int row = 8 * tile + 2 * t + e;
      float most = most_of[row];
      for (int w = 1; w < WARPS; w++) most = fmaxf(most, most_of[w * ROWS + row]);
      float share = exp2_(sums.most[tile][e] - most);
      UNROLL for (int b = 0; b < BLOCKS; b++) UNROLL for (int i = 0; i < 4; i++) {
        float x = (sums.sum[b][i >> 1][tile][2 * (i & 1) + e] + sums.zeros[tile][e]) * share;
        float& to = merged[row * DIM + 32 * b + 4 * m + i];
        to = warp == 0 ? x : to + x;
      }
      if (m == 0) {
        float total = sums.total[tile][e] * share;
        ends[2 * row] = most;
        ends[2 * row + 1] = warp == 0 ? total : ends[2 * row + 1] + total;
      }
    }
  }
  sync_block();
}

// All partial results of a tile and head: the weighted mean, in bfloat16. `peaks`: [ROWS + 32 WARPS], scratch.
INLINE void merge_items(const Step& step, const Tile& tile, int head, float* peaks) {
  constexpr int size = ROWS * (DIM + 2), apart = 32 * WARPS / ROWS;
  const float* first = step.partial + ((i64)tile.first_slot * step.kv_heads + head) * size;
  i64 stride = (i64)step.kv_heads * size;
  float* found = peaks + ROWS;
  float most = NOTHING;
  UNROLL_BY_4 for (int s = thread_index() / ROWS; s < tile.slots; s += apart)
    most = fmaxf(most, fresh(first + s * stride + ROWS * DIM + 2 * (thread_index() % ROWS)));
  found[thread_index()] = most;
  sync_block();
  if (thread_index() < ROWS) {
    for (int i = 1; i < apart; i++) most = fmaxf(most, found[i * ROWS + thread_index()]);
    peaks[thread_index()] = most;
  }
  sync_block();
  for (int i = thread_index(); i < tile.count * step.group * (DIM / 4); i += 32 * WARPS) {
    int row = i / (DIM / 4), channel = 4 * (i % (DIM / 4)), of_heads = head * step.group + row % step.group;
    float sink = step.sinks ? step.sinks[of_heads] * 1.4426950408889634f : NOTHING;
    float peak = fmaxf(peaks[row], sink);
    float total = step.sinks ? exp2_(sink - peak + LIFT) : 0.f, sum[4] = {0.f, 0.f, 0.f, 0.f};
    UNROLL_BY_8 for (int s = 0; s < tile.slots; s++) {
      const float* p = first + s * stride;
      float share = exp2_(fresh(p + ROWS * DIM + 2 * row) - peak);
      total += fresh(p + ROWS * DIM + 2 * row + 1) * share;
      uint4 part = fresh4(p + row * DIM + channel);
      UNROLL for (int c = 0; c < 4; c++) sum[c] += bits_float(word(part, c)) * share;
    }
    u16* out = step.out + (tile.first_row + row / step.group) * step.out_row + of_heads * step.out_head + channel;
    UNROLL for (int c = 0; c < 4; c++) out[c] = (u16)pack_bf16(sum[c] / total, 0.f);
  }
}

KERNEL(WARPS, BLOCKS_AT_ONCE) decode(const Step step) {
  SHARED(memory);
  float* rows = (float*)memory;                       // [ROWS, DIM]: queries, later sums
  uint4* plain = (uint4*)(rows + ROWS * DIM);         // [OCTETS, TILES, 32]
  uint4* coded = plain + OCTETS * TILES * 32;
  uint4* raw = KEYS == RAW ? plain : coded + (KEYS == NF4 ? OCTETS * TILES * 32 : 0);  // of the own page
  u8* params = (u8*)(raw + (TOGETHER || KEYS == RAW ? OCTETS * TILES * 32 : 0));
  float* scale = (float*)(params + WARPS * STAGES * PARAMS);  // [ROWS]
  float* ends = scale + ROWS;                         // [ROWS, 2]
  float* most_of = ends + 2 * ROWS;                   // [WARPS, ROWS]
  int* last = (int*)(most_of + WARPS * ROWS);

  const int* item = step.items + ITEM * block_x();
  if (item[0] < 0) return;
  int low = item[2], high = item[3] < 0 ? ~item[3] : item[3], head = block_y();
  int lane = thread_index() & 31;
  u8* mine = params + (thread_index() >> 5) * STAGES * PARAMS;
  const Tile tile = tile_of(step, item[0]);
  const int* frames = step.sealed + tile.sequence * step.sealed_columns;
  bool both = item[3] < 0;
#pragma unroll 1
  for (int own = TOGETHER || low < high ? 0 : 1; own < (both && !TOGETHER ? 2 : 1); own++) {
    Ahead ahead = load_ahead(step, frames, head, low, own ? low : high, mine);
    if (own) load_rows<RAW>(step, tile, head, rows, scale, plain, coded, nullptr);
    else load_rows<KEYS>(step, tile, head, rows, scale, plain, coded, TOGETHER && both ? raw : nullptr);
    Logits logits;
    UNROLL for (int i = 0; i < TILES; i++) UNROLL for (int e = 0; e < 2; e++) {
      int row = 8 * i + 2 * (lane & 3) + e;
      logits.scale[i][e] = scale[row];
      logits.high[i][e] = tile.position + row / step.group;
      logits.low[i][e] = step.window > 0 ? logits.high[i][e] - step.window + 1 : 0;
    }
    Sums sums;
    clear(sums);
    if (!own) attend_sealed(step, tile, frames, high, {plain, coded}, logits, mine, ahead, sums);
    if (own || (TOGETHER && both)) {
      UNROLL for (int i = 0; i < TILES; i++) UNROLL for (int e = 0; e < 2; e++) logits.scale[i][e] = step.scale;
      attend_own(step, tile, head, {own ? plain : raw, nullptr}, logits, sums);
    }
    sync_block();
    if (step.stores && (own || (TOGETHER && both))) store_rows(step, tile, head);
    merge_warps(sums, rows, ends, most_of);
    if (VALUES == NF4 && !own) rotate_rows(rows, ROWS);
    int slot = tile.first_slot + (own ? 0 : item[1]);
    float* partial = step.partial + ((i64)slot * step.kv_heads + head) * (ROWS * (DIM + 2));
    for (int i = thread_index(); i < ROWS * (DIM + 2); i += 32 * WARPS)
      partial[i] = i < ROWS * DIM ? rows[i] : ends[i - ROWS * DIM];
    sync_block();
  }
  if (thread_index() == 0) *last = count_arrival(step.arrived + item[0] * step.kv_heads + head, tile.items - 1) == (u32)(tile.items - 1);
  sync_block();
  if (*last) merge_items(step, tile, head, rows);
}
