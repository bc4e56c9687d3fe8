#include "coatrt/json_check.hpp"

#include <algorithm>
#include <set>
#include <vector>

#include "coatrt/error.hpp"
#include "json.hpp"

namespace coatrt {
namespace {

/// The end of a text, printable whatever it is.
std::string shown(std::string_view end) {
  constexpr std::size_t kMost = 20;
  std::string text(end.substr(end.size() - std::min(end.size(), kMost)));
  for (char& c : text)
    if (c < 0x20 || c > 0x7e) c = '?';
  return detail::repr(text);
}

/// Reads the text and keeps nothing but the keys of the objects that are open.
class Check {
 public:
  Check(std::string_view text, const std::string& what, const std::string& remedy, const JsonLimits& limits)
      : text_(text), what_(what), remedy_(remedy), limits_(limits) {}

  // What nlohmann's reader calls.
  bool null() { return true; }
  bool boolean(bool) { return true; }
  bool number_integer(std::int64_t) { return true; }
  bool number_unsigned(std::uint64_t) { return true; }
  bool number_float(double, const std::string&) { return true; }
  bool string(std::string&) { return true; }
  bool binary(std::vector<std::uint8_t>&) { return true; }
  bool start_object(std::size_t) { return open(); }
  bool start_array(std::size_t) { return open(); }
  bool end_object() { return close(); }
  bool end_array() { return close(); }
  bool key(std::string& name) {
    if (++count_ > limits_.keys) throw Error(what_ + " has more than " + std::to_string(limits_.keys) + " keys; give fewer");
    if (!keys_.back().insert(name).second)
      throw Error(what_ + " gives the key " + detail::repr(name.substr(0, 40)) + " twice in one object; give it once");
    return true;
  }
  /// `position` counts the bytes up to the wrong one, from 1.
  bool parse_error(std::size_t position, const std::string& token, const nlohmann::detail::exception& error) {
    const std::string_view before = text_.substr(0, position == 0 ? 0 : position - 1);
    const std::string after = before.empty() ? "" : " after " + shown(before);
    constexpr int kNumberOverflow = 406;
    const std::string why = error.id == kNumberOverflow    ? "the number " + shown(token) + " is outside the range of float64"
                            : position > text_.size()      ? "it ends too early"
                            : (text_[before.size()] & 128) ? "text that is not UTF-8, or not within quotes"
                                                           : "unexpected " + shown(text_.substr(before.size(), 1)) + after;
    throw Error(what_ + " is not JSON (line " + std::to_string(1 + std::count(before.begin(), before.end(), '\n')) + ", byte " +
                std::to_string(before.size() + 1) + ": " + why + "); " + remedy_);
  }

 private:
  bool open() {
    keys_.emplace_back();
    if (keys_.size() > limits_.depth)
      throw Error(what_ + " is nested deeper than " + std::to_string(limits_.depth) + " levels; give fewer");
    return true;
  }
  bool close() {
    keys_.pop_back();
    return true;
  }

  std::string_view text_;
  const std::string &what_, &remedy_;
  const JsonLimits& limits_;
  std::size_t count_ = 0;
  std::vector<std::set<std::string>> keys_;
};

}  // namespace

void check_json(std::string_view text, const std::string& what, const std::string& remedy, const JsonLimits& limits) {
  Check check(text, what, remedy, limits);
  nlohmann::json::sax_parse(text.begin(), text.end(), &check);
}

}  // namespace coatrt
