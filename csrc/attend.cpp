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

// Rows of a block when `rows` of them meet a page: kBlockRows at most, or as even a share as there is for kernels of
// many.
inline int block_rows(int rows, bool many) {
  if (!many || rows <= kBlockRows) return rows < kBlockRows ? rows : kBlockRows;
  const int blocks = (rows + kManyRows - 1) / kManyRows;
  return (rows + blocks - 1) / blocks;
}

// The first token that a query at `position` sees.
inline int first_seen(const Layer& layer, int position) {
  if (layer.window < 0) return position - position % -layer.window;
  return layer.window > 0 && position >= layer.window ? position - layer.window + 1 : 0;
}

// The first page that it sees anything of.
inline int oldest_page(const Layer& layer, int position) { return first_seen(layer, position) / kPage; }

// The step cut into tasks.
struct Plan {
  Plan(const Layer& layer, const Batch& batch, int threads);

  std::vector<Item> items;
  std::vector<Group> groups;
  size_t partial_rows = 0;  // of all groups
  int item_rows;            // query rows of the largest item

 private:
  // visit(s, token, tokens, split, last_split) for every tile of a sequence's new tokens, all in one page.
  template <class Visit>
  void each_tile(const Layer& layer, const Batch& batch, int tile_tokens, const Visit& visit) const {
    for (int s = 0; s < batch.sequences; ++s) {
      const int start = batch.starts[s], end = start + batch.counts[s];
      for (int from = start; from < end;) {
        const int boundary = (from / tile_tokens + 1) * tile_tokens;
        const int to = boundary < end ? boundary : end;
        visit(s, from - start, to - from, oldest_page(layer, from) / kSplitPages, from / kPage / kSplitPages + 1);
        from = to;
      }
    }
  }
};

Plan::Plan(const Layer& layer, const Batch& batch, int threads) {
  const int group_size = layer.heads / layer.kv_heads;
  int tile_tokens = kPage;
  while (tile_tokens > 1 && tile_tokens * group_size > kTileRows) tile_tokens /= 2;

  // A page's heads lie side by side: a task that takes them all reads memory in order. With few tasks each takes one.
  int pieces = 0, most_new = 0;
  for (int s = 0; s < batch.sequences; ++s) most_new = batch.counts[s] > most_new ? batch.counts[s] : most_new;
  each_tile(layer, batch, tile_tokens, [&](int, int, int, int split, int last_split) { pieces += last_split - split; });
  const bool all_heads = most_new <= kSplitTokens && pieces >= 4 * threads;
  const int item_heads = all_heads ? layer.kv_heads : 1;
  item_rows = tile_tokens * group_size * item_heads;

  size_t count = 0;
  each_tile(layer, batch, tile_tokens, [&](int s, int, int, int, int) {
    count += batch.counts[s] <= kSplitTokens ? layer.kv_heads / item_heads : 0;
  });
  groups = std::vector<Group>(count);
  size_t next = 0;
  each_tile(layer, batch, tile_tokens, [&](int s, int token, int tokens, int split, int last_split) {
    for (int head = 0; head < layer.kv_heads; head += item_heads) {
      if (batch.counts[s] > kSplitTokens || last_split - split == 1) {
        items.push_back({s, head, item_heads, token, tokens, split, last_split, -1});
        continue;
      }
      Group& group = groups[next];
      group.first_split = split;
      group.splits = last_split - split;
      group.partial = partial_rows;
      group.missing.store(group.splits, std::memory_order_relaxed);
      partial_rows += static_cast<size_t>(group.splits) * tokens * group_size * item_heads;
      for (int i = split; i < last_split; ++i) {
        items.push_back({s, head, item_heads, token, tokens, i, i + 1, static_cast<int>(next)});
      }
      ++next;
    }
  });
}

