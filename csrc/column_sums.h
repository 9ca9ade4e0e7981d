// The second stage of a gradient that every row adds to.
#pragma once

#include <cstdint>

#include "common.cuh"

namespace dk {

// out[g, c] = sum over r of sums[g, r, c], in one fixed order
void add_rows(const float* sums,  // [groups, rows, columns]
              void* out,          // [groups, columns], of `dtype`
              int64_t groups, int64_t rows, int64_t columns, DType dtype, cudaStream_t stream);

}  // namespace dk
