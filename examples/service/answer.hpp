#pragma once
#include <atomic>
#include <chrono>
#include <coatrt/coatrt.hpp>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "request.hpp"
#include "server.hpp"

/// A generated token with its log probabilities, and the number of complete characters before it.
struct TokenEntry {
  std::int64_t token;
  coatrt::Logprobs logprobs;
  std::size_t offset;
};

struct Usage {
  std::size_t prompt = 0, completion = 0, cached = 0;

  Json json() const {
    return {{"prompt_tokens", prompt},
            {"completion_tokens", completion},
            {"total_tokens", prompt + completion},
            {"prompt_tokens_details", {{"cached_tokens", cached}}}};
  }
};

/// Writes the answer to one request, in events or at the end. Its methods are called by one thread at a time.
class Answer {
 public:
  Answer(const ApiRequest& request, std::size_t choices, const coatrt::Tokenizer& tokenizer, std::shared_ptr<Reply> reply)
      : chat_(request.chat),
        stream_(request.stream),
        usage_wanted_(request.include_usage),
        alternatives_(request.logprobs),
        tokenizer_(tokenizer),
        reply_(std::move(reply)),
        whole_(choices) {
    static std::atomic<std::uint64_t> count{std::random_device{}() * std::uint64_t{1000000}};
    base_["id"] = (chat_ ? "chatcmpl-" : "cmpl-") + std::to_string(++count);
    base_["object"] = !chat_ ? "text_completion" : stream_ ? "chat.completion.chunk" : "chat.completion";
    base_["created"] = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
    base_["model"] = request.model;
  }

  bool gone() const { return reply_->gone(); }
  bool begun() const { return begun_; }

  /// The next text of a choice, and its tokens since the last call.
  void add(std::size_t choice, const std::string& text, std::vector<TokenEntry> entries) {
    if (stream_) {
      open(choice);
      if (text.empty() && entries.empty()) return;
      event(chat_ ? Json{{"index", choice}, {"delta", {{"content", text}}}} : Json{{"index", choice}, {"text", text}},
            entries, Json());
    } else {
      whole_[choice].text += text;
      for (TokenEntry& entry : entries) whole_[choice].entries.push_back(std::move(entry));
    }
  }
  /// The last text of a choice.
  void finish(std::size_t choice, const std::string& text, std::vector<TokenEntry> entries, const char* reason) {
    if (!stream_) {
      add(choice, text, std::move(entries));
      whole_[choice].reason = reason;
    } else if (chat_) {
      add(choice, text, std::move(entries));
      event({{"index", choice}, {"delta", Json::object()}}, {}, reason);
    } else {
      open(choice);
      event({{"index", choice}, {"text", text}}, entries, reason);
    }
  }
  /// After all choices: the whole answer, or the end of the stream.
  void done(const Usage& usage) {
    if (stream_) {
      if (usage_wanted_) {
        Json last = base_;
        last["choices"] = Json::array();
        last["usage"] = usage.json();
        send(last);
      }
      reply_->part("data: [DONE]\n\n");
      reply_->end();
      return;
    }
    Json choices = Json::array();
    for (std::size_t i = 0; i < whole_.size(); ++i) {
      Json choice{{"index", i}};
      if (chat_) choice["message"] = {{"role", "assistant"}, {"content", whole_[i].text}};
      else choice["text"] = whole_[i].text;
      choice["logprobs"] = logprobs(whole_[i].entries, true);
      choice["finish_reason"] = whole_[i].reason;
      choices.push_back(std::move(choice));
    }
    base_["choices"] = std::move(choices);
    base_["usage"] = usage.json();
    reply_->answer(200, "application/json", dump(base_) + "\n");
  }
  /// An error, as the answer or as the last event.
  void fail(const ApiError& error, std::string_view headers = "") {
    if (!begun_) return reply_->answer(error.status, "application/json", dump(error.json()) + "\n", headers);
    send(error.json());
    reply_->end();
  }

 private:
  struct Whole {
    std::string text, reason;
    std::vector<TokenEntry> entries;
    bool opened = false;
  };

  void send(const Json& value) { reply_->part("data: " + dump(value) + "\n\n"); }

  /// The first event of a choice of a chat names its role.
  void open(std::size_t choice) {
    if (!std::exchange(begun_, true)) reply_->begin("text/event-stream");
    if (std::exchange(whole_[choice].opened, true) || !chat_) return;
    event({{"index", choice}, {"delta", {{"role", "assistant"}, {"content", ""}}}}, {}, Json());
  }

  void event(Json choice, const std::vector<TokenEntry>& entries, const Json& reason) {
    choice["logprobs"] = logprobs(entries, false);
    choice["finish_reason"] = reason;
    Json value = base_;
    value["choices"] = Json::array({std::move(choice)});
    if (usage_wanted_) value["usage"] = Json();
    send(value);
  }

  /// Null where none are wanted, and in an event without tokens.
  Json logprobs(const std::vector<TokenEntry>& entries, bool complete) const {
    if (!alternatives_ || (entries.empty() && !complete)) return Json();
    const auto text = [&](std::int64_t token) { return tokenizer_.decode({token}, false); };
    if (chat_) {
      const auto one = [&](std::int64_t token, double logprob) {
        Json bytes = Json::array();
        for (const char byte : tokenizer_.bytes(token, false)) bytes.push_back(static_cast<unsigned char>(byte));
        return Json{{"token", text(token)}, {"logprob", logprob}, {"bytes", std::move(bytes)}};
      };
      Json content = Json::array();
      for (const TokenEntry& entry : entries) {
        Json made = one(entry.token, entry.logprobs.token), top = Json::array();
        for (const auto& [token, logprob] : entry.logprobs.likeliest) top.push_back(one(token, logprob));
        made["top_logprobs"] = std::move(top);
        content.push_back(std::move(made));
      }
      return {{"content", std::move(content)}};
    }
    Json tokens = Json::array(), chosen = Json::array(), offsets = Json::array(), tops = Json::array();
    for (const TokenEntry& entry : entries) {
      tokens.push_back(text(entry.token));
      chosen.push_back(entry.logprobs.token);
      offsets.push_back(entry.offset);
      Json top = Json::object();
      for (const auto& [token, logprob] : entry.logprobs.likeliest) top.emplace(text(token), logprob);
      top.emplace(text(entry.token), entry.logprobs.token);
      tops.push_back(std::move(top));
    }
    return {{"tokens", std::move(tokens)},
            {"token_logprobs", std::move(chosen)},
            {"top_logprobs", *alternatives_ == 0 ? Json() : std::move(tops)},
            {"text_offset", std::move(offsets)}};
  }

  const bool chat_, stream_, usage_wanted_;
  const std::optional<std::size_t> alternatives_;
  const coatrt::Tokenizer tokenizer_;
  const std::shared_ptr<Reply> reply_;
  std::vector<Whole> whole_;
  Json base_;
  bool begun_ = false;
};
