// Attention over pages: which rows meet which pages, in which order.
//
// A query row's result is the same sequence of operations whatever else the step holds: pages in order, in splits of
// kSplitPages whose partial results are merged in order. So decode and prefill, any batch and any number of threads
// give the same bits.
#include <atomic>
#include <cstring>
#include <vector>

#include "step.h"

namespace kvbits {
namespace {

constexpr float kNoMax = -3.40282347e38f;  // no score is less
constexpr int kTileRows = 64;              // query rows of a prefill tile: their state stays in the L2 cache
constexpr int kSplitTokens = 8;            // up to so many new tokens, a sequence's splits are separate tasks
constexpr size_t kLine = 64;

struct Item {
  int s, head, heads;     // sequence, first KV head and how many
  int token, tokens;      // first new token and how many, all in one page
  int split, last_split;  // [split, last_split)
  int group;              // index of the shared result when splits are separate tasks, else -1
};

struct Group {
  int first_split, splits;
  size_t partial;  // index of its first partial row
  std::atomic<int> missing;
};

inline int round_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

// Row state carved from a thread's scratch memory.
class RowBlock {
 public:
  static size_t bytes(int rows, int key_dim, int value_dim) {
    return rows * (2 * sizeof(QueryRow) + stride(key_dim, value_dim)) + kLine;
  }
  RowBlock(uint8_t* memory, int rows, int key_dim, int value_dim)
      : rows_(reinterpret_cast<QueryRow*>(memory)), totals_(rows_ + rows) {
    auto* floats = memory + round_up(static_cast<int>(2 * rows * sizeof(QueryRow)), kLine);
    for (int r = 0; r < rows; ++r, floats += stride(key_dim, value_dim)) {
      rows_[r].query = reinterpret_cast<float*>(floats);
      rows_[r].accumulator = rows_[r].query + round_up(key_dim, 16);
      totals_[r].accumulator = rows_[r].accumulator + round_up(value_dim, 16);
      rows_[r].codes = reinterpret_cast<uint8_t*>(totals_[r].accumulator + round_up(value_dim, 16));
    }
  }
  QueryRow* rows() { return rows_; }
  QueryRow* totals() { return totals_; }

