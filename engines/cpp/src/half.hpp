#pragma once
#include <onnxruntime_float16.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace coatrt::detail {

/// ONNX Runtime's float16 conversions. Its C++ header offers them as Ort::Float16_t, but wants the library linked.
struct Float16 : onnxruntime_float16::Float16Impl<Float16> {
  static std::uint16_t from(float value) { return ToUint16Impl(value); }
  static float to(std::uint16_t bits) {
    Float16 half;
    half.val = bits;
    return half.ToFloatImpl();
  }
};

/// float32 → float16, ties to even.
inline std::uint16_t to_float16(float value) { return Float16::from(value); }
inline float from_float16(std::uint16_t half) { return Float16::to(half); }

// A bfloat16 is the upper half of a float32. ONNX Runtime's conversions of it copy single bytes: GCC 12 made code of them
// that took 20 (to bfloat16) and 200 times (from it) as long, milliseconds for the logits of one token.

/// float32 → bfloat16, ties to even.
inline std::uint16_t to_bfloat16(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float from_bfloat16(std::uint16_t half) {
  const std::uint32_t bits = std::uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace coatrt::detail
