#pragma once

#include <natten/natten.h>

namespace natten::bindings {

/// Threads of the OpenMP runtime that this process has loaded, which is PyTorch's: they are awake
/// after an operation of PyTorch's, and threads of ours would compete with them for the processors.
/// Where there is none, those of the default executor.
class OpenMpExecutor final : public Executor {
 public:
  explicit OpenMpExecutor(int threads) : threads_(threads) {}
  int concurrency() const override { return threads_; }
  void schedule(std::function<void()> task) override;
  void run_on(int threads, const std::function<void()>& task) override;

 private:
  const int threads_;
};

}  // namespace natten::bindings
