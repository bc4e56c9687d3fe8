#pragma once
#include <cstdint>
#include <cstring>

namespace coatrt::detail {

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

/// float32 → bfloat16, ties to even.
inline std::uint16_t to_bfloat16(float value) {
  const std::uint32_t bits = bits_of(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat16(std::uint16_t half) { return float_of(std::uint32_t{half} << 16); }

/// float32 → float16, ties to even.
inline std::uint16_t to_float16(float value) {
  const std::uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return static_cast<std::uint16_t>(sign | 0x7e00);
  if (size >= 0x47800000) return static_cast<std::uint16_t>(sign | 0x7c00);  // 65,536 and more
  if (size < 0x38800000) {  // subnormal: adding 0.5 aligns the significand so that the hardware rounds it
    return static_cast<std::uint16_t>(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000));
  }
  return static_cast<std::uint16_t>(sign | (size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
}

inline float from_float16(std::uint16_t half) {
  const std::uint32_t sign = std::uint32_t{half} << 16 & 0x80000000, rest = half & 0x7fff;
  if (rest >= 0x7c00) return float_of(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return float_of(sign | ((rest << 13) + 0x38000000));
  const float value = static_cast<float>(rest) * 0x1p-24f;
  return sign != 0 ? -value : value;
}

}  // namespace coatrt::detail
