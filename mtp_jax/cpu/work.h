// Work that threads share, in units that any of them may take.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

namespace mtp_jax {

// A piece of work in units that any thread may take. Whoever comes takes what is left, in order; nobody waits for a
// thread that has not begun.
struct Work {
  std::atomic<int64_t> next{0}, finished{0};
  int64_t units = 0;

  virtual ~Work() = default;
  virtual void unit(int64_t u) = 0;
  void run() {
    for (int64_t u; (u = next.fetch_add(1)) < units;) {
      unit(u);
      finished.fetch_add(1, std::memory_order_release);
    }
  }
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads that help with a call. XLA's own pool lets its threads sleep within microseconds, and waking one takes as long
// as a product; these look out for the next call for some milliseconds before they sleep, and give way to whoever else
// wants their core.
class Team {
 public:
  explicit Team(int64_t helpers) : threads(helpers + 1) {
    for (int64_t i = 0; i < helpers; ++i) std::thread([this] { help(); }).detach();
  }

  void run(std::shared_ptr<Work> work) {
    bool leading = work->units >= 2 && !busy_.exchange(true);
    if (leading) {
      {
        std::lock_guard<std::mutex> lock(mutex_);
        work_ = work;
        calls_.fetch_add(1, std::memory_order_release);
      }
      if (asleep_.load()) wake_.notify_all();
    }
    work->run();
    while (work->finished.load(std::memory_order_acquire) < work->units) pause();
    if (leading) busy_.store(false);
  }

  const int64_t threads;

 private:
  void help() {
    for (int64_t seen = 0;;) {
      auto begin = std::chrono::steady_clock::now();
      while (calls_.load(std::memory_order_acquire) == seen) {
        for (int i = 0; i < 32; ++i) pause();
        std::this_thread::yield();
        if (std::chrono::steady_clock::now() - begin > std::chrono::milliseconds(3)) {
          std::unique_lock<std::mutex> lock(mutex_);
          asleep_.fetch_add(1);
          wake_.wait(lock, [&] { return calls_.load() != seen; });
          asleep_.fetch_sub(1);
        }
      }
      std::shared_ptr<Work> work;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        seen = calls_.load();
        work = work_;
      }
      work->run();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::shared_ptr<Work> work_;
  std::atomic<int64_t> calls_{0};
  std::atomic<int> asleep_{0};
  std::atomic<bool> busy_{false};
};

}  // namespace mtp_jax