// Row state carved from a thread's scratch memory.
class RowBlock {
 public:
  static size_t bytes(int rows, int key_dim, int value_dim) {
    return rows * (2 * sizeof(QueryRow) + stride(key_dim, value_dim)) + kCacheLine;
  }
  RowBlock(uint8_t* memory, int rows, int key_dim, int value_dim)
      : rows_(reinterpret_cast<QueryRow*>(memory)), totals_(rows_ + rows) {
    auto* floats = memory + round_up(static_cast<int>(2 * rows * sizeof(QueryRow)), kCacheLine);
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
    return 4 * (round_up(key_dim, 16) + 2 * round_up(value_dim, 16)) + round_up(2 * key_dim, kCacheLine);
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

// What all tasks of a step share, and the three parts of a task: its rows, its splits of pages, their union.
class Attention {
 public:
  Attention(const Kernels& kernels, const Layer& layer, const Batch& batch, const Rows& rows, const Pages& pages,
            std::vector<Group>& groups, float* partials)
      : kernels_(kernels),
        layer_(layer),
        batch_(batch),
        rows_(rows),
        pages_(pages),
        groups_(groups),
        partials_(partials),
        group_size_(layer.heads / layer.kv_heads),
        width_(rows.dtype == Float::kF32 ? 4 : 2),
        open_{kernels.key(layer.open.key_codec), kernels.value(layer.open.value_codec),
              layer.latent ? kernels.latent(layer.open.key_codec) : nullptr},
        sealed_(codecs(layer.sealed)),
        sink_(codecs(layer.sink)) {}

  // Of a thread's scratch memory, before its rows: what kernels keep, and a page of values that have to be decoded.
  static size_t head_bytes(const Kernels& kernels, const Layer& layer) {
    if (!layer.latent) return kernels.kept_bytes;
    return round_up(static_cast<int>(kernels.kept_bytes), kCacheLine) + sizeof(uint16_t) * kPage * layer.value_dim;
  }
  static size_t partial_stride(int value_dim) { return 2 * kLanes + round_up(value_dim, kLanes); }

  void run(const Item& item, uint8_t* scratch) const {
    if (kernels_.begin != nullptr) kernels_.begin(block_rows(head_rows(item), true));
    read_splits(item, scratch);
    if (kernels_.end != nullptr) kernels_.end();
  }

 private:
  // `scratch` begins with what kernels keep.
  void read_splits(const Item& item, uint8_t* scratch) const {
    const int count = item.tokens * group_size_ * item.heads;
    RowBlock block(scratch + head_bytes(kernels_, layer_), count, layer_.key_dim, layer_.value_dim);
    QueryRow *state = block.rows(), *totals = block.totals();
    for (int r = 0; r < count; ++r) {
      const int64_t at = token_row(item, r) * rows_.query_row + query_head(item, r) * rows_.query_head;
      const uint8_t* query = static_cast<const uint8_t*>(rows_.query) + at * width_;
      kernels_.load_query(query, rows_.dtype, layer_.scale, layer_.key_dim, state[r].query);
      state[r].source = rows_.dtype == Float::kBf16 ? reinterpret_cast<const uint16_t*>(query) : nullptr;
      state[r].scale = layer_.scale;
    }
    for (int split = item.split; split < item.last_split; ++split) {
      read_split(item, split, state, count, scratch);
      if (item.group >= 0) return reduce(item, state, totals, count);
      for (int r = 0; r < count; ++r) add(totals[r], state[r], split == item.split);
    }
    for (int r = 0; r < count; ++r) finish(item, totals[r], r);
  }

  struct Codecs {
    const KeyKernel* key;
    const ValueKernel* value;
    LatentKernel latent;  // null: pages have values
  };
  Codecs codecs(const Place& place) const {
    if (layer_.latent) return {kernels_.key(place.key_codec), open_.value, kernels_.latent(place.key_codec)};
    if (batch_.draft) return {kernels_.draft_key(place.key_codec), kernels_.draft_value(place.value_codec), nullptr};
    return {kernels_.key(place.key_codec), kernels_.value(place.value_codec), nullptr};
  }

  // Row r belongs to token r % head_rows / group_size and to this query head:
  int head_rows(const Item& item) const { return item.tokens * group_size_; }
  int query_head(const Item& item, int r) const {
    return (item.head + r / head_rows(item)) * group_size_ + r % group_size_;
  }
  int64_t token_row(const Item& item, int r) const {
    return batch_.rows[item.s] + item.token + r % head_rows(item) / group_size_;
  }
  int position(const Item& item) const { return batch_.starts[item.s] + item.token; }
  const uint8_t* keys_of(const Item& item, int page, int head) const {
    return page == position(item) / kPage ? pages_.open(item.s, page, head) : pages_.sealed(item.s, page, head);
  }

  // An accumulator may be kept in its codec's own basis until the codec changes.
  void unrotate(const ValueKernel* kernel, QueryRow* state, int count) const {
    if (kernel == nullptr || kernel->unrotate == nullptr) return;
    for (int r = 0; r < count; ++r) kernel->unrotate(state[r], layer_.value_dim);
  }

  void read_split(const Item& item, int split, QueryRow* state, int count, uint8_t* kept) const {
    const int own = position(item) / kPage, first_page = oldest_page(layer_, position(item));
    for (int r = 0; r < count; ++r) reset(state[r], layer_.value_dim);
    const int from = split * kSplitPages > first_page ? split * kSplitPages : first_page;
    const int to = (split + 1) * kSplitPages - 1 < own ? (split + 1) * kSplitPages - 1 : own;
    // A row holds the query in one codec's basis: the sink's while its page is read, then the others'.
    const bool begins_with_sink = from == 0 && layer_.has_sink;
    if (split == item.split || begins_with_sink) {
      const KeyKernel& first = *(begins_with_sink ? sink_ : sealed_).key;
      for (int r = 0; r < count; ++r) first.prepare(state[r], layer_.key_dim);
    }
    const ValueKernel* value_before = nullptr;
    for (int page = from; page <= to; ++page) {
      const Codecs& codecs = page == own ? open_ : pages_.is_sink(page) ? sink_ : sealed_;
      if (begins_with_sink && page == 1) {
        for (int r = 0; r < count; ++r) sealed_.key->prepare(state[r], layer_.key_dim);
      }
      if (value_before != codecs.value) {
        unrotate(value_before, state, count);
        unrotate(codecs.value, state, count);
        value_before = codecs.value;
      }
      read_page(item, page, page < to, codecs, state, kept);
    }
    unrotate(value_before, state, count);
  }

  void read_page(const Item& item, int page, bool one_follows, const Codecs& codecs, QueryRow* state,
                 uint8_t* kept) const {
    alignas(64) float scores[kManyRows * kPage];
    float rescale[kManyRows];
    const bool is_own = page == position(item) / kPage;
    const int rows = head_rows(item), last_head = item.head + item.heads - 1;
    const bool many = codecs.key->score_many && codecs.value->accumulate_many &&
                      layer_.key_dim >= codecs.key->many_from && layer_.value_dim >= codecs.value->many_from;
    const int step = block_rows(rows, many);
    const auto score = step > kBlockRows ? codecs.key->score_many : codecs.key->score;
    const auto accumulate = step > kBlockRows ? codecs.value->accumulate_many : codecs.value->accumulate;
    for (int head = item.head; head <= last_head; ++head, state += rows) {
      const uint8_t* keys = keys_of(item, page, head);
      const uint8_t* values = keys + (is_own ? layer_.open : pages_.sealed_place(page)).value_offset;
      if (codecs.latent != nullptr) {
        codecs.latent(keys, layer_.key_dim, layer_.value_dim, latent_values(kept));
        values = latent_values(kept);
      }
      // The bytes to come, asked for while these are read. An own page of another format has other offsets: it is small
      // and recent, and asked for piece by piece all the same.
      const uint8_t* next = keys;
      if (head < last_head) {
        next = keys_of(item, page, head + 1);
      } else if (one_follows) {
        next = keys_of(item, page + 1, item.head);
      }
      for (int r = 0; r < rows; r += step) {
        const int n = rows - r < step ? rows - r : step;
        Block block{keys, values, r == 0 ? next - keys : 0, state + r, n, scores, rescale, r == 0, kept};
        score(block, layer_.key_dim);
        for (int i = 0; i < n; i += kBlockRows) weigh(block, i, position(item), page * kPage, r, is_own);
        if (codecs.latent != nullptr) block.ahead = 0;  // nothing follows these values
        accumulate(block, layer_.value_dim);
      }
    }
  }

  // Where a page's values are decoded to, after what kernels keep.
  uint8_t* latent_values(uint8_t* kept) const {
    return kept + round_up(static_cast<int>(kernels_.kept_bytes), kCacheLine);
  }

  // The softmax of up to kBlockRows rows of a block, from row `begin` on. Row `first` of the head is the block's first;
  // the head's first row is that of the query at `position`, and the page begins with token `page_start`.
  void weigh(const Block& block, int begin, int position, int page_start, int first, bool is_own) const {
    const int rest = block.count - begin;
    Block part = block;
    part.count = rest < kBlockRows ? rest : kBlockRows;
    part.rows += begin;
    part.scores += begin * kPage;
    part.rescale += begin;
    if (begin > 0) part.ahead = 0;
    int oldest[kBlockRows], last[kBlockRows];
    for (int i = 0; i < part.count; ++i) {
      const int query = position + (first + begin + i) / group_size_, oldest_token = first_seen(layer_, query);
      last[i] = is_own ? query - page_start + 1 : kPage;
      oldest[i] = oldest_token > page_start ? oldest_token - page_start : 0;
    }
    kernels_.softmax(part, oldest, last, layer_.softcap);
  }

  // Keeps a split's partial result; whoever brings the last one merges them in order.
  void reduce(const Item& item, QueryRow* state, QueryRow* totals, int count) const {
    Group& group = groups_[item.group];
    const size_t stride = partial_stride(layer_.value_dim);
    const auto partial = [&](int split, int r) {
      return partials_ + (group.partial + static_cast<size_t>(split) * count + r) * stride;
    };
    for (int r = 0; r < count; ++r) {
      float* out = partial(item.split - group.first_split, r);
      out[0] = state[r].max;
      std::memcpy(out + kLanes, state[r].total, sizeof(state[r].total));
      std::memcpy(out + 2 * kLanes, state[r].accumulator, layer_.value_dim * sizeof(float));
    }
    if (group.missing.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    for (int r = 0; r < count; ++r) {
      for (int split = 0; split < group.splits; ++split) {
        float* in = partial(split, r);
        QueryRow part = state[r];
        part.max = in[0];
        std::memcpy(part.total, in + kLanes, sizeof(part.total));
        part.accumulator = in + 2 * kLanes;
        add(totals[r], part, split == 0);
      }
      finish(item, totals[r], r);
    }
  }

  void add(QueryRow& total, const QueryRow& part, bool first) const {
    if (first) {
      take(total, part, layer_.value_dim);
    } else {
      kernels_.merge(total, part, layer_.value_dim);
    }
  }

  void finish(const Item& item, const QueryRow& row, int r) const {
    const int64_t at = (token_row(item, r) * layer_.heads + query_head(item, r)) * layer_.value_dim;
    kernels_.store_output(row, rows_.sinks ? rows_.sinks + query_head(item, r) : nullptr, layer_.value_dim, rows_.dtype,
                          static_cast<uint8_t*>(rows_.out) + at * width_);
  }

  const Kernels& kernels_;
  const Layer& layer_;
  const Batch& batch_;
  const Rows& rows_;
  const Pages& pages_;
  std::vector<Group>& groups_;
  float* partials_;
  const int group_size_;
  const size_t width_;
  const Codecs open_, sealed_, sink_;
};

}  // namespace

void Cpu::attend(const Layer& layer, const Batch& batch, const Rows& rows, const Pages& pages) {
  Plan plan(layer, batch, workers_.threads());
  const size_t partial = Attention::partial_stride(layer.value_dim) * sizeof(float);
  auto* partials = reinterpret_cast<float*>(partials_.get(plan.partial_rows * partial + kCacheLine));
  const size_t bytes =
      Attention::head_bytes(kernels_, layer) + RowBlock::bytes(plan.item_rows, layer.key_dim, layer.value_dim);
  const size_t per_thread = round_up(static_cast<int>(bytes), 4096);
  uint8_t* scratch = thread_scratch_.get(per_thread * workers_.threads());
  const Attention attention(kernels_, layer, batch, rows, pages, plan.groups, partials);
  workers_.run(static_cast<int>(plan.items.size()),
               [&](int index, int thread) { attention.run(plan.items[index], scratch + thread * per_thread); });
}

}  // namespace kvbits
