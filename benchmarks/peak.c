/* Yardsticks of the products: a plain read, and the fastest dot products of bytes that the processor has. */
#include <stddef.h>
#include <stdint.h>

/* Reads all of it; eight chains of 64 bytes. */
uint64_t plain_read(const uint64_t* words, size_t count) {
  uint64_t sums[64] = {0};
  for (size_t i = 0; i + 64 <= count; i += 64) {
    __builtin_prefetch(words + i + 512, 0, 2);
    __builtin_prefetch(words + i + 528, 0, 2);
    for (int j = 0; j < 64; ++j) sums[j] ^= words[i + j];
  }
  uint64_t all = 0;
  for (int j = 0; j < 64; ++j) all ^= sums[j];
  return all;
}

/* Multiplications that `rounds` rounds make, in registers only. */
uint64_t dot_bytes(uint64_t rounds) {
#if defined(__AVX512VNNI__)
#define STEP(n) "vpdpbusd %%zmm31, %%zmm30, %%zmm" #n "\n"
#define WIDTH 64
#elif defined(__AVX2__)
#define STEP(n) "vpmaddubsw %%ymm14, %%ymm15, %%ymm" #n "\n vpmaddwd %%ymm13, %%ymm" #n ", %%ymm" #n "\n"
#define WIDTH 32
#endif
#ifdef STEP
  for (uint64_t i = 0; i < rounds; ++i) {
    __asm__ volatile(STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)::
                         : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
                           "xmm11");
  }
  return rounds * 12 * WIDTH;
#else
  (void)rounds;
  return 0;
#endif
}
