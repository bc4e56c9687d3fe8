// Weight formats as weights.bin stores them, and how words of them become float16 pairs for the tensor cores.
//
// A matrix [K, N] is stored as packed rows of N columns:
//   int4, nvfp4     two columns a byte, the first in the low half; a packed row is a row of K
//   int8, fp8       one column a byte; a packed row is a row of K
//   nf2, nf3, nf4   planes of bits packed along K, each byte with its top bit flipped (export/weights/packing.py):
//                   K is cut into segments of R rows, and packed row i holds row i of every segment, first segment in
//                   the low bits. nf3 has a plane of low bits, 2R packed rows of 4 segments, and a plane of top bits,
//                   R packed rows of 8 segments: rows i and R + i of the first belong to row i of the second.
#pragma once
#include <cuda_fp16.h>
#include <stdint.h>

namespace coatrt {

enum Format : int { kInt4 = 0, kInt8, kNvfp4, kFp8, kNf2, kNf3, kNf4 };

/// How a warp reads a format. The primary template is that of int8 and fp8.
///
/// A step is what a lane decodes at once: kLoads words of 8 bytes from kStepRows packed rows, which the four lanes of a
/// quad share. It feeds kProducts tensor-core products of 16 rows of K for every 16 columns.
template <Format F>
struct Packing {
  static constexpr int kSegments = 1;     // rows of K in a packed row
  static constexpr int kWordColumns = 4;  // columns of a 32-bit word
  static constexpr int kStepRows = 16;
  static constexpr int kLoads = 4;
  static constexpr int kProducts = 1;
  static constexpr int kScalePairs = 1;  // pairs of segments with scales of their own
};
template <>
struct Packing<kInt4> {
  static constexpr int kSegments = 1, kWordColumns = 8, kStepRows = 16, kLoads = 4, kProducts = 1, kScalePairs = 1;
};
template <>
struct Packing<kNvfp4> : Packing<kInt4> {};
template <>
struct Packing<kNf4> {
  static constexpr int kSegments = 2, kWordColumns = 4, kStepRows = 8, kLoads = 2, kProducts = 1, kScalePairs = 1;
};
template <>
struct Packing<kNf2> {
  static constexpr int kSegments = 4, kWordColumns = 4, kStepRows = 4, kLoads = 1, kProducts = 1, kScalePairs = 2;
};
template <>
struct Packing<kNf3> {
  static constexpr int kSegments = 8, kWordColumns = 4, kStepRows = 4, kLoads = 3, kProducts = 2, kScalePairs = 4;
};

/// Whether scales multiply sums over a block; otherwise they multiply weights, as segments have scales of their own
/// and blocks of 16 are too short to sum apart.
template <Format F>
constexpr bool kScalesSums = F == kInt4 || F == kInt8 || F == kFp8;

/// First segment of a pair; the second is kSegments / 2 later. Pairs are (0, 1) of nf4, (0, 2) (1, 3) of nf2, and
/// (0, 4) (2, 6) (1, 5) (3, 7) of nf3: the two codes in a nibble-aligned byte come 4 bits apart.
template <Format F>
__device__ constexpr int first_segment(int pair) {
  return F == kNf3 ? (pair % 2) * 2 + pair / 2 : pair;
}

__device__ __forceinline__ half2 as_half2(uint32_t v) { return *reinterpret_cast<half2*>(&v); }
__device__ __forceinline__ uint32_t as_word(half2 v) { return *reinterpret_cast<uint32_t*>(&v); }
__device__ __forceinline__ uint32_t times(uint32_t a, uint32_t b) {
  return as_word(__hmul2(as_half2(a), as_half2(b)));
}
__device__ __forceinline__ uint32_t word(const uint2& v, int i) { return i ? v.y : v.x; }

/// The codebook of a NormalFloat format: low and high bytes of its float16 levels, four to a register.
struct Codebook {
  uint32_t low[4], high[4];

  template <Format F>
  __device__ __forceinline__ void load(const half* levels) {
    constexpr int kCount = F == kNf2 ? 4 : F == kNf3 ? 8 : 16;
#pragma unroll
    for (int i = 0; i < kCount / 4; ++i) {
      uint32_t l = 0, h = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t v = __half_as_ushort(levels[4 * i + j]);
        l |= (v & 255u) << (8 * j);
        h |= (v >> 8) << (8 * j);
      }
      low[i] = l;
      high[i] = h;
    }
  }

  /// Eight codes in nibbles → four columns' pairs of levels. The nibbles of a byte are the two halves of a pair.
  ///
  /// A byte permutation looks four nibbles up in eight bytes at once; of 16 levels (nf4) a third one picks the half of
  /// the table by the codes' top bits.
  template <Format F>
  __device__ __forceinline__ void look_up(uint32_t codes, uint32_t (&out)[4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t s = i ? codes >> 16 : codes;
      uint32_t l, h;
      if constexpr (F == kNf4) {
        const uint32_t select = s & 0x7777u, half_of = ((s & 0x8888u) >> 1) | 0x3210u;
        l = __byte_perm(__byte_perm(low[0], low[1], select), __byte_perm(low[2], low[3], select), half_of);
        h = __byte_perm(__byte_perm(high[0], high[1], select), __byte_perm(high[2], high[3], select), half_of);
      } else if constexpr (F == kNf3) {
        l = __byte_perm(low[0], low[1], s);
        h = __byte_perm(high[0], high[1], s);
      } else {
        l = __byte_perm(low[0], 0, s);
        h = __byte_perm(high[0], 0, s);
      }
      out[2 * i] = __byte_perm(l, h, 0x5140);
      out[2 * i + 1] = __byte_perm(l, h, 0x7362);
    }
  }
};

