// What the kernels of adaLN share: rows of modulation, rounding, and sums over a row.
//
// Arithmetic is in float32. With `eager` each result is rounded to the dtype that torch gives it; the
// products are then kept from being contracted into fused multiply-adds.
#pragma once

#include "adaln.h"
#include "rows.cuh"

namespace dk::adaln {

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
    // torch's rms_norm has no bias: there it is a second op, unless one of both is met in float32
    const bool same = bias.dtype == dtype && (weight.data == nullptr || weight.dtype == dtype);
    if (eager && rms && same) round_to(n, dtype);
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

inline void check_vectors(const Channels& channels) {
  check_aligned(channels.data, bytes_of(channels.dtype), 16, 1, 0, 0);
}

// any C, stride and dtype: adaln_general.cu
void forward_any(const AdalnForward& call, cudaStream_t stream);
void backward_any(const AdalnBackward& call, cudaStream_t stream);

}  // namespace dk::adaln
