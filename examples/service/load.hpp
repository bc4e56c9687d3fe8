#pragma once
#include <cstddef>
#include <mutex>
#include <optional>
#include <utility>

/// Counts the requests that wait and run, and admits no more than there is room for.
class Load {
 public:
  explicit Load(std::size_t most) : most_(most) {}

  /// A request's place. It waits, then runs, and leaves with the ticket.
  class Ticket {
   public:
    explicit Ticket(Load& load) : load_(&load) {}
    Ticket(Ticket&& other) noexcept : load_(std::exchange(other.load_, nullptr)), running_(other.running_) {}
    Ticket& operator=(Ticket&& other) noexcept {
      leave();
      load_ = std::exchange(other.load_, nullptr);
      running_ = other.running_;
      return *this;
    }
    ~Ticket() { leave(); }
    void run() {
      if (load_ != nullptr && !std::exchange(running_, true)) load_->change(-1, 1);
    }
    void leave() {
      if (Load* load = std::exchange(load_, nullptr)) load->change(running_ ? 0 : -1, running_ ? -1 : 0);
    }

   private:
    Load* load_;
    bool running_ = false;
  };

  std::optional<Ticket> enter() {
    const std::lock_guard lock(mutex_);
    if (waiting_ + running_ >= most_) return std::nullopt;
    ++waiting_;
    return Ticket(*this);
  }
  std::pair<std::size_t, std::size_t> running_and_waiting() const {
    const std::lock_guard lock(mutex_);
    return {running_, waiting_};
  }

 private:
  void change(int waiting, int running) {
    const std::lock_guard lock(mutex_);
    waiting_ += static_cast<std::size_t>(waiting);
    running_ += static_cast<std::size_t>(running);
  }
  mutable std::mutex mutex_;
  std::size_t waiting_ = 0, running_ = 0, most_;
};
