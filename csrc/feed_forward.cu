// Bias and activation of the feed-forward: one elementwise kernel each way.
//
//   gelu    y = gelu(x + bias)                             reads x, writes y
//   swiglu  y = silu(a) * b, (a, b) = halves of x + bias   reads x once, writes half of it
//
// A warp owns 32 vectors of columns, whose bias its lanes keep in registers, and the block's warps walk over
// rows. The backward recomputes from x, reads x and dy and writes dx; the bias gradient is the column sum
// of dx before its rounding: one float32 row a block, then add_rows.
#include "feed_forward.h"

#include <algorithm>

namespace dk {
namespace {

constexpr int WARPS = 8;
constexpr int UNROLL = 2;  // rows in flight a thread

// What __expf loses shows in float32 only.
template <typename T>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (std::is_same_v<T, float>) return expf(x);
  else return __expf(x);
}

// (sigmoid(x), sigmoid(-x)): neither by a difference, and nothing overflows
template <typename T>
__device__ __forceinline__ float2 sigmoids(float x) {
  const float e = exponential<T>(-fabsf(x));
  const float near = __fdividef(1.0f, 1.0f + e), far = e * near;  // one ulp, without a division's slow path
  return x < 0.0f ? make_float2(far, near) : make_float2(near, far);
}

template <typename T, bool TANH>
__device__ __forceinline__ float gelu(float z) {
  // (1 + tanh(u)) / 2 = sigmoid(2u), which loses nothing where tanh is near -1
  if constexpr (TANH) return z * sigmoids<T>(1.5957691216057308f * (z + 0.044715f * z * z * z)).x;
  else return 0.5f * z * erfcf(-0.7071067811865476f * z);
}

template <typename T, bool TANH>
__device__ __forceinline__ float dgelu(float z) {
  if constexpr (TANH) {
    const float2 s = sigmoids<T>(1.5957691216057308f * (z + 0.044715f * z * z * z));
    return s.x + z * (s.x * s.y) * (1.5957691216057308f * (1.0f + 0.134145f * z * z));
  } else {
    return 0.5f * erfcf(-0.7071067811865476f * z) + z * (0.3989422804014327f * exponential<T>(-0.5f * z * z));
  }
}

__device__ __forceinline__ int64_t row_offset(unsigned m, unsigned inner, unsigned rows, RowStrides strides) {
  if (inner == rows) return m * strides.inner;
  return m / inner * strides.outer + m % inner * strides.inner;
}

template <int VEC>
__device__ __forceinline__ void load_bias(const void* bias, DType dtype, int64_t first, int64_t stride,
                                          float (&values)[VEC]) {
#pragma unroll
  for (int i = 0; i < VEC; ++i) values[i] = bias ? load_any(bias, dtype, (first + i) * stride) : 0.0f;
}

template <typename T, int VEC, Activation ACT>
__global__ void __launch_bounds__(32 * WARPS)
    feed_forward_fwd_kernel(const T* __restrict__ x,  // [rows, F] or [rows, 2F]
                            const void* __restrict__ bias, T* __restrict__ y, unsigned rows, unsigned inner,
                            unsigned columns, unsigned chunk, RowStrides x_strides, int64_t bias_stride,
                            DType bias_dtype) {
  constexpr bool GATED = ACT == Activation::swiglu_first || ACT == Activation::swiglu_second;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned tiles = (columns + 32 * VEC - 1) / (32 * VEC);
  const unsigned column = (blockIdx.x % tiles * 32 + lane) * VEC;
  const unsigned begin = blockIdx.x / tiles * chunk, end = min(begin + chunk, rows);
  if (column >= columns) return;
  float bias1[VEC], bias2[VEC];
  load_bias(bias, bias_dtype, column, bias_stride, bias1);
  if constexpr (GATED) load_bias(bias, bias_dtype, columns + column, bias_stride, bias2);
  x += column * x_strides.column;
  for (unsigned m0 = begin + warp; m0 < end; m0 += WARPS * UNROLL) {
    float z[UNROLL][VEC], z2[UNROLL][VEC];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const unsigned m = m0 + u * WARPS;
      if (m >= end) break;
      const T* row = x + row_offset(m, inner, rows, x_strides);
      load_vector(row, z[u]);
      if constexpr (GATED) load_vector(row + columns * x_strides.column, z2[u]);
    }
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const unsigned m = m0 + u * WARPS;
      if (m >= end) break;
      float out[VEC];
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const float a = z[u][i] + bias1[i];
        if constexpr (GATED) {
          const float b = z2[u][i] + bias2[i];
          out[i] = ACT == Activation::swiglu_first ? a * sigmoids<T>(a).x * b : a * (b * sigmoids<T>(b).x);
        } else {
          out[i] = gelu<T, ACT == Activation::gelu_tanh>(a);
        }
      }
      store_vector(y + int64_t(m) * columns + column, out);
    }
  }
}

