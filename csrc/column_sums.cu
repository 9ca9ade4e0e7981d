// Adds up the float32 rows that the blocks of a backward wrote: 32 columns a block, warps over the rows.
#include "column_sums.h"

namespace dk {
namespace {

constexpr int WARPS = 8;

template <typename T>
__global__ void __launch_bounds__(32 * WARPS)
    add_rows_kernel(const float* __restrict__ sums,  // [groups, rows, columns]
                    T* __restrict__ out,             // [groups, columns]
                    int64_t rows, int64_t columns) {
  __shared__ float partial[WARPS][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t tiles = (columns + 31) / 32;
  const int64_t group = blockIdx.x / tiles, column = blockIdx.x % tiles * 32 + lane;
  float total = 0.0f;
  if (column < columns)
    for (int64_t row = warp; row < rows; row += WARPS) total += sums[(group * rows + row) * columns + column];
  partial[warp][lane] = total;
  __syncthreads();
  if (warp || column >= columns) return;
#pragma unroll
  for (int w = 1; w < WARPS; ++w) total += partial[w][lane];
  out[group * columns + column] = from_float<T>(total);
}

}  // namespace

void add_rows(const float* sums, void* out, int64_t groups, int64_t rows, int64_t columns, DType dtype,
              cudaStream_t stream) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    DK_LAUNCH(add_rows_kernel<T>, grid_of(groups * ceil_div(columns, 32)), 32 * WARPS, 0, stream, sums,
              static_cast<T*>(out), rows, columns);
  });
}

}  // namespace dk
