// The final layer, forward and backward, by products of tiles: 128 tokens by 64 values of a patch.
//
// Forward: a block takes mean and rstd of its tokens, then reads them again, out of the L2 cache, for y and its
// product with the weight, which it scatters to the video. Backward: y and its gradient are recomputed tile by
// tile; d(x) needs two sums over each row, so the product with the weight is made twice. Sums over tokens are
// one float32 row a block, added up by add_rows. Nothing is atomic.
#include "adaln.cuh"
#include "final_layer.h"
#include "products.cuh"

namespace dk {
namespace {

using namespace products;

constexpr int kWarps = kThreads / 32;
constexpr int kWarpRows = ROWS / kWarps;

__device__ __host__ inline int values_of(const FinalLayer& call) {
  return call.patch[0] * call.patch[1] * call.patch[2] * call.channels;
}

__device__ __host__ inline int64_t tokens_of(const FinalLayer& call) {
  return int64_t{call.grid[0]} * call.grid[1] * call.grid[2];
}

// Where value k of a patch is in the video
__device__ inline int64_t value_offset(const FinalLayer& call, int k) {
  const int t = k / call.steps[0] % call.patch[0], h = k / call.steps[1] % call.patch[1];
  const int w = k / call.steps[2] % call.patch[2], c = k / call.steps[3] % call.channels;
  return c * call.video_strides[1] + t * call.video_strides[2] + h * call.video_strides[3] + w * call.video_strides[4];
}

// Some tokens: where their rows are. -1: there is none.
template <int LINES>
struct Lines {
  int64_t token[LINES], x[LINES], shift[LINES], scale[LINES], video[LINES];
  float mean[LINES], rstd[LINES];

  // token b * N + n, or none; in a thread a line
  __device__ void set(int line, const FinalLayer& call, int64_t at, bool live) {
    token[line] = live ? at : -1;
    x[line] = shift[line] = scale[line] = video[line] = -1;
    mean[line] = rstd[line] = 0.0f;
    if (!live) return;
    const int64_t tokens = tokens_of(call), n = at % tokens;
    const adaln::Place place{at / tokens, static_cast<int32_t>(n), at};
    x[line] = adaln::row_offset(call.x, place);
    shift[line] = adaln::row_offset(call.shift, nullptr, place);
    scale[line] = adaln::row_offset(call.scale, nullptr, place);
    const int64_t gw = n % call.grid[2], gh = n / call.grid[2] % call.grid[1], gt = n / call.grid[2] / call.grid[1];
    video[line] = place.sample * call.video_strides[0] + gt * call.patch[0] * call.video_strides[2] +
                  gh * call.patch[1] * call.video_strides[3] + gw * call.patch[2] * call.video_strides[4];
  }

  // the saved statistics
  __device__ void read_statistics(int line, const FinalLayer& call) {
    if (token[line] < 0) return;
    rstd[line] = call.rstd[token[line]];
    if (call.norm == Norm::layer) mean[line] = call.mean[token[line]];
  }
};

template <int WIDTH>
__device__ inline void load_x(float (&x)[WIDTH], const FinalLayer& call, int64_t row, int c) {
  load_channels(x, call.x.data, row + (WIDTH == 1 ? c * call.x.stride_channel : c), call.x.dtype);
}

// Mean and rstd of the block's tokens, a warp a token at a time
template <int WIDTH>
__device__ inline void take_statistics(Lines<ROWS>& lines, const FinalLayer& call) {
  const int lane = threadIdx.x % 32;
  for (int line = threadIdx.x / 32; line < ROWS; line += kWarps) {
    const int64_t row = lines.x[line];
    if (row < 0) continue;
    float x[WIDTH], sum = 0.0f, square = 0.0f;
    if (call.norm == Norm::layer) {
      for (int c = lane * WIDTH; c < call.width; c += 32 * WIDTH) {
        load_x(x, call, row, c);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) sum += x[i];
      }
    }
    const float mean = warp_sum(sum) / call.width;
    for (int c = lane * WIDTH; c < call.width; c += 32 * WIDTH) {
      load_x(x, call, row, c);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) square += (x[i] - mean) * (x[i] - mean);
    }
    const float rstd = rsqrtf(warp_sum(square) / call.width + call.eps);
    if (lane == 0) {
      lines.mean[line] = mean;
      lines.rstd[line] = rstd;
    }
  }
}

