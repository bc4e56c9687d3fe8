#pragma once
#include <array>
#include <map>
#include <mutex>
#include <sstream>
#include <string>

/// Counters and latencies in the text format that Prometheus reads.
class Metrics {
 public:
  void request(int status, double seconds) {
    const std::lock_guard lock(mutex_);
    ++requests_[status];
    latency_.add(seconds);
  }
  void first_token(double seconds) {
    const std::lock_guard lock(mutex_);
    first_token_.add(seconds);
  }
  void tokens(std::size_t count) {
    const std::lock_guard lock(mutex_);
    tokens_ += count;
  }
  void swap(double seconds) {
    const std::lock_guard lock(mutex_);
    swap_.add(seconds);
  }

  std::string text(std::size_t busy, std::size_t waiting) const {
    const std::lock_guard lock(mutex_);
    std::ostringstream out;
    out << "# TYPE coatrt_requests_total counter\n";
    for (const auto& [status, count] : requests_) out << "coatrt_requests_total{status=\"" << status << "\"} " << count << "\n";
    out << "# TYPE coatrt_tokens_total counter\ncoatrt_tokens_total " << tokens_ << "\n"
        << "# TYPE coatrt_sessions_busy gauge\ncoatrt_sessions_busy " << busy << "\n"
        << "# TYPE coatrt_requests_waiting gauge\ncoatrt_requests_waiting " << waiting << "\n";
    latency_.write(out, "coatrt_request_seconds");
    first_token_.write(out, "coatrt_first_token_seconds");
    swap_.write(out, "coatrt_swap_seconds");
    return out.str();
  }

 private:
  struct Histogram {
    static constexpr std::array<double, 12> kBounds{0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30};
    std::array<std::size_t, kBounds.size()> within{};
    std::size_t count = 0;
    double sum = 0;

    void add(double seconds) {
      for (std::size_t i = 0; i < kBounds.size(); ++i) within[i] += seconds <= kBounds[i];
      ++count;
      sum += seconds;
    }
    void write(std::ostream& out, const char* name) const {
      out << "# TYPE " << name << " histogram\n";
      for (std::size_t i = 0; i < kBounds.size(); ++i) out << name << "_bucket{le=\"" << kBounds[i] << "\"} " << within[i] << "\n";
      out << name << "_bucket{le=\"+Inf\"} " << count << "\n" << name << "_sum " << sum << "\n" << name << "_count " << count << "\n";
    }
  };
  mutable std::mutex mutex_;
  std::map<int, std::size_t> requests_;
  std::size_t tokens_ = 0;
  Histogram latency_, first_token_, swap_;
};
