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

  /// Length of the match at `at`, 0 for none. `steps` is what the caller grants, for all matches of a text together; what
  /// this one takes is subtracted, and an Error says that they do not suffice.
  std::size_t match(const std::vector<char32_t>& text, std::size_t at, std::size_t end, std::size_t& steps) const;
  /// Many times what the pattern of any known tokenizer takes on a text of so many characters.
  static std::size_t steps_for(std::size_t characters) { return 10'000'000 + 200 * characters; }

  struct Item;
  using Sequence = std::vector<Item>;
  using Alternatives = std::vector<Sequence>;

 private:
  Pattern(std::unique_ptr<Alternatives> alternatives, std::size_t items);
  std::unique_ptr<Alternatives> alternatives_;
  std::size_t items_ = 0;
};

}  // namespace coatrt::detail
