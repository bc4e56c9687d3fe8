// What an operator is asked for, checked, and how it is divided over thread blocks. Host code.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "linear.cuh"

namespace coatrt {

struct MatrixSpec {
  int64_t format, N, block;  // block 0: a scale per column
  float factor;
};

/// The attributes of a node.
struct Spec {
  int64_t K, mode;
  bool lora;
  std::vector<MatrixSpec> matrices;
};

/// An input of a node.
struct TensorSpec {
  enum Type { kFloat16, kUint8 };
  std::string name;
  Type type;
  int64_t elements;
  std::vector<int64_t> shape;  // empty: any of so many elements
};

/// The launch of a group for some rows. Pointers of the group are still unset.
struct Plan {
  Group group;
  int blocks, sum_blocks;  // thread blocks of coatrt_partial; of coatrt_sum, for each row
  size_t shared_bytes;     // of coatrt_partial
  int64_t floats;          // partial sums
};

inline int segments(int64_t format) { return format == kNf2 ? 4 : format == kNf3 ? 8 : format == kNf4 ? 2 : 1; }
inline int step_rows(int64_t format) { return format == kNf2 || format == kNf3 ? 4 : format == kNf4 ? 8 : 16; }
inline bool has_4_bits(int64_t format) { return format == kInt4 || format == kNvfp4; }
inline int tile_columns(int64_t format) { return has_4_bits(format) ? 256 : 128; }

inline int64_t block_of(const Spec& spec, const MatrixSpec& m) { return m.block ? m.block : spec.K; }
inline int64_t padded_k(const Spec& spec, const MatrixSpec& m) {
  return (spec.K + block_of(spec, m) - 1) / block_of(spec, m) * block_of(spec, m);
}

/// Packed rows of a chunk: as many as share their scales in every segment, within the pipeline's stage.
inline int64_t chunk_rows(const Spec& spec, const MatrixSpec& m) {
  const int64_t most = m.format == kNf3 ? 16 : 32, rows = padded_k(spec, m) / segments(m.format);
  if (m.format == kNvfp4) return std::gcd(rows, most);  // a chunk of 32 loads the scales of two blocks
  const int64_t shared = std::gcd(std::gcd(rows, block_of(spec, m)), most);
  return m.block == 0 && shared % step_rows(m.format) ? most : shared;  // per column, a chunk may end behind K
}

/// Refuse what the kernels would read wrongly.
///
/// Throws:
///   std::invalid_argument: with one line on what is wrong and what is allowed.
inline void check(const Spec& spec) {
  const auto refuse = [](const std::string& what) { throw std::invalid_argument(what); };
  const auto text = [](int64_t value) { return std::to_string(value); };
  if (spec.K <= 0 || spec.K % 8 || spec.K > 1 << 20)
    refuse("K must be a multiple of 8, at most 2^20, got " + text(spec.K));
  const size_t count = spec.matrices.size();
  if (count < 1 || count > kMaxMatrices) refuse("a node takes 1 to 4 matrices, got " + text(count));
  if (spec.mode != kSideBySide && spec.mode != kGated) refuse("mode must be 0 or 1, got " + text(spec.mode));
  if (spec.mode == kGated && (count != 2 || spec.matrices[0].N != spec.matrices[1].N))
    refuse("mode 1 takes two matrices of the same N");
  for (const MatrixSpec& m : spec.matrices) {
    if (m.format < kInt4 || m.format > kNf4) refuse("format must be 0 to 6, got " + text(m.format));
    const int64_t multiple = has_4_bits(m.format) ? 16 : 8;
    if (m.N <= 0 || m.N % multiple || m.N > 1 << 20)
      refuse("N must be a multiple of " + text(multiple) + ", at most 2^20, got " + text(m.N));
    const bool normal = segments(m.format) > 1;
    if (m.block < 0 || m.block % 16 || m.block > 1 << 20 || (normal && m.block == 0))
      refuse("block must be a multiple of 16" + std::string(normal ? "" : " or 0") + ", got " + text(m.block));
    if (m.format == kNvfp4 && m.block != 16) refuse("nvfp4 has blocks of 16, got " + text(m.block));
    const int64_t padded = padded_k(spec, m);
    if (padded % segments(m.format) || (normal && chunk_rows(spec, m) % step_rows(m.format)))
      refuse("K " + text(spec.K) + " with blocks of " + text(m.block) + " has segments of " +
             text(padded / segments(m.format)) + " rows, which must be a multiple of " + text(step_rows(m.format)));
    if (!(std::isfinite(m.factor) && m.factor > 0)) refuse("factors must be positive numbers");
  }
}

/// The inputs of a node behind x, in their order.
inline std::vector<TensorSpec> inputs(const Spec& spec) {
  std::vector<TensorSpec> all;
  for (const MatrixSpec& m : spec.matrices) {
    const int64_t padded = padded_k(spec, m), weights = padded * m.N;
    const int64_t bytes = m.format == kInt8 || m.format == kFp8 ? weights
                          : m.format == kNf2 || m.format == kNf3 ? weights / 4
                                                                 : weights / 2;
    all.push_back({"codes", TensorSpec::kUint8, bytes, {}});
    const auto scales = m.format == kNvfp4 ? TensorSpec::kUint8 : TensorSpec::kFloat16;
    all.push_back({"scales", scales, padded / block_of(spec, m) * m.N, {}});
    if (m.format == kNf3) all.push_back({"plane", TensorSpec::kUint8, weights / 8, {}});
    if (segments(m.format) > 1)
      all.push_back({"levels", TensorSpec::kFloat16, m.format == kNf2 ? 4 : m.format == kNf3 ? 8 : 16, {}});
    if (spec.lora) {
      all.push_back({"A", TensorSpec::kFloat16, spec.K * kRank, {spec.K, kRank}});
      all.push_back({"B", TensorSpec::kFloat16, kRank * m.N, {kRank, m.N}});
    }
  }
  return all;
}

inline int stage_bytes(int64_t format, int rows) {
  switch (format) {
    case kInt4: return Stage<kInt4>::bytes(rows);
    case kInt8: return Stage<kInt8>::bytes(rows);
    case kNvfp4: return Stage<kNvfp4>::bytes(rows);
    case kFp8: return Stage<kFp8>::bytes(rows);
    case kNf2: return Stage<kNf2>::bytes(rows);
    case kNf3: return Stage<kNf3>::bytes(rows);
    default: return Stage<kNf4>::bytes(rows);
  }
}

/// Divide a checked group so that two thread blocks of each multiprocessor have a share by bytes.
inline Plan divide(const Spec& spec, int rows, int multiprocessors) {
  Plan plan{};
  Group& g = plan.group;
  g.count = static_cast<int>(spec.matrices.size());
  g.a_blocks = spec.lora ? static_cast<int>((spec.K + kRowsOfA - 1) / kRowsOfA) : 0;
  std::vector<double> bits;
  for (const MatrixSpec& m : spec.matrices) {
    const bool has_8_bits = m.format == kInt8 || m.format == kFp8;
    const double each = m.format == kNf2 ? 2.25 : m.format == kNf3 ? 3.25 : has_8_bits ? 8.1 : 4.3;
    bits.push_back(static_cast<double>(m.N) * each);
  }
  const double all = std::accumulate(bits.begin(), bits.end(), 0.0);
  const int budget = 2 * multiprocessors - g.a_blocks;
  size_t shared = sizeof(float) * std::max(kWarpsK * rows * 256, kMaxMatrices * rows * kWarps * kRank);
  for (int i = 0; i < g.count; ++i) {
    const MatrixSpec& given = spec.matrices[i];
    Matrix& m = g.m[i];
    m.format = static_cast<int>(given.format), m.factor = given.factor;
    m.N = static_cast<int>(given.N), m.K = static_cast<int>(spec.K);
    m.block = static_cast<int>(block_of(spec, given));
    m.packed_rows = static_cast<int>(padded_k(spec, given) / segments(given.format));
    m.chunk_rows = static_cast<int>(chunk_rows(spec, given));
    m.chunks = (m.packed_rows + m.chunk_rows - 1) / m.chunk_rows;
    const int wide = tile_columns(given.format);
    m.tiles = (m.N + wide - 1) / wide;
    m.splits = std::max(1, std::min(static_cast<int>(budget * bits[i] / all / m.tiles), m.chunks / kWarpsK));
    m.first = plan.blocks, m.partial = static_cast<int>(plan.floats);
    plan.blocks += m.tiles * m.splits;
    plan.floats += static_cast<int64_t>(m.tiles) * m.splits * rows * wide;
    plan.sum_blocks += (m.N + kSumColumns - 1) / kSumColumns;
    shared = std::max(shared, static_cast<size_t>(kWarps) * kStages * stage_bytes(given.format, rows));
  }
  for (int i = 0; i < g.count; ++i) {
    g.m[i].partial_a = static_cast<int>(plan.floats);
    plan.floats += static_cast<int64_t>(g.a_blocks) * kRank * rows;
  }
  if (spec.mode == kGated) plan.sum_blocks = (g.m[0].N + kSumColumns - 1) / kSumColumns;
  plan.blocks += g.a_blocks;
  plan.shared_bytes = shared;
  return plan;
}

}  // namespace coatrt
