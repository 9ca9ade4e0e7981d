// What the kernels of adaLN share: rows of modulation, rounding, and sums over a row.
//
// Arithmetic is in float32. With `eager` each result is rounded to the dtype that torch gives it; the
// products are then kept from being contracted into fused multiply-adds.
#pragma once

#include "adaln.h"
#include "common.cuh"

namespace dk::adaln {

// ---- rounding

__device__ inline float rounded(float value, DType dtype) {
  if (dtype == DType::bfloat16) return __bfloat162float(__float2bfloat16(value));
  if (dtype == DType::float16) return __half2float(__float2half(value));
  return value;
}

__device__ inline DType promoted(DType a, DType b) { return a == b ? a : DType::float32; }

template <int WIDTH>
__device__ inline void round_to(float (&values)[WIDTH], DType dtype) {
  if (dtype == DType::float32) return;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) values[i] = rounded(values[i], dtype);
}

// ---- a value, or WIDTH adjacent channels, of any dtype

template <typename T>
constexpr DType dtype_of = sizeof(T) == 4 ? DType::float32
                           : std::is_same<T, __half>::value ? DType::float16
                                                            : DType::bfloat16;

__device__ inline void store_one(void* data, int64_t offset, float value, DType dtype) {
  if (dtype == DType::bfloat16) {
    static_cast<__nv_bfloat16*>(data)[offset] = __float2bfloat16(value);
  } else if (dtype == DType::float16) {
    static_cast<__half*>(data)[offset] = __float2half(value);
  } else {
    static_cast<float*>(data)[offset] = value;
  }
}

__device__ inline float2 unpack(uint32_t pair, DType dtype) {
  if (dtype == DType::bfloat16) return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

__device__ inline uint32_t pack(float low, float high, DType dtype) {
  if (dtype == DType::bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// WIDTH channels from `offset`: one, or 4 or 8 of which the address is a multiple of 16 bytes, or of 8 where
// they are 8 bytes.
template <int WIDTH>
__device__ inline void load_channels(float (&values)[WIDTH], const void* data, int64_t offset, DType dtype) {
  if constexpr (WIDTH == 1) {
    values[0] = load_any(data, dtype, offset);
  } else if (dtype == DType::float32) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(data) + offset);
#pragma unroll
    for (int i = 0; i < WIDTH / 4; ++i) {
      const float4 four = from[i];
      values[4 * i] = four.x;
      values[4 * i + 1] = four.y;
      values[4 * i + 2] = four.z;
      values[4 * i + 3] = four.w;
    }
  } else {
    const void* from = static_cast<const uint16_t*>(data) + offset;
    uint32_t pairs[WIDTH / 2];
    if constexpr (WIDTH == 8) {
      const uint4 all = *static_cast<const uint4*>(from);
      pairs[0] = all.x;
      pairs[1] = all.y;
      pairs[2] = all.z;
      pairs[3] = all.w;
    } else {
      const uint2 all = *static_cast<const uint2*>(from);
      pairs[0] = all.x;
      pairs[1] = all.y;
    }
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) {
      const float2 pair = unpack(pairs[i], dtype);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

template <int WIDTH>
__device__ inline void store_channels(void* data, int64_t offset, const float (&values)[WIDTH], DType dtype) {
  if constexpr (WIDTH == 1) {
    store_one(data, offset, values[0], dtype);
  } else if (dtype == DType::float32) {
    float4* to = reinterpret_cast<float4*>(static_cast<float*>(data) + offset);
#pragma unroll
    for (int i = 0; i < WIDTH / 4; ++i) {
      to[i] = make_float4(values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]);
    }
  } else {
    uint32_t pairs[WIDTH / 2];
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) pairs[i] = pack(values[2 * i], values[2 * i + 1], dtype);
    void* to = static_cast<uint16_t*>(data) + offset;
    if constexpr (WIDTH == 8) {
      *static_cast<uint4*>(to) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
      *static_cast<uint2*>(to) = make_uint2(pairs[0], pairs[1]);
    }
  }
}

// 16 bytes of T on their way into shared memory. A float32 row may be met by a 16-bit branch: 8 bytes.
template <typename T>
__device__ inline void copy_async_row(uint4* to, const Tokens& tokens, int64_t offset) {
  if (sizeof(T) == 4 && tokens.dtype != DType::float32) {
    cp_async<8>(to, static_cast<const uint16_t*>(tokens.data) + offset);
  } else {
    cp_async<16>(to, static_cast<const T*>(tokens.data) + offset);
  }
}

template <typename T, int WIDTH>
__device__ inline void load_row_part(float (&values)[WIDTH], const uint4* from, DType dtype) {
  load_channels(values, from, 0, sizeof(T) == 4 ? dtype : dtype_of<T>);
}

template <int WIDTH>
__device__ inline void fill(float (&values)[WIDTH], float value) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) values[i] = value;
}

