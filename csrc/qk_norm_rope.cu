// QK-norm + RoPE, forward and backward, 16 bytes at a time: each input is read once, each result written once.
//
// A row belongs to `lanes` threads: a head's to a part of a warp, the whole hidden size's to a block. The two
// channels of a pair are in one thread, in one vector or in two. Weight and bias gradients are sums in
// registers over the block's rows, one float32 row a block in the end; add_rows adds those.
#include "qk_norm_rope.cuh"

namespace dk {
namespace {

using namespace qk;

// Vectors of a row in a thread: enough loads under way, as few registers as the sums need
template <typename T, bool HIDDEN, bool BACKWARD>
constexpr int kVectors = HIDDEN && !(BACKWARD && sizeof(T) == 2) ? 4 : 2;

template <typename T, bool HIDDEN, bool BACKWARD>
constexpr int kMaxThreads = !BACKWARD ? 512 : !HIDDEN ? 128 : sizeof(T) == 2 ? 384 : 512;

// Blocks that a multiprocessor shall have room for: the backward of heads has small ones, three by its registers
template <bool HIDDEN, bool BACKWARD>
constexpr int kBlocks = !HIDDEN && BACKWARD ? 3 : 1;

// Where a thread's vectors are in a row. The vectors of a pair are 2j and 2j + 1 with `half`.
template <typename T, int VECTORS>
struct Slots {
  static constexpr int WIDTH = VECTOR<T>;
  bool live[VECTORS];
  int channel[VECTORS];  // in the row
  int head[VECTORS];     // of a hidden row
  int angle[VECTORS];    // the first, or -1: it does not turn

  __device__ Slots(const QkNormRope& call, const HeadsSide& side, int lane) {
    const int wide = call.dim / call.sections;
    const int channels = call.hidden ? call.dim * side.heads : call.dim;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      int d, section, i;
      if (call.half) {
        // units of a vector a and its vector b
        const int unit = ((v / 2) * call.lanes + lane) * WIDTH, d_unit = unit % (call.dim / 2);
        head[v] = unit / (call.dim / 2);
        section = d_unit / (wide / 2);
        i = d_unit % (wide / 2);
        live[v] = 2 * unit < channels;
        const bool turning = i < call.turning;
        const int apart = turning ? call.turning : wide / 2;
        d = section * wide + (turning ? i : i + call.turning) + (v % 2) * apart;
        if (!turning && v % 2 == 1) d = section * wide + i + wide / 2;
        angle[v] = turning ? section * call.turning + i : -1;
      } else {
        const int c = (v * call.lanes + lane) * WIDTH;
        live[v] = c < channels;
        head[v] = c / call.dim;
        d = c % call.dim;
        section = d / wide;
        i = d % wide / 2;
        angle[v] = i < call.turning ? section * call.turning + i : -1;
      }
      channel[v] = head[v] * call.dim + d;
    }
  }

  // of vector v in a tensor whose rows start at `row`
  __device__ int64_t offset(const QkNormRope& call, const Heads& x, int64_t row, int v) const {
    return row + head[v] * x.stride_head + (channel[v] - head[v] * call.dim);
  }
};

// Turns the row's pairs, or with INVERSE turns them back.
template <bool INVERSE, typename T, int VECTORS>
__device__ inline void turn_row(float (&x)[VECTORS][VECTOR<T>], const QkNormRope& call, const RowPlace& place,
                                const Slots<T, VECTORS>& slots) {
  constexpr int WIDTH = VECTOR<T>;
  const int64_t row = place.in(call.angles);
  auto load = [&](auto& cos, auto& sin, int v) {
    const int64_t at = row + slots.head[v] * call.angles.stride_head + slots.angle[v];
    load_channels(cos, call.angles.cos, at, call.angles.dtype);
    load_channels(sin, call.angles.sin, at, call.angles.dtype);
  };
  if (call.half) {
#pragma unroll
    for (int v = 0; v < VECTORS; v += 2) {
      if (!slots.live[v] || slots.angle[v] < 0) continue;
      float cos[WIDTH], sin[WIDTH];
      load(cos, sin, v);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) turn(x[v][i], x[v + 1][i], cos[i], INVERSE ? -sin[i] : sin[i]);
    }
  } else {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (!slots.live[v] || slots.angle[v] < 0) continue;
      float cos[WIDTH / 2], sin[WIDTH / 2];
      load(cos, sin, v);
#pragma unroll
      for (int i = 0; i < WIDTH / 2; ++i) turn(x[v][2 * i], x[v][2 * i + 1], cos[i], INVERSE ? -sin[i] : sin[i]);
    }
  }
}

