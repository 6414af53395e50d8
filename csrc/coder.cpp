#include "coder.h"

#include <vector>

namespace kvbits {

namespace {
// A page of rows as seal kernels take it, see src/kvbits/codecs/raw.py: pairs of the reduced dimension.
void gather(const uint16_t* rows, int64_t row, int dim, bool key, uint16_t* page) {
  if (key) {
    for (int t = 0; t < kPage; ++t, rows += row) {
      for (int c = 0; c < dim; c += 2) {
        uint16_t* at = page + (static_cast<size_t>(c) * kPage) + 2 * t;
        at[0] = rows[c];
        at[1] = rows[c + 1];
      }
    }
    return;
  }
  for (int t = 0; t < kPage; t += 2, rows += 2 * row, page += 2 * dim) {
    for (int c = 0; c < dim; ++c) {
      page[2 * c] = rows[c];
      page[2 * c + 1] = rows[row + c];
    }
  }
}
}  // namespace

bool encode(const Kernels& kernels, const Coded& coded, const float* feedback, const int32_t* order,
            const float* clip) {
  const SealKernel seal = coded.key ? kernels.seal_key(coded.codec) : kernels.seal_value(coded.codec);
  if (seal == nullptr) return false;
  std::vector<uint16_t> page(static_cast<size_t>(kPage) * coded.dim);
  for (int p = 0; p < coded.pages; ++p) {
    for (int h = 0; h < coded.heads; ++h) {
      gather(coded.rows + p * kPage * coded.row + h * coded.head, coded.row, coded.dim, coded.key, page.data());
      const size_t channels = static_cast<size_t>(h) * coded.dim;
      const Rounding rounding{feedback == nullptr ? nullptr : feedback + channels * coded.dim,
                              order == nullptr ? nullptr : order + channels, clip == nullptr ? 1.0f : clip[h]};
      seal(reinterpret_cast<const uint8_t*>(page.data()), coded.dim, rounding,
           coded.sealed + p * coded.page_bytes + h * coded.head_bytes);
    }
  }
  return true;
}

bool decode(const Kernels& kernels, const Coded& coded) {
  const OpenKernel open = coded.key ? kernels.open_key(coded.codec) : kernels.open_value(coded.codec);
  if (open == nullptr) return false;
  for (int p = 0; p < coded.pages; ++p) {
    for (int h = 0; h < coded.heads; ++h) {
      open(coded.sealed + p * coded.page_bytes + h * coded.head_bytes, coded.dim,
           coded.rows + p * kPage * coded.row + h * coded.head, coded.row);
    }
  }
  return true;
}

}  // namespace kvbits