template <typename T, int VEC, Activation ACT>
__global__ void __launch_bounds__(32 * WARPS)
    feed_forward_bwd_kernel(const T* __restrict__ dy,  // [rows, F]
                            const T* __restrict__ x,   // [rows, F] or [rows, 2F]
                            const void* __restrict__ bias, T* __restrict__ dx,
                            float* __restrict__ dbias_sums,  // [parts, F or 2F]
                            unsigned rows, unsigned inner, unsigned columns, unsigned chunk,
                            RowStrides dy_strides, RowStrides x_strides, int64_t bias_stride, DType bias_dtype) {
  constexpr bool GATED = ACT == Activation::swiglu_first || ACT == Activation::swiglu_second;
  constexpr int HALVES = GATED ? 2 : 1;
  __shared__ float shared_sums[WARPS][HALVES][VEC][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned tiles = (columns + 32 * VEC - 1) / (32 * VEC);
  const unsigned column = (blockIdx.x % tiles * 32 + lane) * VEC;
  const unsigned part = blockIdx.x / tiles, begin = part * chunk, end = min(begin + chunk, rows);
  const bool inside = column < columns;
  float bias1[VEC], bias2[VEC], sums[HALVES][VEC] = {};
  if (inside) {
    load_bias(bias, bias_dtype, column, bias_stride, bias1);
    if constexpr (GATED) load_bias(bias, bias_dtype, columns + column, bias_stride, bias2);
    for (unsigned m = begin + warp; m < end; m += WARPS) {
      float z[VEC], z2[VEC], g[VEC], dz[VEC], dz2[VEC];
      const T* row = x + row_offset(m, inner, rows, x_strides) + column * x_strides.column;
      load_vector(dy + row_offset(m, inner, rows, dy_strides) + column * dy_strides.column, g);
      load_vector(row, z);
      if constexpr (GATED) load_vector(row + columns * x_strides.column, z2);
#pragma unroll
      for (int i = 0; i < VEC; ++i) {
        const float a = z[i] + bias1[i];
        if constexpr (GATED) {
          const float b = z2[i] + bias2[i];
          if constexpr (ACT == Activation::swiglu_first) {
            const float2 s = sigmoids<T>(a);
            dz2[i] = g[i] * (a * s.x);
            dz[i] = g[i] * b * (s.x * (1.0f + a * s.y));
          } else {
            const float2 s = sigmoids<T>(b);
            dz[i] = g[i] * (b * s.x);
            dz2[i] = g[i] * a * (s.x * (1.0f + b * s.y));
          }
          sums[1][i] += dz2[i];
        } else {
          dz[i] = g[i] * dgelu<T, ACT == Activation::gelu_tanh>(a);
        }
        sums[0][i] += dz[i];
      }
      if (dx) {
        T* out = dx + int64_t(m) * (HALVES * columns) + column;
        store_vector(out, dz);
        if constexpr (GATED) store_vector(out + columns, dz2);
      }
    }
  }
  if (!dbias_sums) return;
#pragma unroll
  for (int half = 0; half < HALVES; ++half)
#pragma unroll
    for (int i = 0; i < VEC; ++i) shared_sums[warp][half][i][lane] = sums[half][i];
  __syncthreads();
  // thread t adds column t of the tile over the warps
  for (int t = threadIdx.x; t < HALVES * VEC * 32; t += 32 * WARPS) {
    const int half = t / (VEC * 32), at = t % (VEC * 32);
    const unsigned to = blockIdx.x % tiles * (32 * VEC) + at;
    if (to >= columns) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) total += shared_sums[w][half][at % VEC][at / VEC];
    dbias_sums[int64_t(part) * (HALVES * columns) + half * columns + to] = total;
  }
}

template <typename Action>
void with_activation(Activation act, Action&& action) {
  switch (act) {
    case Activation::gelu_tanh: return action(std::integral_constant<Activation, Activation::gelu_tanh>{});
    case Activation::gelu_erf: return action(std::integral_constant<Activation, Activation::gelu_erf>{});
    case Activation::swiglu_first: return action(std::integral_constant<Activation, Activation::swiglu_first>{});
    case Activation::swiglu_second: return action(std::integral_constant<Activation, Activation::swiglu_second>{});
  }
  throw std::invalid_argument("no such activation: " + std::to_string(static_cast<int>(act)));
}