/// The same word of two rows of K → each column's pair (row p, row q), without scales; formats with one segment.
///
/// Integers are placed in the low bits of the mantissa of 1024 (0x6400), whose unit is 1, and what was added is
/// subtracted. Floats are shifted into place, and a power of two makes up for the other exponent bias.
template <Format F>
__device__ __forceinline__ void decode_rows(uint32_t p, uint32_t q, uint32_t (&out)[Packing<F>::kWordColumns]) {
  if constexpr (F == kInt4) {
    p ^= 0x88888888u;  // two's complement → offset of 8
    q ^= 0x88888888u;
    // The high nibbles of a byte stay where they are, 16 times as large: 1024 + 16 n, over 16, less 64 + 8.
    const half2 low = __float2half2_rn(-1032.f), high = __float2half2_rn(-72.f), part = __float2half2_rn(0.0625f);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t v = __byte_perm(p, q, i ? 0x7632 : 0x5410);  // columns 4i … 4i + 3 of p and of q
      out[4 * i] = as_word(__hadd2(as_half2((v & 0x000f000fu) | 0x64006400u), low));
      out[4 * i + 1] = as_word(__hfma2(as_half2((v & 0x00f000f0u) | 0x64006400u), part, high));
      v >>= 8;
      out[4 * i + 2] = as_word(__hadd2(as_half2((v & 0x000f000fu) | 0x64006400u), low));
      out[4 * i + 3] = as_word(__hfma2(as_half2((v & 0x00f000f0u) | 0x64006400u), part, high));
    }
  } else if constexpr (F == kNvfp4) {
    const half2 unit = __float2half2_rn(16384.f);  // 2^(15 − 1)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t v = __byte_perm(p, q, i ? 0x7632 : 0x5410);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint32_t sign = (v << (12 - 4 * c)) & 0x80008000u;
        const uint32_t rest = (c < 3 ? v << (9 - 4 * c) : v >> 3) & 0x0e000e00u;
        out[4 * i + c] = as_word(__hmul2(as_half2(sign | rest), unit));
      }
    }
  } else if constexpr (F == kInt8) {
    p ^= 0x80808080u;  // two's complement → offset of 128
    q ^= 0x80808080u;
    const half2 offset = __float2half2_rn(-1152.f);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t v = __byte_perm(p, q, i ? 0x7362 : 0x5140);  // p, q of column 2i, p, q of 2i + 1
      out[2 * i] = as_word(__hadd2(as_half2(__byte_perm(v, 0x64646464u, 0x4140)), offset));
      out[2 * i + 1] = as_word(__hadd2(as_half2(__byte_perm(v, 0x64646464u, 0x4342)), offset));
    }
  } else {                                       // fp8, E4M3
    const half2 unit = __float2half2_rn(256.f);  // 2^(15 − 7)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t v = __byte_perm(p, q, i ? 0x7362 : 0x5140);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const uint32_t two = __byte_perm(v, 0, c ? 0x3424 : 0x1404);
        out[2 * i + c] = as_word(__hmul2(as_half2((two & 0x80008000u) | ((two & 0x7f007f00u) >> 1)), unit));
      }
    }
  }
}

/// 32-bit word `index` (0, 1) of a lane's loads of a step → both K pairs of one product, for every column of the word.
///
/// The pairs are rows 4t, 4t + 1 and 4t + 2, 4t + 3 of the step in lane t of a quad for one segment; packed rows 2t and
/// 2t + 1, each with both segments, for nf4; packed row t with the pairs of `first_segment` for nf2 and nf3.
template <Format F>
__device__ __forceinline__ void decode_pairs(const uint2 (&loads)[Packing<F>::kLoads], int index, int product,
                                             const Codebook& codebook, uint32_t (&first)[Packing<F>::kWordColumns],
                                             uint32_t (&second)[Packing<F>::kWordColumns]) {
  if constexpr (Packing<F>::kSegments == 1) {
    decode_rows<F>(word(loads[0], index), word(loads[1], index), first);
    decode_rows<F>(word(loads[2], index), word(loads[3], index), second);
  } else if constexpr (F == kNf4) {
    codebook.look_up<F>(word(loads[0], index) ^ 0x80808080u, first);
    codebook.look_up<F>(word(loads[1], index) ^ 0x80808080u, second);
  } else if constexpr (F == kNf2) {
    const uint32_t v = word(loads[0], index) ^ 0x80808080u;
    codebook.look_up<F>(v & 0x33333333u, first);
    codebook.look_up<F>((v >> 2) & 0x33333333u, second);
  } else {  // nf3: the third load holds the top bits of both products
    const uint32_t v = word(loads[product], index) ^ 0x80808080u, top = word(loads[2], index) ^ 0x80808080u;
    const uint32_t one = product ? (top & 0x22222222u) << 1 : (top & 0x11111111u) << 2;
    const uint32_t two = product ? (top & 0x88888888u) >> 1 : top & 0x44444444u;
    codebook.look_up<F>((v & 0x33333333u) | one, first);
    codebook.look_up<F>(((v >> 2) & 0x33333333u) | two, second);
  }
}

/// Four E4M3 scales, never negative, → two pairs of float16, each 256 times too small.
__device__ __forceinline__ uint32_t decode_e4m3_scales(uint32_t four, int pair) {
  return __byte_perm(four, 0, pair ? 0x3424 : 0x1404) >> 1;
}

}  // namespace coatrt
