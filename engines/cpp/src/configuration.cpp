#include "configuration.hpp"

#include <algorithm>
#include <optional>
#include <set>

#include "coatrt/error.hpp"
#include "formats.hpp"
#include "glob.hpp"
#include "sha256.hpp"

namespace coatrt {
namespace detail {
namespace {

// A configuration may come from an untrusted client: these bound the time to read and to match it.
constexpr std::size_t kMostKeys = 4096;
constexpr std::size_t kMostPatternCharacters = 8192;

struct FormatPattern {
  std::string text;
  Glob glob;
  std::string format;
};

std::string parse(const std::string& source, const std::string& where, const nlohmann::ordered_json& value) {
  if (!value.is_string())
    throw Error(source + ": " + where + ": no weight format " + value.dump() + "; give a text such as int8");
  try {
    check_format(value.get<std::string>());
  } catch (const Error& error) {
    throw Error(source + ": " + where + ": " + error.what());
  }
  return value.get<std::string>();
}

std::vector<FormatPattern> patterns_of(const nlohmann::ordered_json& value, const std::string& source) {
  std::vector<FormatPattern> patterns;
  std::size_t characters = 0;
  for (const auto& [text, format] : value.items()) {
    characters += text.size();
    if (characters > kMostPatternCharacters)
      throw Error(source + ": the patterns have more than " + std::to_string(kMostPatternCharacters) +
                  " characters; give fewer or shorter ones");
    patterns.push_back({text, Glob(text), parse(source, text, format)});
  }
  return patterns;
}

/// What to do about a pattern that matches nothing.
std::string advice(const std::string& pattern) {
  bool expression = pattern.find_first_of("(|+^$") != pattern.npos;
  for (const char* sign : {".*", "\\."}) expression = expression || pattern.find(sign) != pattern.npos;
  return expression ? "patterns are globs, not regular expressions: write *.mlp.* or *[qkv]_proj" : "correct or remove it";
}

}  // namespace

Configuration resolve(std::string_view text, const std::string& source, const std::vector<std::string>& matrices) {
  const auto value = parse_ordered_json(text, "configuration", source, kMostKeys);
  std::vector<std::string> given;
  bool known = value.is_object() && !value.empty();
  if (value.is_object())
    for (const auto& [key, _] : value.items()) {
      given.push_back(key);
      known = known && (key == "matrices" || key == "patterns" || key == "default");
    }
  if (!known) {
    std::sort(given.begin(), given.end());
    const std::string held = value.is_object() ? (given.empty() ? "nothing" : join(given)) : value.type_name();
    throw Error(source + " holds " + held + "; a configuration has the keys default, matrices, patterns");
  }
  for (const char* key : {"matrices", "patterns"})
    if (value.contains(key) && !value[key].is_object())
      throw Error(source + ": " + key + " is a " + value[key].type_name() + "; give an object of name: format");

  std::map<std::string, std::string> exact;
  std::vector<FormatPattern> patterns;
  std::optional<std::string> otherwise;
  if (value.contains("matrices"))
    for (const auto& [name, format] : value["matrices"].items()) exact[name] = parse(source, name, format);
  if (value.contains("patterns")) patterns = patterns_of(value["patterns"], source);
  if (value.contains("default") && !value["default"].is_null()) otherwise = parse(source, "default", value["default"]);

  const std::set<std::string> names(matrices.begin(), matrices.end());
  for (const auto& [name, _] : exact)
    if (names.count(name) == 0)
      throw Error("the configuration names " + repr(name) + ", which the model lacks; its " +
                  std::to_string(matrices.size()) + " matrices are " + matrices.front() + ", " +
                  matrices[std::min<std::size_t>(1, matrices.size() - 1)] + "; correct the name or use patterns");
  for (const FormatPattern& pattern : patterns)
    if (std::none_of(matrices.begin(), matrices.end(), [&](const auto& name) { return pattern.glob.matches(name); }))
      throw Error("the pattern " + repr(pattern.text) + " matches none of the model's " +
                  std::to_string(matrices.size()) + " matrices (like " + matrices.back() + "); " + advice(pattern.text));
  Configuration result;
  for (const std::string& name : matrices) {
    if (const auto found = exact.find(name); found != exact.end()) {
      result.formats[name] = found->second;
      continue;
    }
    const auto match = std::find_if(patterns.begin(), patterns.end(), [&](const auto& p) { return p.glob.matches(name); });
    if (match == patterns.end() && !otherwise)
      throw Error("the configuration gives " + name + " no format; name it, match it, or add a default");
    result.formats[name] = match != patterns.end() ? match->format : *otherwise;
  }
  return result;
}

}  // namespace detail

std::string Configuration::hash() const {
  const auto quoted = [](const std::string& text) {  // as Python's json.dumps: ASCII only
    return nlohmann::json(text).dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
  };
  std::string text = "{\"matrices\": {";
  for (const auto& [name, format] : formats)
    text += (text.back() == '{' ? "" : ", ") + quoted(name) + ": " + quoted(format);
  text += "}}";
  return detail::sha256(text.data(), text.size()).substr(0, 16);
}

}  // namespace coatrt
