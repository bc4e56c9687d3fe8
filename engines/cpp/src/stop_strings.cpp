#include "coatrt/stop_strings.hpp"

#include <algorithm>
#include <utility>

#include "coatrt/error.hpp"

namespace coatrt {

StopStrings::StopStrings(std::vector<std::string> strings) : strings_(std::move(strings)) {
  for (const std::string& string : strings_)
    if (string.empty()) throw Error("a stop string must not be empty");
}

std::string StopStrings::add(std::string_view text) {
  if (found_) return "";
  held_ += text;
  // The string that is complete first ends the text, as if the text came byte by byte.
  std::size_t begin = held_.npos, end = held_.npos;
  for (const std::string& string : strings_) {
    const std::size_t at = held_.find(string);
    if (at == held_.npos) continue;
    const std::size_t after = at + string.size();
    if (after < end || (after == end && at < begin)) begin = at, end = after;
  }
  if (end != held_.npos) {
    found_ = true;
    return std::exchange(held_, "").substr(0, begin);
  }
  std::size_t keep = 0;
  for (const std::string& string : strings_)
    for (std::size_t size = std::min(string.size() - 1, held_.size()); size > keep; --size)
      if (held_.compare(held_.size() - size, size, string, 0, size) == 0) keep = size;
  std::string shown = held_.substr(0, held_.size() - keep);
  held_.erase(0, shown.size());
  return shown;
}

std::string StopStrings::finish() { return std::exchange(held_, ""); }

}  // namespace coatrt
