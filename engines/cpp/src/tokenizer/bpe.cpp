#include "tokenizer/bpe.hpp"

#include <functional>
#include <queue>
#include <tuple>

namespace coatrt::detail {
namespace {

std::uint64_t key(std::int64_t left, std::int64_t right) {
  return static_cast<std::uint64_t>(left) << 32 | static_cast<std::uint64_t>(right);
}

}  // namespace

void Bpe::add_merge(std::int64_t left, std::int64_t right, std::int64_t made, std::int64_t rank) {
  merges_.insert_or_assign(key(left, right), Merge{rank, made});
}

void Bpe::finish() {
  bytes_.assign(256, -1);
  for (int byte = 0; byte < 256; ++byte)
    if (const auto found = vocabulary.find(std::string(1, static_cast<char>(byte))); found != vocabulary.end())
      bytes_[static_cast<std::size_t>(byte)] = found->second;
}

const Bpe::Merge* Bpe::merge(std::int64_t left, std::int64_t right) const {
  const auto found = merges_.find(key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

void Bpe::encode(std::string_view piece, std::vector<std::int64_t>& tokens) const {
  if (ignore_merges) {
    if (const auto found = vocabulary.find(std::string(piece)); found != vocabulary.end()) {
      tokens.push_back(found->second);
      return;
    }
  }
  struct Symbol {
    std::int64_t token;
    std::size_t before, after;  // neighbours; `none` at the ends
  };
  constexpr std::size_t none = static_cast<std::size_t>(-1);
  std::vector<Symbol> symbols;
  symbols.reserve(piece.size());
  for (const char c : piece) {
    const std::int64_t token = bytes_[static_cast<unsigned char>(c)];
    if (token >= 0) symbols.push_back({token, symbols.size() - 1, symbols.size() + 1});
  }
  if (symbols.empty()) return;
  symbols.front().before = none;
  symbols.back().after = none;

  // Lowest rank first, then leftmost. An entry is stale where its symbols have changed since.
  using Entry = std::tuple<std::int64_t, std::size_t, std::int64_t>;  // rank, place, token made
  std::priority_queue<Entry, std::vector<Entry>, std::greater<>> queue;
  const auto offer = [&](std::size_t at) {
    if (at == none || symbols[at].after == none) return;
    if (const Merge* found = merge(symbols[at].token, symbols[symbols[at].after].token))
      queue.emplace(found->rank, at, found->made);
  };
  for (std::size_t at = 0; at + 1 < symbols.size(); ++at) offer(at);
  while (!queue.empty()) {
    const auto [rank, at, made] = queue.top();
    queue.pop();
    Symbol& left = symbols[at];
    if (left.token < 0 || left.after == none) continue;
    Symbol& right = symbols[left.after];
    const Merge* now = merge(left.token, right.token);
    if (now == nullptr || now->rank != rank) continue;
    left.token = made;
    left.after = right.after;
    right.token = -1;
    if (left.after != none) symbols[left.after].before = at;
    offer(left.before);
    offer(at);
  }
  for (const Symbol& symbol : symbols)
    if (symbol.token >= 0) tokens.push_back(symbol.token);
}

}  // namespace coatrt::detail
