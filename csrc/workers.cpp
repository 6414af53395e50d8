#include "workers.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvbits {
namespace {

constexpr uint64_t kTaskBits = 32, kTaskMask = (uint64_t{1} << kTaskBits) - 1;
// Longer than the work between two calls of a burst, far shorter than what the system gives another process at once.
constexpr std::chrono::microseconds kSpin{40};

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether `ready` came true while spinning was worth it.
template <class Ready>
bool spin(Ready ready) {
  const auto end = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < end);
  return false;
}

}  // namespace

Workers::~Workers() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : own_) thread.join();
}

void Workers::run(int tasks, const std::function<void(int, int)>& task) {
  if (threads_ == 1 || tasks <= 1) {
    for (int i = 0; i < tasks; ++i) task(i, 0);
    return;
  }
  const std::lock_guard<std::mutex> turn(turn_);
  task_ = &task;
  if (gomp_ != nullptr && bursts_ == 0) {
    run_on_gomp(tasks);
  } else {
    run_on_own(tasks);
  }
}

void Workers::run_on_gomp(int tasks) {
  tasks_ = tasks;
  next_.store(0, std::memory_order_relaxed);
  next_thread_.store(0, std::memory_order_relaxed);
  gomp_(
      [](void* self) {
        auto* workers = static_cast<Workers*>(self);
        const int thread = workers->next_thread_.fetch_add(1, std::memory_order_relaxed);
        for (int i; (i = workers->next_.fetch_add(1, std::memory_order_relaxed)) < workers->tasks_;) {
          (*workers->task_)(i, thread);
        }
      },
      this, static_cast<unsigned>(threads_), 0);
}

void Workers::run_on_own(int tasks) {
  if (own_.empty()) {
    for (int i = 1; i < threads_; ++i) own_.emplace_back([this, i] { loop(i); });
  }
  tasks_ = tasks;
  unfinished_.store(tasks, std::memory_order_relaxed);
  const uint64_t call = (left_.load(std::memory_order_relaxed) >> kTaskBits) + 1;
  left_.store(call << kTaskBits | static_cast<uint64_t>(tasks));  // publishes the others
  if (sleeping_.load() > 0) {
    const std::lock_guard<std::mutex> lock(mutex_);  // whoever is about to sleep has looked before or will look after
    wake_.notify_all();
  }
  while (take(0)) {
  }
  const auto finished = [&] { return unfinished_.load() == 0; };
  if (spin(finished)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  caller_sleeps_.store(true);
  done_.wait(lock, finished);
  caller_sleeps_.store(false);
}

// Does one task of the present call; false: none is left.
bool Workers::take(int thread) {
  uint64_t left = left_.load(std::memory_order_acquire);
  do {
    if ((left & kTaskMask) == 0) return false;
  } while (!left_.compare_exchange_weak(left, left - 1, std::memory_order_acq_rel, std::memory_order_acquire));
  // The call cannot end, so nothing of it change, before this task has.
  (*task_)(tasks_ - static_cast<int>(left & kTaskMask), thread);
  if (unfinished_.fetch_sub(1) == 1 && caller_sleeps_.load()) {
    const std::lock_guard<std::mutex> lock(mutex_);
    done_.notify_one();
  }
  return true;
}

bool Workers::work_left() const { return (left_.load() & kTaskMask) != 0; }

void Workers::loop(int thread) {
  while (true) {
    while (take(thread)) {
    }
    if (spin([this] { return work_left(); })) continue;
    std::unique_lock<std::mutex> lock(mutex_);
    ++sleeping_;
    wake_.wait(lock, [this] { return stop_ || work_left(); });
    --sleeping_;
    if (stop_) return;
  }
}

}  // namespace kvbits
