#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace coatrt::detail {

/// A shell pattern over a whole name: `*` any characters, `?` one, `[abc]`, `[a-z]`, `[!x]`; what Python's
/// fnmatch.fnmatchcase matches. Time is at most pattern length × name length.
class Glob {
 public:
  explicit Glob(std::string_view pattern);
  bool matches(std::string_view name) const;

 private:
  struct Item {
    enum Kind { kCharacter, kAny, kStar, kSet } kind = kCharacter;
    char32_t character = 0;
    bool negated = false;
    std::vector<std::pair<char32_t, char32_t>> ranges{};

    bool has(char32_t point) const;
  };
  static Item set(std::u32string_view inside);
  std::vector<Item> items_;
};

}  // namespace coatrt::detail
