#include "tokenizer/unicode.hpp"

#include <algorithm>
#include <iterator>

#include "coatrt/error.hpp"

namespace coatrt::detail {
namespace {

struct Range {
  char32_t first, last;
};
struct Marks {
  char32_t first, last;
  int order;  // canonical combining class
};
#include "tokenizer/unicode_tables.inc"

/// The entry of a sorted table that holds `point`, or nullptr.
template <typename Entry, std::size_t size>
const Entry* entry(const Entry (&table)[size], char32_t point) {
  const Entry* at = std::upper_bound(std::begin(table), std::end(table), point,
                                     [](char32_t value, const Entry& e) { return value < e.first; });
  return at != std::begin(table) && point <= (at - 1)->last ? at - 1 : nullptr;
}

}  // namespace

bool in_class(char name, char32_t point) {
  switch (name) {
    case 'L': return entry(kL, point) != nullptr;
    case 'M': return entry(kM, point) != nullptr;
    case 'N': return entry(kN, point) != nullptr;
    case 'P': return entry(kP, point) != nullptr;
    case 'S': return entry(kS, point) != nullptr;
    default: return entry(kSpace, point) != nullptr;
  }
}

Utf8 read_utf8(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char first = byte(at);
  if (first < 0x80) return {1, first, true, false};
  const std::size_t length = first >= 0xf0 ? 4 : first >= 0xe0 ? 3 : 2;
  if (first < 0xc2 || first > 0xf4) return {1, 0, false, false};
  // The second byte's bounds keep out overlong forms, surrogates and what is beyond U+10FFFF.
  unsigned low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
  unsigned high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
  char32_t point = first & (0xff >> (length + 1));
  for (std::size_t i = 1; i < length; ++i, low = 0x80, high = 0xbf) {
    if (at + i == text.size()) return {i, 0, false, true};
    if (byte(at + i) < low || byte(at + i) > high) return {i, 0, false, false};
    point = point << 6 | (byte(at + i) & 0x3f);
  }
  return {length, point, true, false};
}

std::vector<char32_t> decode_utf8(std::string_view text) {
  std::vector<char32_t> points;
  points.reserve(text.size());
  for (std::size_t at = 0; at < text.size();) {
    const Utf8 read = read_utf8(text, at);
    if (!read.valid) throw Error("the text is no UTF-8 at byte " + std::to_string(at) + "; give UTF-8");
    points.push_back(read.point);
    at += read.length;
  }
  return points;
}

void append_utf8(std::string& text, char32_t point) {
  const auto tail = [&](int shift) { text += static_cast<char>(0x80 | (point >> shift & 0x3f)); };
  if (point < 0x80) text += static_cast<char>(point);
  else if (point < 0x800) text += static_cast<char>(0xc0 | point >> 6), tail(0);
  else if (point < 0x10000) text += static_cast<char>(0xe0 | point >> 12), tail(6), tail(0);
  else text += static_cast<char>(0xf0 | point >> 18), tail(12), tail(6), tail(0);
}

std::string replace_invalid(std::string_view bytes) {
  std::string text;
  for (std::size_t at = 0; at < bytes.size();) {
    const Utf8 read = read_utf8(bytes, at);
    if (read.valid) text += bytes.substr(at, read.length);
    else text += "\xef\xbf\xbd";
    at += read.length;
  }
  return text;
}

bool is_nfc(const std::vector<char32_t>& text) {
  int last = 0;
  for (const char32_t point : text) {
    if (point < 0x300) {
      last = 0;
      continue;
    }
    const Marks* marks = entry(kMarks, point);
    const int order = marks == nullptr ? 0 : marks->order;
    if ((order != 0 && order < last) || entry(kNotNfc, point) != nullptr) return false;
    last = order;
  }
  return true;
}

}  // namespace coatrt::detail
