#include "tokenizer/unicode.hpp"

#include <algorithm>
#include <iterator>
#include <utility>

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
struct Apart {
  char32_t first;
  char32_t parts[4];  // zeros at the end
};
struct Pair {
  char32_t first, second, made;
};
#include "tokenizer/unicode_tables.inc"

// Hangul syllables are leading + vowel + trailing, by arithmetic (Unicode, section 3.12).
constexpr char32_t kSyllables = 0xac00, kLeading = 0x1100, kVowels = 0x1161, kTrailing = 0x11a7;
constexpr char32_t kLeadings = 19, kVowelCount = 21, kTrailings = 28;

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
    if (!read.valid) throw Error("the text is not UTF-8 at byte " + std::to_string(at) + "; give UTF-8");
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

namespace {

int order_of(char32_t point) {
  const Marks* marks = entry(kMarks, point);
  return marks == nullptr ? 0 : marks->order;
}

void decompose(char32_t point, std::vector<char32_t>& out) {
  if (const char32_t at = point - kSyllables; point >= kSyllables && at < kLeadings * kVowelCount * kTrailings) {
    out.push_back(kLeading + at / (kVowelCount * kTrailings));
    out.push_back(kVowels + at / kTrailings % kVowelCount);
    if (at % kTrailings != 0) out.push_back(kTrailing + at % kTrailings);
    return;
  }
  const Apart* found = std::lower_bound(std::begin(kApart), std::end(kApart), point,
                                        [](const Apart& a, char32_t value) { return a.first < value; });
  if (found == std::end(kApart) || found->first != point) return out.push_back(point);
  for (const char32_t part : found->parts)
    if (part != 0) out.push_back(part);
}

/// What two code points compose to, 0 for nothing.
char32_t composed(char32_t a, char32_t b) {
  if (a >= kLeading && a < kLeading + kLeadings && b >= kVowels && b < kVowels + kVowelCount)
    return kSyllables + ((a - kLeading) * kVowelCount + (b - kVowels)) * kTrailings;
  if (a >= kSyllables && a < kSyllables + kLeadings * kVowelCount * kTrailings && (a - kSyllables) % kTrailings == 0 &&
      b > kTrailing && b < kTrailing + kTrailings)
    return a + (b - kTrailing);
  const auto less = [](const Pair& x, const Pair& y) { return std::make_pair(x.first, x.second) < std::make_pair(y.first, y.second); };
  const Pair* found = std::lower_bound(std::begin(kPairs), std::end(kPairs), Pair{a, b, 0}, less);
  return found != std::end(kPairs) && found->first == a && found->second == b ? found->made : 0;
}

}  // namespace

std::vector<char32_t> to_nfc(std::vector<char32_t> text) {
  if (std::all_of(text.begin(), text.end(), [](char32_t point) { return point < 0x300; })) return text;
  std::vector<char32_t> apart;
  for (const char32_t point : text) decompose(point, apart);
  for (auto at = apart.begin(); at != apart.end();) {  // runs of marks, by class
    const auto end = std::find_if(at, apart.end(), [](char32_t point) { return order_of(point) == 0; });
    std::stable_sort(at, end, [](char32_t a, char32_t b) { return order_of(a) < order_of(b); });
    at = end == apart.end() ? end : end + 1;
  }
  std::vector<char32_t> made;
  std::size_t starter = apart.size();  // place in `made` of the last character of class 0; none yet
  int last = 0;                        // class of what stands between it and here; 0 for nothing
  for (const char32_t point : apart) {
    const int order = order_of(point);
    const bool reaches = starter < made.size() && (made.size() == starter + 1 || (last != 0 && last < order));
    if (const char32_t joined = reaches ? composed(made[starter], point) : 0; joined != 0) {
      made[starter] = joined;
      continue;
    }
    if (order == 0) starter = made.size();
    last = order;
    made.push_back(point);
  }
  return made;
}

}  // namespace coatrt::detail
