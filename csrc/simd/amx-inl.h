// Tiles beside 512-bit vectors: AMX-TILE, AMX-INT8 and AMX-BF16. Included by isa/*amx.cpp, after avx512-inl.h and
// tile_config-inl.h. Assembly, because the compilers' intrinsics take a tile's number as a token and do not say that
// they touch memory.

inline void tile_configure(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory"); }
inline void tile_release() { __asm__ volatile("tilerelease" ::: "memory"); }
template <int T>
inline void tile_zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
// Rows `stride` bytes apart.
template <int T>
inline void tile_load(const void* from, ptrdiff_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T>
inline void tile_store(void* to, ptrdiff_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride) : "memory");
}

// Tile SUM += tile A times tile B, B's rows being quads (pairs) of A's columns.
struct SignedUnsigned {  // bytes of A and of B; int32 sums
  template <int SUM, int A, int B>
  static void add() {
    __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
  }
};
struct UnsignedSigned {
  template <int SUM, int A, int B>
  static void add() {
    __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
  }
};
struct Bfloat16 {  // float32 sums
  template <int SUM, int A, int B>
  static void add() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUM), "i"(A), "i"(B));
  }
};
