#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace coatrt::detail {

/// Whether a code point is in a class: 'L', 'M', 'N', 'P', 'S' (general categories) or ' ' (white space).
bool in_class(char name, char32_t point);

/// One character of UTF-8 at `at`: its length, and the code point where valid. An invalid one is the longest part that
/// could have begun a character (Unicode's maximal subpart); `incomplete` where the text ends within it.
struct Utf8 {
  std::size_t length;
  char32_t point;
  bool valid, incomplete;
};
Utf8 read_utf8(std::string_view text, std::size_t at);

/// Code points of UTF-8 text. Throws where it is invalid.
std::vector<char32_t> decode_utf8(std::string_view text);
void append_utf8(std::string& text, char32_t point);
/// Replace invalid UTF-8 by U+FFFD.
std::string replace_invalid(std::string_view bytes);

/// Text in normalization form C (UAX #15).
std::vector<char32_t> to_nfc(std::vector<char32_t> text);

}  // namespace coatrt::detail