// y of channels c0 to c0 + LENGTH of the lines; zeros past the last, up to a multiple of 16
template <typename T, int WIDTH, int LINES, int LENGTH>
__device__ inline void fill_modulated(T* tile, const FinalLayer& call, const Lines<LINES>& lines, int c0) {
  constexpr int S = STRIDE<T, LENGTH>;
  const int length = call.width - c0 < LENGTH ? call.width - c0 : LENGTH, vectors = up_to_16(length) / WIDTH;
#pragma unroll 2
  for (int at = threadIdx.x; at < LINES * vectors; at += kThreads) {
    const int line = at / vectors, i = at % vectors * WIDTH;
    float y[WIDTH];
    fill(y, 0.0f);
    if (i < length && lines.x[line] >= 0) {
      load_x(y, call, lines.x[line], c0 + i);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) y[j] = (y[j] - lines.mean[line]) * lines.rstd[line];
      adaln::modulate(y, DType::float32, call.scale, Channels{}, lines.scale[line], call.shift, Channels{},
                      lines.shift[line], c0 + i, false);
    }
    T* const to = tile + line * S + i;
    if constexpr (sizeof(T) == 2 && WIDTH == 8) {
      store_channels(to, 0, y, dtype_of<T>);
    } else {
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) to[j] = from_float<T>(y[j]);
    }
  }
}

// Offsets of `count` rows of the weight from `first`
__device__ inline void set_weight_rows(int64_t* rows, const FinalLayer& call, int first, int count) {
  const int i = threadIdx.x;
  if (i < count) rows[i] = first + i < values_of(call) ? static_cast<int64_t>(first + i) * call.width : -1;
}

__device__ inline void set_places(int64_t* places, const FinalLayer& call, int first, int count) {
  const int i = threadIdx.x;
  if (i < count) places[i] = first + i < values_of(call) ? value_offset(call, first + i) : 0;
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kThreads, 2)
    final_layer_fwd_kernel(const FinalLayer call, bool wide_weight, const Pixels pixels) {
  DK_DYNAMIC_SHARED(unsigned char, shared);
  T* const left = reinterpret_cast<T*>(shared);        // [tokens][channels]
  T* const right = left + ROWS * STRIDE<T, DEPTH<T>>;  // [values][channels]
  float* const stage = reinterpret_cast<float*>(right + COLUMNS * STRIDE<T, DEPTH<T>>);
  __shared__ Lines<ROWS> lines;
  __shared__ int64_t places[COLUMNS], weights[COLUMNS];
  const int values = values_of(call), thread = threadIdx.x, blocks = (values + COLUMNS - 1) / COLUMNS;
  const int64_t total = call.samples * tokens_of(call), m0 = blockIdx.x / blocks * static_cast<int64_t>(ROWS);
  const int k0 = blockIdx.x % blocks * COLUMNS;
  if (thread < ROWS) lines.set(thread, call, m0 + thread, m0 + thread < total);
  set_places(places, call, k0, COLUMNS);
  set_weight_rows(weights, call, k0, COLUMNS);
  __syncthreads();
  take_statistics<WIDTH>(lines, call);
  __syncthreads();
  if (call.rstd != nullptr && k0 == 0 && thread < ROWS && lines.token[thread] >= 0) {
    call.rstd[lines.token[thread]] = lines.rstd[thread];
    if (call.norm == Norm::layer) call.mean[lines.token[thread]] = lines.mean[thread];
  }
  Product<T> product;
  product.clear();
  for (int c0 = 0; c0 < call.width; c0 += DEPTH<T>) {
    const int depth = call.width - c0 < DEPTH<T> ? call.width - c0 : DEPTH<T>;
    __syncthreads();
    fill_tile<T, COLUMNS, DEPTH<T>>(right, call.weight.data, call.weight.dtype, weights, c0, depth, 1, wide_weight);
    cp_async_commit();
    fill_modulated<T, WIDTH, ROWS, DEPTH<T>>(left, call, lines, c0);
    cp_async_wait<0>();
    __syncthreads();
    product.template add<false, false>(left, right, depth);
  }
  constexpr int S = COLUMNS + 1;
  product.store(stage, S);
  __syncthreads();
  store_pixels<T, ROWS>(pixels, lines.video, places, values - k0 < COLUMNS ? values - k0 : COLUMNS,
                        [&](int line, int i) {
                          const float bias =
                              call.bias.data == nullptr ? 0.0f : load_any(call.bias.data, call.bias.dtype, k0 + i);
                          return stage[line * S + i] + bias;
                        });
}

