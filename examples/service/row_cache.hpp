#pragma once
#include <algorithm>
#include <coatrt/coatrt.hpp>
#include <cstdint>
#include <string>
#include <vector>

/// Which row a prompt gets, and how much of it is in the caches already.
///
/// Only positions that were computed as part of a prompt are used again, an even number of them: then the numbers are
/// those of a prompt that is computed afresh, bit for bit, and an answer does not depend on what was asked before.
class RowCache {
 public:
  explicit RowCache(std::size_t rows) : rows_(rows) {}

  /// A row, and the number of positions at its beginning that are the prompt's.
  struct Place {
    std::size_t row, cached;
  };

  bool any_free() const {
    return std::any_of(rows_.begin(), rows_.end(), [](const Row& row) { return !row.busy; });
  }

  /// Take a free row for a prompt under a LoRA, which is named by a key; null is the base.
  Place take(coatrt::Batch& batch, const std::vector<std::int64_t>& prompt, const std::string& key, const coatrt::Lora* lora) {
    std::size_t best = 0, match = 0, oldest = rows_.size();
    for (std::size_t i = 0; i < rows_.size(); ++i) {
      const std::size_t common = rows_[i].key == key ? shared(rows_[i].tokens, prompt) : 0;
      const bool better = common > match || (common == match && common > 0 && rows_[best].busy && !rows_[i].busy);
      if (better) best = i, match = common;
      if (!rows_[i].busy && (oldest == rows_.size() || rows_[i].used < rows_[oldest].used)) oldest = i;
    }
    // A row goes on with its own conversation; another one begins in the row that was longest unused.
    std::size_t row = oldest;
    if (match > 0 && !rows_[best].busy && (best == oldest || 2 * match >= rows_[best].tokens.size())) row = best;
    if (match > 0 && row != best && !batch.copy(best, row, static_cast<std::int64_t>(match))) match = 0;
    if (match == 0) {
      if (lora != nullptr) batch.set_lora(row, *lora);
      else batch.drop_lora(row);
    } else if (row == best) {
      batch.truncate(row, static_cast<std::int64_t>(match));
    }
    rows_[row].busy = true;
    rows_[row].key = key;
    rows_[row].tokens.assign(prompt.begin(), prompt.begin() + static_cast<std::ptrdiff_t>(match));
    return {row, match};
  }
  /// The first positions of a row hold this many tokens of its prompt.
  void computed(std::size_t row, const std::vector<std::int64_t>& prompt, std::size_t count) {
    rows_[row].tokens.assign(prompt.begin(), prompt.begin() + static_cast<std::ptrdiff_t>(count));
  }
  void release(std::size_t row) {
    rows_[row].busy = false;
    rows_[row].used = ++clock_;
  }
  /// Nothing of a row can be used again.
  void forget(std::size_t row) { rows_[row].tokens.clear(); }

 private:
  struct Row {
    std::vector<std::int64_t> tokens;
    std::string key;
    bool busy = false;
    std::uint64_t used = 0;
  };

  static std::size_t shared(const std::vector<std::int64_t>& known, const std::vector<std::int64_t>& prompt) {
    const std::size_t most = std::min(known.size(), prompt.size() - 1);  // the last token is computed for its logits
    std::size_t count = 0;
    while (count < most && known[count] == prompt[count]) ++count;
    return count - count % 2;
  }

  std::vector<Row> rows_;
  std::uint64_t clock_ = 0;
};
