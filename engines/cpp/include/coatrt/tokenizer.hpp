#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "coatrt/bundle.hpp"

namespace coatrt {

/// Byte-level BPE as Hugging Face's tokenizer.json describes it; another kind of tokenizer is refused (use token ids).
/// Immutable: one serves all threads.
class Tokenizer {
 public:
  /// The bundle's, its hash checked.
  explicit Tokenizer(const Bundle& bundle);
  /// From the text of a tokenizer.json.
  explicit Tokenizer(std::string_view json);

  /// Token ids of UTF-8 text; special tokens written in it become themselves.
  std::vector<std::int64_t> encode(std::string_view text, bool add_special_tokens = true) const;
  /// Text of tokens, special ones left out; bytes that are no UTF-8 become U+FFFD.
  std::string decode(const std::vector<std::int64_t>& tokens) const;
  /// Raw bytes of one token, none for a special one or an unknown id.
  std::string bytes(std::int64_t token) const;

  struct State;

 private:
  std::shared_ptr<const State> state_;
};

/// Text of tokens as they come: whole characters only.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  /// Add a token and return the characters it completes.
  std::string add(std::int64_t token);
  /// What is left at the end.
  std::string finish();

 private:
  Tokenizer tokenizer_;
  std::string held_;
};

}  // namespace coatrt