// OWN: a token has a row of scale or shift of its own
template <typename T, int WIDTH, bool OWN>
__global__ void __launch_bounds__(kThreads, 2)
    final_layer_bwd_rows_kernel(const FinalLayer call, const FinalLayerRows to, bool wide_weight,
                                const Pixels pixels) {
  DK_DYNAMIC_SHARED(unsigned char, shared);
  T* const left = reinterpret_cast<T*>(shared);        // [tokens][values]
  T* const right = left + ROWS * STRIDE<T, DEPTH<T>>;  // [values][channels]
  float* const stage = reinterpret_cast<float*>(right + DEPTH<T> * STRIDE<T, COLUMNS>);
  constexpr int S = COLUMNS + 1;
  __shared__ Lines<ROWS> lines;
  __shared__ int64_t places[DEPTH<T>], weights[DEPTH<T>];
  __shared__ float along[ROWS], centre[ROWS];  // of dn with xhat, and of dn
  __shared__ float column_sums[2][kWarps][COLUMNS];
  const int values = values_of(call), thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int chunks = (to.segment + ROWS - 1) / ROWS;
  const int64_t piece = blockIdx.x / chunks, first = piece * to.segment, at = blockIdx.x % chunks * int64_t{ROWS};
  if (thread < ROWS) lines.set(thread, call, first + at + thread, at + thread < to.segment);
  __syncthreads();  // a thread reads its own line next: this is only what keeps sm_90a from spilling in float32
  if (thread < ROWS) lines.read_statistics(thread, call);

  // the gradient of y: 64 channels of all tokens, in `stage`
  auto make_dy = [&](int c0) {
    Product<T> product;
    product.clear();
    for (int k0 = 0; k0 < values; k0 += DEPTH<T>) {
      const int depth = values - k0 < DEPTH<T> ? values - k0 : DEPTH<T>;
      // the barrier that followed the tiles of the last offsets is behind their readers
      set_weight_rows(weights, call, k0, DEPTH<T>);
      set_places(places, call, k0, DEPTH<T>);
      __syncthreads();
      fill_tile<T, DEPTH<T>, COLUMNS>(right, call.weight.data, call.weight.dtype, weights, c0, call.width - c0, 1,
                                      wide_weight);
      cp_async_commit();
      fill_pixels<T, ROWS, DEPTH<T>>(left, pixels, lines.video, places, depth);
      cp_async_wait<0>();
      __syncthreads();
      product.template add<false, true>(left, right, depth);
    }
    product.store(stage, S);
    __syncthreads();
  };
  // a warp has 16 tokens; of `TOGETHER` at a time a lane sees WIDTH channels in 64, PER_LANE times
  constexpr int LANES = COLUMNS / WIDTH < 32 ? COLUMNS / WIDTH : 32, TOGETHER = 32 / LANES;
  constexpr int PER_LANE = COLUMNS / WIDTH / LANES;
  const int column = lane % LANES * WIDTH, first_line = warp * kWarpRows + lane / LANES;
  auto load_scale = [&](float(&scale)[WIDTH], int line, int c) {
    fill(scale, 0.0f);
    if (call.scale.data != nullptr && c < call.width) {
      load_channels(scale, call.scale.data, lines.scale[line] + (WIDTH == 1 ? c * call.scale.stride_channel : c),
                    call.scale.dtype);
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) scale[i] += 1.0f;
  };
  auto load_xhat = [&](float(&xhat)[WIDTH], int line, int c) {
    load_x(xhat, call, lines.x[line], c);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) xhat[i] = (xhat[i] - lines.mean[line]) * lines.rstd[line];
  };

  float scale[PER_LANE][WIDTH], own[WIDTH], xhat[WIDTH];
  if (thread < ROWS) along[thread] = centre[thread] = 0.0f;
  if (to.dx.data != nullptr) {
    for (int c0 = 0; c0 < call.width; c0 += COLUMNS) {
      make_dy(c0);
#pragma unroll
      for (int p = 0; p < PER_LANE; ++p) load_scale(scale[p], 0, c0 + column + 32 * p);
      for (int line = first_line; line < (warp + 1) * kWarpRows; line += TOGETHER) {
        float dot = 0.0f, sum = 0.0f;
#pragma unroll
        for (int p = 0; p < PER_LANE; ++p) {
          const int i = column + 32 * p, c = c0 + i;
          if (c >= call.width || lines.x[line] < 0) continue;
          load_xhat(xhat, line, c);
          if constexpr (OWN) load_scale(own, line, c);
#pragma unroll
          for (int j = 0; j < WIDTH; ++j) {
            const float dn = stage[line * S + i + j] * (OWN ? own[j] : scale[p][j]);
            dot += dn * xhat[j];
            sum += dn;
          }
        }
#pragma unroll
        for (int step = LANES / 2; step > 0; step /= 2) {
          dot += __shfl_xor_sync(0xffffffffu, dot, step);
          sum += __shfl_xor_sync(0xffffffffu, sum, step);
        }
        if (lane % LANES == 0) {
          along[line] += dot;
          centre[line] += sum;
        }
      }
    }
    __syncthreads();
    if (thread < ROWS) {
      along[thread] /= call.width;
      centre[thread] = call.norm == Norm::layer ? centre[thread] / call.width : 0.0f;
    }
  }
  const bool sums = to.shift_sums != nullptr || to.scale_sums != nullptr;
  for (int c0 = 0; c0 < call.width; c0 += COLUMNS) {
    make_dy(c0);
    float shift_sums[PER_LANE][WIDTH], scale_sums[PER_LANE][WIDTH];
#pragma unroll
    for (int p = 0; p < PER_LANE; ++p) {
      load_scale(scale[p], 0, c0 + column + 32 * p);
      fill(shift_sums[p], 0.0f);
      fill(scale_sums[p], 0.0f);
    }
    for (int line = first_line; line < (warp + 1) * kWarpRows; line += TOGETHER) {
      if (lines.x[line] < 0) break;
      const int64_t out = lines.token[line] * call.width;
#pragma unroll
      for (int p = 0; p < PER_LANE; ++p) {
        const int i = column + 32 * p, c = c0 + i;
        if (c >= call.width) continue;
        float dy[WIDTH], dx[WIDTH];
        load_xhat(xhat, line, c);
        if constexpr (OWN) load_scale(own, line, c);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
          dy[j] = stage[line * S + i + j];
          const float dn = dy[j] * (OWN ? own[j] : scale[p][j]);
          dx[j] = (dn - xhat[j] * along[line] - centre[line]) * lines.rstd[line];
          shift_sums[p][j] += dy[j];
          xhat[j] *= dy[j];
          scale_sums[p][j] += xhat[j];
        }
        if (to.dx.data != nullptr) store_channels(to.dx.data, out + c, dx, sizeof(T) == 2 ? dtype_of<T> : to.dx.dtype);
        if constexpr (OWN) {
          if (to.dshift.data != nullptr) store_channels(to.dshift.data, out + c, dy, to.dshift.dtype);
          if (to.dscale.data != nullptr) store_channels(to.dscale.data, out + c, xhat, to.dscale.dtype);
        }
      }
    }
    if (!sums) continue;
