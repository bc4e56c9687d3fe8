#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "coatrt/tokenizer.hpp"
#include "json.hpp"
#include "tokenizer/bpe.hpp"
#include "tokenizer/pattern.hpp"

namespace coatrt {

/// A token that is looked for before the text is normalized or split.
struct AddedToken {
  std::int64_t id;
  std::u32string content;
  bool strip_left, strip_right;
};

struct Tokenizer::State {
  using Added = std::unordered_map<char32_t, std::vector<AddedToken>>;  // by first character, longest first
  Added added[2];  // looked for in the text as passed; in the normalized text
  bool nfc = false;
  bool prefix_space = false;
  std::vector<detail::Pattern> splits;  // applied in order; matches and the text between them become pieces
  detail::Bpe bpe;
  std::vector<std::int64_t> before, after;  // special tokens of the post-processor
  std::unordered_map<std::int64_t, std::string> bytes;
  std::unordered_set<std::int64_t> special;
};

namespace detail {

/// Read a tokenizer.json. Throws where this library would not give the tokens of Hugging Face.
Tokenizer::State read_tokenizer(std::string_view json);

}  // namespace detail
}  // namespace coatrt
