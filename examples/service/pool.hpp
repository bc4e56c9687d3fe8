#pragma once
#include <chrono>
#include <coatrt/coatrt.hpp>
#include <condition_variable>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "load.hpp"
#include "server.hpp"

/// The last few emitted LoRAs, by configuration hash.
class Loras {
 public:
  explicit Loras(const coatrt::Bundle& bundle) : bundle_(bundle) {}

  coatrt::Lora of(const coatrt::Configuration& configuration, const std::string& hash) {
    const std::lock_guard lock(mutex_);  // one emission at a time: it uses all cores
    for (auto at = known_.begin(); at != known_.end(); ++at)
      if (at->first == hash) {
        known_.splice(known_.begin(), known_, at);
        return at->second;
      }
    known_.emplace_front(hash, bundle_.adapt(configuration));
    if (known_.size() > kMost) known_.pop_back();
    return known_.front().second;
  }

 private:
  static constexpr std::size_t kMost = 8;
  coatrt::Bundle bundle_;
  std::mutex mutex_;
  std::list<std::pair<std::string, coatrt::Lora>> known_;
};

/// Threads that work through a queue in order of arrival. Tickets bound how many jobs there are.
class Workers {
 public:
  struct Job {
    HttpRequest request;
    std::shared_ptr<Reply> reply;
    Load::Ticket ticket;
    std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  };
  /// `work` must not throw. `refuse` gets the jobs still queued at the end.
  using Work = std::function<void(Job& job)>;

  Workers(std::size_t threads, Work work, Work refuse) : work_(std::move(work)), refuse_(std::move(refuse)) {
    for (std::size_t i = 0; i < threads; ++i) threads_.emplace_back([this] { run(); });
  }
  ~Workers() {
    close();
    for (std::thread& thread : threads_) thread.join();
  }
  Workers(const Workers&) = delete;
  Workers& operator=(const Workers&) = delete;

  void add(Job&& job) {
    {
      const std::lock_guard lock(mutex_);
      if (!closed_) {
        jobs_.push_back(std::move(job));
        ready_.notify_one();
        return;
      }
    }
    refuse_(job);
  }
  /// Drop the jobs whose client is gone.
  void drop_gone() {
    const std::lock_guard lock(mutex_);
    jobs_.remove_if([](const Job& waiting) { return waiting.reply->gone(); });
  }
  /// Accept no more jobs and refuse those in the queue.
  void close() {
    std::list<Job> rest;
    {
      const std::lock_guard lock(mutex_);
      closed_ = true;
      rest.swap(jobs_);
    }
    ready_.notify_all();
    for (Job& job : rest) refuse_(job);
  }

 private:
  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      ready_.wait(lock, [&] { return closed_ || !jobs_.empty(); });
      if (jobs_.empty()) return;
      {
        Job job = std::move(jobs_.front());
        jobs_.pop_front();
        lock.unlock();
        if (!job.reply->gone()) work_(job);
      }
      lock.lock();
    }
  }

  std::mutex mutex_;
  std::condition_variable ready_;
  std::list<Job> jobs_;
  bool closed_ = false;
  Work work_, refuse_;
  std::vector<std::thread> threads_;
};
