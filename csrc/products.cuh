// Matrix products of tiles in shared memory, for the ops whose operands are gathered: on tensor cores for
// 16-bit operands, with fused multiply-adds for float32.
//
//     product [ROWS, COLUMNS] += left [ROWS, DEPTH] right [COLUMNS, DEPTH]^T
//
// An operand lies in shared memory with its depth adjacent, or ACROSS: [DEPTH, ROWS or COLUMNS].
#pragma once

#include "rows.cuh"

namespace dk::products {

constexpr int kThreads = 256;
constexpr int ROWS = 128, COLUMNS = 64;
template <typename T>
constexpr int DEPTH = 128 / sizeof(T);

// Elements from one line of a tile to the next: lines start at multiples of 16 bytes, in different banks
template <typename T, int LENGTH>
constexpr int STRIDE = LENGTH + (sizeof(T) == 2 ? 8 : 1);

template <typename T>
struct Product {
  static constexpr bool TENSOR = sizeof(T) == 2;
  // tensor cores: 4 x 2 warps of 32 x 32; else 16 x 16 threads of 8 x 4
  float at[TENSOR ? 2 : 8][TENSOR ? 4 : 4][TENSOR ? 4 : 1];

  __device__ void clear() {
#pragma unroll
    for (auto& row : at) {
#pragma unroll
      for (auto& tile : row) fill(tile, 0.0f);
    }
  }

  // `depth`: how much of the tiles is there; what is between it and a multiple of 16 is zeros
  template <bool LEFT_ACROSS, bool RIGHT_ACROSS>
  __device__ void add(const T* left, const T* right, int depth) {
    constexpr int L = LEFT_ACROSS ? STRIDE<T, ROWS> : STRIDE<T, DEPTH<T>>;
    constexpr int R = RIGHT_ACROSS ? STRIDE<T, COLUMNS> : STRIDE<T, DEPTH<T>>;
    if constexpr (TENSOR) {
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, matrix = lane / 8, line = lane % 8;
      const int row0 = warp / 2 * 32, column0 = warp % 2 * 32;
      for (int k = 0; k < depth; k += 16) {
        unsigned a[2][4], b[2][4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int row = row0 + 16 * i + matrix % 2 * 8, deep = k + matrix / 2 * 8;
          if constexpr (LEFT_ACROSS) ldmatrix<4, true>(a[i], left + (deep + line) * L + row);
          else ldmatrix<4>(a[i], left + (row + line) * L + deep);
        }
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = column0 + 16 * j + matrix / 2 * 8, deep = k + matrix % 2 * 8;
          if constexpr (RIGHT_ACROSS) ldmatrix<4, true>(b[j], right + (deep + line) * R + column);
          else ldmatrix<4>(b[j], right + (column + line) * R + deep);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const unsigned pair[2] = {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]};
            mma<T>(at[i][j], a[i], pair);
          }
        }
      }
    } else {
      const int row0 = threadIdx.x / 16, column0 = threadIdx.x % 16;
      // a sum of its own for each tile: long depths lose less to rounding
      float sum[8][4] = {};
      for (int k = 0; k < depth; ++k) {
        float b[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int column = column0 + 16 * j;
          b[j] = right[RIGHT_ACROSS ? k * R + column : column * R + k];
        }
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const int row = row0 + 16 * i;
          const float a = left[LEFT_ACROSS ? k * L + row : row * L + k];
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[i][j] = fmaf(a, b[j], sum[i][j]);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) at[i][j][0] += sum[i][j];
      }
    }
  }

  // [ROWS][stride]
  __device__ void store(float* shared, int stride) const {
    if constexpr (TENSOR) {
      const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
      const int row0 = warp / 2 * 32 + lane / 4, column0 = warp % 2 * 32 + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float* const to = shared + (row0 + 16 * i) * stride + column0 + 8 * j;
          to[0] = at[i][j][0];
          to[1] = at[i][j][1];
          to[8 * stride] = at[i][j][2];
          to[8 * stride + 1] = at[i][j][3];
        }
      }
    } else {
      const int row0 = threadIdx.x / 16, column0 = threadIdx.x % 16;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) shared[(row0 + 16 * i) * stride + column0 + 16 * j] = at[i][j][0];
      }
    }
  }
};

template <typename T>
__device__ inline T load_as(const void* data, DType dtype, int64_t offset) {
  if constexpr (sizeof(T) == 2) return static_cast<const T*>(data)[offset];
  else return load_any(data, dtype, offset);
}

__device__ inline int up_to_16(int depth) { return (depth + 15) / 16 * 16; }

// LINES lines of up to LENGTH elements of a matrix whose line i starts at `offsets[i]` (-1: there is none) and
// has `length` elements `step` apart, into a tile; the rest is zeros, up to a multiple of 16 each way.
// `wide`: 16 bytes at a time. The copies are under way until cp_async_wait.
template <typename T, int LINES, int LENGTH>
__device__ inline void fill_tile(T* tile, const void* data, DType dtype, const int64_t* offsets, int64_t first,
                                 int length, int64_t step, bool wide) {
  constexpr int WIDTH = 16 / sizeof(T), S = STRIDE<T, LENGTH>;
  length = length < LENGTH ? length : LENGTH;
  if (sizeof(T) == 2 && wide) {
    const int vectors = up_to_16(length) / WIDTH;
    for (int at = threadIdx.x; at < LINES * vectors; at += kThreads) {
      const int line = at / vectors, i = at % vectors * WIDTH;
      const bool live = offsets[line] >= 0 && i < length;
      cp_async<16>(tile + line * S + i, static_cast<const T*>(data) + (live ? offsets[line] + first + i : 0), live);
    }
    return;
  }
  const int padded = up_to_16(length);
  for (int at = threadIdx.x; at < LINES * padded; at += kThreads) {
    const int line = at / padded, i = at % padded;
    const bool live = offsets[line] >= 0 && i < length;
    tile[line * S + i] = live ? load_as<T>(data, dtype, offsets[line] + (first + i) * step) : from_float<T>(0.0f);
  }
}

}  // namespace dk::products
