// Threads for the kernels.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace kvbits {

// Runs tasks 0..n-1 on a fixed number of threads, the caller among them; whoever is free takes the next task.
//
// Two OpenMP runtimes in one process fight for the cores (each keeps its idle threads spinning), so where the host's
// runtime is GNU OpenMP, as in PyTorch's builds, its entry point `GOMP_parallel` is passed in and its threads do our
// work too. Otherwise we keep our own, which sleep between calls.
class Workers {
 public:
  using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

  Workers(int threads, GompParallel gomp);
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  int threads() const { return threads_; }

  // task(index, thread) for every index; returns when all are done. Calls from several threads take turns, and a task
  // makes none. `thread` tells the threads of one call apart.
  void run(int tasks, const std::function<void(int, int)>& task);

 private:
  void loop(int thread);
  void drain(int thread);

  const int threads_;
  const GompParallel gomp_;
  std::vector<std::thread> own_;
  std::mutex turn_, mutex_;
  std::condition_variable wake_, done_;
  uint64_t round_ = 0;
  int active_ = 0;
  bool stop_ = false;

  const std::function<void(int, int)>* task_ = nullptr;
  int tasks_ = 0;
  std::atomic<int> next_{0}, next_thread_{0};
};

}  // namespace kvbits
