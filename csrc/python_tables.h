// What both Python faces hold: the arrays of a step.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include "kernels.h"

namespace kvbits {

using Table = nanobind::ndarray<const int32_t, nanobind::c_contig, nanobind::device::cpu>;

// Keeps the arrays that a Batch borrows.
struct BatchTables {
  Table starts, counts, rows, sealed, head, tail, sink;
  Batch batch;
};

}  // namespace kvbits
