#include "json.hpp"

#include "coatrt/json_check.hpp"

namespace coatrt::detail {
namespace {
constexpr const char* kRemedy = "give a JSON file";
constexpr std::int64_t kMost = std::int64_t{1} << 62;
}  // namespace

std::string repr(std::string_view text) {
  const char quote = text.find('\'') != text.npos && text.find('"') == text.npos ? '"' : '\'';
  std::string out(1, quote);
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == quote || c == '\\') out += '\\', out += c;
    else if (c == '\n') out += "\\n";
    else if (c == '\r') out += "\\r";
    else if (c == '\t') out += "\\t";
    else if (byte < 0x20 || byte == 0x7f) out += "\\x", out += "0123456789abcdef"[byte >> 4], out += "0123456789abcdef"[byte & 15];
    else out += c;
  }
  return out + quote;
}

std::string join(const std::vector<std::string>& texts) {
  std::string out;
  for (const auto& text : texts) out += (out.empty() ? "" : ", ") + text;
  return out;
}

Json parse_json(std::string_view text, const std::string& what, const std::string& source) {
  check_json(text, what + " " + source, kRemedy);
  return Json::parse(text.begin(), text.end());
}

nlohmann::ordered_json parse_ordered_json(std::string_view text, const std::string& what, const std::string& source,
                                          std::size_t most_keys) {
  JsonLimits limits;
  limits.keys = most_keys;
  check_json(text, what + " " + source, kRemedy, limits);
  return nlohmann::ordered_json::parse(text.begin(), text.end());
}

const Json* find(const Json& value, const char* key) {
  if (!value.is_object()) return nullptr;
  const auto found = value.find(key);
  return found == value.end() ? nullptr : &*found;
}

const std::string* find_text(const Json& value, const char* key) {
  const Json* found = find(value, key);
  return found != nullptr && found->is_string() ? found->get_ptr<const std::string*>() : nullptr;
}

bool whole(const Json* value, std::int64_t least, std::int64_t& number) {
  if (value == nullptr || !value->is_number_integer()) return false;
  if (value->is_number_unsigned() && value->get<std::uint64_t>() > static_cast<std::uint64_t>(kMost)) return false;
  number = value->get<std::int64_t>();
  return number >= least;
}

std::int64_t product(std::int64_t a, std::int64_t b) {
  if (a < 0 || b < 0 || (b != 0 && a > kMost / b)) return -1;
  return a * b;
}

}  // namespace coatrt::detail
