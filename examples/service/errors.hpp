#pragma once
#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

using Json = nlohmann::ordered_json;  // patterns of a configuration apply in the order of the text

/// An error in OpenAI's form.
struct ApiError {
  int status = 400;
  std::string message, param, code;  // empty: null

  static constexpr std::size_t kLongestMessage = 1000;  // messages may quote the client

  Json json() const {
    const auto text = [](const std::string& value) { return value.empty() ? Json() : Json(value); };
    const char* type = status >= 500 ? "server_error" : "invalid_request_error";
    return {{"error",
             {{"message", message.substr(0, kLongestMessage)}, {"type", type}, {"param", text(param)}, {"code", text(code)}}}};
  }
};

/// What a client sees of a value that is wrong.
inline std::string shown(const Json& value) {
  return value.is_primitive() ? value.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 40) : value.type_name();
}

/// Text of JSON; bytes that are not UTF-8 (of a message that was cut) become U+FFFD.
inline std::string dump(const Json& value) { return value.dump(-1, ' ', false, Json::error_handler_t::replace); }
