// Mixtures of experts: rows grouped by the expert that they go to, one product a group.
#pragma once
#include <vector>

#include "../weights/linear.h"

namespace kvbits {

struct Expert {
  const Linear *gate, *up, *down;
};

// Where the rows go: for each row `count` experts, and the share of each in its sum. [rows, count]
struct Choice {
  int count;
  const int32_t* experts;
  const float* shares;
};

// The `count` experts with the largest logits, of equals the first, and their shares: a softmax over all of them or,
// `among_chosen`, over these.
void choose_experts(const float* logits, int experts, int count, bool among_chosen, int32_t* chosen, float* shares);

class Experts {
 public:
  // All of one shape.
  Experts(std::vector<Expert> experts, const Gate& gate);

  int count() const { return static_cast<int>(experts_.size()); }
  int hidden() const { return experts_[0].gate->in(); }
  bool grouped() const { return grouped_; }

  // A call's memory.
  struct Room {
    Input gathered, gated;
  };
  // Adds to sums[row], float [rows, hidden], what the row's experts make of x[row], bfloat16 [rows, hidden]: expert
  // after expert in their own order, so that a row's sum is the same bits whatever the rows beside it.
  void add(Workers& workers, const LinearKernels& kernels, const uint16_t* x, int rows, const Choice& choice,
           float* sums, Room& room) const;

 private:
  std::vector<Expert> experts_;
  Gate gate_;
  bool grouped_ = false;
};

}  // namespace kvbits