// Sums over a row, which all its threads get
template <bool HIDDEN>
struct GroupSums {
  RowSums row_sums;
  int lanes;

  __device__ float operator()(float a) {
    if constexpr (HIDDEN) {
      return row_sums(a);
    } else {
      for (int step = lanes / 2; step > 0; step /= 2) a += __shfl_xor_sync(0xffffffffu, a, step);
      return a;
    }
  }
};

template <typename T, bool HIDDEN>
__global__ void __launch_bounds__(kMaxThreads<T, HIDDEN, false>) qk_norm_rope_fwd_kernel(const QkNormRope call) {
  constexpr int WIDTH = VECTOR<T>, VECTORS = kVectors<T, HIDDEN, false>;
  __shared__ float2 scratch[64];
  const Work work(call);
  const HeadsSide& side = call.sides[work.second];
  GroupSums<HIDDEN> group_sum{RowSums(scratch), call.lanes};
  const int groups = HIDDEN ? 1 : blockDim.x / call.lanes;
  const int lane = HIDDEN ? threadIdx.x : threadIdx.x % call.lanes;
  const int group = HIDDEN ? 0 : threadIdx.x / call.lanes;
  const Slots<T, VECTORS> slots(call, side, lane);
  const int count = HIDDEN ? call.dim * side.heads : call.dim;
  const int64_t rows = side.samples * side.length * (HIDDEN ? 1 : side.heads);
  const int64_t first = work.block * static_cast<int64_t>(side.chunk);
  const RowPlace base(call, side, first);
  const int64_t last = first + side.chunk < rows ? first + side.chunk : rows;

  // all of a warp goes round together: its lanes exchange sums
  for (int64_t start = first; start < last; start += groups) {
    const bool live = start + group < last;
    const int64_t row = live ? start + group : first;
    const RowPlace place = base.further(call, side, static_cast<int32_t>(row - first));
    const int64_t from = place.in(side.x);
    float x[VECTORS][WIDTH];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      fill(x[v], 0.0f);
      if (live && slots.live[v]) {
        load_channels(x[v], side.x.data, slots.offset(call, side.x, from, v), dtype_of<T>);
      }
    }
    if (call.norm != Norm::none) {
      if (call.norm == Norm::layer) {
        float sum = 0.0f;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) sum += x[v][i];
        }
        const float mean = group_sum(sum) / count;
        if (side.mean != nullptr && live && lane == 0) side.mean[row] = mean;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
          if (!slots.live[v]) continue;
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) x[v][i] -= mean;
        }
      }
      float square = 0.0f;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) square += x[v][i] * x[v][i];
      }
      const float rstd = rsqrtf(group_sum(square) / count + call.eps);
      if (side.rstd != nullptr && live && lane == 0) side.rstd[row] = rstd;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) x[v][i] *= rstd;
      }
    }
    if (!live) continue;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (slots.live[v]) finish_norm(x[v], call, side, slots.channel[v]);
    }
    if (place.turns(call.angles)) turn_row<false, T>(x, call, place, slots);
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (slots.live[v]) store_channels(side.y.data, row * count + slots.channel[v], x[v], dtype_of<T>);
    }
  }
}

