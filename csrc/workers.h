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
// runtime is GNU OpenMP, as in PyTorch's builds, its entry point `GOMP_parallel` is passed in, and calls between
// PyTorch's own run on its threads. Where many calls follow each other (Burst), and where there is no such entry point,
// threads of our own do: a call then waits for its tasks, not for every thread to come, so that one whose core another
// process has taken holds up nothing but the task in its hands; and whoever waits longer than a moment sleeps, which
// gives its core to that thread.
class Workers {
 public:
  using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

  Workers(int threads, GompParallel gomp) : threads_(threads), gomp_(gomp) {}
  ~Workers();
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  int threads() const { return threads_; }

  // task(index, thread) for every index; returns when all are done. Calls from several threads take turns, and a task
  // makes none. `thread` tells the threads of one call apart.
  void run(int tasks, const std::function<void(int, int)>& task);

  // While one lives, calls run on our own threads.
  class Burst {
   public:
    explicit Burst(Workers& workers) : workers_(workers) { ++workers_.bursts_; }
    ~Burst() { --workers_.bursts_; }
    Burst(const Burst&) = delete;
    Burst& operator=(const Burst&) = delete;

   private:
    Workers& workers_;
  };

 private:
  void run_on_gomp(int tasks);
  void run_on_own(int tasks);
  void start();
  void loop(int thread);
  bool take(int thread);
  bool work_left() const;

  const int threads_;
  const GompParallel gomp_;
  std::atomic<int> bursts_{0};
  std::mutex turn_;
  const std::function<void(int, int)>* task_ = nullptr;
  int tasks_ = 0;
  std::atomic<int> next_{0}, next_thread_{0};  // on GNU OpenMP's threads

  // Our own. The call's number (upper half), how many tasks are still to be taken (lower half): a thread that comes
  // late cannot take one of a call that it has not seen.
  std::atomic<uint64_t> left_{0};
  std::atomic<int> unfinished_{0}, sleeping_{0};
  std::atomic<bool> caller_sleeps_{false};
  std::vector<std::thread> own_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  bool stop_ = false;
};

}  // namespace kvbits
