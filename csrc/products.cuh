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
// `wide`: 16 bytes at a time, where they are of T. The copies are under way until cp_async_wait.
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
  if (sizeof(T) == 4 && wide) {
    for (int at = threadIdx.x; at < LINES * padded / WIDTH; at += kThreads) {
      const int line = at / (padded / WIDTH), i = at % (padded / WIDTH) * WIDTH;
      float values[WIDTH];
      fill(values, 0.0f);
      if (offsets[line] >= 0 && i < length) load_channels(values, data, offsets[line] + first + i, dtype);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) tile[line * S + i + j] = from_float<T>(values[j]);
    }
    return;
  }
  for (int at = threadIdx.x; at < LINES * padded; at += kThreads) {
    const int line = at / padded, i = at % padded;
    const bool live = offsets[line] >= 0 && i < length;
    tile[line * S + i] = live ? load_as<T>(data, dtype, offsets[line] + (first + i) * step) : from_float<T>(0.0f);
  }
}

// The values of patches in a video: neighbours in a row of it are WIDTH / pw whole patches side by side.
struct Pixels {
  void* video;
  DType dtype;
  int32_t pw;    // values of a patch that are adjacent in the video
  int32_t step;  // and how far apart they are among the patch's values
  bool wide;     // 16 bytes at a time
};

// Visits a tile [LINES patches][`length` of a patch's values], `action(line, value, offset)` with what is
// at `patches[line] + places[value]`; or, wide, with the first of 16 bytes. -1: there is no such patch.
template <int WIDTH, int LINES, typename Action>
__device__ inline void visit_pixels(const Pixels& pixels, const int64_t* patches, const int64_t* places, int length,
                                    Action&& action) {
  if (!pixels.wide) {
    // neighbouring threads have neighbouring patches
    for (int at = threadIdx.x; at < LINES * length; at += kThreads) {
      const int line = at % LINES, value = at / LINES;
      action(line, value, patches[line] < 0 ? -1 : patches[line] + places[value]);
    }
    return;
  }
  // 8 values, then the patches: whole sectors of the video, few conflicts in the tile
  const int side_by_side = WIDTH / pixels.pw, groups = LINES / side_by_side, values = length / pixels.pw;
  for (int at = threadIdx.x; at < (values + 7) / 8 * 8 * groups; at += kThreads) {
    const int i = at / (8 * groups) * 8 + at % 8, line = at / 8 % groups * side_by_side;
    if (i >= values) continue;
    const int value = i / pixels.step * pixels.pw * pixels.step + i % pixels.step;
    action(line, value, patches[line] < 0 ? -1 : patches[line] + places[value]);
  }
}

// A tile [LINES patches][LENGTH values] of the video; zeros past `length`, up to a multiple of 16
template <typename T, int LINES, int LENGTH>
__device__ inline void fill_pixels(T* tile, const Pixels& pixels, const int64_t* patches, const int64_t* places,
                                   int length) {
  constexpr int S = STRIDE<T, LENGTH>, WIDTH = VECTOR<T>;
  length = length < LENGTH ? length : LENGTH;
  const int rest = up_to_16(length) - length;
  for (int at = threadIdx.x; at < LINES * rest; at += kThreads) {
    tile[at / rest * S + length + at % rest] = from_float<T>(0.0f);
  }
  visit_pixels<WIDTH, LINES>(pixels, patches, places, length, [&](int line, int value, int64_t offset) {
    if (!pixels.wide) {
      tile[line * S + value] = offset < 0 ? from_float<T>(0.0f) : load_as<T>(pixels.video, pixels.dtype, offset);
      return;
    }
    Packed<T, WIDTH> packed;
    if (offset >= 0) packed.load(static_cast<const T*>(pixels.video) + offset);
    T* to = tile + line * S + value;
    int w = 0;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      to[w * pixels.step] = offset < 0 ? from_float<T>(0.0f) : packed.at[i];
      if (++w == pixels.pw) {
        w = 0;
        to += S;
      }
    }
  });
}

// The same way back: `value_of(line, value)` to the video
template <typename T, int LINES, typename Value>
__device__ inline void store_pixels(const Pixels& pixels, const int64_t* patches, const int64_t* places, int length,
                                    Value&& value_of) {
  constexpr int WIDTH = VECTOR<T>;
  visit_pixels<WIDTH, LINES>(pixels, patches, places, length, [&](int line, int value, int64_t offset) {
    if (offset < 0) return;
    if (!pixels.wide) {
      const float one[1] = {value_of(line, value)};
      store_channels(pixels.video, offset, one, pixels.dtype);
      return;
    }
    float values[WIDTH];
    int w = 0;
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) {
      values[i] = value_of(line, value + w * pixels.step);
      if (++w == pixels.pw) {
        w = 0;
        ++line;
      }
    }
    store_channels(pixels.video, offset, values, dtype_of<T>);
  });
}

// Whether 16 bytes of the video are WIDTH / pw whole patches side by side, in any tile of `length` values
inline bool wide_pixels(const void* video, DType dtype, DType operands, const int64_t (&strides)[5], int grid_w, int pw,
                        int step, int values, int length) {
  const int width = 16 / bytes_of(dtype);
  return dtype == operands && width % pw == 0 && grid_w % (width / pw) == 0 && strides[4] == 1 &&
         values % (pw * step) == 0 && (values <= length || length % (pw * step) == 0) &&
         aligned16(video, bytes_of(dtype), strides[0], strides[1], strides[2], strides[3]);
}

}  // namespace dk::products
