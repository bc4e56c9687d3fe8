// x·W + (x·A)·B for up to 8 rows of x and the matrices that read one input, in two kernels.
//
// 1. coatrt_partial: thread blocks of x·A come first, each with 256 rows of K of every matrix's A; behind them those
//    of x·W, matrix by matrix: `tiles` side by side, `splits` sharing K. Each writes partial sums in float32.
// 2. coatrt_sum: adds the partial sums up, adds (x·A)·B and writes float16.
//
// Nothing is added atomically, so that a result does not depend on the order in which thread blocks run.
#pragma once
#include "tile.cuh"

namespace coatrt {

constexpr int kMaxMatrices = 4, kMaxRows = 8, kRank = 16;
constexpr int kRowsOfA = 256;      // rows of K that a thread block of x·A takes
constexpr int kSumThreads = 128;   // of coatrt_sum: two columns each
constexpr int kSumColumns = 256;

enum Mode : int { kSideBySide = 0, kGated };  // results side by side; silu(result of matrix 0) · result of matrix 1

struct Group {
  Matrix m[kMaxMatrices];
  int count, a_blocks;  // matrices; thread blocks of x·A, 0 without LoRA
};

/// Partial sums of thread block `block` of a matrix.
template <Format F>
__device__ void partial_product(const Matrix& m, int block, const half* x, int rows, float* partial, char* shared) {
  constexpr int kColumns = WarpTile<F>::kColumns, kWide = kWarpsN * 8 * kColumns;
  const int warp = threadIdx.x / 32, warp_n = warp % kWarpsN, warp_k = warp / kWarpsN;
  const int tile = block % m.tiles, split = block / m.tiles;
  WarpTile<F> one(m, x, rows, tile, warp_n);
  one.run(split * kWarpsK + warp_k, m.chunks, m.splits * kWarpsK, shared + warp * kStages * Stage<F>::bytes(rows));
  float* sums = reinterpret_cast<float*>(shared);  // [kWarpsK, rows, kWide]
  __syncthreads();                                 // the pipelines' memory takes the sums
#pragma unroll
  for (int s = 0; s < WarpTile<F>::kSets; ++s)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = 2 * one.t + i % 2, c = warp_n * 8 * kColumns + one.g * kColumns + 2 * s + i / 2;
      if (row < rows) sums[(warp_k * rows + row) * kWide + c] = one.total[s][i];
    }
  __syncthreads();
  float* out = partial + m.partial + static_cast<size_t>(split * m.tiles + tile) * rows * kWide;
  for (int i = threadIdx.x; i < rows * kWide; i += kThreads) {
    float value = 0.f;
#pragma unroll
    for (int k = 0; k < kWarpsK; ++k) value += sums[k * rows * kWide + i];
    out[i] = value;
  }
}

/// Partial sums of x·A, K from block · 256, of every matrix. Eight threads side by side hold a row of A [K, 16].
__device__ void partial_products_of_a(const Group& g, int block, const half* x, int rows, float* partial,
                                      float* shared) {
  constexpr int kEach = 8;
  const int pair = threadIdx.x % 8, first = threadIdx.x / 8, warp = threadIdx.x / 32, K = g.m[0].K;
  const int begin = block * kRowsOfA + first;
  half2 a[kMaxMatrices][kEach];
#pragma unroll
  for (int i = 0; i < kMaxMatrices; ++i)
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int at = begin + 32 * k;
      a[i][k] = i < g.count && at < K ? reinterpret_cast<const half2*>(g.m[i].A)[static_cast<size_t>(at) * 8 + pair]
                                      : __float2half2_rn(0.f);
    }
  wait_for_previous();
  for (int row = 0; row < rows; ++row) {
    float v[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      v[k] = begin + 32 * k < K ? __half2float(x[static_cast<size_t>(row) * K + begin + 32 * k]) : 0.f;
#pragma unroll
    for (int i = 0; i < kMaxMatrices; ++i) {
      float2 sum = {0.f, 0.f};
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const float2 w = __half22float2(a[i][k]);
        sum.x += v[k] * w.x;
        sum.y += v[k] * w.y;
      }
#pragma unroll
      for (int step = 8; step < 32; step *= 2) {  // the four rows of A that a warp holds
        sum.x += __shfl_xor_sync(0xffffffffu, sum.x, step);
        sum.y += __shfl_xor_sync(0xffffffffu, sum.y, step);
      }
      if (threadIdx.x % 32 < 8)
        *reinterpret_cast<float2*>(shared + ((i * rows + row) * kWarps + warp) * kRank + 2 * pair) = sum;
    }
  }
  __syncthreads();
  for (int t = threadIdx.x; t < g.count * rows * kRank; t += kThreads) {
    const int i = t / (rows * kRank), row = t / kRank % rows, r = t % kRank;
    float value = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) value += shared[((i * rows + row) * kWarps + w) * kRank + r];
    partial[g.m[i].partial_a + (block * rows + row) * kRank + r] = value;
  }
}

