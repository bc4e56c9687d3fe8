#pragma once
#include <algorithm>
#include <charconv>
#include <coatrt/coatrt.hpp>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "fields.hpp"

/// A prompt of /v1/completions: a text, or its tokens.
struct Prompt {
  std::string text;
  std::vector<std::int64_t> tokens;  // where there are any, they count
};

/// A request to /v1/completions or /v1/chat/completions, checked (docs/reference/openai-api.md).
struct ApiRequest {
  static constexpr std::size_t kMostChoices = 16, kMostStops = 16, kLongestStop = 256, kMostBiases = 1024;
  static constexpr std::int64_t kMostAlternatives = 20, kMostTopK = 1000000;

  bool chat;
  std::string model;
  std::string configuration;  // JSON; empty: none
  std::vector<Prompt> prompts;
  std::vector<coatrt::Message> messages;
  std::optional<std::int64_t> max_tokens;
  coatrt::Sampling sampling;
  std::size_t n = 1;
  std::vector<std::string> stop;
  bool ignore_eos = false, stream = false, include_usage = false;
  std::optional<std::size_t> logprobs;  // alternatives at each token

  ApiRequest(const std::string& body, bool to_chat) : chat(to_chat) {
    const Json in = parse_json(body);
    const Fields fields = to_chat ? Fields(in, "", {"model", "messages", "max_tokens", "max_completion_tokens", "temperature", "top_p",
                                                    "top_k", "min_p", "presence_penalty", "frequency_penalty",
                                                    "repetition_penalty", "logit_bias", "seed", "n", "stop", "ignore_eos",
                                                    "stream", "stream_options", "logprobs", "top_logprobs", "configuration",
                                                    "user"})
                                  : Fields(in, "", {"model", "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p",
                                                    "presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias",
                                                    "seed", "n", "stop", "ignore_eos", "stream", "stream_options", "logprobs",
                                                    "configuration", "user"});
    model = fields.text("model", fields.required("model"));
    if (const Json* value = fields.find("user")) fields.text("user", *value);
    if (const Json* value = fields.find("configuration")) {
      if (!value->is_object()) fields.refuse("configuration", "must be an object like {\"default\": \"int8\"}, got " + shown(*value));
      configuration = value->dump();
    }
    read_sampling(fields);
    read_ends(fields);
    read_stream(fields);
    if (chat) {
      read_messages(fields);
      const bool wanted = fields.boolean("logprobs");
      if (fields.find("top_logprobs") != nullptr && !wanted)
        fields.refuse("top_logprobs", "needs \"logprobs\": true; give both");
      const auto alternatives = fields.whole("top_logprobs", 0, kMostAlternatives, 0);
      if (wanted) logprobs = static_cast<std::size_t>(alternatives);
    } else {
      if (fields.find("logprobs") != nullptr)
        logprobs = static_cast<std::size_t>(fields.whole("logprobs", 0, kMostAlternatives, 0));
      read_prompts(fields);
    }
    n = static_cast<std::size_t>(fields.whole("n", 1, kMostChoices, 1));
    if (n * std::max<std::size_t>(1, prompts.size()) > kMostChoices)
      fields.refuse("n", "times the number of prompts must be at most " + std::to_string(kMostChoices));
  }

 private:
  static constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();