 private:
  static size_t stride(int key_dim, int value_dim) {
    return 4 * (round_up(key_dim, 16) + 2 * round_up(value_dim, 16)) + round_up(2 * key_dim, kLine);
  }
  QueryRow *rows_, *totals_;
};

inline void reset(QueryRow& row, int dim) {
  row.max = kNoMax;
  std::memset(row.total, 0, sizeof(row.total));
  std::memset(row.accumulator, 0, dim * sizeof(float));
}

inline void take(QueryRow& to, const QueryRow& from, int dim) {
  to.max = from.max;
  std::memcpy(to.total, from.total, sizeof(to.total));
  std::memcpy(to.accumulator, from.accumulator, dim * sizeof(float));
}

}  // namespace

void Cpu::attend(const Layer& layer, const Batch& batch, const Rows& rows, const Pages& pages) {
  const int group_size = layer.heads / layer.kv_heads;
  const int key_dim = layer.key_dim, value_dim = layer.value_dim;
  const auto key_of = batch.draft ? kernels_.draft_key : kernels_.key;
  const auto value_of = batch.draft ? kernels_.draft_value : kernels_.value;
  const KeyKernel& sealed_key = *key_of(layer.sealed.key_codec);
  const ValueKernel& sealed_value = *value_of(layer.sealed.value_codec);
  const KeyKernel& sink_key = *key_of(layer.sink.key_codec);
  const ValueKernel& sink_value = *value_of(layer.sink.value_codec);
  const KeyKernel& open_key = *kernels_.key(layer.open.key_codec);
  const ValueKernel& open_value = *kernels_.value(layer.open.value_codec);
  const size_t width = rows.dtype == Float::kF32 ? 4 : 2;

  int tile_tokens = kPage;
  while (tile_tokens > 1 && tile_tokens * group_size > kTileRows) tile_tokens /= 2;

  std::vector<Item> items;
  size_t groups = 0, partial_rows = 0;
  const auto for_tiles = [&](auto&& visit) {
    for (int s = 0; s < batch.sequences; ++s) {
      const int start = batch.starts[s], end = start + batch.counts[s];
      for (int from = start; from < end;) {
        const int boundary = (from / tile_tokens + 1) * tile_tokens;
        const int to = boundary < end ? boundary : end;
        const int first_page = layer.window > 0 && from >= layer.window ? (from - layer.window + 1) / kPage : 0;
        visit(s, from - start, to - from, first_page / kSplitPages, from / kPage / kSplitPages + 1);
        from = to;
      }
    }
  };
  // A page's heads lie side by side: a task that takes them all reads memory in order. With few tasks each takes one.
  int pieces = 0, most_new = 0;
  for (int s = 0; s < batch.sequences; ++s) most_new = batch.counts[s] > most_new ? batch.counts[s] : most_new;
  for_tiles([&](int, int, int, int split, int last_split) { pieces += last_split - split; });
  const bool all_heads = most_new <= kSplitTokens && pieces >= 4 * workers_.threads();
  const int item_heads = all_heads ? layer.kv_heads : 1;

  for_tiles(
      [&](int s, int, int, int, int) { groups += batch.counts[s] <= kSplitTokens ? layer.kv_heads / item_heads : 0; });
  std::vector<Group> shared(groups);
  size_t next_group = 0;
  for_tiles([&](int s, int token, int tokens, int split, int last_split) {
    for (int head = 0; head < layer.kv_heads; head += item_heads) {
      if (batch.counts[s] > kSplitTokens || last_split - split == 1) {
        items.push_back({s, head, item_heads, token, tokens, split, last_split, -1});
        continue;
      }
      Group& group = shared[next_group];
      group.first_split = split;
      group.splits = last_split - split;
      group.partial = partial_rows;
      group.missing.store(group.splits, std::memory_order_relaxed);
      partial_rows += static_cast<size_t>(group.splits) * tokens * group_size * item_heads;
      for (int i = split; i < last_split; ++i) {
        items.push_back({s, head, item_heads, token, tokens, i, i + 1, static_cast<int>(next_group)});
      }
      ++next_group;
    }
  });

  const size_t partial_stride = 2 * kLanes + round_up(value_dim, kLanes);
  auto* partials = reinterpret_cast<float*>(partials_.get(partial_rows * partial_stride * sizeof(float) + kLine));
  const int most_rows = tile_tokens * group_size * item_heads;
  const size_t per_thread = round_up(static_cast<int>(RowBlock::bytes(most_rows, key_dim, value_dim)), 4096);
  uint8_t* scratch = thread_scratch_.get(per_thread * workers_.threads());

  workers_.run(static_cast<int>(items.size()), [&](int index, int thread) {
    const Item item = items[index];
    const int head_rows = item.tokens * group_size;  // rows of one KV head
    const int count = head_rows * item.heads;
    RowBlock block(scratch + thread * per_thread, count, key_dim, value_dim);
    QueryRow* state = block.rows();
    QueryRow* totals = block.totals();
    const int64_t first_row = batch.rows[item.s] + item.token;
    const int position = batch.starts[item.s] + item.token;
    const int own = position / kPage;
    // Row r belongs to token r % head_rows / group_size and to this query head:
    const auto query_head = [&](int r) { return (item.head + r / head_rows) * group_size + r % group_size; };
    const auto token_row = [&](int r) { return first_row + r % head_rows / group_size; };
    for (int r = 0; r < count; ++r) {
      const int64_t at = token_row(r) * rows.query_row + query_head(r) * rows.query_head;
      kernels_.load_query(static_cast<const uint8_t*>(rows.query) + at * width, rows.dtype, layer.scale, key_dim,
                          state[r].query);
    }
    const auto finish = [&](const QueryRow& row, int r) {
      const int64_t at = (token_row(r) * layer.heads + query_head(r)) * value_dim;
      kernels_.store_output(row, rows.sinks ? rows.sinks + query_head(r) : nullptr, value_dim, rows.dtype,
                            static_cast<uint8_t*>(rows.out) + at * width);
    };
    const auto page_block = [&](int page, int head) {
      return page == own ? pages.open(item.s, page, head) : pages.sealed(item.s, page, head);
    };

    const int first_page = layer.window > 0 && position >= layer.window ? (position - layer.window + 1) / kPage : 0;
    const int last_head = item.head + item.heads - 1;
    alignas(64) float scores[kBlockRows * kPage];
    float keep[kBlockRows];
    for (int split = item.split; split < item.last_split; ++split) {
      for (int r = 0; r < count; ++r) reset(state[r], value_dim);
      const int from = split * kSplitPages > first_page ? split * kSplitPages : first_page;
      const int to = (split + 1) * kSplitPages - 1 < own ? (split + 1) * kSplitPages - 1 : own;
      // A row holds the query in one codec's form: the sink's while its page is read, then the others'.
      const bool begins_with_sink = from == 0 && layer.has_sink;
      if (split == item.split || begins_with_sink) {
        const KeyKernel& first = begins_with_sink ? sink_key : sealed_key;
        for (int r = 0; r < count; ++r) first.prepare(state[r], key_dim);
      }
      // An accumulator may be kept in its codec's own form until the codec changes.
      const ValueKernel* value_before = nullptr;
      const auto turn_accumulators = [&](const ValueKernel* kernel) {
        if (kernel == nullptr || kernel->turn == nullptr) return;
        for (int r = 0; r < count; ++r) kernel->turn(state[r], value_dim);
      };
      for (int page = from; page <= to; ++page) {
        const bool is_own = page == own;
        const bool is_sink = pages.is_sink(page);
        const KeyKernel& key = is_own ? open_key : is_sink ? sink_key : sealed_key;
        const ValueKernel& value = is_own ? open_value : is_sink ? sink_value : sealed_value;
        if (begins_with_sink && page == 1) {
          for (int r = 0; r < count; ++r) sealed_key.prepare(state[r], key_dim);
        }
        if (value_before != &value) {
          turn_accumulators(value_before);
          turn_accumulators(&value);
          value_before = &value;
        }
        for (int head = item.head; head <= last_head; ++head) {
          const uint8_t* keys = page_block(page, head);
          const uint8_t* values = keys + (is_own ? layer.open : pages.sealed_place(page)).value_offset;
          // The bytes to come, asked for while these are read. An own page of another form has other offsets: it is
          // small and recent, and asked for piece by piece all the same.
          const uint8_t* next = keys;
          if (head < last_head) {
            next = page_block(page, head + 1);
          } else if (page < to) {
            next = page_block(page + 1, item.head);
          }
          QueryRow* head_state = state + (head - item.head) * head_rows;
          for (int r = 0; r < head_rows; r += kBlockRows) {
            const int n = head_rows - r < kBlockRows ? head_rows - r : kBlockRows;
            const Block block{keys, values, r == 0 ? next - keys : 0, head_state + r, n, scores, keep};
            key.score(block, key_dim);
            int oldest[kBlockRows], last[kBlockRows];
            for (int i = 0; i < n; ++i) {
              const int offset = position + (r + i) / group_size - page * kPage;  // of the query from the page's start
              last[i] = is_own ? offset + 1 : kPage;
              oldest[i] = layer.window > 0 && offset >= layer.window ? offset - layer.window + 1 : 0;
            }
            kernels_.softmax(block, oldest, last, layer.softcap);
            value.accumulate(block, value_dim);
          }
        }
      }
      turn_accumulators(value_before);
      if (item.group >= 0) continue;
      for (int r = 0; r < count; ++r) {
        if (split == item.split) {
          take(totals[r], state[r], value_dim);
        } else {
          kernels_.merge(totals[r], state[r], value_dim);
        }
      }
    }
    if (item.group < 0) {
      for (int r = 0; r < count; ++r) finish(totals[r], r);
      return;
    }

    Group& group = shared[item.group];
    const auto partial = [&](int split, int r) {
      return partials + (group.partial + static_cast<size_t>(split) * count + r) * partial_stride;
    };
    for (int r = 0; r < count; ++r) {
      float* out = partial(item.split - group.first_split, r);
      out[0] = state[r].max;
      std::memcpy(out + kLanes, state[r].total, sizeof(state[r].total));
      std::memcpy(out + 2 * kLanes, state[r].accumulator, value_dim * sizeof(float));
    }
    if (group.missing.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    for (int r = 0; r < count; ++r) {
      for (int split = 0; split < group.splits; ++split) {
        float* in = partial(split, r);
        QueryRow part = state[r];
        part.max = in[0];
        std::memcpy(part.total, in + kLanes, sizeof(part.total));
        part.accumulator = in + 2 * kLanes;
        if (split == 0) {
          take(totals[r], part, value_dim);
        } else {
          kernels_.merge(totals[r], part, value_dim);
        }
      }
      finish(totals[r], r);
    }
  });
}

const char* Cpu::supports(const Layer& layer) const {
  if (!kernels_.key(layer.sealed.key_codec)) return "no kernel for the key codec";
  if (!kernels_.value(layer.sealed.value_codec)) return "no kernel for the value codec";
  return nullptr;
}

void Cpu::forward(const Layer& layer, const Batch& batch, const Rows& rows) {
  std::vector<int32_t> staging_first(batch.sequences);
  const Pages unstaged(layer, batch, nullptr, staging_first.data());
  size_t staged = 0;
  for (int s = 0; s < batch.sequences; ++s) {
    staging_first[s] = static_cast<int32_t>(staged);
    staged += unstaged.staged(s);
  }
  uint8_t* staging = staging_.get(staged * layer.kv_heads * layer.open.head_bytes + kLine);
  const Pages pages(layer, batch, staging, staging_first.data());
  append(layer, batch, rows, pages);
  attend(layer, batch, rows, pages);
  settle(layer, batch, pages);
}

}  // namespace kvbits