extern __shared__ __align__(16) char shared_memory[];

extern "C" __global__ void __launch_bounds__(kThreads, 2)
    coatrt_partial(const __grid_constant__ Group g, const half* x, int rows, float* partial) {
  start_next();
  if (blockIdx.x < g.a_blocks)
    return partial_products_of_a(g, blockIdx.x, x, rows, partial, reinterpret_cast<float*>(shared_memory));
  const int block = blockIdx.x - g.a_blocks;
  int i = 0;
#pragma unroll
  for (int j = 1; j < kMaxMatrices; ++j)
    if (j < g.count && block >= g.m[j].first) i = j;
  const Matrix& m = g.m[i];
  const int index = block - m.first;
  switch (m.format) {
    case kInt4: partial_product<kInt4>(m, index, x, rows, partial, shared_memory); break;
    case kInt8: partial_product<kInt8>(m, index, x, rows, partial, shared_memory); break;
    case kNvfp4: partial_product<kNvfp4>(m, index, x, rows, partial, shared_memory); break;
    case kFp8: partial_product<kFp8>(m, index, x, rows, partial, shared_memory); break;
    case kNf2: partial_product<kNf2>(m, index, x, rows, partial, shared_memory); break;
    case kNf3: partial_product<kNf3>(m, index, x, rows, partial, shared_memory); break;
    case kNf4: partial_product<kNf4>(m, index, x, rows, partial, shared_memory); break;
  }
}

/// A thread block sums 256 columns of one matrix, or of both of a gated pair; blockIdx.y is the row. `width`: of y.
extern "C" __global__ void __launch_bounds__(kSumThreads)
    coatrt_sum(const __grid_constant__ Group g, const float* partial, half* y, int mode, int width) {
  __shared__ float low[2][kRank];  // x·A
  const int row = blockIdx.y, rows = gridDim.y;
  start_next();
  int mine = 0, block = blockIdx.x;  // mine: first matrix of this block
  if (mode != kGated)
    while (block >= (g.m[mine].N + 255) / kSumColumns) block -= (g.m[mine].N + 255) / kSumColumns, ++mine;
  const int n = block * kSumColumns + 2 * threadIdx.x;
  const int begin = mode == kGated ? 0 : mine, end = mode == kGated ? 2 : mine + 1;
  const bool inside = n < g.m[mine].N;
  half2 b[2][kRank];
  if (g.a_blocks > 0 && inside)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (begin + i < end)
#pragma unroll
        for (int r = 0; r < kRank; ++r)
          b[i][r] =
              *reinterpret_cast<const half2*>(g.m[begin + i].B + static_cast<size_t>(r) * g.m[begin + i].N + n);
  wait_for_previous();
  if (g.a_blocks > 0) {
    for (int t = threadIdx.x; t < (end - begin) * kRank * 8; t += kSumThreads) {  // 8 threads for each number of x·A
      const int part = t % 8, r = t / 8 % kRank, i = t / (8 * kRank);
      float value = 0.f;
#pragma unroll 4
      for (int k = part; k < g.a_blocks; k += 8)
        value += partial[g.m[begin + i].partial_a + (k * rows + row) * kRank + r];
#pragma unroll
      for (int step = 4; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
      if (part == 0) low[i][r] = value;
    }
    __syncthreads();
  }
  if (!inside) return;
  int start = 0;
  for (int i = 0; i < mine; ++i) start += g.m[i].N;
  float2 sums[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (begin + i >= end) break;
    const Matrix& m = g.m[begin + i];
    const int wide = m.format == kInt4 || m.format == kNvfp4 ? 256 : 128;  // columns of a tile
    const float* from = partial + m.partial + (static_cast<size_t>(n / wide) * rows + row) * wide + n % wide;
    const size_t stride = static_cast<size_t>(m.tiles) * rows * wide;
    float2 sum = {0.f, 0.f};
#pragma unroll 8
    for (int s = 0; s < m.splits; ++s) {
      const float2 v = *reinterpret_cast<const float2*>(from + s * stride);
      sum.x += v.x;
      sum.y += v.y;
    }
    if (g.a_blocks > 0)
#pragma unroll
      for (int r = 0; r < kRank; ++r) {
        const float2 w = __half22float2(b[i][r]);
        sum.x += low[i][r] * w.x;
        sum.y += low[i][r] * w.y;
      }
    sums[i] = sum;
  }
  float2 out = sums[0];
  if (mode == kGated) {
    out.x = out.x / (1.f + __expf(-out.x)) * sums[1].x;
    out.y = out.y / (1.f + __expf(-out.y)) * sums[1].y;
  }
  *reinterpret_cast<half2*>(y + static_cast<size_t>(row) * width + start + n) = __floats2half2_rn(out.x, out.y);
}

}  // namespace coatrt