template <typename T, bool HIDDEN>
__global__ void __launch_bounds__(kMaxThreads<T, HIDDEN, true>, kBlocks<HIDDEN, true>)
    qk_norm_rope_bwd_kernel(const QkNormRope call) {
  constexpr int WIDTH = VECTOR<T>, VECTORS = kVectors<T, HIDDEN, true>;
  __shared__ float2 scratch[64];
  DK_DYNAMIC_SHARED(float, gathered);  // [groups][D], for the sums of heads
  const Work work(call);
  const HeadsSide& side = call.sides[work.second];
  GroupSums<HIDDEN> group_sum{RowSums(scratch), call.lanes};
  const int groups = HIDDEN ? 1 : blockDim.x / call.lanes;
  const int lane = HIDDEN ? threadIdx.x : threadIdx.x % call.lanes;
  const int group = HIDDEN ? 0 : threadIdx.x / call.lanes;
  const Slots<T, VECTORS> slots(call, side, lane);
  const int count = HIDDEN ? call.dim * side.heads : call.dim;
  const int64_t rows = side.samples * side.length * (HIDDEN ? 1 : side.heads);
  const int64_t first = work.block * static_cast<int64_t>(side.chunk);
  const RowPlace base(call, side, first);
  const int64_t last = first + side.chunk < rows ? first + side.chunk : rows;
  const bool normed = call.norm != Norm::none;

  float weight_sums[VECTORS][WIDTH], bias_sums[VECTORS][WIDTH];
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    fill(weight_sums[v], 0.0f);
    fill(bias_sums[v], 0.0f);
  }
  for (int64_t start = first; start < last; start += groups) {
    const bool live = start + group < last;
    const int64_t row = live ? start + group : first;
    const RowPlace place = base.further(call, side, static_cast<int32_t>(row - first));
    const int64_t from = place.in(side.x), dy_from = place.in(side.dy);
    const float rstd = normed ? side.rstd[row] : 1.0f;
    const float mean = call.norm == Norm::layer ? side.mean[row] : 0.0f;
    float xhat[VECTORS][WIDTH], g[VECTORS][WIDTH];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      fill(xhat[v], 0.0f);
      fill(g[v], 0.0f);
      if (live && slots.live[v]) {
        load_channels(g[v], side.dy.data, slots.offset(call, side.dy, dy_from, v), dtype_of<T>);
        if (normed || call.relu) {
          load_channels(xhat[v], side.x.data, slots.offset(call, side.x, from, v), dtype_of<T>);
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) xhat[v][i] = (xhat[v][i] - mean) * rstd;
        }
      }
    }
    if (live && place.turns(call.angles)) turn_row<true, T>(g, call, place, slots);
    float along = 0.0f, centre = 0.0f;
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (!slots.live[v]) continue;
      float dweight[WIDTH], dbias[WIDTH];
      norm_gradient(g[v], dweight, dbias, call, side, slots.channel[v], xhat[v]);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        weight_sums[v][i] += dweight[i];
        bias_sums[v][i] += dbias[i];
        along += g[v][i] * xhat[v][i];
        centre += g[v][i];
      }
    }
    if (side.y.data == nullptr) continue;
    if (normed) {
      along = group_sum(along) / count;
      centre = call.norm == Norm::layer ? group_sum(centre) / count : 0.0f;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) g[v][i] = (g[v][i] - xhat[v][i] * along - centre) * rstd;
      }
    }
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      if (live && slots.live[v]) store_channels(side.y.data, row * count + slots.channel[v], g[v], dtype_of<T>);
    }
  }

  auto store_sums = [&](float* to, const float(&sums)[VECTORS][WIDTH]) {
    if (to == nullptr) return;
    to += work.block * count;
    if constexpr (HIDDEN) {
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        if (slots.live[v]) store_channels(to, slots.channel[v], sums[v], DType::float32);
      }
    } else {
      __syncthreads();
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        if (slots.live[v]) store_channels(gathered, group * count + slots.channel[v], sums[v], DType::float32);
      }
      __syncthreads();
      for (int c = threadIdx.x; c < count; c += blockDim.x) {
        float total = gathered[c];
        for (int other = 1; other < groups; ++other) total += gathered[other * count + c];
        to[c] = total;
      }
    }
  };
  store_sums(side.weight_sums, weight_sums);
  store_sums(side.bias_sums, bias_sums);
}

