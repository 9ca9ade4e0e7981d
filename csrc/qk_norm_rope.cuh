// What the kernels of QK-norm + RoPE share: the steps of the formula on some channels, and where rows are.
#pragma once

#include "qk_norm_rope.h"
#include "rows.cuh"

namespace dk::qk {

// Which of q and k a block works on, and which of its blocks it is
struct Work {
  bool second;
  int64_t block;

  __device__ explicit Work(const QkNormRope& call)
      : second(blockIdx.x >= call.sides[0].blocks), block(blockIdx.x - (second ? call.sides[0].blocks : 0)) {}
};

// A row: a token, or a head of it
struct RowPlace {
  int64_t token;  // b * N + n
  int64_t sample;
  int32_t n, head;

  __device__ RowPlace(const QkNormRope& call, const HeadsSide& side, int64_t row) {
    token = call.hidden ? row : row / side.heads;
    head = call.hidden ? 0 : static_cast<int32_t>(row % side.heads);
    sample = token / side.length;
    n = static_cast<int32_t>(token % side.length);
  }

  // `rows` rows further: without divisions of 64 bits
  __device__ RowPlace further(const QkNormRope& call, const HeadsSide& side, int32_t rows) const {
    RowPlace to = *this;
    uint32_t tokens = rows;
    if (!call.hidden) {
      const uint32_t heads = head + rows;
      tokens = heads / side.heads;
      to.head = heads - tokens * side.heads;
    }
    const uint32_t place = n + tokens, samples = place / side.length;
    to.token += tokens;
    to.sample += samples;
    to.n = place - samples * side.length;
    return to;
  }

  __device__ int64_t in(const Heads& x) const {
    return sample * x.stride_sample + n * x.stride_token + head * x.stride_head;
  }
  __device__ int64_t in(const Angles& angles) const {
    return sample * angles.stride_sample + (n - angles.start) * angles.stride_token + head * angles.stride_head;
  }
  __device__ bool turns(const Angles& angles) const {
    return angles.cos != nullptr && n >= angles.start && n < angles.start + angles.length;
  }
};

// n: xhat on entry; the norm's weight and bias, and act. `same`: weight and bias have x's dtype.
template <int WIDTH>
__device__ inline void finish_norm(float (&n)[WIDTH], const QkNormRope& call, const HeadsSide& side, int channel) {
  const DType dtype = side.x.dtype;
  float values[WIDTH];
  if (side.weight.data != nullptr) {
    load_channels(values, side.weight.data, channel, side.weight.dtype);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) n[i] = __fmul_rn(n[i], values[i]);
  }
  if (side.bias.data != nullptr) {
    const bool same = side.bias.dtype == dtype && (side.weight.data == nullptr || side.weight.dtype == dtype);
    // torch's rms_norm has no bias: there it is a second op
    if (call.eager && same && call.norm == Norm::rms) round_to(n, dtype);
    load_channels(values, side.bias.data, channel, side.bias.dtype);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) n[i] = __fadd_rn(n[i], values[i]);
  }
  if (call.eager) round_to(n, dtype);
  if (call.relu) {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) n[i] = n[i] < 0.0f ? 0.0f : n[i];
  }
}

// g: the gradient behind act on entry, before the norm's weight on return; what weight and bias add up.
template <int WIDTH>
__device__ inline void norm_gradient(float (&g)[WIDTH], float (&dweight)[WIDTH], float (&dbias)[WIDTH],
                                     const QkNormRope& call, const HeadsSide& side, int channel,
                                     const float (&xhat)[WIDTH]) {
  if (call.relu) {
    float n[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) n[i] = xhat[i];
    finish_norm(n, call, side, channel);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) g[i] = n[i] > 0.0f ? g[i] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) {
    dweight[i] = g[i] * xhat[i];
    dbias[i] = g[i];
  }
  if (side.weight.data != nullptr) {
    float weight[WIDTH];
    load_channels(weight, side.weight.data, channel, side.weight.dtype);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) g[i] *= weight[i];
  }
}

// The rotation is in separate roundings, as torch's is.
__device__ inline void turn(float& a, float& b, float cos, float sin) {
  const float x = a, y = b;
  a = __fsub_rn(__fmul_rn(x, cos), __fmul_rn(y, sin));
  b = __fadd_rn(__fmul_rn(x, sin), __fmul_rn(y, cos));
}

// any stride and dtype: qk_norm_rope_general.cu
void forward_any(const QkNormRope& call, cudaStream_t stream);
void backward_any(const QkNormRope& call, cudaStream_t stream);

}  // namespace dk::qk
