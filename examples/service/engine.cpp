#include "engine.hpp"

#include <algorithm>
#include <iostream>
#include <iterator>

namespace {

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

const ApiError kStopping{503, "the server ends", "", "stopping"};
const ApiError kFailed{500, "the server failed; the cause is in its log", "", ""};

std::size_t characters(const std::string& text) {
  return static_cast<std::size_t>(std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
}

}  // namespace

Engine::Engine(coatrt::Batch batch, const coatrt::Tokenizer& tokenizer, const std::vector<std::int64_t>& end_tokens,
               std::chrono::seconds limit, Metrics& metrics)
    : batch_(std::move(batch)), tokenizer_(tokenizer), end_tokens_(end_tokens), time_limit_(limit), metrics_(metrics), rows_(batch_.rows()) {
  thread_ = std::thread([this] { run(); });
}

Engine::~Engine() {
  stop(std::chrono::milliseconds(0));
  thread_.join();
}

void Engine::submit(std::unique_ptr<Task> task) {
  {
    const std::lock_guard lock(mutex_);
    if (!last_) {
      arrived_.push_back(std::move(task));
      changed_.notify_all();
      return;
    }
  }
  fail(*task, kStopping);
}

void Engine::stop(std::chrono::milliseconds patience) {
  const std::lock_guard lock(mutex_);
  const auto last = Clock::now() + patience;
  last_ = last_ ? std::min(*last_, last) : last;
  changed_.notify_all();
}

void Engine::run() {
  for (;;) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return !arrived_.empty() || !tasks_.empty() || last_; });
      std::move(arrived_.begin(), arrived_.end(), std::back_inserter(tasks_));
      arrived_.clear();
      if (tasks_.empty()) return;  // it was told to stop
    }
    check(Clock::now());
    clean();
    admit();
    read_piece();
    decode();
    clean();
  }
}

/// End tasks whose client is gone, whose time is over, or which the server's end does not wait for.
void Engine::check(Clock::time_point now) {
  std::optional<Clock::time_point> last;
  {
    const std::lock_guard lock(mutex_);
    last = last_;
  }
  for (const auto& task : tasks_) {
    if (task->answer.gone()) {
      task->over = true;
      task->ticket.leave();
      metrics_.request(499);  // as other servers count a client that closed its request
    } else if (last && (task->begun == 0 || now >= *last)) {
      fail(*task, kStopping);
    } else if (now - task->arrival > time_limit_) {
      fail(*task, {504, "the request ran longer than the server allows, " + std::to_string(time_limit_.count()) + " s", "", "time_limit"});
    }
  }
}

/// Drop what is over.
void Engine::clean() {
  sequences_.remove_if([&](const Sequence& sequence) {
    if (!sequence.ended && !sequence.task->over) return false;
    rows_.release(sequence.row);
    return true;
  });
  tasks_.erase(std::remove_if(tasks_.begin(), tasks_.end(), [](const auto& task) { return task->over; }), tasks_.end());
}

void Engine::admit() {
  for (const auto& task : tasks_)
    while (task->begun < task->choices() && !task->over && !reads(*task, task->begun / task->request.n)) {
      if (!rows_.any_free()) return;
      try {
        begin(*task);
      } catch (const std::exception& error) {
        std::cerr << "service: a request failed: " << error.what() << std::endl;
        fail(*task, kFailed);
      }
    }
}

/// Whether a choice of this prompt is still reading it: the others wait, and copy what it read.
bool Engine::reads(const Task& task, std::size_t prompt) const {
  return std::any_of(sequences_.begin(), sequences_.end(), [&](const Sequence& sequence) {
    return sequence.task == &task && sequence.index / task.request.n == prompt && sequence.reads();
  });
}

void Engine::begin(Task& task) {
  const std::size_t index = task.begun++;
  const auto& prompt = task.prompts[index / task.request.n];
  coatrt::Sampling sampling = task.request.sampling;
  sampling.seed += 0x9E3779B97F4A7C15U * index;  // a generator for each choice
  const coatrt::Sampler sampler(sampling, prompt);
  const auto place = rows_.take(batch_, prompt, task.lora_key, task.lora ? &*task.lora : nullptr);
  const bool once = index % task.request.n == 0;  // a prompt counts once
  if (once) {
    task.usage.cached += place.cached;
    metrics_.prompt(prompt.size(), place.cached);
  }
  task.ticket.run();
  sequences_.push_back({&task, index, place.row, place.cached, sampler, coatrt::TextStream(tokenizer_),
                        coatrt::StopStrings(task.request.stop)});
}

