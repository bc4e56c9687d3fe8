#include "tokenizer/pattern.hpp"

#include <algorithm>
#include <limits>
#include <string>

#include "coatrt/error.hpp"
#include "tokenizer/unicode.hpp"

namespace coatrt::detail {

namespace {

constexpr std::size_t kEndless = std::numeric_limits<std::size_t>::max();
constexpr int kDepth = 16;
constexpr std::size_t kMostItems = 1024;  // the matcher recurses once an item

}  // namespace

/// What one character may be: any of the terms, or none of them where negated.
struct CharacterClass {
  struct Term {
    char32_t first, last;  // a range, where `name` is 0
    char name;             // else a class of `in_class`
    bool negated;
  };
  std::vector<Term> terms;
  bool negated = false;
  bool any_case = false;

  bool has(char32_t point) const {
    const auto holds = [&](char32_t at) {
      for (const Term& term : terms)
        if ((term.name != 0 ? in_class(term.name, at) : term.first <= at && at <= term.last) != term.negated) return true;
      return false;
    };
    if (!any_case) return holds(point) != negated;
    const char32_t lower = point == 0x17f ? U's' : point == 0x212a ? U'k' : point >= 'A' && point <= 'Z' ? point + 32 : point;
    const char32_t upper = lower >= 'a' && lower <= 'z' ? lower - 32 : lower;
    return (holds(point) || holds(lower) || holds(upper)) != negated;
  }
};

struct Pattern::Item {
  std::size_t number = 0;  // among all items of the pattern
  enum Kind { kClass, kGroup, kAhead, kNotAhead } kind = kClass;
  CharacterClass what;
  Alternatives group;
  std::size_t least = 1, most = 1;
  bool possessive = false;
};

namespace {

using Item = Pattern::Item;

/// Recursive descent over the pattern's text.
class Parser {
 public:
  explicit Parser(std::string_view text) : text_(decode_utf8(text)), shown_(text.substr(0, 200)) {}

