#pragma once
#include <array>
#include <map>
#include <mutex>
#include <sstream>
#include <string>

/// Counters and latencies in the text format that Prometheus reads.
class Metrics {
 public:
  /// A request to /v1 was answered; `seconds` since its arrival, where it was a generation.
  void request(int status) {
    const std::lock_guard lock(mutex_);
    ++requests_[status];
  }
  void generation(double seconds) {
    const std::lock_guard lock(mutex_);
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
  void prompt(std::size_t tokens, std::size_t cached) {
    const std::lock_guard lock(mutex_);
    prompt_tokens_ += tokens;
    cached_tokens_ += cached;
  }

  std::string text(std::size_t running, std::size_t waiting) const {
    const std::lock_guard lock(mutex_);
    std::ostringstream out;
    out << "# TYPE coatrt_requests_total counter\n";
    for (const auto& [status, count] : requests_) out << "coatrt_requests_total{status=\"" << status << "\"} " << count << "\n";
    const auto value = [&](const char* name, const char* type, std::size_t number) {
      out << "# TYPE " << name << " " << type << "\n" << name << " " << number << "\n";
    };
    value("coatrt_prompt_tokens_total", "counter", prompt_tokens_);
    value("coatrt_cached_tokens_total", "counter", cached_tokens_);
    value("coatrt_tokens_total", "counter", tokens_);
    value("coatrt_requests_running", "gauge", running);
    value("coatrt_requests_waiting", "gauge", waiting);
    latency_.write(out, "coatrt_request_seconds");
    first_token_.write(out, "coatrt_first_token_seconds");
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
  std::size_t tokens_ = 0, prompt_tokens_ = 0, cached_tokens_ = 0;
  Histogram latency_, first_token_;
};
