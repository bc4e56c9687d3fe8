#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "coatrt/sampling.hpp"

namespace coatrt::detail {

/// Refuse a value out of range.
void check_sampling(const Sampling& sampling);
/// Index of the first greatest of the logits, as numpy's argmax.
std::int64_t likeliest(const Logits& logits);
/// The distribution the next token is drawn from: temperature, then top-k, top-p and min-p.
std::vector<double> probabilities(const Logits& logits, const Sampling& sampling);

}  // namespace coatrt::detail
