// Bias and activation between the two Linears of a feed-forward.
#pragma once

#include <cstdint>

#include "common.cuh"

namespace dk {

enum class Activation : int { gelu_tanh, gelu_erf, swiglu_first, swiglu_second };

// Row m of a matrix of rows lies at (m / inner) * outer_stride + (m % inner) * inner_stride, in elements.
struct RowStrides {
  int64_t outer, inner, column;
};

void feed_forward_fwd(const void* x,     // [rows, F], gated [rows, 2F], of `dtype`
                      const void* bias,  // [F] or [2F], of `bias_dtype`, or null
                      void* y,           // [rows, F], contiguous, of `dtype`
                      int64_t rows, int64_t inner, int64_t columns,  // columns: F
                      RowStrides x_strides, int64_t bias_stride, DType dtype, DType bias_dtype, Activation act,
                      cudaStream_t stream);

// Rows of `dbias_sums` that the backward writes for this shape
int64_t feed_forward_bwd_parts(int64_t rows, int64_t columns);

void feed_forward_bwd(const void* dy,       // [rows, F], of `dtype`
                      const void* x,        // [rows, F] or [rows, 2F], of `dtype`
                      const void* bias,     // [F] or [2F], of `bias_dtype`, or null
                      void* dx,             // as x, contiguous, of `dtype`, or null
                      float* dbias_sums,    // [feed_forward_bwd_parts, F or 2F], or null
                      int64_t rows, int64_t inner, int64_t columns, RowStrides dy_strides, RowStrides x_strides,
                      int64_t bias_stride, DType dtype, DType bias_dtype, Activation act, cudaStream_t stream);

}  // namespace dk
