#include "glob.hpp"

#include <algorithm>

#include "tokenizer/unicode.hpp"

namespace coatrt::detail {

bool Glob::Item::has(char32_t point) const {
  if (kind == kAny) return true;
  if (kind == kCharacter) return point == character;
  const bool within = std::any_of(ranges.begin(), ranges.end(),
                                  [&](const auto& range) { return range.first <= point && point <= range.second; });
  return within != negated;
}

/// What stands between [ and ], read as Python reads it: a hyphen is one of the characters where it cannot mean a range,
/// and a range whose ends are in the wrong order is nothing.
Glob::Item Glob::set(std::u32string_view inside) {
  // Chunks: the last character of each and the first of the next are the ends of a range.
  std::vector<std::u32string> chunks;
  std::size_t begin = 0;
  for (std::size_t at = inside.front() == '!' ? 2 : 1;;) {
    at = inside.find(U'-', at);
    if (at == inside.npos) break;
    chunks.emplace_back(inside.substr(begin, at - begin));
    begin = at + 1;
    at += 3;
  }
  if (begin < inside.size() || chunks.empty()) chunks.emplace_back(inside.substr(begin));
  else chunks.back() += U'-';
  for (std::size_t k = chunks.size() - 1; k > 0; --k)
    if (chunks[k - 1].back() > chunks[k].front()) {
      chunks[k - 1].pop_back();
      chunks[k - 1] += chunks[k].substr(1);
      chunks.erase(chunks.begin() + static_cast<std::ptrdiff_t>(k));
    }

  Item made;
  made.kind = Item::kSet;
  if (!chunks.front().empty() && chunks.front().front() == '!') {
    made.negated = true;
    chunks.front().erase(0, 1);
  }
  for (std::size_t k = 0; k < chunks.size(); ++k) {
    for (const char32_t point : chunks[k]) made.ranges.emplace_back(point, point);
    if (k == 0) continue;
    if (chunks[k - 1].empty()) made.ranges.emplace_back(U'-', U'-');
    else made.ranges.emplace_back(chunks[k - 1].back(), chunks[k].front());
  }
  return made;
}

Glob::Glob(std::string_view pattern) {
  const std::vector<char32_t> points = decode_utf8(pattern);
  const std::u32string text(points.begin(), points.end());
  bool closed = true;  // whether a ] may still come
  for (std::size_t at = 0; at < text.size(); ++at) {
    Item made;
    made.character = text[at];
    if (text[at] == '*') {
      made.kind = Item::kStar;
      if (!items_.empty() && items_.back().kind == Item::kStar) continue;
    } else if (text[at] == '?') {
      made.kind = Item::kAny;
    } else if (text[at] == '[' && closed) {
      std::size_t first = at + 1;  // a ] in the first place is one of the characters
      if (first < text.size() && text[first] == '!') ++first;
      const std::size_t end = text.find(U']', first + 1);
      closed = end != text.npos;
      if (closed) {
        made = set(std::u32string_view(text).substr(at + 1, end - at - 1));
        at = end;
      }
    }
    items_.push_back(std::move(made));
  }
}

bool Glob::matches(std::string_view name) const {
  const std::vector<char32_t> text = decode_utf8(name);
  // Only the last star is ever tried again: what stood before it has matched as early as it could.
  std::size_t at = 0, item = 0, star = items_.size(), resume = 0;
  while (at < text.size()) {
    if (item < items_.size() && items_[item].kind == Item::kStar) {
      star = item++;
      resume = at;
    } else if (item < items_.size() && items_[item].has(text[at])) {
      ++item, ++at;
    } else if (star < items_.size()) {
      item = star + 1;
      at = ++resume;
    } else {
      return false;
    }
  }
  while (item < items_.size() && items_[item].kind == Item::kStar) ++item;
  return item == items_.size();
}

}  // namespace coatrt::detail
