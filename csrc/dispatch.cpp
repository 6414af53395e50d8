// Which kernels this processor runs.
#include <cstring>

#include "decoder/rows.h"
#include "kernels.h"

namespace kvbits {
namespace {
bool always() { return true; }
#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
const RowKernels& best_avx512_rows() {
  return __builtin_cpu_supports("avx512bf16") ? avx512bf16_rows() : avx512_rows();
}
#endif

// Every instruction set, the best first: the one line that a new one adds here.
const struct {
  const char* name;
  bool (*runs)();
  const Kernels& (*kernels)();
  const RowKernels& (*rows)();
  const ProductKernels& (*products)();
} kIsas[] = {
#if defined(__x86_64__)
    {"avx512", has_avx512, avx512_kernels, best_avx512_rows, avx512_products},
    {"avx2", has_avx2, avx2_kernels, avx2_rows, avx2_products},
#endif
    {"scalar", always, scalar_kernels, scalar_rows, scalar_products},
};
}  // namespace

const Kernels* kernels_for(const char* isa) {
  for (const auto& known : kIsas) {
    const bool meant = std::strcmp(isa, "auto") == 0 || std::strcmp(isa, known.name) == 0;
    if (meant && known.runs()) return &known.kernels();
  }
  return nullptr;
}

const RowKernels& rows_for(const char* isa) {
  for (const auto& known : kIsas) {
    if (std::strcmp(isa, known.name) == 0 && known.runs()) return known.rows();
  }
  return scalar_rows();
}

const ProductKernels& products_for(const char* isa) {
  for (const auto& known : kIsas) {
    if (std::strcmp(isa, known.name) == 0 && known.runs()) return known.products();
  }
  return scalar_products();
}

std::vector<const char*> available_isas() {
  std::vector<const char*> names;
  for (const auto& known : kIsas) {
    if (known.runs()) names.push_back(known.name);
  }
  return names;
}

}  // namespace kvbits
