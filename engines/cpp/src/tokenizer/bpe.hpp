#pragma once
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace coatrt::detail {

/// Byte-level byte-pair encoding: tokens are byte strings, merges are pairs of tokens by rank.
class Bpe {
 public:
  std::unordered_map<std::string, std::int64_t> vocabulary;
  bool ignore_merges = false;  ///< a piece that is a token needs no merges

  void add_merge(std::int64_t left, std::int64_t right, std::int64_t made, std::int64_t rank);
  /// Prepare after the vocabulary is filled.
  void finish();
  /// Append the tokens of one piece of text.
  void encode(std::string_view piece, std::vector<std::int64_t>& tokens) const;

 private:
  struct Merge {
    std::int64_t rank, made;
  };
  const Merge* merge(std::int64_t left, std::int64_t right) const;

  std::unordered_map<std::uint64_t, Merge> merges_;
  std::vector<std::int64_t> bytes_;  // the token of each byte, -1 for none
};

}  // namespace coatrt::detail