// ---- modulation

// Token n of a sample; `index` is its place in row_index.
struct Place {
  int64_t sample;
  int32_t n;
  int64_t index;
};

__device__ inline int64_t row_offset(const Tokens& tokens, const Place& place) {
  return place.sample * tokens.stride_sample + place.n * tokens.stride_token;
}

__device__ inline int64_t row_offset(const ModulationRows& rows, const int32_t* row_index, const Place& place) {
  if (rows.data == nullptr) return 0;
  if (rows.indexed) return row_index[place.index] * rows.stride_sample;
  const int64_t offset = place.sample * rows.stride_sample;
  return rows.stride_group == 0 ? offset : offset + place.n / rows.group_length * rows.stride_group;
}

// The row plus its table, and the dtype of the sum.
template <int WIDTH>
__device__ inline DType load_modulation(float (&values)[WIDTH], const ModulationRows& rows, const Channels& table,
                                        int64_t offset, int channel, bool eager) {
  load_channels(values, rows.data, offset + (WIDTH == 1 ? channel * rows.stride_channel : channel), rows.dtype);
  if (table.data == nullptr) return rows.dtype;
  float more[WIDTH];
  load_channels(more, table.data, channel, table.dtype);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) values[i] += more[i];
  const DType sum = promoted(rows.dtype, table.dtype);
  if (eager) round_to(values, sum);
  return sum;
}

// Each result with the rounding that torch's own op would make.

template <int WIDTH>
__device__ inline DType multiply(float (&a)[WIDTH], DType a_dtype, const float (&b)[WIDTH], DType b_dtype, bool eager) {
  const DType dtype = promoted(a_dtype, b_dtype);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) a[i] = __fmul_rn(a[i], b[i]);
  if (eager) round_to(a, dtype);
  return dtype;
}

template <int WIDTH>
__device__ inline DType add(float (&a)[WIDTH], DType a_dtype, const float (&b)[WIDTH], DType b_dtype, bool eager) {
  const DType dtype = promoted(a_dtype, b_dtype);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) a[i] = __fadd_rn(a[i], b[i]);
  if (eager) round_to(a, dtype);
  return dtype;
}

template <int WIDTH>
__device__ inline void one_plus(float (&a)[WIDTH], DType dtype, bool eager) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) a[i] += 1.0f;
  if (eager) round_to(a, dtype);
}

template <int WIDTH>
__device__ inline void apply_tanh(float (&a)[WIDTH], DType dtype, bool eager) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) a[i] = tanhf(a[i]);
  if (eager) round_to(a, dtype);
}

// The norm's own weight and bias on the normalised row; `dtype` is the rounding of the norm's result.
template <int WIDTH>
__device__ inline void apply_affine(float (&n)[WIDTH], const Channels& weight, const Channels& bias, int channel,
                                    bool rms, DType dtype, bool eager) {
  float values[WIDTH];
  if (weight.data != nullptr) {
    load_channels(values, weight.data, channel, weight.dtype);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) n[i] = __fmul_rn(n[i], values[i]);
  }
  if (bias.data != nullptr) {
    // torch's rms_norm has no bias: there it is a second op
    if (eager && rms && bias.dtype == dtype) round_to(n, dtype);
    load_channels(values, bias.data, channel, bias.dtype);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) n[i] = __fadd_rn(n[i], values[i]);
  }
  if (eager) round_to(n, dtype);
}

// ---- forward, WIDTH channels of a row

// x: the branch on entry, residual_out in its own rounding on return.
template <int WIDTH>
__device__ inline void add_branch(float (&x)[WIDTH], const float (&residual)[WIDTH], const AdalnForward& call,
                                  float branch_rstd, DType branch_dtype, int64_t gate_row, int channel) {
  const bool eager = call.form.eager;
  if (call.form.branch_rms) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) x[i] *= branch_rstd;
    apply_affine(x, call.branch_weight, Channels{}, channel, true, branch_dtype, eager);
  }
  DType dtype = branch_dtype;
  if (call.gate.data != nullptr) {
    float gate[WIDTH];
    dtype = load_modulation(gate, call.gate, call.gate_table, gate_row, channel, eager);
    if (call.form.tanh) apply_tanh(gate, dtype, eager);
    dtype = multiply(x, branch_dtype, gate, dtype, eager);
  }
  add(x, dtype, residual, call.residual.dtype, eager);
  // y is of residual_out as it is stored
  round_to(x, call.residual.dtype);
}

