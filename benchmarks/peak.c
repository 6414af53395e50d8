/* Yardsticks of the products: a plain read, and the fastest products that the processor has: dot products of bytes or,
   with tiles, products of tiles of bfloat16. */
#include <stddef.h>
#include <stdint.h>
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

/* Multiplications that `rounds` rounds make, in registers only; 0 where there is no such instruction. */
#if defined(__AMX_BF16__)
#define TILES(n) "tdpbf16ps %%tmm7, %%tmm6, %%tmm" #n "\n"
uint64_t multiply(uint64_t rounds) {
  struct {
    uint8_t palette, start, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  } config = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
  if (syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 0; /* ARCH_REQ_XCOMP_PERM: tiles' data */
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
  __asm__ volatile(
      "tilezero %tmm0\n tilezero %tmm1\n tilezero %tmm2\n tilezero %tmm3\n tilezero %tmm4\n tilezero %tmm5\n"
      "tilezero %tmm6\n tilezero %tmm7\n");
  rounds /= 32; /* a product of tiles takes that much longer */
  for (uint64_t i = 0; i < rounds; ++i) {
    __asm__ volatile(TILES(0) TILES(1) TILES(2) TILES(3) TILES(4) TILES(5)::);
  }
  __asm__ volatile("tilerelease");
  return rounds * 6 * 16 * 16 * 32;
}
#elif defined(__AVX2__)
#if defined(__AVX512VNNI__)
#define STEP(n) "vpdpbusd %%zmm31, %%zmm30, %%zmm" #n "\n"
#define WIDTH 64
#else
#define STEP(n) "vpmaddubsw %%ymm14, %%ymm15, %%ymm" #n "\n vpmaddwd %%ymm13, %%ymm" #n ", %%ymm" #n "\n"
#define WIDTH 32
#endif
uint64_t multiply(uint64_t rounds) {
  for (uint64_t i = 0; i < rounds; ++i) {
    __asm__ volatile(STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)::
                         : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10",
                           "xmm11");
  }
  return rounds * 12 * WIDTH;
}
#else
uint64_t multiply(uint64_t rounds) {
  (void)rounds;
  return 0;
}
#endif
