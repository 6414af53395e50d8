#include "workers.h"

namespace kvbits {

Workers::Workers(int threads, GompParallel gomp) : threads_(threads), gomp_(gomp) {
  if (gomp_ == nullptr) {
    for (int i = 1; i < threads_; ++i) own_.emplace_back([this, i] { loop(i); });
  }
}

Workers::~Workers() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : own_) thread.join();
}

void Workers::drain(int thread) {
  for (int i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) (*task_)(i, thread);
}

void Workers::loop(int thread) {
  uint64_t seen = 0;
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    wake_.wait(lock, [&] { return stop_ || round_ != seen; });
    if (stop_) return;
    seen = round_;
    lock.unlock();
    drain(thread);
    lock.lock();
    if (--active_ == 0) done_.notify_one();
  }
}

void Workers::run(int tasks, const std::function<void(int, int)>& task) {
  if (threads_ == 1 || tasks <= 1) {
    for (int i = 0; i < tasks; ++i) task(i, 0);
    return;
  }
  const std::lock_guard<std::mutex> turn(turn_);
  task_ = &task;
  tasks_ = tasks;
  next_.store(0, std::memory_order_relaxed);
  if (gomp_ != nullptr) {
    next_thread_.store(0, std::memory_order_relaxed);
    gomp_(
        [](void* self) {
          auto* workers = static_cast<Workers*>(self);
          workers->drain(workers->next_thread_.fetch_add(1, std::memory_order_relaxed));
        },
        this, static_cast<unsigned>(threads_), 0);
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    active_ = threads_ - 1;
    ++round_;
  }
  wake_.notify_all();
  drain(0);
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [&] { return active_ == 0; });
}

}  // namespace kvbits
