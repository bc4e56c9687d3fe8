#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace coatrt::detail {

using Json = nlohmann::json;

/// Python's repr of a string, for messages that read the same in both languages.
std::string repr(std::string_view text);
/// Join texts with ", ".
std::string join(const std::vector<std::string>& texts);

/// Parse JSON; `what` and `source` are for the message. Nesting is bounded.
Json parse_json(std::string_view text, const std::string& what, const std::string& source);
/// The same with keys in the order of the text. Each key is compared with those before it, so their number is bounded.
nlohmann::ordered_json parse_ordered_json(std::string_view text, const std::string& what, const std::string& source,
                                          std::size_t most_keys);

/// The value of a key, or nullptr where `value` is not an object or lacks it.
const Json* find(const Json& value, const char* key);
/// A string field, or nullptr.
const std::string* find_text(const Json& value, const char* key);
/// Whether `value` is a whole number from `least` to 2^62; then `number` is set.
bool whole(const Json* value, std::int64_t least, std::int64_t& number);

/// a·b, or -1 where it would pass 2^62 or an argument is negative.
std::int64_t product(std::int64_t a, std::int64_t b);

}  // namespace coatrt::detail
