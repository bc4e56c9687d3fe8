#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

#include "half.hpp"

namespace coatrt::detail {

/// Cast float32 to the activations' dtype at `to`.
inline void from_float32(const std::string& dtype, const float* from, std::size_t count, void* to) {
  if (dtype == "float32") {
    std::memcpy(to, from, count * sizeof(float));
    return;
  }
  auto* halves = static_cast<std::uint16_t*>(to);
  const bool is_float16 = dtype == "float16";
  for (std::size_t i = 0; i < count; ++i) halves[i] = is_float16 ? to_float16(from[i]) : to_bfloat16(from[i]);
}

/// Cast the activations' dtype (float16 or bfloat16) to float32.
inline void to_float32(const std::string& dtype, const void* from, std::size_t count, float* to) {
  const auto* halves = static_cast<const std::uint16_t*>(from);
  const bool is_float16 = dtype == "float16";
  for (std::size_t i = 0; i < count; ++i) to[i] = is_float16 ? from_float16(halves[i]) : from_bfloat16(halves[i]);
}

}  // namespace coatrt::detail
