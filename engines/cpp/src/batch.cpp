#include "coatrt/batch.hpp"

#include <algorithm>

#include "backend.hpp"
#include "coatrt/error.hpp"
#include "packed_lora.hpp"
#include "rows.hpp"
#include "state.hpp"

namespace coatrt {
namespace {

/// A decoder for each row: steps run one after the other.
class SeparateRows final : public detail::Rows {
 public:
  SeparateRows(const Bundle& bundle, std::size_t rows, const SessionOptions& options) {
    for (std::size_t i = 0; i < rows; ++i) decoders_.push_back(detail::make_decoder(bundle.state(), options));
  }
  std::int64_t capacity() const override { return decoders_[0]->capacity(); }
  Limit limit() const override { return decoders_[0]->limit(); }
  std::int64_t prefill_limit() const override { return decoders_[0]->prefill_limit(); }
  std::int64_t vocabulary() const override { return decoders_[0]->vocabulary(); }
  void set_lora(std::size_t row, const Lora* lora) override { decoders_[row]->set_lora(lora); }
  bool copy(std::size_t, std::size_t, std::int64_t) override { return false; }
  const float* run(std::size_t row, const std::int64_t* tokens, std::size_t count, std::int64_t start) override {
    return decoders_[row]->run(tokens, count, start);
  }
  std::vector<const float*> step(const std::vector<detail::RowToken>& tokens) override {
    std::vector<const float*> made;
    for (const auto& [row, token, position] : tokens) made.push_back(decoders_[row]->run(&token, 1, position));
    return made;
  }

 private:
  std::vector<std::unique_ptr<Decoder>> decoders_;
};

}  // namespace

struct Batch::State {
  Bundle bundle;
  std::unique_ptr<detail::Rows> rows;
  detail::Contract contract;
  std::vector<std::int64_t> lengths;

  void check_row(std::size_t row) const {
    if (row >= lengths.size())
      throw Error("row " + std::to_string(row) + " of a batch of " + std::to_string(lengths.size()) + " rows");
  }
  void check(std::size_t row, const std::int64_t* tokens, std::size_t count) const {
    check_row(row);
    if (count == 0) throw Error("empty prompt; give at least one token per sequence");
    if (static_cast<std::size_t>(lengths[row]) + count > static_cast<std::size_t>(rows->capacity()))
      throw Error(std::to_string(static_cast<std::size_t>(lengths[row]) + count) + " positions needed, a row has " +
                  std::to_string(rows->capacity()));
    const auto [least, most] = std::minmax_element(tokens, tokens + count);
    if (*least < 0 || *most >= rows->vocabulary())
      throw Error("token id " + std::to_string(*least < 0 ? *least : *most) + " is outside the vocabulary of " +
                  std::to_string(rows->vocabulary()) + "; use the bundle's tokenizer");
  }
  Logits logits(const float* data) const { return {data, static_cast<std::size_t>(rows->vocabulary())}; }
};

Batch::Batch(const Bundle& bundle, std::size_t rows, const SessionOptions& options) {
  if (rows < 1) throw Error("a batch needs at least 1 row, got 0");
  const bool one = options.backend == "ort" && (options.provider.empty() || options.provider == "cpu" ||
                                                options.provider == "CPUExecutionProvider");
  std::unique_ptr<detail::Rows> made;
  if (one) made = detail::make_ort_rows(bundle.state(), rows, options);
  else made = std::make_unique<SeparateRows>(bundle, rows, options);
  state_.reset(new State{bundle, std::move(made), bundle.state()->contract(), std::vector<std::int64_t>(rows)});
  const Lora lora = bundle.lora();
  for (std::size_t row = 0; row < rows; ++row) set_lora(row, lora);
}

Batch::~Batch() = default;
Batch::Batch(Batch&&) noexcept = default;
Batch& Batch::operator=(Batch&&) noexcept = default;

std::size_t Batch::rows() const { return state_->lengths.size(); }
std::int64_t Batch::capacity() const { return state_->rows->capacity(); }
Limit Batch::limit() const { return state_->rows->limit(); }
std::int64_t Batch::vocabulary() const { return state_->rows->vocabulary(); }
std::int64_t Batch::length(std::size_t row) const {
  state_->check_row(row);
  return state_->lengths[row];
}

void Batch::set_lora(std::size_t row, const Lora& lora) {
  state_->check_row(row);
  detail::check_lora(state_->contract, lora);
  state_->lengths[row] = 0;
  state_->rows->set_lora(row, &lora);
}

void Batch::drop_lora(std::size_t row) {
  state_->check_row(row);
  state_->lengths[row] = 0;
  state_->rows->set_lora(row, nullptr);
}

void Batch::truncate(std::size_t row, std::int64_t length) {
  state_->check_row(row);
  if (length < 0 || length > state_->lengths[row])
    throw Error("row " + std::to_string(row) + " has " + std::to_string(state_->lengths[row]) + " positions, " +
                std::to_string(length) + " cannot be kept");
  state_->lengths[row] = length;
}

bool Batch::copy(std::size_t from, std::size_t to, std::int64_t length) {
  state_->check_row(from);
  state_->check_row(to);
  if (length < 0 || length > state_->lengths[from])
    throw Error("row " + std::to_string(from) + " has " + std::to_string(state_->lengths[from]) + " positions, " +
                std::to_string(length) + " cannot be copied");
  if (!state_->rows->copy(from, to, length)) return false;
  state_->lengths[to] = length;
  return true;
}

Logits Batch::prefill(std::size_t row, const std::int64_t* tokens, std::size_t count) {
  state_->check(row, tokens, count);
  const auto limit = static_cast<std::size_t>(state_->rows->prefill_limit());
  const float* made = nullptr;
  for (std::size_t done = 0; done < count;) {
    const std::size_t piece = std::min(limit, count - done);
    made = state_->rows->run(row, tokens + done, piece, state_->lengths[row]);
    done += piece;
    state_->lengths[row] += static_cast<std::int64_t>(piece);
  }
  return state_->logits(made);
}

std::vector<Logits> Batch::decode(const std::vector<Step>& steps) {
  std::vector<detail::RowToken> tokens;
  for (const Step& step : steps) {
    state_->check(step.row, &step.token, 1);
    for (const detail::RowToken& other : tokens)
      if (other.row == step.row) throw Error("row " + std::to_string(step.row) + " gets two tokens in one step");
    tokens.push_back({step.row, step.token, state_->lengths[step.row]});
  }
  std::vector<Logits> made;
  if (tokens.empty()) return made;
  for (const float* data : state_->rows->step(tokens)) made.push_back(state_->logits(data));
  for (const Step& step : steps) ++state_->lengths[step.row];
  return made;
}

}  // namespace coatrt
