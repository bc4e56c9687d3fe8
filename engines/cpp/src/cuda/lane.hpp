#pragma once
#include <condition_variable>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>

namespace coatrt::detail {

/// One thread that does all the work of a model, in order of arrival. ONNX Runtime keeps captured CUDA graphs, and cuBLAS
/// with its workspace, for each thread that runs a session; two threads may not run one session that captures.
class Lane {
 public:
  Lane() : thread_([this] { work(); }) {}
  ~Lane() {
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
    }
    arrived_.notify_one();
    thread_.join();
  }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  /// Run `task` on the lane and wait for it; what it throws is thrown here.
  void run(const std::function<void()>& task) {
    Job job;
    job.task = &task;
    std::unique_lock lock(mutex_);
    jobs_.push_back(&job);
    arrived_.notify_one();
    job.over.wait(lock, [&] { return job.done; });
    if (job.error) std::rethrow_exception(job.error);
  }

 private:
  struct Job {
    const std::function<void()>* task = nullptr;
    bool done = false;
    std::exception_ptr error;
    std::condition_variable over;
  };

  void work() {
    std::unique_lock lock(mutex_);
    for (;;) {
      arrived_.wait(lock, [&] { return closed_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      Job* job = jobs_.front();
      jobs_.pop_front();
      lock.unlock();
      try {
        (*job->task)();
      } catch (...) {
        job->error = std::current_exception();
      }
      lock.lock();
      job->done = true;
      job->over.notify_one();  // under the lock: the job goes as soon as its owner sees that it is done
    }
  }

  std::mutex mutex_;
  std::condition_variable arrived_;
  std::deque<Job*> jobs_;
  bool closed_ = false;
  std::thread thread_;  // last: it uses the others
};

}  // namespace coatrt::detail