void check_aligned(const Heads& x, DType dtype) {
  if (x.data == nullptr) return;
  if (x.dtype != dtype || x.stride_channel != 1 ||
      !aligned16(x.data, bytes_of(dtype), x.stride_sample, x.stride_token, x.stride_head)) {
    throw std::invalid_argument("heads must be of one dtype, with adjacent channels, from multiples of 16 bytes");
  }
}

// Whether a row of `channels` fits `lanes` threads of `vectors`, and pairs and sections fall on vectors
void check_row(const QkNormRope& call, int width, int vectors, int most_threads) {
  const int wide = call.sections > 0 ? call.dim / call.sections : 0;
  const bool whole = call.half ? wide % (2 * width) == 0 && call.turning % width == 0
                               : wide % width == 0 && call.turning % (width / 2) == 0;
  bool fits = call.threads >= 32 && call.threads <= most_threads && call.threads % 32 == 0;
  fits = fits && (call.hidden ? call.lanes == call.threads : call.lanes <= 32 && 32 % call.lanes == 0);
  for (const HeadsSide& side : call.sides) {
    const int64_t channels = static_cast<int64_t>(call.dim) * (call.hidden ? side.heads : 1);
    fits = fits && (side.blocks == 0 || channels <= static_cast<int64_t>(call.lanes) * vectors * width);
  }
  if (!whole || !fits) {
    throw std::invalid_argument("a head of " + std::to_string(call.dim) + " channels in " +
                                std::to_string(call.sections) + " sections does not fit vectors of " +
                                std::to_string(width) + " in " + std::to_string(call.lanes) + " of " +
                                std::to_string(call.threads) + " threads");
  }
}

template <bool BACKWARD>
void launch(const QkNormRope& call, cudaStream_t stream) {
  const HeadsSide& given = call.sides[call.sides[0].blocks > 0 ? 0 : 1];
  const DType dtype = given.x.dtype;
  for (const HeadsSide& side : call.sides) {
    if (side.blocks == 0) continue;
    check_aligned(side.x, dtype);
    check_aligned(side.dy, dtype);
    for (const Channels& v : {side.weight, side.bias}) {
      if (!aligned16(v.data, 1)) throw std::invalid_argument("weights must start at multiples of 16 bytes");
    }
  }
  if (call.angles.cos != nullptr) {
    const int bytes = bytes_of(call.angles.dtype);
    for (const void* table : {call.angles.cos, call.angles.sin}) {
      if (call.angles.stride_angle != 1 || !aligned16(table, bytes, call.angles.stride_sample,
                                                      call.angles.stride_token, call.angles.stride_head)) {
        throw std::invalid_argument("angles must be adjacent, in rows from multiples of 16 bytes");
      }
    }
  }
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    with_bool(call.hidden, [&](auto of_hidden) {
      constexpr bool HIDDEN = decltype(of_hidden)::value;
      check_row(call, VECTOR<T>, kVectors<T, HIDDEN, BACKWARD>, kMaxThreads<T, HIDDEN, BACKWARD>);
      const dim3 grid = grid_of(call.sides[0].blocks + call.sides[1].blocks);
      if constexpr (BACKWARD) {
        const size_t shared = HIDDEN ? 0 : sizeof(float) * call.threads / call.lanes * call.dim;
        DK_LAUNCH((qk_norm_rope_bwd_kernel<T, HIDDEN>), grid, dim3(call.threads), shared, stream, call);
      } else {
        DK_LAUNCH((qk_norm_rope_fwd_kernel<T, HIDDEN>), grid, dim3(call.threads), 0, stream, call);
      }
    });
  });
}

}  // namespace

void qk_norm_rope_fwd(const QkNormRope& call, cudaStream_t stream) {
  if (call.lanes == 0) return forward_any(call, stream);
  launch<false>(call, stream);
}

void qk_norm_rope_bwd(const QkNormRope& call, cudaStream_t stream) {
  if (call.lanes == 0) return backward_any(call, stream);
  launch<true>(call, stream);
}

}  // namespace dk
