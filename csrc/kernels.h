// What the Python side, the drivers and the per-ISA kernels agree on. Plain data; no templates, no inline code.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace kvbits {

constexpr int kPage = 64;        // tokens in a page
constexpr int kSplitPages = 16;  // pages whose partial result is kept apart and merged in order (part of the numerics)
constexpr int kMaxDim = 576;     // largest head size (MLA's latent key)
constexpr int kBlockRows = 4;    // query rows that a kernel treats at once
constexpr int kManyRows = 16;    // the same of kernels for many
constexpr int kLanes = 16;       // floats in the widest vector
constexpr size_t kCacheLine = 64;
constexpr size_t kKeptBytes = 6 * kMaxDim + kCacheLine;

// Where one layer lies inside a page, and how it is coded.
struct Place {
  int32_t key_codec, value_codec;  // Codec.native_id
  int32_t frame;                   // which of the page's frames
  int64_t offset;                  // bytes from the frame's start
  int64_t head_bytes;              // bytes of one KV head
  int64_t value_offset;            // bytes from a head's start to its values
};

struct Layer {
  int32_t heads, kv_heads, key_dim, value_dim;
  float scale, softcap;      // softcap 0: none
  int32_t window;            // 0: none; negative: chunks of so many tokens
  Place sealed, open, sink;  // sink: the first page of a sequence; equal to `sealed` where it has no format of its own
  bool has_sink;
  int64_t frame_bytes;
  uint8_t* buffer;
  // Per KV head, how sealed pages (not the sink) are rounded; null: to nearest.
  const float *key_feedback, *value_feedback;  // [kv_heads, dim, dim]
  const float *key_clip, *value_clip;          // [kv_heads]
  const int32_t *key_order, *value_order;      // [kv_heads, dim]
  bool latent;  // the values are the keys' first value_dim channels, and pages have keys only
};

// A step; see BatchLayout in kernels/base.py. The pointers are borrowed for the call.
struct Batch {
  int32_t sequences, max_pages, open_frames, sink_frames;
  const int32_t *starts, *counts, *rows, *sealed, *head, *tail, *sink;
  bool draft;  // read sealed pages as drafts
};

enum class Float : int32_t { kBf16, kF32 };

// The step's rows. Strides in elements; the last dimension is contiguous.
struct Rows {
  Float dtype;
  const void *query, *key, *value;
  int64_t query_row, query_head, key_row, key_head, value_row, value_head;
  const float* sinks;  // [heads] or null
  void* out;           // [rows, heads, value_dim], contiguous, same dtype
};

// One query row while it meets one sequence's pages.
struct QueryRow {
  float* query;            // [key_dim], scaled
  const uint16_t* source;  // [key_dim], as the model gave it; null: not in bfloat16
  float scale;             // of the scores with `source`
  uint8_t* codes;          // [2 * key_dim]: high and low terms of the query, for codecs that quantize it once
  float unit;              // value of one unit of `codes`
  float correction;        // what a page's products need beside those with `codes`
  float sum;               // sum of the query
  float max;               // running maximum of the scores, in units of log 2
  float total[kLanes];     // running sum of the softmax, spread over a vector's lanes
  float* accumulator;      // [value_dim]
};

// Query rows that share a KV head, and one page of it. While a kernel reads the page it asks for the bytes `ahead` of
// those that it reads (0: nothing follows).
struct Block {
  const uint8_t* keys;
  const uint8_t* values;
  ptrdiff_t ahead;
  QueryRow* rows;
  int count;       // up to kBlockRows, or kManyRows
  float* scores;   // [count, kPage]; the softmax turns them into weights
  float* rescale;  // [count]: the factor by which a row's accumulator must shrink
  bool first;      // the first block of rows that meets these keys
  uint8_t* kept;   // [Kernels::kept_bytes], on a cache line: what a kernel keeps of the page for the other blocks
};