  std::size_t items() const { return items_; }
  Pattern::Alternatives parse() {
    Pattern::Alternatives result = alternatives(false, 0);
    if (at_ != text_.size()) refuse("an unmatched )");
    return result;
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const {
    throw Error("the tokenizer's pattern " + shown_ + " has " + what + ", which is not supported; pass token ids instead");
  }
  bool more() const { return at_ < text_.size(); }
  char32_t peek() const { return more() ? text_[at_] : 0; }
  bool take(std::string_view expected) {
    for (std::size_t i = 0; i < expected.size(); ++i)
      if (at_ + i >= text_.size() || text_[at_ + i] != static_cast<unsigned char>(expected[i])) return false;
    at_ += expected.size();
    return true;
  }

  Pattern::Alternatives alternatives(bool any_case, int depth) {
    if (depth > kDepth) refuse("groups nested too deeply");
    Pattern::Alternatives result(1);
    while (more() && peek() != ')') {
      if (take("|")) result.emplace_back();
      else result.back().push_back(item(any_case, depth));
    }
    return result;
  }

  Item item(bool any_case, int depth) {
    Item made;
    made.number = items_++;
    if (items_ > kMostItems) refuse("more than 1024 items");
    if (take("(")) {
      made.kind = Item::kGroup;
      if (take("?i:")) any_case = true;
      else if (take("?!")) made.kind = Item::kNotAhead;
      else if (take("?=")) made.kind = Item::kAhead;
      else if (!take("?:") && peek() == '?') refuse("a group it begins with (?");
      made.group = alternatives(any_case, depth + 1);
      if (!take(")")) refuse("an unmatched (");
    } else {
      made.what = one(any_case);
    }
    quantifier(made);
    if (made.kind != Item::kClass && made.most != 1) refuse("a repeated group");
    if ((made.kind == Item::kAhead || made.kind == Item::kNotAhead) && made.least != 1) refuse("an optional lookahead");
    return made;
  }

  void quantifier(Item& made) {
    if (take("?")) made.least = 0;
    else if (take("*")) made.least = 0, made.most = kEndless;
    else if (take("+")) made.most = kEndless;
    else if (take("{")) {
      made.least = made.most = number();
      if (take(",")) made.most = peek() == '}' ? kEndless : number();
      if (!take("}") || made.most < made.least) refuse("an invalid {}");
    } else return;
    if (take("+")) made.possessive = true;
    if (peek() == '?' || peek() == '*' || peek() == '{') refuse("a lazy or doubled quantifier");
  }

  std::size_t number() {
    std::size_t value = 0, digits = 0;
    for (; peek() >= '0' && peek() <= '9' && digits < 6; ++at_, ++digits) value = 10 * value + (peek() - '0');
    if (digits == 0) refuse("an invalid {}");
    return value;
  }

  CharacterClass one(bool any_case) {
    CharacterClass made;
    made.any_case = any_case;
    if (take("[")) {
      made.negated = take("^");
      while (!take("]")) {
        if (!more()) refuse("an unmatched [");
        if (peek() == '[' || take("&&")) refuse("a class within a class");
        CharacterClass::Term term = escaped_or_plain();
        if (term.name == 0 && peek() == '-' && at_ + 1 < text_.size() && text_[at_ + 1] != ']') {
          ++at_;
          const CharacterClass::Term last = escaped_or_plain();
          if (last.name != 0 || last.first < term.first) refuse("an invalid range");
          term.last = last.first;
        }
        made.terms.push_back(term);
      }
    } else if (take(".")) {
      made.terms.push_back({'\n', '\n', 0, true});
    } else if (peek() == '^' || peek() == '$' || peek() == '*' || peek() == '+' || peek() == '?') {
      refuse("an anchor or a lone quantifier");
    } else {
      made.terms.push_back(escaped_or_plain());
    }
    return made;
  }

  CharacterClass::Term escaped_or_plain() {
    const auto literal = [](char32_t point) { return CharacterClass::Term{point, point, 0, false}; };
    if (!take("\\")) return literal(text_[at_++]);
    if (!more()) refuse("a lone backslash");
    const char32_t letter = text_[at_++];
    switch (letter) {
      case 's': return {0, 0, ' ', false};
      case 'S': return {0, 0, ' ', true};
      case 'r': return literal('\r');
      case 'n': return literal('\n');
      case 't': return literal('\t');
      case 'p':
      case 'P':
        for (const char name : {'L', 'M', 'N', 'P', 'S'})
          if (take(std::string("{") + name + "}") || take(std::string(1, name))) return {0, 0, name, letter == 'P'};
        refuse("a \\p other than L, M, N, P or S");
      default:
        if ((letter >= 'a' && letter <= 'z') || (letter >= 'A' && letter <= 'Z') || (letter >= '0' && letter <= '9'))
          refuse("an escape");
        return literal(letter);
    }
  }

  std::vector<char32_t> text_;
  std::string shown_;
  std::size_t at_ = 0, items_ = 0;
};

/// Backtracking match. What is left to match is a chain of frames on the stack, so its depth is that of the pattern, never
/// that of the text. Groups are not repeated, so what follows an item is always the same: where one has failed at a place
/// it fails there again, and a match that takes long notes such places, which makes its time polynomial.
class Matcher {
 public:
  struct Rest {
    const Pattern::Sequence* sequence;
    std::size_t item;
    const Rest* then;
  };

  Matcher(const std::vector<char32_t>& text, std::size_t begin, std::size_t end, std::size_t items, std::size_t& steps)
      : text_(text), begin_(begin), end_(end), items_(items), steps_(steps) {}

  bool run(const Rest* rest, std::size_t at, std::size_t& stop) {
    while (rest != nullptr && rest->item == rest->sequence->size()) rest = rest->then;
    if (rest == nullptr) return stop = at, true;
    const Item& item = (*rest->sequence)[rest->item];
    if (noting_ && failed_[place(item, at)]) return false;
    if (matched(item, rest, at, stop)) return true;
    if (noting_) failed_[place(item, at)] = true;
    return false;
  }

