#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <sstream>

#include "coatrt/error.hpp"

namespace coatrt::detail {
namespace {

std::string text(double value) {
  std::ostringstream out;
  out << value;
  return out.str();
}

void normalize(std::vector<double>& weights) {
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  for (double& weight : weights) weight /= sum;
}

}  // namespace

void check_sampling(const Sampling& sampling) {
  if (!(sampling.temperature >= 0 && std::isfinite(sampling.temperature)))
    throw Error("temperature must be 0 or a positive number, got " + text(sampling.temperature));
  if (sampling.top_k < 0)
    throw Error("top-k must be 0 (all) or a positive number, got " + std::to_string(sampling.top_k));
  if (!(sampling.top_p > 0 && sampling.top_p <= 1))
    throw Error("top-p must be more than 0 and at most 1, got " + text(sampling.top_p));
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
  std::vector<double> weights(logits.data, logits.data + logits.size);
  const double most = *std::max_element(weights.begin(), weights.end());
  for (double& weight : weights) weight = (weight - most) / sampling.temperature;  // at most 0 at any temperature
  std::vector<std::size_t> order(weights.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto k = static_cast<std::size_t>(sampling.top_k);
  if (0 < k && k < weights.size()) {
    const auto greater = [&](std::size_t a, std::size_t b) { return weights[a] > weights[b]; };
    std::nth_element(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(k), order.end(), greater);
    for (std::size_t i = k; i < order.size(); ++i) weights[order[i]] = -HUGE_VAL;
  }
  for (double& weight : weights) weight = std::exp(weight);
  normalize(weights);
  if (sampling.top_p < 1) {
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return weights[a] > weights[b]; });
    double before = 0;
    for (const std::size_t token : order) {
      const double weight = weights[token];
      if (before >= sampling.top_p) weights[token] = 0;
      before += weight;
    }
    normalize(weights);
  }
  return weights;
}

std::int64_t next_token(const Logits& logits, const Sampling& sampling, std::mt19937_64& random) {
  if (sampling.temperature == 0) return likeliest(logits);
  const std::vector<double> weights = probabilities(logits, sampling);
  double left = std::uniform_real_distribution<double>()(random);
  std::size_t last = 0;
  for (std::size_t token = 0; token < weights.size(); ++token) {
    if (weights[token] > 0) last = token;
    if ((left -= weights[token]) < 0 && weights[token] > 0) return static_cast<std::int64_t>(token);
  }
  return static_cast<std::int64_t>(last);
}

}  // namespace coatrt::detail
