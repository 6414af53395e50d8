// Which kernels this processor runs.
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
// What the kernels on tiles take of vectors.
bool has_avx512_beside_tiles() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}
// Linux lets a process use tiles only after it asked.
bool has_tiles() {
#if defined(__linux__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kAll = kBf16 | kTile | kInt8;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
  return false;
#endif
}
bool has_amx() {
  static const bool has = has_avx512_beside_tiles() && has_tiles();
  return has;
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
    {"amx", has_amx, amx_kernels, amx_rows, avx512_products},
    {"avx512", has_avx512, avx512_kernels, best_avx512_rows, avx512_products},
    {"avx2", has_avx2, avx2_kernels, avx2_rows, avx2_products},
#endif
    {"scalar", always, scalar_kernels, scalar_rows, scalar_products},
#if defined(KVBITS_EMULATED_TILES)
    {"amx_emulated", has_avx512_beside_tiles, amx_emulated_kernels, amx_emulated_rows, avx512_products},
#endif
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
