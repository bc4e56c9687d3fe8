#pragma once
#include <coatrt/coatrt.hpp>
#include <coatrt/json_check.hpp>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <string>
#include <vector>

#include "errors.hpp"

/// The fields of an untrusted JSON object. A field that is null counts as missing; one that nobody knows is refused.
class Fields {
 public:
  Fields(const Json& object, std::string path, std::initializer_list<const char*> known)
      : object_(object), path_(std::move(path)) {
    const std::string what = path_.empty() ? "the request" : path_;
    if (!object.is_object()) throw ApiError{400, what + " must be an object, got " + shown(object), path_, ""};
    for (const auto& [key, value] : object.items()) {
      if (std::find(known.begin(), known.end(), key) != known.end()) continue;
      std::string names;
      for (const char* name : known) names += (names.empty() ? "" : ", ") + std::string(name);
      throw ApiError{400, what + " has the unknown field " + shown(Json(key)) + "; allowed: " + names, name_of(key.substr(0, 64)), ""};
    }
  }

  /// The field, or nullptr where it is missing or null.
  const Json* find(const char* key) const {
    const auto found = object_.find(key);
    return found == object_.end() || found->is_null() ? nullptr : &*found;
  }
  const Json& required(const char* key) const {
    if (const Json* found = find(key)) return *found;
    refuse(key, "is missing; give it");
  }
  std::string name_of(const std::string& key) const { return path_.empty() ? key : path_ + "." + key; }

  [[noreturn]] void refuse(const char* key, const std::string& rule) const {
    throw ApiError{400, name_of(key) + " " + rule, name_of(key), ""};
  }
  std::string text(const char* key, const Json& value) const {
    if (!value.is_string()) refuse(key, "must be a text, got " + shown(value));
    return value.get<std::string>();
  }
  std::int64_t whole(const char* key, std::int64_t least, std::int64_t most, std::int64_t otherwise) const {
    const Json* value = find(key);
    return value == nullptr ? otherwise : whole(key, *value, least, most);
  }
  std::int64_t whole(const char* key, const Json& value, std::int64_t least, std::int64_t most) const {
    constexpr auto greatest = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    const bool fits = value.is_number_unsigned() ? value.get<std::uint64_t>() <= greatest : value.is_number_integer();
    if (!fits || value.get<std::int64_t>() < least || value.get<std::int64_t>() > most)
      refuse(key, "must be a whole number from " + std::to_string(least) + " to " + std::to_string(most) + ", got " + shown(value));
    return value.get<std::int64_t>();
  }
  /// `rule` says what is allowed: "must be …".
  double real(const char* key, double least, double most, double otherwise, const char* rule) const {
    const Json* value = find(key);
    if (value == nullptr) return otherwise;
    if (!value->is_number() || !(value->get<double>() >= least && value->get<double>() <= most))
      refuse(key, std::string(rule) + ", got " + shown(*value));
    return value->get<double>();
  }
  bool boolean(const char* key) const {
    const Json* value = find(key);
    if (value == nullptr) return false;
    if (!value->is_boolean()) refuse(key, "must be true or false, got " + shown(*value));
    return value->get<bool>();
  }

 private:
  const Json& object_;
  std::string path_;
};

/// Parse an untrusted request. Depth is bounded because walking a value recurses; the number of keys, because each is
/// compared with those before it.
inline Json parse_json(const std::string& body) {
  try {
    coatrt::check_json(body, "the request", R"(send an object like {"model": "NAME", "prompt": "Once"})", {32, 5000});
  } catch (const coatrt::Error& error) {
    throw ApiError{400, error.what(), "", ""};
  }
  return Json::parse(body);
}