#pragma unroll
    for (int p = 0; p < PER_LANE; ++p) {
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
#pragma unroll
        for (int step = LANES; step < 32; step *= 2) {
          shift_sums[p][j] += __shfl_xor_sync(0xffffffffu, shift_sums[p][j], step);
          scale_sums[p][j] += __shfl_xor_sync(0xffffffffu, scale_sums[p][j], step);
        }
        if (lane < LANES) {
          column_sums[0][warp][column + 32 * p + j] = shift_sums[p][j];
          column_sums[1][warp][column + 32 * p + j] = scale_sums[p][j];
        }
      }
    }
    __syncthreads();
    if (thread < 2 * COLUMNS && c0 + thread % COLUMNS < call.width) {
      const int which = thread / COLUMNS, i = thread % COLUMNS;
      float* const rows = which == 0 ? to.shift_sums : to.scale_sums;
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += column_sums[which][w][i];
      if (rows != nullptr) rows[static_cast<int64_t>(blockIdx.x) * call.width + c0 + i] = total;
    }
  }
}

template <typename T, int WIDTH>
__global__ void __launch_bounds__(kThreads, 2)
    final_layer_bwd_weight_kernel(const FinalLayer call, int64_t chunk, float* weight_sums, float* bias_sums,
                                  const Pixels pixels) {
  DK_DYNAMIC_SHARED(unsigned char, shared);
  T* const left = reinterpret_cast<T*>(shared);        // [tokens][channels]
  T* const right = left + DEPTH<T> * STRIDE<T, ROWS>;  // [tokens][values]
  float* const stage = reinterpret_cast<float*>(right + DEPTH<T> * STRIDE<T, COLUMNS>);
  __shared__ Lines<DEPTH<T>> lines;
  __shared__ int64_t places[COLUMNS];
  const int values = values_of(call), thread = threadIdx.x;
  const int c0 = blockIdx.x * ROWS, k0 = blockIdx.y * COLUMNS;
  const int64_t total = call.samples * tokens_of(call), piece = blockIdx.z, begin = piece * chunk;
  const int64_t end = begin + chunk < total ? begin + chunk : total;
  set_places(places, call, k0, COLUMNS);
  Product<T> product;
  product.clear();
  float bias_sum = 0.0f;
  for (int64_t m = begin; m < end; m += DEPTH<T>) {
    const int depth = end - m < DEPTH<T> ? static_cast<int>(end - m) : DEPTH<T>;
    // the barrier that followed the tiles of the last lines is behind their readers
    if (thread < DEPTH<T>) {
      lines.set(thread, call, m + thread, thread < depth);
      lines.read_statistics(thread, call);
    }
    __syncthreads();
    if (weight_sums != nullptr) fill_modulated<T, WIDTH, DEPTH<T>, ROWS>(left, call, lines, c0);
    fill_pixels<T, DEPTH<T>, COLUMNS>(right, pixels, lines.video, places, values - k0);
    __syncthreads();
    if (weight_sums != nullptr) product.template add<true, true>(left, right, depth);
    if (bias_sums != nullptr && c0 == 0 && thread < COLUMNS && k0 + thread < values) {
      // a sum of its own for each tile, as the product has
      float sum = 0.0f;
      for (int i = 0; i < depth; ++i) sum += to_float(right[i * STRIDE<T, COLUMNS> + thread]);
      bias_sum += sum;
    }
  }
  if (bias_sums != nullptr && c0 == 0 && thread < COLUMNS && k0 + thread < values) {
    bias_sums[piece * values + k0 + thread] = bias_sum;
  }
  if (weight_sums == nullptr) return;
  constexpr int S = COLUMNS + 1;
  product.store(stage, S);
  __syncthreads();
  for (int at = thread; at < ROWS * COLUMNS; at += kThreads) {
    const int row = at % ROWS, i = at / ROWS;
    if (c0 + row >= call.width || k0 + i >= values) continue;
    weight_sums[(piece * values + k0 + i) * call.width + c0 + row] = stage[row * S + i];
  }
}

