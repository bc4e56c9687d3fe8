#pragma once
#include <chrono>
#include <coatrt/coatrt.hpp>
#include <condition_variable>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "answer.hpp"
#include "load.hpp"
#include "metrics.hpp"
#include "request.hpp"
#include "row_cache.hpp"

using Clock = std::chrono::steady_clock;

/// A request whose prompts are tokens and whose LoRA is at hand.
struct Task {
  ApiRequest request;
  std::vector<std::vector<std::int64_t>> prompts;
  std::string lora_key;              // names the LoRA; equal keys, equal LoRAs
  std::optional<coatrt::Lora> lora;  // none: the base
  Answer answer;
  Load::Ticket ticket;
  Clock::time_point arrival;

  std::size_t begun = 0, ended = 0;  // choices
  Usage usage{};
  bool over = false, first = true;

  std::size_t choices() const { return prompts.size() * request.n; }
};

/// The thread that runs the model: it brings waiting requests into rows as these become free, reads prompts piece by
/// piece, and between the pieces decodes one token for all rows together.
class Engine {
 public:
  /// `limit`: seconds a request may take in all.
  Engine(coatrt::Batch batch, const coatrt::Tokenizer& tokenizer, const std::vector<std::int64_t>& end_tokens,
         std::chrono::seconds limit, Metrics& metrics);
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  std::int64_t capacity() const { return batch_.capacity(); }
  coatrt::Limit limit() const { return batch_.limit(); }
  std::int64_t vocabulary() const { return batch_.vocabulary(); }

  void submit(std::unique_ptr<Task> task);
  /// Refuse what waits, and after `patience` what runs. Returns at once.
  void stop(std::chrono::milliseconds patience);

 private:
  static constexpr std::size_t kPiece = 64;  // tokens of a prompt between two decode steps

  /// One choice of a task, in a row.
  struct Sequence {
    Task* task;
    std::size_t index, row;
    std::size_t done;  // tokens of the prompt in the caches
    coatrt::Sampler sampler;
    coatrt::TextStream text;
    coatrt::StopStrings stops;
    std::size_t generated = 0, characters = 0;
    std::int64_t next = 0;  // the last token, not yet in the caches
    bool ended = false;

    const std::vector<std::int64_t>& prompt() const { return task->prompts[index / task->request.n]; }
    bool reads() const { return done < prompt().size(); }
  };

  void run();
  void admit();
  bool reads(const Task& task, std::size_t prompt) const;
  void begin(Task& task);
  void read_piece();
  void decode();
  void take(Sequence& sequence, const coatrt::Logits& logits);
  void choose(Sequence& sequence, const coatrt::Logits& logits);
  void end(Sequence& sequence);
  void fail(Task& task, const ApiError& error);
  void check(Clock::time_point now);
  void clean();

  coatrt::Batch batch_;
  const coatrt::Tokenizer tokenizer_;
  const std::vector<std::int64_t> end_tokens_;
  const std::chrono::seconds time_limit_;
  Metrics& metrics_;
  RowCache rows_;
  std::deque<std::unique_ptr<Task>> tasks_;  // in order of arrival: running ones, then waiting ones
  std::list<Sequence> sequences_;

  std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  std::vector<std::unique_ptr<Task>> arrived_;
  std::optional<Clock::time_point> last_;  // when what runs is refused
  std::thread thread_;
};
