// The kernels' warp.cuh on a CPU: each thread of a block is a coroutine, and whatever a warp does together is worked out
// here from what its 32 lanes hold, by the fragment layouts of NVIDIA's PTX ISA (9.7.14.5.8, mma.m16n8k16, figures for
// .f16/.bf16 and .f32; 9.7.14.5.16, movmatrix; 9.7.9.7, prmt). Written from that text, not from the kernels.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
struct uint2 { u32 x, y; };
struct uint4 { u32 x, y, z, w; };

#define INLINE inline
#define SHARED(name) u8* name = emulation::block->shared
#define KERNEL(warps, blocks) constexpr int emulated_threads = 32 * warps; void
#define UNROLL
#define UNROLL_BY_4
#define UNROLL_BY_8

namespace emulation {

struct Copy { u8* to; const u8* from; };

struct Lane {
  ucontext_t context;
  std::vector<u8> stack;
  bool done = false;
  u32 shown[6];  // operands that other lanes see
  std::vector<std::vector<Copy>> groups{1};
};

struct Gate { int arrived = 0, generation = 0; };

struct Block {
  ucontext_t scheduler;
  std::vector<Lane> lanes;
  std::vector<Gate> warps;
  Gate all;
  u8* shared;
  int x, y, current;
};

inline thread_local Block* block = nullptr;
inline thread_local const u8 *readable_from = nullptr, *readable_to = nullptr;
inline thread_local int faults = 0;  // accesses outside the pool or unaligned

inline Lane& self() { return block->lanes[block->current]; }
inline Lane* warp() { return &block->lanes[block->current / 32 * 32]; }

inline void wait_at(Gate& gate, int many) {
  int generation = gate.generation;
  if (++gate.arrived == many) {
    gate.arrived = 0, gate.generation++;
    return;
  }
  while (gate.generation == generation) swapcontext(&self().context, &block->scheduler);
}
inline void meet() { wait_at(block->warps[block->current / 32], 32); }

// Shows `words` to the warp, works out `result` from what all show, and lets nobody go on before all have.
template <class F>
inline auto together(const u32* words, int count, F result) {
  memcpy(self().shown, words, 4 * count);
  meet();
  auto r = result(warp(), block->current % 32);
  meet();
  return r;
}

inline float half_value(u32 x) { _Float16 h; u16 b = (u16)x; memcpy(&h, &b, 2); return (float)h; }
inline u32 half_bits(double x) { _Float16 h = (_Float16)x; u16 b; memcpy(&b, &h, 2); return b; }
inline float bf16_value(u32 x) { u32 b = (x & 0xffff) << 16; float f; memcpy(&f, &b, 4); return f; }
inline u32 bf16_bits(float x) {
  u32 b;
  memcpy(&b, &x, 4);
  if (std::isnan(x)) return 0x7fff;
  return (b + 0x7fff + (b >> 16 & 1)) >> 16;
}

struct Four { float d[4]; };

template <class Value>
Four mma(const float (&d)[4], const u32 (&ab)[6], Value value) {
  return together(ab, 6, [&](Lane* lanes, int lane) {
    // element (row, k) of a: lane 4 (row % 8) + (k % 8) / 2, register (row / 8) + 2 (k / 8), half k % 2
    auto a = [&](int row, int k) {
      return value(lanes[4 * (row % 8) + k % 8 / 2].shown[row / 8 + 2 * (k / 8)] >> 16 * (k % 2));
    };
    // element (k, column) of b: lane 4 column + (k % 8) / 2, register k / 8, half k % 2
    auto b = [&](int k, int column) { return value(lanes[4 * column + k % 8 / 2].shown[4 + k / 8] >> 16 * (k % 2)); };
    Four r;
    for (int i = 0; i < 4; i++) {  // d[i]: row lane / 4 + 8 (i / 2), column 2 (lane % 4) + i % 2
      double sum = 0;
      for (int k = 0; k < 16; k++) sum += (double)a(lane / 4 + 8 * (i / 2), k) * b(k, 2 * (lane % 4) + i % 2);
      r.d[i] = (float)(d[i] + sum);
    }
    return r;
  });
}

template <class F>
u32 halves(u32 a, u32 b, F f) {
  return half_bits(f(half_value(a), half_value(b))) | half_bits(f(half_value(a >> 16), half_value(b >> 16))) << 16;
}

}  // namespace emulation

inline int thread_index() { return emulation::block->current; }
inline int block_x() { return emulation::block->x; }
inline int block_y() { return emulation::block->y; }