void check(const FinalLayer& call) {
  const int64_t values = int64_t{call.patch[0]} * call.patch[1] * call.patch[2] * call.channels;
  if (call.width <= 0 || call.width > 0x7fffff || values <= 0 || values > 0x7fffff || call.shift.indexed ||
      call.scale.indexed) {
    throw std::invalid_argument("rows of " + std::to_string(call.width) + " channels to patches of " +
                                std::to_string(values) + " values are out of range");
  }
}

bool wide_weight(const FinalLayer& call) {
  return call.width % 8 == 0 && aligned16(call.weight.data, bytes_of(call.weight.dtype));
}

// Whether x and its modulation can be read in vectors
bool wide_rows(const FinalLayer& call) {
  bool wide = call.width % 8 == 0 && call.x.stride_channel == 1 &&
              aligned16(call.x.data, bytes_of(call.x.dtype), call.x.stride_sample, call.x.stride_token);
  for (const ModulationRows* rows : {&call.shift, &call.scale}) {
    wide = wide && (rows->data == nullptr ||
                    (rows->stride_channel == 1 &&
                     aligned16(rows->data, bytes_of(rows->dtype), rows->stride_sample, rows->stride_group)));
  }
  return wide;
}

// action(T{}, width): 16-bit x and weight are multiplied as they are, others, and what cannot be read in
// vectors, in float32
template <typename Action>
void with_operands(const FinalLayer& call, Action&& action) {
  const bool wide = wide_rows(call), same = call.x.dtype == call.weight.dtype && call.x.dtype == call.video_dtype;
  with_dtype(same && wide ? call.x.dtype : DType::float32, [&](auto element) {
    using T = decltype(element);
    if constexpr (sizeof(T) == 4) {
      if (!wide) return action(element, std::integral_constant<int, 1>{});
    }
    action(element, std::integral_constant<int, VECTOR<T>>{});
  });
}