  void read_sampling(const Fields& fields) {
    constexpr double kTiny = std::numeric_limits<double>::denorm_min();
    sampling.temperature = fields.real("temperature", 0, 2, 1, "must be a number from 0 to 2");
    sampling.top_p = fields.real("top_p", kTiny, 1, 1, "must be a number above 0 and at most 1");
    sampling.top_k = fields.whole("top_k", 0, kMostTopK, 0);
    sampling.min_p = fields.real("min_p", 0, 1, 0, "must be a number from 0 to 1");
    sampling.presence_penalty = fields.real("presence_penalty", -2, 2, 0, "must be a number from -2 to 2");
    sampling.frequency_penalty = fields.real("frequency_penalty", -2, 2, 0, "must be a number from -2 to 2");
    sampling.repetition_penalty = fields.real("repetition_penalty", kTiny, 10, 1, "must be a number above 0 and at most 10");
    const Json* seed = fields.find("seed");
    if (seed != nullptr) {
      sampling.seed = static_cast<std::uint64_t>(fields.whole("seed", *seed, 0, kMost));
    } else {
      std::random_device random;
      sampling.seed = static_cast<std::uint64_t>(random()) << 32 | random();
    }
    const Json* biases = fields.find("logit_bias");
    if (biases == nullptr) return;
    if (!biases->is_object() || biases->size() > kMostBiases)
      fields.refuse("logit_bias", "must be an object of at most " + std::to_string(kMostBiases) + " token ids, got " + shown(*biases));
    for (const auto& [key, value] : biases->items()) {
      std::int64_t token = -1;
      const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token);
      if (error != std::errc() || std::to_string(token) != key || token < 0)
        fields.refuse("logit_bias", "has the key " + shown(Json(key)) + "; keys must be token ids, like \"50\"");
      if (!value.is_number() || !(value.get<double>() >= -100 && value.get<double>() <= 100))
        fields.refuse("logit_bias", "must have values from -100 to 100, got " + shown(value));
      sampling.logit_bias.emplace_back(token, value.get<double>());
    }
  }

  void read_ends(const Fields& fields) {
    if (fields.find("max_tokens") != nullptr) max_tokens = fields.whole("max_tokens", 1, kMost, 1);
    if (chat && fields.find("max_completion_tokens") != nullptr) {
      if (max_tokens) fields.refuse("max_completion_tokens", "is another name of max_tokens; give one of them");
      max_tokens = fields.whole("max_completion_tokens", 1, kMost, 1);
    }
    ignore_eos = fields.boolean("ignore_eos");
    const Json* stops = fields.find("stop");
    if (stops == nullptr) return;
    if (!stops->is_string() && !stops->is_array())
      fields.refuse("stop", "must be a text or a list of texts, got " + shown(*stops));
    const Json list = stops->is_array() ? *stops : Json::array({*stops});
    if (list.size() > kMostStops) fields.refuse("stop", "must have at most " + std::to_string(kMostStops) + " texts");
    for (const Json& value : list) {
      stop.push_back(fields.text("stop", value));
      const auto characters = std::count_if(stop.back().begin(), stop.back().end(), [](char c) { return (c & 0xc0) != 0x80; });
      if (characters < 1 || characters > static_cast<std::ptrdiff_t>(kLongestStop))
        fields.refuse("stop", "must have texts of 1 to " + std::to_string(kLongestStop) + " characters, got one of " +
                                  std::to_string(characters));
    }
  }

  void read_stream(const Fields& fields) {
    stream = fields.boolean("stream");
    const Json* options = fields.find("stream_options");
    if (options == nullptr) return;
    const Fields inside(*options, "stream_options", {"include_usage"});
    if (!stream) fields.refuse("stream_options", "needs \"stream\": true; give both");
    include_usage = inside.boolean("include_usage");
  }

  static Prompt tokens_of(const Fields& fields, const Json& list) {
    Prompt made;
    if (list.empty()) fields.refuse("prompt", "must not be empty");
    for (const Json& token : list) made.tokens.push_back(fields.whole("prompt", token, 0, std::int64_t{1} << 31));
    return made;
  }

  void read_prompts(const Fields& fields) {
    const Json& value = fields.required("prompt");
    const char* rule = "must be a text, a list of token ids, or a list of either, got ";
    if (!value.is_string() && !value.is_array()) fields.refuse("prompt", rule + shown(value));
    const bool whole = value.is_string() || (!value.empty() && value[0].is_number());
    const Json list = whole ? Json::array({value}) : value;
    if (list.empty() || list.size() > kMostChoices)
      fields.refuse("prompt", "must have 1 to " + std::to_string(kMostChoices) + " texts or lists, got " + std::to_string(list.size()));
    for (const Json& prompt : list) {
      if (prompt.is_array()) {
        prompts.push_back(tokens_of(fields, prompt));
      } else {
        if (!prompt.is_string()) fields.refuse("prompt", rule + shown(prompt));
        prompts.push_back({prompt.get<std::string>(), {}});
        if (prompts.back().text.empty()) fields.refuse("prompt", "must not be empty");
      }
    }
  }

  void read_messages(const Fields& fields) {
    const Json& list = fields.required("messages");
    if (!list.is_array() || list.empty()) fields.refuse("messages", "must be a list of at least one message, got " + shown(list));
    for (std::size_t i = 0; i < list.size(); ++i) {
      const Fields message(list[i], "messages[" + std::to_string(i) + "]", {"role", "content"});
      std::string role = message.text("role", message.required("role"));
      if (role == "developer") role = "system";
      if (role != "system" && role != "user" && role != "assistant")
        message.refuse("role", "must be system, developer, user or assistant, got " + shown(Json(role)));
      messages.push_back({role, content(message)});
    }
  }

  static std::string content(const Fields& message) {
    const Json& value = message.required("content");
    if (value.is_string()) return value.get<std::string>();
    if (!value.is_array()) message.refuse("content", "must be a text or a list of text parts, got " + shown(value));
    std::string joined;
    for (std::size_t i = 0; i < value.size(); ++i) {
      const std::string path = message.name_of("content") + "[" + std::to_string(i) + "]";
      if (value[i].is_object() && value[i].contains("type") && value[i]["type"] != "text")
        throw ApiError{400, path + ".type must be text, got " + shown(value[i]["type"]), path + ".type", ""};
      const Fields part(value[i], path, {"type", "text"});
      part.required("type");
      joined += part.text("text", part.required("text"));
    }
    return joined;
  }
};