/// Read the next tokens of the prompt that came first.
void Engine::read_piece() {
  const auto found = std::find_if(sequences_.begin(), sequences_.end(), [](const Sequence& sequence) { return sequence.reads(); });
  if (found == sequences_.end()) return;
  Sequence& sequence = *found;
  const auto& prompt = sequence.prompt();
  const std::size_t count = std::min(kPiece, prompt.size() - sequence.done);
  try {
    const coatrt::Logits logits = batch_.prefill(sequence.row, prompt.data() + sequence.done, count);
    sequence.done += count;
    rows_.computed(sequence.row, prompt, sequence.done);
    if (!sequence.reads()) take(sequence, logits);
  } catch (const std::exception& error) {
    rows_.forget(sequence.row);
    std::cerr << "service: a prompt failed: " << error.what() << std::endl;
    fail(*sequence.task, kFailed);
  }
}

/// Add a token to every row that has one.
void Engine::decode() {
  std::vector<coatrt::Batch::Step> steps;
  std::vector<Sequence*> stepped;
  for (Sequence& sequence : sequences_) {
    if (sequence.ended || sequence.task->over || sequence.reads()) continue;
    steps.push_back({sequence.row, sequence.next});
    stepped.push_back(&sequence);
  }
  if (steps.empty()) return;
  try {
    const auto logits = batch_.decode(steps);
    for (std::size_t i = 0; i < stepped.size(); ++i)
      if (!stepped[i]->task->over) take(*stepped[i], logits[i]);
  } catch (const std::exception& error) {
    std::cerr << "service: a step failed: " << error.what() << std::endl;
    for (Sequence* sequence : stepped) {
      rows_.forget(sequence->row);
      if (!sequence->task->over) fail(*sequence->task, kFailed);
    }
  }
}

void Engine::take(Sequence& sequence, const coatrt::Logits& logits) {
  try {
    choose(sequence, logits);
  } catch (const std::exception& error) {  // logits that are not finite: of this sequence alone
    std::cerr << "service: a token failed: " << error.what() << std::endl;
    fail(*sequence.task, kFailed);
  }
}

/// Choose the next token of a sequence and pass its text on.
void Engine::choose(Sequence& sequence, const coatrt::Logits& logits) {
  Task& task = *sequence.task;
  const ApiRequest& request = task.request;
  const std::int64_t token = sequence.sampler.next(logits);
  if (std::exchange(task.first, false)) metrics_.first_token(since(task.arrival));
  const bool stop_token = std::find(end_tokens_.begin(), end_tokens_.end(), token) != end_tokens_.end();
  const char* reason = stop_token && !request.ignore_eos ? "stop" : nullptr;
  std::string shown;
  std::vector<TokenEntry> entries;
  if (reason == nullptr) {
    ++sequence.generated;
    ++task.usage.completion;
    metrics_.tokens(1);
    if (request.logprobs) entries.push_back({token, coatrt::logprobs(logits, token, *request.logprobs), sequence.characters});
    const std::string text = sequence.text.add(token);
    sequence.characters += characters(text);
    shown = sequence.stops.add(text);
    const std::size_t length = sequence.prompt().size() + sequence.generated;
    const bool full = length >= static_cast<std::size_t>(batch_.capacity());
    if (sequence.stops.found()) reason = "stop";
    else if (full || static_cast<std::int64_t>(sequence.generated) >= request.max_tokens.value_or(batch_.capacity())) reason = "length";
  }
  sequence.next = token;
  if (reason == nullptr) return task.answer.add(sequence.index, shown, std::move(entries));
  shown += sequence.stops.add(sequence.text.finish());
  if (!sequence.stops.found()) shown += sequence.stops.finish();
  else reason = "stop";
  task.answer.finish(sequence.index, shown, std::move(entries), reason);
  end(sequence);
}

void Engine::end(Sequence& sequence) {
  sequence.ended = true;
  Task& task = *sequence.task;
  if (++task.ended < task.choices()) return;
  task.over = true;
  task.ticket.leave();  // before the client can know, so that it is not counted when it asks
  metrics_.request(200);
  metrics_.generation(since(task.arrival));
  for (std::size_t i = 0; i < task.prompts.size(); ++i) task.usage.prompt += task.prompts[i].size();
  task.answer.done(task.usage);
}

void Engine::fail(Task& task, const ApiError& error) {
  task.over = true;
  task.ticket.leave();
  metrics_.request(error.status);
  metrics_.generation(since(task.arrival));
  task.answer.fail(error, error.status == 503 ? "Retry-After: 1\r\n" : "");
}