// Tiles start at multiples of `first` tokens.
Pixels pixels_of(const FinalLayer& call, DType operands, int length, int first) {
  const int width = 16 / bytes_of(call.video_dtype);
  return {call.video, call.video_dtype, call.patch[2], call.steps[2],
          first % width == 0 && wide_pixels(call.video, call.video_dtype, operands, call.video_strides, call.grid[2],
                                            call.patch[2], call.steps[2], values_of(call), length)};
}

constexpr size_t kStageBytes = sizeof(float) * ROWS * (COLUMNS + 1);

}  // namespace

void final_layer_fwd(const FinalLayer& call, cudaStream_t stream) {
  check(call);
  const int64_t blocks = ceil_div(call.samples * tokens_of(call), ROWS) * ceil_div(values_of(call), COLUMNS);
  with_operands(call, [&](auto element, auto width) {
    using T = decltype(element);
    const size_t tiles = sizeof(T) * (ROWS + COLUMNS) * STRIDE<T, DEPTH<T>>;
    DK_LAUNCH((final_layer_fwd_kernel<T, decltype(width)::value>), grid_of(blocks), dim3(kThreads),
              tiles + kStageBytes, stream, call, wide_weight(call), pixels_of(call, dtype_of<T>, COLUMNS, ROWS));
  });
}

void final_layer_bwd_rows(const FinalLayer& call, const FinalLayerRows& rows, cudaStream_t stream) {
  check(call);
  const int64_t tokens = tokens_of(call);
  if (rows.segment <= 0 || tokens % rows.segment != 0) {
    throw std::invalid_argument("segments of " + std::to_string(rows.segment) + " tokens do not divide " +
                                std::to_string(tokens));
  }
  const int64_t blocks = call.samples * (tokens / rows.segment) * ceil_div(rows.segment, ROWS);
  const bool own = rows.dshift.data != nullptr || rows.dscale.data != nullptr ||
                   (call.scale.data != nullptr && call.scale.group_length == 1);
  with_operands(call, [&](auto element, auto width) {
    using T = decltype(element);
    const size_t tiles = sizeof(T) * (ROWS * STRIDE<T, DEPTH<T>> + DEPTH<T> * STRIDE<T, COLUMNS>);
    with_bool(own, [&](auto of_own) {
      DK_LAUNCH((final_layer_bwd_rows_kernel<T, decltype(width)::value, decltype(of_own)::value>), grid_of(blocks),
                dim3(kThreads), tiles + kStageBytes, stream, call, rows, wide_weight(call),
                pixels_of(call, dtype_of<T>, DEPTH<T>, rows.segment));
    });
  });
}

void final_layer_bwd_weight(const FinalLayer& call, int64_t chunk, float* weight_sums, float* bias_sums,
                            cudaStream_t stream) {
  check(call);
  const int64_t width = weight_sums == nullptr ? 1 : ceil_div(call.width, ROWS);
  const int64_t depth = ceil_div(values_of(call), COLUMNS), chunks = ceil_div(call.samples * tokens_of(call), chunk);
  if (chunk % 64 != 0 || chunks > 65535 || depth > 65535) {
    throw std::invalid_argument(std::to_string(chunks) + " chunks of " + std::to_string(chunk) +
                                " tokens: at most 65535, of multiples of 64");
  }
  const dim3 grid(static_cast<unsigned>(width), static_cast<unsigned>(depth), static_cast<unsigned>(chunks));
  with_operands(call, [&](auto element, auto of_width) {
    using T = decltype(element);
    const size_t tiles = sizeof(T) * DEPTH<T> * (STRIDE<T, ROWS> + STRIDE<T, COLUMNS>);
    DK_LAUNCH((final_layer_bwd_weight_kernel<T, decltype(of_width)::value>), grid, dim3(kThreads), tiles + kStageBytes,
              stream, call, chunk, weight_sums, bias_sums, pixels_of(call, dtype_of<T>, COLUMNS, 64));
  });
}

}  // namespace dk
