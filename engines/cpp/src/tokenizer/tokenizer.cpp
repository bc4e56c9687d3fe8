#include "tokenizer/tokenizer.hpp"

#include "coatrt/error.hpp"
#include "state.hpp"
#include "tokenizer/unicode.hpp"

namespace coatrt {
namespace {

using Text = std::vector<char32_t>;

struct Span {
  std::size_t begin, end;
};

/// The longest added token that begins at `at`, or nullptr.
const AddedToken* added_at(const Tokenizer::State::Added& tokens, const Text& text, std::size_t at, std::size_t end) {
  const auto found = tokens.find(text[at]);
  if (found == tokens.end()) return nullptr;
  for (const AddedToken& token : found->second)
    if (token.content.size() <= end - at && std::equal(token.content.begin(), token.content.end(), text.begin() + static_cast<std::ptrdiff_t>(at)))
      return &token;
  return nullptr;
}

struct Encoder {
  const Tokenizer::State& state;
  const Text& text;
  std::vector<std::int64_t>& tokens;
  std::size_t& steps;  // of pattern matching, for the whole text

  /// Find the added tokens of a group. The text between them goes to the next group, after the last group to `pieces`.
  void with_added(Span span, std::size_t group) const {
    if (group == std::size(state.added)) return pieces(span);
    if (group == 1 && state.nfc) {  // the second group is looked for in the normalized text
      const Text normal = detail::to_nfc({text.begin() + static_cast<std::ptrdiff_t>(span.begin),
                                          text.begin() + static_cast<std::ptrdiff_t>(span.end)});
      return Encoder{state, normal, tokens, steps}.find_added({0, normal.size()}, group);
    }
    find_added(span, group);
  }

  void find_added(Span span, std::size_t group) const {
    std::size_t begin = span.begin;
    for (std::size_t at = span.begin; at < span.end;) {
      const AddedToken* token = added_at(state.added[group], text, at, span.end);
      if (token == nullptr) {
        ++at;
        continue;
      }
      std::size_t left = at, right = at + token->content.size();
      while (token->strip_left && left > begin && detail::in_class(' ', text[left - 1])) --left;
      while (token->strip_right && right < span.end && detail::in_class(' ', text[right])) ++right;
      if (left > begin) with_added({begin, left}, group + 1);
      tokens.push_back(token->id);
      begin = at = right;
    }
    if (begin < span.end) with_added({begin, span.end}, group + 1);
  }

  void pieces(Span span) const {
    if (state.prefix_space && text[span.begin] != ' ') {
      Text spaced{U' '};
      spaced.insert(spaced.end(), text.begin() + static_cast<std::ptrdiff_t>(span.begin),
                    text.begin() + static_cast<std::ptrdiff_t>(span.end));
      Encoder{state, spaced, tokens, steps}.split({0, spaced.size()}, 0);
    } else {
      split(span, 0);
    }
  }

  /// Split into the matches of a pattern and the text between them, then each by the next pattern.
  void split(Span span, std::size_t pattern) const {
    if (pattern == state.splits.size()) return encode(span);
    std::size_t begin = span.begin;
    for (std::size_t at = span.begin; at < span.end;) {
      const std::size_t length = state.splits[pattern].match(text, at, span.end, steps);
      if (length == 0) {
        ++at;
        continue;
      }
      if (begin < at) split({begin, at}, pattern + 1);
      split({at, at + length}, pattern + 1);
      begin = at += length;
    }
    if (begin < span.end) split({begin, span.end}, pattern + 1);
  }

  void encode(Span span) const {
    std::string bytes;
    for (std::size_t at = span.begin; at < span.end; ++at) detail::append_utf8(bytes, text[at]);
    state.bpe.encode(bytes, tokens);
  }
};

}  // namespace

Tokenizer::Tokenizer(const Bundle& bundle)
    : Tokenizer(bundle.state()->read("tokenizer/tokenizer.json")->text()) {}

Tokenizer::Tokenizer(std::string_view json)
    : state_(std::make_shared<const State>(detail::read_tokenizer(json))) {}

std::vector<std::int64_t> Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  const Text points = detail::decode_utf8(text);
  std::vector<std::int64_t> tokens;
  if (add_special_tokens) tokens = state_->before;
  std::size_t steps = detail::Pattern::steps_for(points.size());
  if (!points.empty()) Encoder{*state_, points, tokens, steps}.with_added({0, points.size()}, 0);
  if (add_special_tokens) tokens.insert(tokens.end(), state_->after.begin(), state_->after.end());
  return tokens;
}

std::string Tokenizer::bytes(std::int64_t token, bool skip_special_tokens) const {
  const auto found = state_->bytes.find(token);
  const bool skipped = skip_special_tokens && state_->special.count(token) != 0;
  return found == state_->bytes.end() || skipped ? "" : found->second;
}

std::string Tokenizer::decode(const std::vector<std::int64_t>& tokens, bool skip_special_tokens) const {
  std::string all;
  for (const std::int64_t token : tokens) all += bytes(token, skip_special_tokens);
  return detail::replace_invalid(all);
}

std::string TextStream::add(std::int64_t token) {
  held_ += tokenizer_.bytes(token);
  std::size_t at = 0;
  while (at < held_.size()) {
    const detail::Utf8 read = detail::read_utf8(held_, at);
    if (read.incomplete) break;
    at += read.length;
  }
  const std::string whole = detail::replace_invalid(std::string_view(held_).substr(0, at));
  held_.erase(0, at);
  return whole;
}

std::string TextStream::finish() {
  const std::string rest = detail::replace_invalid(held_);
  held_.clear();
  return rest;
}

}  // namespace coatrt
