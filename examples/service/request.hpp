#pragma once
#include <algorithm>
#include <coatrt/coatrt.hpp>
#include <coatrt/json_check.hpp>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

using Json = nlohmann::ordered_json;  // patterns of a configuration apply in the order of the text

/// Parse an untrusted request. Depth is bounded because walking a value recurses; the number of keys, because each is
/// compared with those before it.
inline Json parse_json(const std::string& body, const std::string& example) {
  coatrt::check_json(body, "the request", "send an object like " + example, {32, 5000});
  return Json::parse(body);
}

/// The parameters of POST /generate.
struct GenerateRequest {
  std::vector<std::int64_t> tokens;   // the prompt as tokens,
  std::optional<std::string> prompt;  // or as text
  std::size_t max_tokens = 64;
  coatrt::Sampling sampling;
  std::string configuration;  // JSON; empty for the default
  bool stream = false;

  explicit GenerateRequest(const std::string& body) {
    const Json in = parse_json(body, R"({"prompt": "Once"})");
    if (!in.is_object()) throw coatrt::Error("the request must be an object like {\"prompt\": \"Once\"}");
    check_keys(in);
    if (in.contains("tokens")) {
      if (!in["tokens"].is_array()) throw coatrt::Error("tokens must be a list of token ids");
      for (const Json& token : in["tokens"]) tokens.push_back(whole(token, "a token id", 0));
    } else if (in.contains("prompt")) {
      if (!in["prompt"].is_string()) throw coatrt::Error("prompt must be a text");
      prompt = in["prompt"].get<std::string>();
    } else {
      throw coatrt::Error("the request has neither prompt nor tokens; give one");
    }
    if (in.contains("max_tokens")) max_tokens = static_cast<std::size_t>(whole(in["max_tokens"], "max_tokens", 1));
    if (in.contains("top_k")) sampling.top_k = whole(in["top_k"], "top_k", 0);
    if (in.contains("seed")) sampling.seed = static_cast<std::uint64_t>(whole(in["seed"], "seed", 0));
    if (in.contains("temperature")) sampling.temperature = real(in["temperature"], "temperature");
    if (in.contains("top_p")) sampling.top_p = real(in["top_p"], "top_p");
    if (in.contains("stream")) {
      if (!in["stream"].is_boolean()) throw coatrt::Error("stream must be true or false");
      stream = in["stream"].get<bool>();
    }
    if (in.contains("configuration")) configuration = in["configuration"].dump();
  }

 private:
  static void check_keys(const Json& in) {
    constexpr const char* kAllowed[] = {"prompt", "tokens", "max_tokens", "temperature", "top_k", "top_p", "seed",
                                        "configuration", "stream"};
    std::string allowed;
    for (const char* name : kAllowed) allowed += (allowed.empty() ? "" : ", ") + std::string(name);
    for (const auto& [key, _] : in.items())
      if (std::find(std::begin(kAllowed), std::end(kAllowed), key) == std::end(kAllowed))
        throw coatrt::Error("the request has the unknown key " + shown(key) + "; allowed: " + allowed);
    if (in.contains("prompt") && in.contains("tokens"))
      throw coatrt::Error("the request has both prompt and tokens; give one");
  }
  static std::int64_t whole(const Json& value, const std::string& what, std::int64_t least) {
    constexpr auto most = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    const bool fits = value.is_number_unsigned() ? value.get<std::uint64_t>() <= most : value.is_number_integer();
    if (!fits || value.get<std::int64_t>() < least)
      throw coatrt::Error(what + " must be a whole number from " + std::to_string(least) + " to 2^63 - 1, got " +
                          shown(value));
    return value.get<std::int64_t>();
  }
  static double real(const Json& value, const std::string& what) {
    if (!value.is_number()) throw coatrt::Error(what + " must be a number, got " + shown(value));
    return value.get<double>();
  }
  static std::string shown(const Json& value) {
    return value.is_primitive() ? value.dump().substr(0, 40) : value.type_name();
  }
};