// n: the norm's result of dtype `dtype`, then norm * (1 + scale) + shift.
template <int WIDTH>
__device__ inline void modulate(float (&n)[WIDTH], DType dtype, const ModulationRows& scale, const Channels& scale_table,
                                int64_t scale_row, const ModulationRows& shift, const Channels& shift_table,
                                int64_t shift_row, int channel, bool eager) {
  float row[WIDTH];
  if (scale.data != nullptr) {
    const DType of = load_modulation(row, scale, scale_table, scale_row, channel, eager);
    one_plus(row, of, eager);
    dtype = multiply(n, dtype, row, of, eager);
  }
  if (shift.data != nullptr) {
    const DType of = load_modulation(row, shift, shift_table, shift_row, channel, eager);
    add(n, dtype, row, of, eager);
  }
}

// ---- sums over a row, which all threads of the block get, in a fixed order

struct RowSums {
  float2* scratch;  // [2][32], in shared memory
  int parity = 0;

  __device__ explicit RowSums(float2* scratch) : scratch(scratch) {}

  __device__ float2 operator()(float a, float b) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      a += __shfl_xor_sync(0xffffffffu, a, step);
      b += __shfl_xor_sync(0xffffffffu, b, step);
    }
    const int warps = blockDim.x / 32;
    if (warps == 1) return make_float2(a, b);
    // two places in turn: the next sum's barrier stands between a place's readers and its next writers
    parity ^= 1;
    float2* place = scratch + 32 * parity;
    if (threadIdx.x % 32 == 0) place[threadIdx.x / 32] = make_float2(a, b);
    __syncthreads();
    float2 total = place[0];
    for (int w = 1; w < warps; ++w) {
      total.x += place[w].x;
      total.y += place[w].y;
    }
    return total;
  }

  __device__ float operator()(float a) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) a += __shfl_xor_sync(0xffffffffu, a, step);
    const int warps = blockDim.x / 32;
    if (warps == 1) return a;
    parity ^= 1;
    float2* place = scratch + 32 * parity;
    if (threadIdx.x % 32 == 0) place[threadIdx.x / 32].x = a;
    __syncthreads();
    float total = place[0].x;
    for (int w = 1; w < warps; ++w) total += place[w].x;
    return total;
  }
};

// ---- launching

// What the vector kernels take; the launchers refuse the rest, of which the kernels would make wrong reads.

inline void check(const AdalnSizes& size) {
  if (size.samples < 0 || size.length < 0 || size.channels <= 0 || size.threads % 32 != 0 || size.threads < 32) {
    throw std::invalid_argument("sizes must not be negative, and whole warps; got " + std::to_string(size.samples) +
                                " x " + std::to_string(size.length) + " x " + std::to_string(size.channels) + " and " +
                                std::to_string(size.threads) + " threads");
  }
}

inline void check_row(const AdalnSizes& size, DType dtype, int most_threads) {
  const int width = 16 / bytes_of(dtype);
  if (size.channels % width != 0 || size.threads > most_threads ||
      static_cast<int64_t>(size.vectors) * size.threads * width < size.channels) {
    throw std::invalid_argument("a row of " + std::to_string(size.channels) + " channels is not " +
                                std::to_string(size.vectors) + " vectors of " + std::to_string(width) + " in " +
                                std::to_string(size.threads) + " threads");
  }
}

inline void check_aligned(const void* data, int bytes, int vector, int64_t stride_channel, int64_t stride_a, int64_t stride_b) {
  if (data == nullptr) return;
  if (stride_channel != 1 || reinterpret_cast<uintptr_t>(data) % vector != 0 || stride_a * bytes % vector != 0 ||
      stride_b * bytes % vector != 0) {
    throw std::invalid_argument("a row must start at a multiple of " + std::to_string(vector) +
                                " bytes and have adjacent channels; got address % 16 = " +
                                std::to_string(reinterpret_cast<uintptr_t>(data) % 16) + " and strides " +
                                std::to_string(stride_a) + ", " + std::to_string(stride_b) + ", " +
                                std::to_string(stride_channel) + " of " + std::to_string(bytes) + " bytes");
  }
}

// `narrower`: a 16-bit branch may meet a float32 residual.
inline void check_vectors(const Tokens& tokens, DType dtype, bool narrower = false) {
  if (tokens.data == nullptr) return;
  if (tokens.dtype != dtype && !(narrower && dtype == DType::float32)) {
    throw std::invalid_argument("the tensors of a call must have one dtype; a wider branch has no vector kernel");
  }
  const int bytes = bytes_of(tokens.dtype);
  check_aligned(tokens.data, bytes, 16 * bytes / bytes_of(dtype), tokens.stride_channel, tokens.stride_sample,
                tokens.stride_token);
}

inline void check_vectors(const ModulationRows& rows) {
  check_aligned(rows.data, bytes_of(rows.dtype), 16, rows.stride_channel, rows.stride_sample, rows.stride_group);
}

// any C, stride and dtype: adaln_general.cu
void forward_any(const AdalnForward& call, cudaStream_t stream);
void backward_any(const AdalnBackward& call, cudaStream_t stream);

}  // namespace dk::adaln
