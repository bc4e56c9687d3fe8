#pragma once
#include <coatrt/coatrt.hpp>
#include <condition_variable>
#include <list>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

/// Emitted LoRAs by configuration hash: the last few that were asked for.
class Loras {
 public:
  explicit Loras(const coatrt::Bundle& bundle) : bundle_(bundle) {}

  coatrt::Lora of(const coatrt::Configuration& configuration, const std::string& hash) {
    const std::lock_guard lock(mutex_);  // one emission at a time: it uses all cores already
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

/// Sessions to be lent, one to a request. Each remembers the configuration whose LoRA it has bound.
class Pool {
 public:
  struct Slot {
    coatrt::Session session;
    std::string bound;
  };
  /// A lent session, given back at the end of its life.
  class Lease {
   public:
    Lease(Pool& pool, Slot& slot) : pool_(&pool), slot_(&slot) {}
    Lease(Lease&& other) noexcept : pool_(other.pool_), slot_(other.slot_) { other.slot_ = nullptr; }
    Lease& operator=(Lease&&) = delete;
    ~Lease() {
      if (slot_ != nullptr) pool_->give_back(*slot_);
    }
    Slot& operator*() const { return *slot_; }
    Slot* operator->() const { return slot_; }

   private:
    Pool* pool_;
    Slot* slot_;
  };

  Pool(const coatrt::Bundle& bundle, const coatrt::SessionOptions& options, std::size_t sessions, std::size_t queue)
      : most_waiting_(queue) {
    for (std::size_t i = 0; i < sessions; ++i) slots_.push_back({coatrt::Session(bundle, options), ""});
    for (Slot& slot : slots_) free_.push_back(&slot);
  }

  /// A session as soon as one is free, in no order of arrival; nothing where too many wait already.
  std::optional<Lease> lend() {
    std::unique_lock lock(mutex_);
    if (free_.empty() && waiting_ >= most_waiting_) return std::nullopt;
    ++waiting_;
    ready_.wait(lock, [&] { return !free_.empty(); });
    --waiting_;
    Slot& slot = *free_.back();
    free_.pop_back();
    return Lease(*this, slot);
  }
  std::size_t busy() const {
    const std::lock_guard lock(mutex_);
    return slots_.size() - free_.size();
  }
  std::size_t waiting() const {
    const std::lock_guard lock(mutex_);
    return waiting_;
  }

 private:
  void give_back(Slot& slot) {
    {
      const std::lock_guard lock(mutex_);
      free_.push_back(&slot);
    }
    ready_.notify_one();
  }

  mutable std::mutex mutex_;
  std::condition_variable ready_;
  std::list<Slot> slots_;  // places that stay
  std::vector<Slot*> free_;
  std::size_t waiting_ = 0, most_waiting_;
};
