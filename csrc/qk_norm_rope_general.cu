// QK-norm + RoPE for what the vector kernels do not take: any head dim, strides and dtypes, pair by pair.
//
// A block owns a row at a time and a thread every n-th pair of it, which it reads again in each pass.
#include "qk_norm_rope.cuh"

namespace dk {
namespace qk {
namespace {

constexpr int kThreads = 128;

// The p-th pair of a row: its channels in the row, or -1, and its angle, or -1 where it does not turn
struct Pair {
  int a, b, head, angle;

  __device__ Pair(const QkNormRope& call, int p) {
    const int wide = call.dim / call.sections, each = (wide + 1) / 2;
    head = p / (call.sections * each);
    const int section = p / each % call.sections, i = p % each, first = head * call.dim + section * wide;
    const bool turning = i < call.turning;
    angle = turning ? section * call.turning + i : -1;
    if (!call.half) {
      a = first + 2 * i;
      b = a + 1;
    } else {
      a = first + (turning ? i : i + call.turning);
      b = first + i + (turning ? call.turning : each);
    }
    if (b >= first + wide) b = -1;
  }

  __device__ static int count(const QkNormRope& call, const HeadsSide& side) {
    return call.sections * ((call.dim / call.sections + 1) / 2) * (call.hidden ? side.heads : 1);
  }
};

// Channel c of a row; 0 for the second of an odd pair
__device__ inline float load_channel(const QkNormRope& call, const Heads& x, int64_t row, int head, int c) {
  if (c < 0) return 0.0f;
  return load_any(x.data, x.dtype, row + head * x.stride_head + (c - head * call.dim) * x.stride_channel);
}

__device__ inline float2 load_angle(const Angles& angles, int64_t row, int head, int angle) {
  const int64_t at = row + head * angles.stride_head + angle * angles.stride_angle;
  return make_float2(load_any(angles.cos, angles.dtype, at), load_any(angles.sin, angles.dtype, at));
}

__global__ void __launch_bounds__(kThreads) qk_norm_rope_fwd_any_kernel(const QkNormRope call) {
  __shared__ float2 scratch[64];
  RowSums row_sums(scratch);
  const Work work(call);
  const HeadsSide& side = call.sides[work.second];
  const int pairs = Pair::count(call, side), threads = blockDim.x;
  const int count = call.hidden ? call.dim * side.heads : call.dim;
  const int64_t rows = side.samples * side.length * (call.hidden ? 1 : side.heads);
  const int64_t first = work.block * static_cast<int64_t>(side.chunk);
  const int64_t last = first + side.chunk < rows ? first + side.chunk : rows;
  for (int64_t row = first; row < last; ++row) {
    const RowPlace place(call, side, row);
    const int64_t from = place.in(side.x);
    float mean = 0.0f, rstd = 1.0f;
    if (call.norm == Norm::layer) {
      float sum = 0.0f;
      for (int p = threadIdx.x; p < pairs; p += threads) {
        const Pair pair(call, p);
        sum += load_channel(call, side.x, from, pair.head, pair.a) + load_channel(call, side.x, from, pair.head, pair.b);
      }
      mean = row_sums(sum) / count;
      if (side.mean != nullptr && threadIdx.x == 0) side.mean[row] = mean;
    }
    if (call.norm != Norm::none) {
      float square = 0.0f;
      for (int p = threadIdx.x; p < pairs; p += threads) {
        const Pair pair(call, p);
        const float a = load_channel(call, side.x, from, pair.head, pair.a) - mean;
        const float b = load_channel(call, side.x, from, pair.head, pair.b) - mean;
        square += pair.b < 0 ? a * a : a * a + b * b;
      }
      rstd = rsqrtf(row_sums(square) / count + call.eps);
      if (side.rstd != nullptr && threadIdx.x == 0) side.rstd[row] = rstd;
    }
    for (int p = threadIdx.x; p < pairs; p += threads) {
      const Pair pair(call, p);
      float a[1] = {(load_channel(call, side.x, from, pair.head, pair.a) - mean) * rstd};
      float b[1] = {(load_channel(call, side.x, from, pair.head, pair.b) - mean) * rstd};
      finish_norm(a, call, side, pair.a);
      if (pair.b >= 0) finish_norm(b, call, side, pair.b);
      if (pair.angle >= 0 && place.turns(call.angles)) {
        const float2 angle = load_angle(call.angles, place.in(call.angles), pair.head, pair.angle);
        turn(a[0], b[0], angle.x, angle.y);
      }
      store_channels(side.y.data, row * count + pair.a, a, side.y.dtype);
      if (pair.b >= 0) store_channels(side.y.data, row * count + pair.b, b, side.y.dtype);
    }
  }
}

__global__ void __launch_bounds__(kThreads) qk_norm_rope_bwd_any_kernel(const QkNormRope call) {
  __shared__ float2 scratch[64];
  RowSums row_sums(scratch);
  const Work work(call);
  const HeadsSide& side = call.sides[work.second];
  const int pairs = Pair::count(call, side), threads = blockDim.x;
  const int count = call.hidden ? call.dim * side.heads : call.dim;
  const int64_t rows = side.samples * side.length * (call.hidden ? 1 : side.heads);
  const int64_t first = work.block * static_cast<int64_t>(side.chunk);
  const int64_t last = first + side.chunk < rows ? first + side.chunk : rows;
  for (int64_t row = first; row < last; ++row) {
    const RowPlace place(call, side, row);
    const int64_t from = place.in(side.x), dy_from = place.in(side.dy);
    const float rstd = call.norm != Norm::none ? side.rstd[row] : 1.0f;
    const float mean = call.norm == Norm::layer ? side.mean[row] : 0.0f;
    auto add = [&](float* sums, int channel, float value) {
      if (sums == nullptr) return;
      float& sum = sums[work.block * count + channel];
      sum = row == first ? value : sum + value;
    };
    // the gradient before the norm's weight, and xhat
    auto gradient = [&](const Pair& pair, float (&ga)[1], float (&gb)[1], float (&a)[1], float (&b)[1], bool first_pass) {
      a[0] = (load_channel(call, side.x, from, pair.head, pair.a) - mean) * rstd;
      b[0] = pair.b < 0 ? 0.0f : (load_channel(call, side.x, from, pair.head, pair.b) - mean) * rstd;
      ga[0] = load_channel(call, side.dy, dy_from, pair.head, pair.a);
      gb[0] = load_channel(call, side.dy, dy_from, pair.head, pair.b);
      if (pair.angle >= 0 && place.turns(call.angles)) {
        const float2 angle = load_angle(call.angles, place.in(call.angles), pair.head, pair.angle);
        turn(ga[0], gb[0], angle.x, -angle.y);
      }
      float dweight[1], dbias[1];
      norm_gradient(ga, dweight, dbias, call, side, pair.a, a);
      if (first_pass) {
        add(side.weight_sums, pair.a, dweight[0]);
        add(side.bias_sums, pair.a, dbias[0]);
      }
      if (pair.b < 0) return;
      norm_gradient(gb, dweight, dbias, call, side, pair.b, b);
      if (first_pass) {
        add(side.weight_sums, pair.b, dweight[0]);
        add(side.bias_sums, pair.b, dbias[0]);
      }
    };
    float along = 0.0f, centre = 0.0f, ga[1], gb[1], a[1], b[1];
    if (call.norm != Norm::none) {
      for (int p = threadIdx.x; p < pairs; p += threads) {
        gradient(Pair(call, p), ga, gb, a, b, true);
        along += ga[0] * a[0] + gb[0] * b[0];
        centre += ga[0] + gb[0];
      }
      const float2 both = row_sums(along, centre);
      along = both.x / count;
      centre = call.norm == Norm::layer ? both.y / count : 0.0f;
    }
    if (side.y.data == nullptr) continue;
    for (int p = threadIdx.x; p < pairs; p += threads) {
      const Pair pair(call, p);
      gradient(pair, ga, gb, a, b, false);
      ga[0] = (ga[0] - a[0] * along - centre) * rstd;
      gb[0] = (gb[0] - b[0] * along - centre) * rstd;
      store_channels(side.y.data, row * count + pair.a, ga, side.y.dtype);
      if (pair.b >= 0) store_channels(side.y.data, row * count + pair.b, gb, side.y.dtype);
    }
  }
}

dim3 grid_of_sides(const QkNormRope& call) { return grid_of(call.sides[0].blocks + call.sides[1].blocks); }

}  // namespace

void forward_any(const QkNormRope& call, cudaStream_t stream) {
  DK_LAUNCH(qk_norm_rope_fwd_any_kernel, grid_of_sides(call), dim3(call.threads), 0, stream, call);
}

void backward_any(const QkNormRope& call, cudaStream_t stream) {
  DK_LAUNCH(qk_norm_rope_bwd_any_kernel, grid_of_sides(call), dim3(call.threads), 0, stream, call);
}

}  // namespace qk

}  // namespace dk
