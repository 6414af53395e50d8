#include "experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace kvbits {
namespace {
constexpr int kDownTasks = 4, kDownStrips = 8;  // tasks for each thread, at least, and strips of a task, at most

// The rows of one expert.
struct Group {
  const Expert* expert;
  int first;  // of its rows in the order of experts
  Input x, gated;
};

// Every pair of a row and an expert, in the order of experts: `pairs` are indices into the choice.
struct Order {
  Order(const Choice& choice, int rows, int experts) : first(experts + 1), pairs(rows * choice.count) {
    for (size_t i = 0; i < pairs.size(); ++i) ++first[choice.experts[i] + 1];
    for (int e = 0; e < experts; ++e) first[e + 1] += first[e];
    std::vector<int> next(first.begin(), first.end() - 1);
    for (size_t i = 0; i < pairs.size(); ++i) pairs[next[choice.experts[i]]++] = static_cast<int>(i);
  }
  std::vector<int> first, pairs;
};
}  // namespace

void choose_experts(const float* logits, int experts, int count, bool among_chosen, int32_t* chosen, float* shares) {
  std::vector<bool> taken(experts);
  for (int i = 0; i < count; ++i) {
    int best = -1;
    for (int e = 0; e < experts; ++e) {
      if (!taken[e] && (best < 0 || logits[e] > logits[best])) best = e;
    }
    taken[best] = true;
    chosen[i] = best;
  }
  const float largest = logits[chosen[0]];
  float sum = 0;
  for (int i = 0; i < count; ++i) sum += shares[i] = std::exp(logits[chosen[i]] - largest);
  if (!among_chosen) {
    sum = 0;
    for (int e = 0; e < experts; ++e) sum += std::exp(logits[e] - largest);
  }
  for (int i = 0; i < count; ++i) shares[i] /= sum;
}

Experts::Experts(std::vector<Expert> experts, const Gate& gate) : experts_(std::move(experts)), gate_(gate) {
  for (const Expert& expert : experts_) {
    grouped_ = grouped_ || expert.gate->grouped() || expert.up->grouped() || expert.down->grouped();
  }
}

void Experts::add(Workers& workers, const LinearKernels& kernels, const uint16_t* x, int rows, const Choice& choice,
                  float* sums, Room& room) const {
  const Linear &gate = *experts_[0].gate, &down = *experts_[0].down;
  const int hidden = gate.in(), inner = gate.out();
  const Order order(choice, rows, count());
  const int pairs = static_cast<int>(order.pairs.size());
  uint16_t *gathered = room.gathered.get(pairs, hidden), *gated = room.gated.get(pairs, inner);
  if (grouped_) {
    room.gathered.reserve(kernels.coded);
    room.gated.reserve(kernels.coded);
  }
  std::vector<Group> groups;
  std::vector<int> group_of(pairs);
  for (int e = 0; e < count(); ++e) {
    const int first = order.first[e], members = order.first[e + 1] - first;
    if (members == 0) continue;
    std::fill_n(group_of.begin() + first, members, static_cast<int>(groups.size()));
    groups.push_back({&experts_[e], first, room.gathered.part(first, members), room.gated.part(first, members)});
  }

  each_row(workers, pairs, [&](int p) {
    const uint16_t* from = x + static_cast<size_t>(order.pairs[p] / choice.count) * hidden;
    std::memcpy(gathered + static_cast<size_t>(p) * hidden, from, hidden * sizeof(uint16_t));
    Group& group = groups[group_of[p]];
    if (grouped_) group.x.prepare(kernels.coded, p - group.first);
  });
  each_strip(workers, static_cast<int>(groups.size()) * gate.strips(), gate.strip_bytes(), [&](int task) {
    const Group& group = groups[task / gate.strips()];
    const int strip = task % gate.strips(), column = strip * kStrip;
    multiply_pair(kernels, *group.expert->gate, *group.expert->up, strip, group.x,
                  [&](int row, const float* left, const float* right) {
                    kernels.rows.gate(left, right, gate.columns(strip), gate_,
                                      gated + static_cast<size_t>(group.first + row) * inner + column);
                  });
  });
  if (grouped_) {
    each_row(workers, pairs, [&](int p) {
      Group& group = groups[group_of[p]];
      group.gated.prepare(kernels.coded, p - group.first);
    });
  }
  const int most = std::min(kDownStrips, down.strips() / (workers.threads() * kDownTasks)), block = std::max(1, most);
  workers.run((down.strips() + block - 1) / block, [&](int index, int) {
    const int begin = index * block, end = std::min(begin + block, down.strips());
    for (const Group& group : groups) {
      for (int strip = begin; strip < end; ++strip) {
        multiply_strip(kernels, *group.expert->down, strip, group.gated, [&](int row, const float* products) {
          const int pair = order.pairs[group.first + row];
          float* to = sums + static_cast<size_t>(pair / choice.count) * hidden + strip * kStrip;
          for (int c = 0; c < down.columns(strip); ++c) to[c] += choice.shares[pair] * products[c];
        });
      }
    }
  });
}

}  // namespace kvbits
