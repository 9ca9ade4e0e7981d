// The gradients of cos and sin, which few models learn: sums over what turns by an angle.
//
// A block owns some rows of the tables. The samples and heads that turn by a row are dealt to groups of threads,
// 16 bytes of x and of dy a thread at a time, and the groups' sums are added in order. What cannot be read in
// vectors is left to a kernel in which a thread adds up one angle.
#include "qk_norm_rope.cuh"

namespace dk {
namespace {

using namespace qk;

constexpr int kThreads = 128;

// How a block is divided: `units` threads see all angles of a head, `share` groups of them all of a row
struct Division {
  int32_t units, share, rows;
};

// A row of the tables, and the samples and heads of a side that turn by it; counted in INDEX
template <typename INDEX>
struct Turned {
  INDEX sample;
  int32_t n, head;
  bool each_sample, each_head;

  __device__ Turned(const QkNormRopeAngles& angles, INDEX row) {
    const INDEX heads = angles.heads, length = angles.call.angles.length, place = row / heads;
    each_sample = angles.samples > 1;
    each_head = angles.heads > 1;
    sample = place / length;
    n = angles.call.angles.start + static_cast<int32_t>(place - sample * length);
    head = static_cast<int32_t>(row - place * heads);
  }

  __device__ INDEX heads_of(const HeadsSide& side) const { return each_head ? 1 : side.heads; }
  __device__ INDEX count(const HeadsSide& side) const {
    return (each_sample ? 1 : static_cast<INDEX>(side.samples)) * heads_of(side);
  }
};

// Where one of them is: its rows of x, of dy and of the statistics, and its first channel of the weight
struct Member {
  int64_t x, dy, statistics;
  int channel;

  template <typename INDEX>
  __device__ Member(const QkNormRope& call, const HeadsSide& side, const Turned<INDEX>& turned, INDEX item) {
    const INDEX heads = turned.heads_of(side), of = item / heads;
    const int64_t b = turned.sample + of;
    const int h = turned.head + static_cast<int>(item - of * heads);
    x = b * side.x.stride_sample + turned.n * side.x.stride_token + h * side.x.stride_head;
    dy = b * side.dy.stride_sample + turned.n * side.dy.stride_token + h * side.dy.stride_head;
    const int64_t token = b * side.length + turned.n;
    statistics = call.hidden ? token : token * side.heads + h;
    channel = call.hidden ? h * call.dim : 0;
  }
};

template <int WIDTH>
__device__ inline void normalise(float (&x)[WIDTH], const QkNormRope& call, const HeadsSide& side,
                                 const Member& member, int channel) {
  const float rstd = call.norm != Norm::none ? side.rstd[member.statistics] : 1.0f;
  const float mean = call.norm == Norm::layer ? side.mean[member.statistics] : 0.0f;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) x[i] = (x[i] - mean) * rstd;
  finish_norm(x, call, side, member.channel + channel);
}

template <typename T, bool HALF>
__global__ void __launch_bounds__(kThreads, 5)
    qk_norm_rope_bwd_angles_kernel(const __grid_constant__ QkNormRopeAngles angles, const Division by) {
  // a thread's pairs are in a vector, or one channel in each of two
  constexpr int WIDTH = VECTOR<T>, ANGLES = HALF ? WIDTH : WIDTH / 2;
  DK_DYNAMIC_SHARED(float, gathered);  // [rows][share][dcos, dsin][turning * sections]
  const QkNormRope& call = angles.call;
  const int each = call.turning * call.sections, per_section = call.turning / ANGLES;
  const int unit = threadIdx.x % by.units, group = threadIdx.x / by.units;
  const int section = unit / per_section, i = unit % per_section * ANGLES;
  const int channel = section * (call.dim / call.sections) + (HALF ? i : 2 * i);
  // less than 2^31, as the members of a row
  const uint32_t total = static_cast<uint32_t>(angles.samples) * call.angles.length * angles.heads;
  const uint32_t first = blockIdx.x * by.rows, row = first + group / by.share;
  if (group < by.rows * by.share && row < total) {
    const Turned<uint32_t> turned(angles, row);
    float dcos[ANGLES], dsin[ANGLES];
    fill(dcos, 0.0f);
    fill(dsin, 0.0f);
    for (int s = 0; s < 2; ++s) {
      const HeadsSide& side = call.sides[s];
      if (side.dy.data == nullptr) continue;
      const uint32_t count = turned.count(side);
      for (uint32_t item = group % by.share; item < count; item += by.share) {
        const Member member(call, side, turned, item);
        float x[WIDTH], g[WIDTH];
        load_channels(x, side.x.data, member.x + channel, dtype_of<T>);
        load_channels(g, side.dy.data, member.dy + channel, dtype_of<T>);
        if constexpr (HALF) {
          float y[WIDTH], h[WIDTH];
          load_channels(y, side.x.data, member.x + channel + call.turning, dtype_of<T>);
          load_channels(h, side.dy.data, member.dy + channel + call.turning, dtype_of<T>);
          normalise(x, call, side, member, channel);
          normalise(y, call, side, member, channel + call.turning);
#pragma unroll
          for (int j = 0; j < ANGLES; ++j) {
            dcos[j] += g[j] * x[j] + h[j] * y[j];
            dsin[j] += h[j] * x[j] - g[j] * y[j];
          }
        } else {
          normalise(x, call, side, member, channel);
#pragma unroll
          for (int j = 0; j < ANGLES; ++j) {
            dcos[j] += g[2 * j] * x[2 * j] + g[2 * j + 1] * x[2 * j + 1];
            dsin[j] += g[2 * j + 1] * x[2 * j] - g[2 * j] * x[2 * j + 1];
          }
        }
      }
    }
    float* const to = gathered + group * 2 * each + section * call.turning + i;
#pragma unroll
    for (int j = 0; j < ANGLES; ++j) {
      to[j] = dcos[j];
      to[each + j] = dsin[j];
    }
  }
  __syncthreads();
  for (int at = threadIdx.x; at < by.rows * 2 * each; at += kThreads) {
    const int place = at / (2 * each), which = at % (2 * each);
    if (first + place >= total) break;
    const float* const from = gathered + place * by.share * 2 * each + which;
    float sum = from[0];
    for (int other = 1; other < by.share; ++other) sum += from[other * 2 * each];
    const Result& to = which < each ? angles.dcos : angles.dsin;
    if (to.data != nullptr) store_one(to.data, static_cast<int64_t>(first + place) * each + which % each, sum, to.dtype);
  }
}

// One angle a thread: any stride and dtype
__global__ void __launch_bounds__(kThreads)
    qk_norm_rope_bwd_angles_any_kernel(const __grid_constant__ QkNormRopeAngles angles) {
  const QkNormRope& call = angles.call;
  const int each = call.turning * call.sections;
  const int64_t at = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x;
  if (at >= angles.samples * call.angles.length * angles.heads * each) return;
  const int angle = static_cast<int>(at % each), section = angle / call.turning, i = angle % call.turning;
  const int first = section * (call.dim / call.sections);
  const int a = call.half ? first + i : first + 2 * i, b = call.half ? a + call.turning : a + 1;
  const Turned<int64_t> turned(angles, at / each);
  float dcos = 0.0f, dsin = 0.0f;
  for (int s = 0; s < 2; ++s) {
    const HeadsSide& side = call.sides[s];
    if (side.dy.data == nullptr) continue;
    const int64_t count = turned.count(side);
    for (int64_t item = 0; item < count; ++item) {
      const Member member(call, side, turned, item);
      auto load = [&](const Heads& from, int64_t row, int c) {
        return load_any(from.data, from.dtype, row + c * from.stride_channel);
      };
      float x[1] = {load(side.x, member.x, a)}, y[1] = {load(side.x, member.x, b)};
      normalise(x, call, side, member, a);
      normalise(y, call, side, member, b);
      const float gx = load(side.dy, member.dy, a), gy = load(side.dy, member.dy, b);
      dcos += gx * x[0] + gy * y[0];
      dsin += gy * x[0] - gx * y[0];
    }
  }
  if (angles.dcos.data != nullptr) store_one(angles.dcos.data, at, dcos, angles.dcos.dtype);
  if (angles.dsin.data != nullptr) store_one(angles.dsin.data, at, dsin, angles.dsin.dtype);
}

// Whether what turns can be read in vectors of `width` elements of `dtype`, at most a block's threads of them
bool in_vectors(const QkNormRope& call, DType dtype, int width) {
  const int angles = call.half ? width : width / 2;
  bool fits = call.dim / call.sections % width == 0 && call.turning % angles == 0 &&
              call.turning * call.sections / angles <= kThreads;
  for (const HeadsSide& side : call.sides) {
    if (side.dy.data == nullptr) continue;
    for (const Heads& x : {side.x, side.dy}) {
      fits = fits && x.dtype == dtype && x.stride_channel == 1 &&
             aligned16(x.data, bytes_of(dtype), x.stride_sample, x.stride_token, x.stride_head);
    }
    for (const Channels& v : {side.weight, side.bias}) fits = fits && aligned16(v.data, 1);
  }
  return fits;
}

}  // namespace