  bool matched(const Item& item, const Rest* rest, std::size_t at, std::size_t& stop) {
    const Rest after{rest->sequence, rest->item + 1, rest->then};
    if (item.kind == Item::kClass) {
      std::size_t count = 0;
      while (count < item.most && at + count < end_ && item.what.has(text_[at + count])) ++count;
      spend(count + 1);
      if (count < item.least) return false;
      if (item.possessive) return run(&after, at + count, stop);
      for (;; --count) {
        if (run(&after, at + count, stop)) return true;
        if (count == item.least) return false;
        spend(1);
        if (++turns_back_ == kLight) note();
      }
    }
    bool found = false;
    spend(item.group.size());
    for (const Pattern::Sequence& sequence : item.group) {
      const Rest inside{&sequence, 0, item.kind == Item::kGroup ? &after : nullptr};
      std::size_t ahead = 0;
      if (!run(&inside, at, item.kind == Item::kGroup ? stop : ahead)) continue;
      if (item.kind == Item::kGroup) return true;
      found = true;
      break;
    }
    if (item.kind == Item::kGroup) return item.least == 0 && run(&after, at, stop);
    return found == (item.kind == Item::kAhead) && run(&after, at, stop);
  }

 private:
  static constexpr std::size_t kLight = 1024;                      // backtracks before failures are noted
  static constexpr std::size_t kMostNoted = std::size_t{1} << 28;  // bits

  void spend(std::size_t count) {
    if (count > steps_) throw Error("the tokenizer's pattern takes too many steps on this text; shorten it or pass token ids");
    steps_ -= count;
  }
  void note() {
    if (end_ - begin_ >= kMostNoted / items_) return;
    noting_ = true;
    failed_.resize(items_ * (end_ - begin_ + 1));
    spend(failed_.size() / 64);
  }
  std::size_t place(const Item& item, std::size_t at) const { return item.number * (end_ - begin_ + 1) + (at - begin_); }

  const std::vector<char32_t>& text_;
  const std::size_t begin_, end_, items_;
  std::size_t& steps_;
  std::size_t turns_back_ = 0;
  bool noting_ = false;
  std::vector<bool> failed_;  // by item and place
};

}  // namespace

Pattern::Pattern(std::unique_ptr<Alternatives> alternatives, std::size_t items)
    : alternatives_(std::move(alternatives)), items_(items) {}
Pattern::Pattern(std::string_view text) {
  Parser parser(text);
  alternatives_ = std::make_unique<Alternatives>(parser.parse());
  items_ = parser.items();
}
Pattern::~Pattern() = default;
Pattern::Pattern(Pattern&&) noexcept = default;
Pattern& Pattern::operator=(Pattern&&) noexcept = default;

Pattern Pattern::literal(std::string_view text) {
  auto made = std::make_unique<Alternatives>(1);
  const std::vector<char32_t> points = decode_utf8(text);
  if (points.size() > kMostItems) throw Error("the tokenizer splits at a text of more than 1024 characters; pass token ids instead");
  for (const char32_t point : points) {
    Item item;
    item.number = made->front().size();
    item.what.terms.push_back({point, point, 0, false});
    made->front().push_back(std::move(item));
  }
  return Pattern(std::move(made), points.size());
}

std::size_t Pattern::match(const std::vector<char32_t>& text, std::size_t at, std::size_t end, std::size_t& steps) const {
  Matcher matcher(text, at, end, std::max<std::size_t>(1, items_), steps);
  for (const Sequence& sequence : *alternatives_) {
    const Matcher::Rest rest{&sequence, 0, nullptr};
    std::size_t stop = at;
    if (matcher.run(&rest, at, stop) && stop > at) return stop - at;
  }
  return 0;
}

}  // namespace coatrt::detail
