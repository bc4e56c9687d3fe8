#pragma once
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "coatrt/session.hpp"

namespace coatrt::detail {

/// Refuse a value out of range.
void check_sampling(const Sampling& sampling);
/// Index of the first greatest of the logits, as numpy's argmax.
std::int64_t likeliest(const Logits& logits);
/// The distribution the next token is drawn from: temperature, then top-k, then top-p.
std::vector<double> probabilities(const Logits& logits, const Sampling& sampling);
/// Choose the next token.
std::int64_t next_token(const Logits& logits, const Sampling& sampling, std::mt19937_64& random);

}  // namespace coatrt::detail
