// Which kernels this processor runs.
#include <cstring>

#include "decoder/rows.h"
#include "kernels.h"

namespace kvbits {
namespace {
#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}
#endif

struct Runnable {
  const Kernels* tables[4] = {};
  const char* names[4] = {};
  Runnable() {
    int n = 0;
#if defined(__x86_64__)
    if (has_avx512()) tables[n++] = &avx512_kernels();
    if (has_avx2()) tables[n++] = &avx2_kernels();
#endif
    tables[n++] = &scalar_kernels();
    for (int i = 0; i < n; ++i) names[i] = tables[i]->isa;
  }
};

const Runnable& runnable() {
  static const Runnable found;
  return found;
}
}  // namespace

const Kernels* kernels_for(const char* isa) {
  for (const Kernels* table : runnable().tables) {
    if (table != nullptr && (std::strcmp(isa, "auto") == 0 || std::strcmp(isa, table->isa) == 0)) return table;
  }
  return nullptr;
}

const RowKernels& rows_for(const char* isa) {
#if defined(__x86_64__)
  if (std::strcmp(isa, "avx512") == 0) {
    return __builtin_cpu_supports("avx512bf16") ? avx512bf16_rows() : avx512_rows();
  }
  if (std::strcmp(isa, "avx2") == 0) return avx2_rows();
#endif
  (void)isa;
  return scalar_rows();
}

const char* const* available_isas() { return runnable().names; }

}  // namespace kvbits
