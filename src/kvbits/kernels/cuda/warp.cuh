// What a warp can do, in PTX (NVIDIA, PTX ISA): the only file that a host emulation of the kernels replaces.
// No header of CUDA is needed: half floats travel as their bits, two in a 32-bit word, the first in the low half.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;

#define INLINE __device__ __forceinline__
#define SHARED(name) extern __shared__ __align__(128) u8 name[]
#define KERNEL(warps, blocks) extern "C" __global__ void __launch_bounds__(32 * warps, blocks)
#define UNROLL _Pragma("unroll")
#define UNROLL_BY_4 _Pragma("unroll 4")
#define UNROLL_BY_8 _Pragma("unroll 8")

INLINE int thread_index() { return threadIdx.x; }
INLINE int block_x() { return blockIdx.x; }
INLINE int block_y() { return blockIdx.y; }

// d += a b: a 16 x 16 by rows, b 16 x 8 by columns, d 16 x 8 in float32
INLINE void mma_f16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
INLINE void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// an 8 x 8 matrix of 16-bit elements, two of a row in each lane, transposed
INLINE u32 transpose(u32 x) {
  u32 r;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(r) : "r"(x));
  return r;
}
INLINE float from_lane_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
INLINE u32 warp_max(u32 x) { return __reduce_max_sync(~0u, x); }
INLINE bool any_lane(bool x) { return __any_sync(~0u, x); }
INLINE void sync_warp() { __syncwarp(); }
INLINE void sync_block() { __syncthreads(); }

// global memory, read once
INLINE uint4 stream(const u8* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
INLINE void copy_async(u8* to, const u8* from) {
  asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"((u32)__cvta_generic_to_shared(to)), "l"(from));
}
INLINE void end_of_group() { asm volatile("cp.async.commit_group;"); }
template <int LEFT>
INLINE void wait_groups() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }
// Counts up and begins anew after `last`; what the block wrote before is seen by whoever counts later.
INLINE u32 count_arrival(u32* counter, u32 last) {
  u32 before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0,[%1],%2;" : "=r"(before) : "l"(counter), "r"(last) : "memory");
  return before;
}
INLINE float fresh(const float* p) { return __ldcg(p); }
INLINE uint4 fresh4(const float* p) {  // at a multiple of 16 bytes
  return __ldcg((const uint4*)p);
}

INLINE float exp2_(float x) { float r; asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(r) : "f"(x)); return r; }
INLINE float bits_float(u32 x) { return __uint_as_float(x); }
INLINE u32 float_bits(float x) { return __float_as_uint(x); }
// bytes of {a, b}, a's first, one for each nibble of `select`; a nibble's high bit asks for copies of the byte's sign
INLINE u32 permute(u32 a, u32 b, u32 select) {
  u32 r;
  asm("prmt.b32 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(select));
  return r;
}
// one instruction: the compiler's own choice is two, each with a constant of its own
INLINE u32 and_or(u32 x, u32 mask, u32 also) { u32 r; asm("lop3.b32 %0,%1,%2,%3,0xEA;" : "=r"(r) : "r"(x), "r"(mask), "r"(also)); return r; }
INLINE u32 pack_f16(float low, float high) { u32 r; asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low)); return r; }
INLINE u32 pack_bf16(float low, float high) { u32 r; asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(r) : "f"(high), "f"(low)); return r; }
INLINE float low_f16(u32 x) { float r; asm("{.reg .b16 l,h; mov.b32 {l,h},%1; cvt.f32.f16 %0,l;}" : "=f"(r) : "r"(x)); return r; }
INLINE float high_f16(u32 x) { float r; asm("{.reg .b16 l,h; mov.b32 {l,h},%1; cvt.f32.f16 %0,h;}" : "=f"(r) : "r"(x)); return r; }
INLINE u32 mul_f16(u32 a, u32 b) { u32 r; asm("mul.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
INLINE u32 add_f16(u32 a, u32 b) { u32 r; asm("add.rn.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
INLINE u32 fma_f16(u32 a, u32 b, u32 c) { u32 r; asm("fma.rn.f16x2 %0,%1,%2,%3;" : "=r"(r) : "r"(a), "r"(b), "r"(c)); return r; }
INLINE u32 max_f16(u32 a, u32 b) { u32 r; asm("max.f16x2 %0,%1,%2;" : "=r"(r) : "r"(a), "r"(b)); return r; }