// One codec's work on a block.
struct KeyKernel {
  // Once per row, before any page.
  void (*prepare)(QueryRow& row, int dim);
  // scores[r * kPage + t] = row r's query . key t
  void (*score)(const Block& block, int dim);
  // Null, or the same for up to kManyRows rows, to the same bits; taken for heads of `many_from` and more.
  void (*score_many)(const Block& block, int dim) = nullptr;
  int many_from = 0;
};
struct ValueKernel {
  // row r: accumulator = accumulator * rescale[r] + sum over t of weights[r * kPage + t] * value t
  void (*accumulate)(const Block& block, int dim);
  // Null, or what turns an accumulator into the basis that `accumulate` adds to, and back.
  void (*unrotate)(QueryRow& row, int dim);
  // Null, or `accumulate` for up to kManyRows rows, to the same bits; taken for heads of `many_from` and more.
  void (*accumulate_many)(const Block& block, int dim) = nullptr;
  int many_from = 0;
};
// How one head's codes are chosen (Rounding in codecs/base.py).
struct Rounding {
  const float* feedback;  // [dim, dim]: what the c-th rounded channel's error takes from the later; null: to nearest
  const int32_t* order;   // [dim]: which channel is rounded when; null: as they come
  float clip;             // share of a group's range that the codes span; 1: all of it
};
// Encodes one head's bfloat16 page.
using SealKernel = void (*)(const uint8_t* open_page, int dim, const Rounding& rounding, uint8_t* sealed_page);

// Decodes one head's sealed page into bfloat16 rows, [kPage][row] with `row` elements from one to the next.
using OpenKernel = void (*)(const uint8_t* sealed_page, int dim, uint16_t* rows, int64_t row);

// Decodes the first `value_dim` channels of a sealed page of keys into a 16-bit page of values.
using LatentKernel = void (*)(const uint8_t* keys, int dim, int value_dim, uint8_t* values);

// Which sides of a page a codec has kernels for.
struct CodecSides {
  int id;
  bool key, value;
};

struct Kernels {
  const char* isa;
  bool (*codec)(int index, CodecSides* out);  // the table's index-th codec; false: it has no more
  const KeyKernel* (*key)(int codec);         // null: no such codec
  const ValueKernel* (*value)(int codec);
  SealKernel (*seal_key)(int codec);
  SealKernel (*seal_value)(int codec);
  // The block's scores to softmax weights: soft cap, mask outside [first[r], last[r]), running maximum and sum.
  void (*softmax)(const Block& block, const int* first, const int* last, float softcap);
  // a, b: partial results of the same row over different pages; a becomes their union.
  void (*merge)(QueryRow& a, const QueryRow& b, int dim);
  // The row times `scale` (and 1 / ln 2, so that the softmax takes powers of two).
  void (*load_query)(const void* row, Float dtype, float scale, int dim, float* out);
  // Divide by the softmax's sum (and the sink's share) and round.
  void (*store_output)(const QueryRow& row, const float* sink, int dim, Float dtype, void* out);
  // Like `key` and `value`, where a page may be read as a draft: the same kernel for most codecs.
  const KeyKernel* (*draft_key)(int codec);
  const ValueKernel* (*draft_value)(int codec);
  // Null: the codec has none.
  OpenKernel (*open_key)(int codec);
  OpenKernel (*open_value)(int codec);
  LatentKernel (*latent)(int codec);
  size_t kept_bytes = kKeptBytes;
  // Null, or what a thread calls before and after blocks of up to `rows` rows.
  void (*begin)(int rows) = nullptr;
  void (*end)() = nullptr;
};

const Kernels& scalar_kernels();
const Kernels& avx2_kernels();
const Kernels& avx512_kernels();
const Kernels& amx_kernels();
const Kernels& amx_emulated_kernels();

// The table for `isa` ("auto": the best that this processor runs); null if unknown or not runnable here.
const Kernels* kernels_for(const char* isa);
// Names of the ISAs that run here, the best first.
std::vector<const char*> available_isas();

}  // namespace kvbits
