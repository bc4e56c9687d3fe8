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

/// A token that is found in the text before anything else is done with it.
struct AddedToken {
  std::int64_t id;
  std::u32string content;
  bool strip_left, strip_right;
};

struct Tokenizer::State {
  std::vector<AddedToken> added[2];  // found in the text as given; found in the normalized text
  bool nfc = false;
  bool prefix_space = false;
  std::vector<detail::Pattern> splits;  // one after the other; matches and what lies between become pieces
  detail::Bpe bpe;
  std::vector<std::int64_t> before, after;  // added around a text by the post-processor
  std::unordered_map<std::int64_t, std::string> bytes;
  std::unordered_set<std::int64_t> special;
};

namespace detail {

/// Read a tokenizer.json; what this library cannot do exactly is refused.
Tokenizer::State read_tokenizer(std::string_view json);

}  // namespace detail
}  // namespace coatrt