// The kernels count rows and columns in 32 bits; offsets are of 64.
void check_sizes(int64_t rows, int64_t inner, int64_t columns) {
  if (rows > 0x7fff0000 || columns > 0x3fff0000)
    throw std::invalid_argument(std::to_string(rows) + " rows of " + std::to_string(columns) +
                                " columns are more than the kernel counts");
  if (rows < 0 || columns < 0 || inner < 1)
    throw std::invalid_argument("there are no " + std::to_string(rows) + " rows of " + std::to_string(columns) +
                                " columns, " + std::to_string(inner) + " to a step");
}

unsigned narrow(int64_t value) { return static_cast<unsigned>(value); }

// Rows of one block: enough blocks to fill the GPU several times, not more than `most` rows
int64_t rows_a_block(int64_t rows, int64_t tiles, int64_t most) {
  const int64_t slots = 16 * multiprocessors();
  int64_t chunk = WARPS * UNROLL;
  while (chunk < most && rows * tiles > chunk * slots) chunk *= 2;
  return chunk;
}

bool vectors(const void* address, int64_t columns, RowStrides strides, DType dtype) {
  const int bytes = bytes_of(dtype);
  return strides.column == 1 && aligned16(address, bytes, columns, strides.outer, strides.inner);
}

// The backward's tiles are counted as if narrow, so that `feed_forward_bwd_parts` needs no pointers
int64_t backward_chunk(int64_t rows, int64_t columns) { return rows_a_block(rows, ceil_div(columns, 256), 256); }

}  // namespace

void feed_forward_fwd(const void* x, const void* bias, void* y, int64_t rows, int64_t inner, int64_t columns,
                      RowStrides x_strides, int64_t bias_stride, DType dtype, DType bias_dtype, Activation act,
                      cudaStream_t stream) {
  check_sizes(rows, inner, columns);
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    with_activation(act, [&](auto activation) {
      constexpr Activation ACT = decltype(activation)::value;
      with_bool(vectors(x, columns, x_strides, dtype), [&](auto vectorised) {
        constexpr int VEC = decltype(vectorised)::value ? VECTOR<T> : 1;
        const int64_t tiles = ceil_div(columns, 32 * VEC), chunk = rows_a_block(rows, tiles, 128);
        DK_LAUNCH((feed_forward_fwd_kernel<T, VEC, ACT>), grid_of(tiles * ceil_div(rows, chunk)), 32 * WARPS, 0,
                  stream, static_cast<const T*>(x), bias, static_cast<T*>(y), narrow(rows), narrow(inner), narrow(columns),
                  narrow(chunk), x_strides, bias_stride, bias_dtype);
      });
    });
  });
}

int64_t feed_forward_bwd_parts(int64_t rows, int64_t columns) {
  return ceil_div(rows, backward_chunk(rows, columns));
}

void feed_forward_bwd(const void* dy, const void* x, const void* bias, void* dx, float* dbias_sums, int64_t rows,
                      int64_t inner, int64_t columns, RowStrides dy_strides, RowStrides x_strides,
                      int64_t bias_stride, DType dtype, DType bias_dtype, Activation act, cudaStream_t stream) {
  check_sizes(rows, inner, columns);
  const bool vectorised16 = vectors(x, columns, x_strides, dtype) && vectors(dy, columns, dy_strides, dtype);
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    with_activation(act, [&](auto activation) {
      constexpr Activation ACT = decltype(activation)::value;
      with_bool(vectorised16, [&](auto vectorised) {
        constexpr int VEC = decltype(vectorised)::value ? VECTOR<T> : 1;
        const int64_t tiles = ceil_div(columns, 32 * VEC), chunk = backward_chunk(rows, columns);
        DK_LAUNCH((feed_forward_bwd_kernel<T, VEC, ACT>), grid_of(tiles * ceil_div(rows, chunk)), 32 * WARPS, 0,
                  stream, static_cast<const T*>(dy), static_cast<const T*>(x), bias, static_cast<T*>(dx), dbias_sums,
                  narrow(rows), narrow(inner), narrow(columns), narrow(chunk), dy_strides, x_strides, bias_stride,
                  bias_dtype);
      });
    });
  });
}

}  // namespace dk
