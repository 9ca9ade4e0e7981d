// Patch embedding, forward and backward, by products of tiles: 128 patches by 64 channels or values.
//
// The address of A[m, k] is an offset of the patch plus one of the value, so that any strides serve. A block
// keeps its patches for several column blocks; bias and position are added at the store. Backward:
// d(video) = d(tokens) weight, scattered to its place (no two patches overlap); d(weight) = d(tokens)^T A and
// d(bias), cut along the patches, one float32 result a block, added up by add_rows. Nothing is atomic.
//
// No wgmma: K values a patch make at most K operations a byte moved. At the 4.3 TB/s of an H200 that is 69 TFLOP/s
// for K = 16 (DiT), 275 for 64 (Wan, Flux, HunyuanVideo) and 550 for 128 (CogVideoX 1.5, LTX-Video): memory binds, for
// the last one if mma.sync comes that far, which no GPU has shown yet.
#include "patch_embed.h"
#include "products.cuh"

namespace dk {
namespace {

using namespace products;

__device__ __host__ inline int values_of(const PatchEmbed& call) {
  return call.in_channels * call.patch[0] * call.patch[1] * call.patch[2];
}

__device__ __host__ inline int64_t tokens_of(const PatchEmbed& call) {
  return int64_t{call.grid[0]} * call.grid[1] * call.grid[2];
}

// Where patch m starts in the video; -1 past the last
__device__ inline int64_t patch_offset(const PatchEmbed& call, int64_t m) {
  const int64_t tokens = tokens_of(call);
  if (m >= call.samples * tokens) return -1;
  const int64_t n = m % tokens, gw = n % call.grid[2], gh = n / call.grid[2] % call.grid[1];
  const int64_t gt = n / call.grid[2] / call.grid[1];
  return m / tokens * call.video_strides[0] + gt * call.patch[0] * call.video_strides[2] +
         gh * call.patch[1] * call.video_strides[3] + gw * call.patch[2] * call.video_strides[4];
}

// Where value k is in a patch
__device__ inline int64_t value_offset(const PatchEmbed& call, int k) {
  const int w = k % call.patch[2], h = k / call.patch[2] % call.patch[1];
  const int t = k / call.patch[2] / call.patch[1] % call.patch[0], c = k / call.patch[2] / call.patch[1] / call.patch[0];
  return c * call.video_strides[1] + t * call.video_strides[2] + h * call.video_strides[3] + w * call.video_strides[4];
}

// Where token m is; -1 past the last
__device__ inline int64_t token_offset(const PatchEmbed& call, int64_t m) {
  const int64_t tokens = tokens_of(call);
  if (m >= call.samples * tokens) return -1;
  return m / tokens * call.token_strides[0] + m % tokens * call.token_strides[1];
}

constexpr int kStage = COLUMNS + 4;

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    patch_embed_fwd_kernel(const PatchEmbed call, int column_blocks, bool wide_weight, bool wide_tokens,
                           const Pixels pixels) {
  DK_DYNAMIC_SHARED(unsigned char, shared);
  T* const left = reinterpret_cast<T*>(shared);  // [patches][values]
  T* const right = left + ROWS * STRIDE<T, DEPTH<T>>;  // [channels][values]
  float* const stage = reinterpret_cast<float*>(right + COLUMNS * STRIDE<T, DEPTH<T>>);
  __shared__ int64_t patches[ROWS], places[DEPTH<T>], weights[COLUMNS];
  const int values = values_of(call), channels = call.channels, thread = threadIdx.x;
  const int64_t tokens = tokens_of(call), total = call.samples * tokens;
  const int groups = (channels + column_blocks * COLUMNS - 1) / (column_blocks * COLUMNS);
  const int64_t m0 = blockIdx.x / groups * static_cast<int64_t>(ROWS);
  const int first = blockIdx.x % groups * column_blocks * COLUMNS;
  const int last = first + column_blocks * COLUMNS < channels ? first + column_blocks * COLUMNS : channels;

  for (int i = thread; i < ROWS; i += kThreads) patches[i] = patch_offset(call, m0 + i);
  Product<T> product;
  for (int c0 = first; c0 < last; c0 += COLUMNS) {
    product.clear();
    for (int k0 = 0; k0 < values; k0 += DEPTH<T>) {
      const bool gather = c0 == first || values > DEPTH<T>;
      // the barrier that followed the tiles of the last offsets is behind their readers
      for (int i = thread; i < COLUMNS; i += kThreads) {
        weights[i] = c0 + i < channels ? static_cast<int64_t>(c0 + i) * values : -1;
      }
      if (gather && thread < DEPTH<T>) places[thread] = k0 + thread < values ? value_offset(call, k0 + thread) : 0;
      __syncthreads();
      fill_tile<T, COLUMNS, DEPTH<T>>(right, call.weight.data, call.weight.dtype, weights, k0, values - k0, 1,
                                      wide_weight);
      cp_async_commit();
      if (gather) fill_pixels<T, ROWS, DEPTH<T>>(left, pixels, patches, places, values - k0);
      cp_async_wait<0>();
      __syncthreads();
      product.template add<false, false>(left, right, values - k0 < DEPTH<T> ? values - k0 : DEPTH<T>);
    }
    product.store(stage, kStage);
    __syncthreads();

    auto store = [&](auto width) {
      constexpr int WIDTH = decltype(width)::value;
      for (int at = thread; at < ROWS * COLUMNS / WIDTH; at += kThreads) {
        const int row = at / (COLUMNS / WIDTH), column = at % (COLUMNS / WIDTH) * WIDTH, c = c0 + column;
        const int64_t m = m0 + row;
        if (m >= total || c >= channels) continue;
        float sum[WIDTH], more[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) sum[i] = stage[row * kStage + column + i];
        if (call.bias.data != nullptr) {
          load_channels(more, call.bias.data, c, call.bias.dtype);
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) sum[i] += more[i];
        }
        if (call.pos.data != nullptr) {
          load_channels(more, call.pos.data, m % tokens * call.pos_strides[0] + c * call.pos_strides[1], call.pos.dtype);
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) sum[i] += more[i];
        }
        store_channels(call.tokens, m * channels + c, sum, call.token_dtype);
      }
    };
    if (wide_tokens) store(std::integral_constant<int, 8>{});
    else store(std::integral_constant<int, 1>{});
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    patch_embed_bwd_video_kernel(const PatchEmbed call, bool wide_weight, bool wide_tokens,
                                 const Pixels pixels) {
  DK_DYNAMIC_SHARED(unsigned char, shared);
  T* const left = reinterpret_cast<T*>(shared);  // [patches][channels]
  T* const right = left + ROWS * STRIDE<T, DEPTH<T>>;  // [channels][values]
  float* const stage = reinterpret_cast<float*>(right + DEPTH<T> * STRIDE<T, COLUMNS>);
  __shared__ int64_t rows[ROWS], patches[ROWS], places[COLUMNS], weights[DEPTH<T>];
  const int values = values_of(call), channels = call.channels, thread = threadIdx.x;
  const int blocks = (values + COLUMNS - 1) / COLUMNS;
  const int64_t m0 = blockIdx.x / blocks * static_cast<int64_t>(ROWS);
  const int k0 = blockIdx.x % blocks * COLUMNS;
  for (int i = thread; i < ROWS; i += kThreads) {
    rows[i] = token_offset(call, m0 + i);
    patches[i] = patch_offset(call, m0 + i);
  }
  if (thread < COLUMNS) places[thread] = k0 + thread < values ? value_offset(call, k0 + thread) : 0;
  Product<T> product;
  product.clear();
  for (int c0 = 0; c0 < channels; c0 += DEPTH<T>) {
    // the barrier that followed the tiles of the last offsets is behind their readers
    if (thread < DEPTH<T>) weights[thread] = c0 + thread < channels ? static_cast<int64_t>(c0 + thread) * values : -1;
    __syncthreads();
    fill_tile<T, ROWS, DEPTH<T>>(left, call.tokens, call.token_dtype, rows, c0, channels - c0, call.token_strides[2],
                                 wide_tokens);
    fill_tile<T, DEPTH<T>, COLUMNS>(right, call.weight.data, call.weight.dtype, weights, k0, values - k0, 1,
                                    wide_weight);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    product.template add<false, true>(left, right, channels - c0 < DEPTH<T> ? channels - c0 : DEPTH<T>);
  }
  constexpr int S = COLUMNS + 1;
  product.store(stage, S);
  __syncthreads();
  store_pixels<T, ROWS>(pixels, patches, places, values - k0 < COLUMNS ? values - k0 : COLUMNS,
                        [&](int row, int i) { return stage[row * S + i]; });
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    patch_embed_bwd_weight_kernel(const PatchEmbed call, int64_t chunk, float* weight_sums, float* bias_sums,
                                  bool wide_tokens, const Pixels pixels) {
  DK_DYNAMIC_SHARED(unsigned char, shared);
  T* const left = reinterpret_cast<T*>(shared);  // [patches][channels]
  T* const right = left + DEPTH<T> * STRIDE<T, ROWS>;  // [patches][values]
  float* const stage = reinterpret_cast<float*>(right + DEPTH<T> * STRIDE<T, COLUMNS>);
  __shared__ int64_t rows[DEPTH<T>], patches[DEPTH<T>], places[COLUMNS];
  const int values = values_of(call), channels = call.channels, thread = threadIdx.x;
  const int64_t total = call.samples * tokens_of(call);
  const int c0 = blockIdx.x * ROWS, k0 = blockIdx.y * COLUMNS;
  const int64_t piece = blockIdx.z, begin = piece * chunk, end = begin + chunk < total ? begin + chunk : total;
  if (thread < COLUMNS) places[thread] = k0 + thread < values ? value_offset(call, k0 + thread) : 0;
  Product<T> product;
  product.clear();
  float bias_sum = 0.0f;
  for (int64_t m = begin; m < end; m += DEPTH<T>) {
    const int depth = end - m < DEPTH<T> ? static_cast<int>(end - m) : DEPTH<T>;
    // the barrier that followed the tiles of the last offsets is behind their readers
    if (thread < DEPTH<T>) {
      rows[thread] = thread < depth ? token_offset(call, m + thread) : -1;
      patches[thread] = thread < depth ? patch_offset(call, m + thread) : -1;
    }
    __syncthreads();
    fill_tile<T, DEPTH<T>, ROWS>(left, call.tokens, call.token_dtype, rows, c0, channels - c0, call.token_strides[2],
                                 wide_tokens);
    cp_async_commit();
    if (weight_sums != nullptr) fill_pixels<T, DEPTH<T>, COLUMNS>(right, pixels, patches, places, values - k0);
    cp_async_wait<0>();
    __syncthreads();
    if (weight_sums != nullptr) product.template add<true, true>(left, right, depth);
    if (bias_sums != nullptr && k0 == 0 && thread < ROWS && c0 + thread < channels) {
      // a sum of its own for each tile, as the product has
      float sum = 0.0f;
      for (int i = 0; i < depth; ++i) sum += to_float(left[i * STRIDE<T, ROWS> + thread]);
      bias_sum += sum;
    }
  }
  if (bias_sums != nullptr && k0 == 0 && thread < ROWS && c0 + thread < channels) {
    bias_sums[piece * channels + c0 + thread] = bias_sum;
  }
  if (weight_sums == nullptr) return;
  constexpr int S = COLUMNS + 1;
  product.store(stage, S);
  __syncthreads();
  for (int at = thread; at < ROWS * COLUMNS; at += kThreads) {
    const int row = at / COLUMNS, i = at % COLUMNS;
    if (c0 + row >= channels || k0 + i >= values) continue;
    weight_sums[(piece * channels + c0 + row) * values + k0 + i] = stage[row * S + i];
  }
}

template <int WIDTH>
__global__ void __launch_bounds__(kThreads, 2) patch_embed_bwd_pos_kernel(const PatchEmbed call, const Result dpos) {
  const int64_t at = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x;
  const int vectors = (call.channels + WIDTH - 1) / WIDTH;
  const int64_t n = at / vectors;
  const int c = static_cast<int>(at % vectors) * WIDTH;
  if (n >= tokens_of(call)) return;
  float sum[WIDTH], more[WIDTH];
  fill(sum, 0.0f);
  const int64_t from = n * call.token_strides[1] + c * call.token_strides[2];
#pragma unroll 4
  for (int64_t b = 0; b < call.samples; ++b) {
    load_channels(more, call.tokens, b * call.token_strides[0] + from, call.token_dtype);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) sum[i] += more[i];
  }
  store_channels(dpos.data, n * call.channels + c, sum, dpos.dtype);
}

void check(const PatchEmbed& call) {
  bool fits = call.samples >= 0 && call.channels > 0 && call.in_channels > 0;
  int64_t values = call.in_channels, tokens = call.samples;
  for (int axis = 0; axis < 3; ++axis) {
    fits = fits && call.grid[axis] >= 0 && call.patch[axis] > 0;
    values *= call.patch[axis];
    tokens *= call.grid[axis];
  }
  if (!fits || values > 0x7fffff || call.channels > 0x7fffff) {
    throw std::invalid_argument(std::to_string(call.channels) + " channels from patches of " + std::to_string(values) +
                                " values are out of range");
  }
}

// Rows of tokens 16 bytes at a time
bool wide_tokens(const PatchEmbed& call) {
  return call.token_strides[2] == 1 && call.channels % 8 == 0 &&
         aligned16(call.tokens, bytes_of(call.token_dtype), call.token_strides[0], call.token_strides[1]);
}

bool wide_weight(const PatchEmbed& call) {
  return values_of(call) % 8 == 0 && aligned16(call.weight.data, bytes_of(call.weight.dtype));
}

Pixels pixels_of(const PatchEmbed& call, DType operands, int length) {
  return {call.video, call.video_dtype, call.patch[2], 1,
          wide_pixels(call.video, call.video_dtype, operands, call.video_strides, call.grid[2], call.patch[2], 1,
                      values_of(call), length)};
}

// action(T{}): 16-bit operands are multiplied as they are, others in float32
template <typename Action>
void with_operands(DType a, DType b, Action&& action) {
  with_dtype(a == b ? a : DType::float32, action);
}

template <typename T>
constexpr size_t kTiles = sizeof(T) * (ROWS * STRIDE<T, DEPTH<T>> + COLUMNS * STRIDE<T, DEPTH<T>>);
template <typename T>
constexpr size_t kTilesAcross = sizeof(T) * (DEPTH<T> * STRIDE<T, ROWS> + DEPTH<T> * STRIDE<T, COLUMNS>);
template <typename T>
constexpr size_t kTilesHalf = sizeof(T) * (ROWS * STRIDE<T, DEPTH<T>> + DEPTH<T> * STRIDE<T, COLUMNS>);

}  // namespace

void patch_embed_fwd(const PatchEmbed& call, cudaStream_t stream) {
  check(call);
  const int64_t row_blocks = ceil_div(call.samples * tokens_of(call), ROWS);
  const int64_t columns = ceil_div(call.channels, COLUMNS);
  // a block takes as many column blocks as leaves the GPU filled twice
  int64_t groups = columns;
  while (groups > 1 && row_blocks * (groups / 2) >= 4 * multiprocessors()) groups /= 2;
  const int column_blocks = static_cast<int>(ceil_div(columns, groups));
  groups = ceil_div(columns, column_blocks);
  const bool wide_pos = call.pos.data == nullptr ||
                        (call.pos_strides[1] == 1 && aligned16(call.pos.data, bytes_of(call.pos.dtype), call.pos_strides[0]));
  const bool wide = wide_tokens(call) && wide_pos && (call.bias.data == nullptr || aligned16(call.bias.data, 1));
  with_operands(call.video_dtype, call.weight.dtype, [&](auto element) {
    using T = decltype(element);
    DK_LAUNCH(patch_embed_fwd_kernel<T>, grid_of(row_blocks * groups), dim3(kThreads),
              kTiles<T> + sizeof(float) * ROWS * kStage, stream, call, column_blocks, wide_weight(call), wide,
              pixels_of(call, dtype_of<T>, DEPTH<T>));
  });
}

void patch_embed_bwd_video(const PatchEmbed& call, cudaStream_t stream) {
  check(call);
  const int64_t blocks = ceil_div(call.samples * tokens_of(call), ROWS) * ceil_div(values_of(call), COLUMNS);
  with_operands(call.token_dtype, call.weight.dtype, [&](auto element) {
    using T = decltype(element);
    DK_LAUNCH(patch_embed_bwd_video_kernel<T>, grid_of(blocks), dim3(kThreads),
              kTilesHalf<T> + sizeof(float) * ROWS * (COLUMNS + 1), stream, call, wide_weight(call), wide_tokens(call),
              pixels_of(call, dtype_of<T>, COLUMNS));
  });
}

void patch_embed_bwd_weight(const PatchEmbed& call, int64_t chunk, float* weight_sums, float* bias_sums,
                            cudaStream_t stream) {
  check(call);
  const int64_t depth = weight_sums == nullptr ? 1 : ceil_div(values_of(call), COLUMNS);
  const int64_t chunks = ceil_div(call.samples * tokens_of(call), chunk);
  if (chunk % 64 != 0 || chunks > 65535 || depth > 65535) {
    throw std::invalid_argument(std::to_string(chunks) + " chunks of " + std::to_string(chunk) +
                                " patches: at most 65535, of multiples of 64");
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(call.channels, ROWS)), static_cast<unsigned>(depth),
                  static_cast<unsigned>(chunks));
  with_operands(call.token_dtype, call.video_dtype, [&](auto element) {
    using T = decltype(element);
    DK_LAUNCH(patch_embed_bwd_weight_kernel<T>, grid, dim3(kThreads),
              kTilesAcross<T> + sizeof(float) * ROWS * (COLUMNS + 1), stream, call, chunk, weight_sums, bias_sums,
              wide_tokens(call), pixels_of(call, dtype_of<T>, COLUMNS));
  });
}

void patch_embed_bwd_pos(const PatchEmbed& call, Result dpos, cudaStream_t stream) {
  check(call);
  with_bool(wide_tokens(call) && aligned16(dpos.data, 1), [&](auto wide) {
    constexpr int WIDTH = decltype(wide)::value ? 8 : 1;
    const int64_t items = tokens_of(call) * ceil_div(call.channels, WIDTH);
    DK_LAUNCH(patch_embed_bwd_pos_kernel<WIDTH>, grid_of(ceil_div(items, kThreads)), dim3(kThreads), 0, stream, call,
              dpos);
  });
}

}  // namespace dk