inline void mma_f16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  auto r = emulation::mma(d, {a0, a1, a2, a3, b0, b1}, emulation::half_value);
  memcpy(d, r.d, 16);
}
inline void mma_bf16(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  auto r = emulation::mma(d, {a0, a1, a2, a3, b0, b1}, emulation::bf16_value);
  memcpy(d, r.d, 16);
}
inline u32 transpose(u32 x) {
  return emulation::together(&x, 1, [](emulation::Lane* lanes, int lane) {
    // row lane / 4 of the result is that column of the operand
    auto at = [&](int row, int column) { return lanes[4 * row + column / 2].shown[0] >> 16 * (column % 2) & 0xffff; };
    return at(2 * (lane % 4), lane / 4) | at(2 * (lane % 4) + 1, lane / 4) << 16;
  });
}
inline u32 float_bits(float x) { u32 b; memcpy(&b, &x, 4); return b; }
inline float bits_float(u32 x) { float f; memcpy(&f, &x, 4); return f; }
inline float from_lane_xor(float x, int mask) {
  u32 bits = float_bits(x);
  return bits_float(emulation::together(&bits, 1, [&](emulation::Lane* lanes, int lane) { return lanes[lane ^ mask].shown[0]; }));
}
inline u32 warp_max(u32 x) {
  return emulation::together(&x, 1, [](emulation::Lane* lanes, int) {
    u32 most = 0;
    for (int i = 0; i < 32; i++) most = lanes[i].shown[0] > most ? lanes[i].shown[0] : most;
    return most;
  });
}
inline void sync_warp() { emulation::meet(); }
inline void sync_block() { emulation::wait_at(emulation::block->all, (int)emulation::block->lanes.size()); }

inline bool readable(const u8* p) {
  bool fine = (uintptr_t)p % 16 == 0 && p >= emulation::readable_from && p + 16 <= emulation::readable_to;
  emulation::faults += !fine;
  return fine;
}
inline uint4 stream(const u8* p) {
  uint4 v = {};
  if (readable(p)) memcpy(&v, p, 16);
  return v;
}
inline void copy_async(u8* to, const u8* from) {
  emulation::faults += (uintptr_t)to % 16 != 0;
  if (readable(from)) emulation::self().groups.back().push_back({to, from});
}
inline void end_of_group() { emulation::self().groups.emplace_back(); }
template <int LEFT>
inline void wait_groups() {
  auto& groups = emulation::self().groups;  // the last is not ended; nothing is there before it is waited for
  while ((int)groups.size() > LEFT + 1) {
    for (auto& copy : groups.front()) memcpy(copy.to, copy.from, 16);
    groups.erase(groups.begin());
  }
}
inline u32 count_arrival(u32* counter, u32 last) {
  u32 before = *counter;
  *counter = before >= last ? 0 : before + 1;
  return before;
}
inline float fresh(const float* p) { return *p; }
inline uint4 fresh4(const float* p) {
  uint4 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline float exp2_(float x) { return exp2f(x); }
inline u32 permute(u32 a, u32 b, u32 select) {
  u32 r = 0;
  for (int i = 0; i < 4; i++) {
    u32 s = select >> 4 * i & 15, byte = ((s & 4 ? b : a) >> 8 * (s & 3)) & 255;
    if (s & 8) byte = byte & 128 ? 255 : 0;
    r |= byte << 8 * i;
  }
  return r;
}
inline u32 and_or(u32 x, u32 mask, u32 also) { return (x & mask) | also; }
inline u32 pack_f16(float low, float high) { return emulation::half_bits(low) | emulation::half_bits(high) << 16; }
inline u32 pack_bf16(float low, float high) { return emulation::bf16_bits(low) | emulation::bf16_bits(high) << 16; }
inline float low_f16(u32 x) { return emulation::half_value(x); }
inline float high_f16(u32 x) { return emulation::half_value(x >> 16); }
inline u32 mul_f16(u32 a, u32 b) { return emulation::halves(a, b, [](double x, double y) { return x * y; }); }
inline u32 add_f16(u32 a, u32 b) { return emulation::halves(a, b, [](double x, double y) { return x + y; }); }
inline u32 fma_f16(u32 a, u32 b, u32 c) {
  auto one = [&](int shift) {
    double x = emulation::half_value(a >> shift), y = emulation::half_value(b >> shift);
    return emulation::half_bits(x * y + emulation::half_value(c >> shift)) << shift;
  };
  return one(0) | one(16);
}
inline u32 max_f16(u32 a, u32 b) { return emulation::halves(a, b, [](double x, double y) { return fmax(x, y); }); }
