// A warp's share of x·W: columns of a matrix, chunks of K, through a pipeline in shared memory to the tensor cores.
//
// Lanes are numbered as the tensor core's product m16n8k16 numbers them: quad g = lane / 4, place t = lane % 4. Weights
// are its first operand and activations its second, so that its 16 rows are columns of W and its 8 columns are rows
// of x. Which columns and which K those are is free, as long as both operands agree:
//   rows g and g + 8 of the product   columns 2s and 2s + 1 of quad g's kColumns neighbouring columns, s = 0, 1, …
//   K of lane t                       see decode_pairs; operands() reads x in the same order
//   sums of lane (g, t)               columns 2s, 2s + 1 of quad g, rows 2t and 2t + 1 of x
#pragma once
#include "packed.cuh"

namespace coatrt {

constexpr int kWarpsN = 2, kWarpsK = 4;  // warps of a thread block: side by side, and sharing K
constexpr int kWarps = kWarpsN * kWarpsK, kThreads = 32 * kWarps;
constexpr int kStages = 3;  // of a warp's pipeline

/// One matrix of a group. Packed rows that share their scales and are loaded together are a chunk.
struct Matrix {
  const void *codes, *plane;  // plane: top bits of nf3
  const void* scales;         // [Kp / block, N]: float16, E4M3 for nvfp4
  const half *A, *B, *levels;  // [K, 16], [16, N]; the codebook of NormalFloat
  float factor;                // nvfp4: 256 times the power of two its scales are multiplied with
  int format, N, K, block;     // block: K per channel
  int tiles;                   // thread blocks side by side
  int packed_rows;             // Kp / segments
  int chunk_rows, chunks;
  int first, splits;       // first thread block; thread blocks that share K of a tile
  int partial, partial_a;  // floats before its partial sums, and before those of x·A
};

__device__ __forceinline__ void multiply_add(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                             uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

/// Copy `size` bytes (4, 8, 16) to shared memory, of which `bytes` come from memory and the rest is zero.
__device__ __forceinline__ void copy_async(void* to, const void* from, int bytes, int size) {
  const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if (size == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
  else if (size == 8)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(at), "l"(from), "r"(bytes) : "memory");
}

/// Wait for the kernels before this one in the stream. A kernel that starts early (programmatic dependent launch,
/// compute capability 9.0) reads only weights and LoRA before.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Let the next kernel of the stream start as soon as multiprocessors have room for it.
__device__ __forceinline__ void start_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

/// Bytes of one stage of a warp's pipeline: words of a chunk, its scales, then x.
template <Format F>
struct Stage {
  using P = Packing<F>;
  static constexpr int kColumns = 2 * P::kWordColumns;        // of a quad: an 8-byte word
  static constexpr int kMaxRows = F == kNf3 ? 16 : 32;        // most packed rows of a chunk
  static constexpr int kMaxSteps = kMaxRows / P::kStepRows;   // most steps of a chunk
  static constexpr int kWords = kMaxSteps * P::kLoads * 32 * 8;
  static constexpr int kScaleRow = 8 * kColumns * (F == kNvfp4 ? 1 : 2);
  static constexpr int kScaleRows = F == kNvfp4 ? 2 : P::kSegments;  // nvfp4: a chunk of 32 has two blocks of 16
  static constexpr int kScales = kScaleRow * kScaleRows;
  static constexpr int kX = P::kSegments * kMaxRows * 2;  // of a row of x
  __host__ __device__ static constexpr int bytes(int rows) { return kWords + kScales + kX * rows; }
};

/// Sums of x·W of one warp.
template <Format F>
struct WarpTile {
  using P = Packing<F>;
  using S = Stage<F>;
  static constexpr int kColumns = S::kColumns, kSets = kColumns / 2;  // sets: products side by side
  const Matrix& m;
  const half* x;
  int rows, g, t, column;  // column: first of the quad
  const uint2 *words, *tops;
  size_t width;  // 8-byte words of a packed row
  Codebook codebook;
  float sums[kSets][4], total[kSets][4];     // of a chunk without scales, if they multiply sums; of all
  uint32_t scales[P::kScalePairs][kColumns];  // as float16 pairs, one for each pair of segments

  __device__ WarpTile(const Matrix& matrix, const half* activations, int count, int tile, int warp)
      : m(matrix), x(activations), rows(count) {
    const int lane = threadIdx.x % 32;
    g = lane / 4, t = lane % 4;
    column = ((tile * kWarpsN + warp) * 8 + g) * kColumns;
    width = P::kWordColumns == 8 ? m.N / 16 : m.N / 8;
    const int at = column < m.N ? column / kColumns : 0;  // columns behind the last repeat the first, for nothing
    words = static_cast<const uint2*>(m.codes) + at;
    tops = static_cast<const uint2*>(m.plane) + at;
#pragma unroll
    for (int s = 0; s < kSets; ++s)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[s][i] = total[s][i] = 0.f;
    if constexpr (P::kSegments > 1) codebook.load<F>(m.levels);
  }

  /// Load the words and scales of the chunk that begins at packed row `first`.
  __device__ __forceinline__ void fetch_weights(char* stage, int first) const {
    const int lane = threadIdx.x % 32;
    char* to = stage + 8 * lane;
    const uint32_t stride = static_cast<uint32_t>(width) * 8;  // bytes of a packed row
    if constexpr (P::kSegments == 1) {  // lane t reads rows 4t … 4t + 3 of every 16
      const char* from = reinterpret_cast<const char*>(words) + static_cast<size_t>(first + 4 * t) * stride;
      if (first + S::kMaxRows <= m.packed_rows && m.chunk_rows == S::kMaxRows) {
#pragma unroll
        for (int i = 0; i < 4 * S::kMaxSteps; ++i)
          copy_async(to + i * 256, from + (16 * (i / 4) + i % 4) * stride, 8, 8);
      } else {  // rows behind the last repeat it; x is zero there
        for (int i = 0; i < 4 * S::kMaxSteps && 16 * (i / 4) < m.chunk_rows; ++i) {
          const int row = min(first + 16 * (i / 4) + 4 * t + i % 4, m.packed_rows - 1);
          copy_async(to + i * 256, reinterpret_cast<const char*>(words) + static_cast<size_t>(row) * stride, 8, 8);
        }
      }
    } else {  // lane t reads packed rows 2t, 2t + 1 of every 8 (nf4), row t of every 4 (nf2, nf3)
      constexpr int kEach = F == kNf4 ? 2 : 1;
      const char* from = reinterpret_cast<const char*>(words) + static_cast<size_t>(first + kEach * t) * stride;
      const char* top = reinterpret_cast<const char*>(tops) + static_cast<size_t>(first + t) * stride;
      const size_t other = static_cast<size_t>(m.packed_rows) * stride;  // nf3: second half of the low bits
#pragma unroll
      for (int i = 0; i < S::kMaxSteps; ++i) {
        if (i * P::kStepRows >= m.chunk_rows) break;
        if constexpr (F == kNf4) {
          copy_async(to + 512 * i, from + 8 * i * stride, 8, 8);
          copy_async(to + 512 * i + 256, from + (8 * i + 1) * stride, 8, 8);
        } else if constexpr (F == kNf2) {
          copy_async(to + 256 * i, from + 4 * i * stride, 8, 8);
        } else {
          copy_async(to + 768 * i, from + 4 * i * stride, 8, 8);
          copy_async(to + 768 * i + 256, from + other + 4 * i * stride, 8, 8);
          copy_async(to + 768 * i + 512, top + 4 * i * stride, 8, 8);
        }
      }
    }
    // A row of scales for all columns of the warp, a piece from each lane.
    constexpr int kPiece = S::kScaleRow / 32;
    char* scale = stage + S::kWords + lane * kPiece;
    const int base = column - g * kColumns, last = base + lane * (kColumns / 4);
#pragma unroll
    for (int j = 0; j < S::kScaleRows; ++j) {
      const int block = F == kNvfp4 ? min(first / 16 + j, (m.packed_rows - 1) / 16)
                                    : (first + j * m.packed_rows) / m.block;
      const size_t at = static_cast<size_t>(block) * m.N + (last < m.N ? last : 0);
      const char* from = static_cast<const char*>(m.scales) + at * (F == kNvfp4 ? 1 : 2);
      copy_async(scale + j * S::kScaleRow, from, kPiece, kPiece);
    }
  }

  /// Load x of the chunk: lanes 4r … 4r + 3 load row r, 8 values each of every segment, zero behind K.
  __device__ __forceinline__ void fetch_x(char* stage, int first) const {
    const int lane = threadIdx.x % 32, row = lane / 4;
    if (row >= rows) return;
    char* to = stage + S::kWords + S::kScales + row * S::kX;
#pragma unroll
    for (int j = 0; j < P::kSegments; ++j) {
      const int piece = lane % 4, k = first + j * m.packed_rows + 8 * piece;
      if (8 * piece < m.chunk_rows)
        copy_async(to + j * S::kMaxRows * 2 + 16 * piece, x + static_cast<size_t>(row) * m.K + min(k, m.K - 8),
                   max(0, min(16, 2 * (m.K - k))), 16);
    }
  }

  /// Row g of x at the K that decode_pairs gives this lane in a step.
  __device__ __forceinline__ void operands(const char* stage, int step, uint32_t (&b)[2 * P::kProducts]) const {
#pragma unroll
    for (int k = 0; k < 2 * P::kProducts; ++k) b[k] = 0;
    if (g >= rows) return;
    const char* row = stage + S::kWords + S::kScales + g * S::kX;
    if constexpr (P::kSegments == 1) {
      const uint2 v = *reinterpret_cast<const uint2*>(row + (16 * step + 4 * t) * 2);
      b[0] = v.x;
      b[1] = v.y;
    } else {
      const unsigned short* v = reinterpret_cast<const unsigned short*>(row);
      auto pair = [&](int one, int other, int at) {
        return static_cast<uint32_t>(v[one * S::kMaxRows + at]) |
               (static_cast<uint32_t>(v[other * S::kMaxRows + at]) << 16);
      };
      if constexpr (F == kNf4) {
        b[0] = pair(0, 1, 8 * step + 2 * t);
        b[1] = pair(0, 1, 8 * step + 2 * t + 1);
      } else if constexpr (F == kNf2) {
        b[0] = pair(0, 2, 4 * step + t);
        b[1] = pair(1, 3, 4 * step + t);
      } else {
        const int at = 4 * step + t;
        b[0] = pair(0, 4, at);
        b[1] = pair(2, 6, at);
        b[2] = pair(1, 5, at);
        b[3] = pair(3, 7, at);
      }
    }
  }

  /// Row j of the stage's scales for the quad's columns, as float16.
  __device__ __forceinline__ void raw_scales(const char* stage, int j, uint32_t (&raw)[kColumns / 2]) const {
    const char* row = stage + S::kWords + j * S::kScaleRow + g * (S::kScaleRow / 8);
    const uint4* from = reinterpret_cast<const uint4*>(row);
    if constexpr (F == kNvfp4) {
      const uint4 v = *from;
      const half2 unit = __float2half2_rn(m.factor);
      const uint32_t four[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 8; ++i)
        raw[i] = as_word(__hmul2(as_half2(decode_e4m3_scales(four[i / 2], i % 2)), unit));
    } else {
#pragma unroll
      for (int i = 0; i < kColumns / 8; ++i) {
        const uint4 v = from[i];
        raw[4 * i] = v.x;
        raw[4 * i + 1] = v.y;
        raw[4 * i + 2] = v.z;
        raw[4 * i + 3] = v.w;
      }
    }
  }

  /// Scales that multiply weights: for each column and pair of segments the scales of both; of nvfp4 row j's, twice.
  __device__ __forceinline__ void load_scales(const char* stage, int j) {
#pragma unroll
    for (int p = 0; p < P::kScalePairs; ++p) {
      const int first = first_segment<F>(p);
      uint32_t a[kColumns / 2], b[kColumns / 2];
      raw_scales(stage, P::kSegments > 1 ? first : j, a);
      if constexpr (P::kSegments > 1) raw_scales(stage, first + P::kSegments / 2, b);
#pragma unroll
      for (int c = 0; c < kColumns / 2; ++c) {
        const uint32_t other = P::kSegments > 1 ? b[c] : a[c];
        scales[p][2 * c] = __byte_perm(a[c], other, 0x5410);
        scales[p][2 * c + 1] = __byte_perm(a[c], other, 0x7632);
      }
    }
  }

  /// Multiply one step of a stage.
  __device__ __forceinline__ void multiply(const char* stage, int step) {
    const uint2* from = reinterpret_cast<const uint2*>(stage) + step * P::kLoads * 32 + threadIdx.x % 32;
    struct {
      uint2 words[P::kLoads];
      uint32_t x[2 * P::kProducts];
    } lane;
#pragma unroll
    for (int i = 0; i < P::kLoads; ++i) lane.words[i] = from[i * 32];
    operands(stage, step, lane.x);
#pragma unroll
    for (int index = 0; index < 2; ++index) {
#pragma unroll
      for (int product = 0; product < P::kProducts; ++product) {
        uint32_t first[P::kWordColumns], second[P::kWordColumns];
        decode_pairs<F>(lane.words, index, product, codebook, first, second);
        const int pair = 2 * product, next = P::kScalePairs > 1 ? pair + 1 : 0;  // pairs of segments
#pragma unroll
        for (int c = 0; c < P::kWordColumns; c += 2) {
          const int at = index * P::kWordColumns + c;
          if constexpr (kScalesSums<F>)
            multiply_add(sums[at / 2], first[c], first[c + 1], second[c], second[c + 1], lane.x[pair],
                         lane.x[pair + 1]);
          else
            multiply_add(sums[at / 2], times(first[c], scales[pair][at]), times(first[c + 1], scales[pair][at + 1]),
                         times(second[c], scales[next][at]), times(second[c + 1], scales[next][at + 1]), lane.x[pair],
                         lane.x[pair + 1]);
        }
      }
    }
  }

  __device__ __forceinline__ void scale_sums(const char* stage) {
    uint32_t raw[kColumns / 2];
    raw_scales(stage, 0, raw);
#pragma unroll
    for (int s = 0; s < kSets; ++s) {
      const float2 scale = __half22float2(as_half2(raw[s]));
      total[s][0] += sums[s][0] * scale.x;
      total[s][1] += sums[s][1] * scale.x;
      total[s][2] += sums[s][2] * scale.y;
      total[s][3] += sums[s][3] * scale.y;
      sums[s][0] = sums[s][1] = sums[s][2] = sums[s][3] = 0.f;
    }
  }

  /// Multiply chunks first, first + step, … before last. `ring` holds kStages stages of this warp alone.
  __device__ void run(int first, int last, int step, char* ring) {
    const int size = S::bytes(rows), count = first < last ? (last - first - 1) / step + 1 : 0;
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i)
      if (i < count) fetch_weights(ring + i * size, (first + i * step) * m.chunk_rows);
    wait_for_previous();  // x may come from the previous kernel; weights do not
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < count) fetch_x(ring + i * size, (first + i * step) * m.chunk_rows);
      asm volatile("cp.async.commit_group;" ::: "memory");
    }
    int from = 0, to = (kStages - 1) * size;
    for (int i = 0; i < count; ++i) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
      __syncwarp();
      const int ahead = first + (i + kStages - 1) * step;
      if (ahead < last) {
        fetch_weights(ring + to, ahead * m.chunk_rows);
        fetch_x(ring + to, ahead * m.chunk_rows);
      }
      asm volatile("cp.async.commit_group;" ::: "memory");
      const char* stage = ring + from;
      const int left = min(m.chunk_rows, m.packed_rows - (first + i * step) * m.chunk_rows);
      if constexpr (P::kSegments > 1) load_scales(stage, 0);
#pragma unroll
      for (int k = 0; k < S::kMaxSteps; ++k) {
        if (k * P::kStepRows >= left) break;
        if constexpr (F == kNvfp4) load_scales(stage, k);
        multiply(stage, k);
      }
      if constexpr (kScalesSums<F>) scale_sums(stage);
      __syncwarp();  // the stage may be overwritten
      from = from + size == kStages * size ? 0 : from + size;
      to = to + size == kStages * size ? 0 : to + size;
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
    if constexpr (!kScalesSums<F>) {
#pragma unroll
      for (int s = 0; s < kSets; ++s)
#pragma unroll
        for (int i = 0; i < 4; ++i) total[s][i] = sums[s][i];
    }
  }
};

}  // namespace coatrt
