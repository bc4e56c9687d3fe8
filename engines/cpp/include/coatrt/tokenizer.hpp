#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "coatrt/bundle.hpp"

namespace coatrt {

/// Byte-level BPE from Hugging Face's tokenizer.json. Other kinds of tokenizer are refused: pass token ids instead.
/// Immutable, so that all threads can share one.
class Tokenizer {
 public:
  /// The bundle's tokenizer; its hash is checked.
  explicit Tokenizer(const Bundle& bundle);
  /// From the text of a tokenizer.json.
  explicit Tokenizer(std::string_view json);

  /// Token ids of UTF-8 text. Special tokens that the text spells out become special tokens.
  std::vector<std::int64_t> encode(std::string_view text, bool add_special_tokens = true) const;
  /// Text of tokens; invalid UTF-8 becomes U+FFFD.
  std::string decode(const std::vector<std::int64_t>& tokens, bool skip_special_tokens = true) const;
  /// Raw bytes of one token; empty for an unknown id, and for a special token where these are skipped.
  std::string bytes(std::int64_t token, bool skip_special_tokens = true) const;

  struct State;

 private:
  std::shared_ptr<const State> state_;
};

/// Text of a stream of tokens, in whole characters.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  /// Add a token; returns the characters it completes.
  std::string add(std::int64_t token);
  /// The rest, at the end of the stream.
  std::string finish();

 private:
  Tokenizer tokenizer_;
  std::string held_;
};

}  // namespace coatrt
