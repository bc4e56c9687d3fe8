#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <sstream>

#include "coatrt/error.hpp"

namespace coatrt {
namespace {

std::string text(double value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

/// A token that may be drawn, and its weight: first its logit over the temperature, then its probability.
struct Candidate {
  std::int64_t token;
  double weight;
  /// Sorts the likeliest first, equal ones by id.
  bool operator<(const Candidate& other) const {
    return weight != other.weight ? weight > other.weight : token < other.token;
  }
};

void normalize(std::vector<Candidate>& candidates) {
  double sum = 0;
  for (const Candidate& candidate : candidates) sum += candidate.weight;
  for (Candidate& candidate : candidates) candidate.weight /= sum;
}

void keep_top_k(std::vector<Candidate>& candidates, std::int64_t most) {
  const auto k = static_cast<std::size_t>(most);
  if (k == 0 || k >= candidates.size()) return;
  std::nth_element(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(k), candidates.end());
  candidates.resize(k);
}

void keep_top_p(std::vector<Candidate>& candidates, double top_p) {
  if (top_p >= 1) return;
  // Sorting all of a vocabulary takes longer than the rest: sort the front, and more of it where that does not suffice.
  double before = 0;
  std::size_t kept = 0, sorted = 0;
  for (std::size_t want = 256; kept == sorted && sorted < candidates.size() && before < top_p; want *= 8) {
    const std::size_t end = std::min(want, candidates.size());
    const auto place = [&](std::size_t index) { return candidates.begin() + static_cast<std::ptrdiff_t>(index); };
    if (end < candidates.size()) std::nth_element(place(sorted), place(end), candidates.end());
    std::sort(place(sorted), place(end));
    for (sorted = end; kept < sorted && before < top_p; ++kept) before += candidates[kept].weight;
  }
  candidates.resize(std::max<std::size_t>(kept, 1));
  normalize(candidates);
}

void keep_min_p(std::vector<Candidate>& candidates, double min_p) {
  if (min_p <= 0) return;
  double most = 0;
  for (const Candidate& candidate : candidates) most = std::max(most, candidate.weight);
  const auto rare = [&](const Candidate& candidate) { return candidate.weight < min_p * most; };
  candidates.erase(std::remove_if(candidates.begin(), candidates.end(), rare), candidates.end());
  normalize(candidates);
}

template <class Number>
std::vector<Candidate> candidates_of(const Number* scores, std::size_t size, const Sampling& sampling) {
  std::vector<Candidate> found(size);
  for (std::size_t i = 0; i < size; ++i) found[i] = {static_cast<std::int64_t>(i), scores[i]};
  keep_top_k(found, sampling.top_k);
  double most = -HUGE_VAL;
  for (const Candidate& candidate : found) most = std::max(most, candidate.weight);
  for (Candidate& candidate : found)  // the exponent is at most 0 at any temperature
    candidate.weight = std::exp((candidate.weight - most) / sampling.temperature);
  normalize(found);
  keep_top_p(found, sampling.top_p);
  keep_min_p(found, sampling.min_p);
  return found;
}

void check_finite(const Logits& logits) {
  float most = -HUGE_VALF;
  int unordered = 0;
  for (std::size_t i = 0; i < logits.size; ++i) {
    most = logits.data[i] > most ? logits.data[i] : most;
    unordered |= logits.data[i] != logits.data[i];
  }
  if (unordered != 0 || !std::isfinite(most))
    throw Error("the logits are not finite: weights or LoRA are damaged, or too large for the dtype of the activations; "
                "check the bundle (coatrt verify), or run without the LoRA");
}

}  // namespace

namespace detail {

void check_sampling(const Sampling& sampling) {
  const auto refuse = [](const char* rule, double value) { throw Error(std::string(rule) + ", got " + text(value)); };
  const auto within = [](double value, double least, double most) { return value >= least && value <= most; };
  if (!(sampling.temperature >= 0 && std::isfinite(sampling.temperature)))
    refuse("temperature must be 0 or a positive number", sampling.temperature);
  if (sampling.top_k < 0)
    throw Error("top-k must be 0 (all) or a positive number, got " + std::to_string(sampling.top_k));
  if (!(sampling.top_p > 0 && sampling.top_p <= 1)) refuse("top-p must be more than 0 and at most 1", sampling.top_p);
  if (!within(sampling.min_p, 0, 1)) refuse("min-p must be at least 0 and at most 1", sampling.min_p);
  if (!(sampling.repetition_penalty > 0 && std::isfinite(sampling.repetition_penalty)))
    refuse("the repetition penalty must be a positive number", sampling.repetition_penalty);
  if (!within(sampling.presence_penalty, -2, 2))
    refuse("the presence penalty must be at least -2 and at most 2", sampling.presence_penalty);
  if (!within(sampling.frequency_penalty, -2, 2))
    refuse("the frequency penalty must be at least -2 and at most 2", sampling.frequency_penalty);
  for (const auto& [token, bias] : sampling.logit_bias)
    if (token < 0 || !within(bias, -100, 100))
      throw Error("a logit bias must be at least -100 and at most 100 for a token id, got " + text(bias) + " for " +
                  std::to_string(token));
}

std::int64_t likeliest(const Logits& logits) {
  // In two steps that compilers vectorize: the greatest value, then its first place.
  const float* const end = logits.data + logits.size;
  float most = logits.data[0];
  for (const float* at = logits.data; at != end; ++at) most = *at > most ? *at : most;
  const auto* place = std::find(logits.data, end, most);
  return place == end ? 0 : place - logits.data;
}

std::vector<double> probabilities(const Logits& logits, const Sampling& sampling) {
  std::vector<double> made(logits.size);
  for (const Candidate& candidate : candidates_of(logits.data, logits.size, sampling))
    made[static_cast<std::size_t>(candidate.token)] = candidate.weight;
  return made;
}

}  // namespace detail

Sampler::Sampler(const Sampling& sampling, const std::vector<std::int64_t>& prompt)
    : sampling_(sampling), random_(sampling.seed) {
  detail::check_sampling(sampling);
  const bool repeated = sampling.repetition_penalty != 1;
  plain_ = !repeated && sampling.presence_penalty == 0 && sampling.frequency_penalty == 0 && sampling.logit_bias.empty();
  if (repeated)
    for (const std::int64_t token : prompt) counts_[token];
}

/// Put the logits after bias and penalties into `scores_`.
void Sampler::adjust(const Logits& logits) {
  scores_.assign(logits.data, logits.data + logits.size);
  for (const auto& [token, bias] : sampling_.logit_bias) {
    if (static_cast<std::size_t>(token) >= logits.size)
      throw Error("logit_bias names token " + std::to_string(token) + ", which is outside the vocabulary of " +
                  std::to_string(logits.size));
    scores_[static_cast<std::size_t>(token)] += bias;
  }
  for (const auto& [token, count] : counts_) {
    if (static_cast<std::size_t>(token) >= logits.size) continue;
    double& score = scores_[static_cast<std::size_t>(token)];
    score = score > 0 ? score / sampling_.repetition_penalty : score * sampling_.repetition_penalty;
    if (count > 0) score -= sampling_.frequency_penalty * static_cast<double>(count) + sampling_.presence_penalty;
  }
}

std::int64_t Sampler::next(const Logits& logits) {
  check_finite(logits);
  if (plain_) return sampling_.temperature == 0 ? detail::likeliest(logits) : draw(logits.data, logits.size);
  adjust(logits);
  const std::int64_t chosen = sampling_.temperature == 0
                                  ? std::max_element(scores_.begin(), scores_.end()) - scores_.begin()
                                  : draw(scores_.data(), scores_.size());
  ++counts_[chosen];
  return chosen;
}

template <class Number>
std::int64_t Sampler::draw(const Number* scores, std::size_t size) {
  double left = std::uniform_real_distribution<double>()(random_);
  std::int64_t chosen = 0;
  for (const Candidate& candidate : candidates_of(scores, size, sampling_)) {
    if (candidate.weight <= 0) continue;
    chosen = candidate.token;  // the last one where rounding leaves a rest
    if ((left -= candidate.weight) < 0) break;
  }
  return chosen;
}

Logprobs logprobs(const Logits& logits, std::int64_t token, std::size_t count) {
  const double most = *std::max_element(logits.data, logits.data + logits.size);
  const double sum = std::accumulate(logits.data, logits.data + logits.size, 0.0,
                                     [&](double total, float logit) { return total + std::exp(logit - most); });
  const auto of = [&](std::int64_t id) { return logits.data[id] - most - std::log(sum); };
  Logprobs made{of(token), {}};
  std::vector<std::int64_t> order(logits.size);
  std::iota(order.begin(), order.end(), std::int64_t{0});
  const auto end = order.begin() + static_cast<std::ptrdiff_t>(std::min(count, order.size()));
  std::partial_sort(order.begin(), end, order.end(), [&](std::int64_t a, std::int64_t b) {
    return logits.data[a] != logits.data[b] ? logits.data[a] > logits.data[b] : a < b;
  });
  for (auto at = order.begin(); at != end; ++at) made.likeliest.emplace_back(*at, of(*at));
  return made;
}

}  // namespace coatrt
