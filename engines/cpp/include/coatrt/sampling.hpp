#pragma once
#include <cstddef>
#include <cstdint>
#include <random>
#include <unordered_map>
#include <utility>
#include <vector>

namespace coatrt {

/// Logits after the last token, valid until the next call of what made them.
struct Logits {
  const float* data;
  std::size_t size;
};

/// How the next token is chosen, in this order: logit_bias, repetition_penalty, presence and frequency penalty,
/// temperature, top_k, top_p, min_p.
struct Sampling {
  double temperature = 0;  ///< 0 takes the likeliest token
  std::int64_t top_k = 0;  ///< 0 for all
  double top_p = 1;        ///< the likeliest tokens whose probabilities add up to this
  std::uint64_t seed = 0;
  double min_p = 0;               ///< tokens of at least this part of the likeliest token's probability
  double repetition_penalty = 1;  ///< divides positive logits of tokens in prompt and continuation, multiplies negative ones
  double presence_penalty = 0;    ///< subtracted from the logit of a token of the continuation
  double frequency_penalty = 0;   ///< subtracted as often as it is there
  std::vector<std::pair<std::int64_t, double>> logit_bias;  ///< token → added to its logit
};

/// Chooses the tokens of one sequence.
class Sampler {
 public:
  /// Throws Error for a value out of range. The prompt's tokens count for the repetition penalty.
  explicit Sampler(const Sampling& sampling, const std::vector<std::int64_t>& prompt = {});
  /// Choose the next token. Throws Error where a logit is NaN or the greatest is infinite.
  std::int64_t next(const Logits& logits);

 private:
  void adjust(const Logits& logits);
  template <class Number>
  std::int64_t draw(const Number* scores, std::size_t size);

  Sampling sampling_;
  std::mt19937_64 random_;
  bool plain_;                                            // the logits are taken as they are
  std::unordered_map<std::int64_t, std::size_t> counts_;  // of each token of the continuation; 0: of the prompt alone
  std::vector<double> scores_;
};

/// Log-probabilities under the model's own distribution, before anything of `Sampling`.
struct Logprobs {
  double token;                                            ///< of the chosen token
  std::vector<std::pair<std::int64_t, double>> likeliest;  ///< the likeliest tokens, in order
};
Logprobs logprobs(const Logits& logits, std::int64_t token, std::size_t count);

}  // namespace coatrt