void qk_norm_rope_bwd_angles(const QkNormRopeAngles& angles, cudaStream_t stream) {
  const QkNormRope& call = angles.call;
  if (call.turning <= 0 || call.sections <= 0 || angles.samples <= 0 || angles.heads <= 0) {
    throw std::invalid_argument("tables need samples, heads, sections and angles; got " +
                                std::to_string(angles.samples) + ", " + std::to_string(angles.heads) + ", " +
                                std::to_string(call.sections) + " and " + std::to_string(call.turning));
  }
  const int64_t rows = angles.samples * call.angles.length * angles.heads;
  const int each = call.turning * call.sections;
  const DType dtype = call.sides[call.sides[0].dy.data != nullptr ? 0 : 1].x.dtype;
  const int width = 16 / bytes_of(dtype);
  int64_t members = 1;
  for (const HeadsSide& side : call.sides) {
    if (side.dy.data == nullptr) continue;
    const int64_t here = (angles.samples > 1 ? 1 : side.samples) * (angles.heads > 1 ? 1 : side.heads);
    members = here > members ? here : members;
  }
  if (!in_vectors(call, dtype, width) || rows >= int64_t{1} << 31 || members >= int64_t{1} << 31) {
    DK_LAUNCH(qk_norm_rope_bwd_angles_any_kernel, grid_of(ceil_div(rows * each, kThreads)), dim3(kThreads), 0,
              stream, angles);
    return;
  }
  Division by;
  by.units = each / (call.half ? width : width / 2);
  const int groups = kThreads / by.units;
  by.share = members < groups ? static_cast<int32_t>(members) : groups;
  by.rows = groups / by.share;
  const size_t shared = sizeof(float) * by.rows * by.share * 2 * each;
  with_dtype(dtype, [&](auto element) {
    with_bool(call.half, [&](auto half) {
      using T = decltype(element);
      DK_LAUNCH((qk_norm_rope_bwd_angles_kernel<T, decltype(half)::value>), grid_of(ceil_div(rows, by.rows)),
                dim3(kThreads), shared, stream, angles, by);
    });
  });
}

}  // namespace dk
