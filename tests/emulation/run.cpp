// Blocks of the kernel one after another, on the CPU.
#include <decode.cu>

namespace {
const Step* step;
void lane() {
  decode(*step);
  emulation::self().done = true;
  swapcontext(&emulation::self().context, &emulation::block->scheduler);
}
}  // namespace

// `pool`, `size`: what may be read as pages. The number of accesses that hardware would not have made; -1: a deadlock.
extern "C" int emulate(const Step* arguments, int items, int heads, int shared_bytes, const u8* pool, i64 size) {
  step = arguments;
  emulation::faults = 0, emulation::readable_from = pool, emulation::readable_to = pool + size;
  constexpr int guard = 64;
  auto* memory = (u8*)aligned_alloc(128, (shared_bytes + guard + 127) / 128 * 128);
  for (int y = 0; y < heads; y++) for (int x = 0; x < items; x++) {
    emulation::Block block;
    block.x = x, block.y = y, block.shared = memory;
    memset(memory, 0xff, shared_bytes + guard);  // NaN
    block.lanes.resize(emulated_threads), block.warps.resize(emulated_threads / 32);
    emulation::block = &block;
    for (auto& l : block.lanes) {
      l.stack.resize(1 << 16);
      getcontext(&l.context);
      l.context.uc_stack = {l.stack.data(), 0, l.stack.size()};
      l.context.uc_stack.ss_sp = l.stack.data(), l.context.uc_stack.ss_size = l.stack.size();
      l.context.uc_link = nullptr;
      makecontext(&l.context, lane, 0);
    }
    for (i64 idle = 0, left = emulated_threads; left;) {
      for (int i = 0; i < emulated_threads; i++) {
        if (block.lanes[i].done) continue;
        block.current = i;
        swapcontext(&block.scheduler, &block.lanes[i].context);
        left -= block.lanes[i].done;
      }
      if (++idle > 10'000'000) return -1;
    }
    for (int i = 0; i < guard; i++) emulation::faults += memory[shared_bytes + i] != 0xff;
  }
  free(memory);
  return emulation::faults;
}
