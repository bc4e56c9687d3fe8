#pragma once
#include <memory>
#include <string_view>
#include <vector>

namespace coatrt::detail {

/// A regular expression as pre-tokenizers use them: classes, groups, lookahead, greedy quantifiers over characters.
/// What is beyond that (quantified groups, lazy quantifiers, look-behind, back references) is refused when it is read.
class Pattern {
 public:
  explicit Pattern(std::string_view text);
  /// A literal text.
  static Pattern literal(std::string_view text);
  ~Pattern();
  Pattern(Pattern&&) noexcept;
  Pattern& operator=(Pattern&&) noexcept;

  /// Length of the match at `at`, 0 for none.
  std::size_t match(const std::vector<char32_t>& text, std::size_t at, std::size_t end) const;

  struct Item;
  using Sequence = std::vector<Item>;
  using Alternatives = std::vector<Sequence>;

 private:
  explicit Pattern(std::unique_ptr<Alternatives> alternatives);
  std::unique_ptr<Alternatives> alternatives_;
};

}  // namespace coatrt::detail
