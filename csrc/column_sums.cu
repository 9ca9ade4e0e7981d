// Adds up the float32 rows that the blocks of a backward wrote: a lane owns VEC columns, warps walk over rows.
#include "column_sums.h"

namespace dk {
namespace {

constexpr int WARPS = 8;

template <typename T, int VEC>
__global__ void __launch_bounds__(32 * WARPS)
    add_rows_kernel(const float* __restrict__ sums,  // [groups, rows, columns]
                    T* __restrict__ out,             // [groups, columns]
                    unsigned rows, unsigned columns) {
  __shared__ float partial[WARPS][VEC][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned tiles = (columns + 32 * VEC - 1) / (32 * VEC);
  const unsigned column = (blockIdx.x % tiles * 32 + lane) * VEC;
  const int64_t group = blockIdx.x / tiles;
  float total[VEC] = {};
  if (column < columns) {
    sums += group * rows * columns + column;
    for (unsigned row = warp; row < rows; row += WARPS) {
      float values[VEC];
      load_vector(sums + int64_t(row) * columns, values);
#pragma unroll
      for (int i = 0; i < VEC; ++i) total[i] += values[i];
    }
  }
#pragma unroll
  for (int i = 0; i < VEC; ++i) partial[warp][i][lane] = total[i];
  __syncthreads();
  if (warp || column >= columns) return;
#pragma unroll
  for (int i = 0; i < VEC; ++i)
#pragma unroll
    for (int w = 1; w < WARPS; ++w) total[i] += partial[w][i][lane];
  store_vector(out + group * columns + column, total);
}

}  // namespace

void add_rows(const float* sums, void* out, int64_t groups, int64_t rows, int64_t columns, DType dtype,
              cudaStream_t stream) {
  if (rows > 0x7fff0000 || columns > 0x7fff0000)
    throw std::invalid_argument(std::to_string(rows) + " rows of " + std::to_string(columns) +
                                " columns are more than the kernel counts");
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    const bool vectors = columns % 4 == 0 && aligned16(sums, 4) && aligned16(out, 4);
    with_bool(vectors, [&](auto vectorised) {
      constexpr int VEC = decltype(vectorised)::value ? 4 : 1;
      DK_LAUNCH((add_rows_kernel<T, VEC>), grid_of(groups * ceil_div(columns, 32 * VEC)), 32 * WARPS, 0, stream, sums,
                static_cast<T*>(out), static_cast<unsigned>(rows), static_cast<unsigned>(columns));
    });
  });
}

}  // namespace dk
