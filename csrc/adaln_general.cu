// adaLN for what the vector kernels do not take: any C, any stride of the channels, any mix of dtypes.
//
// A block owns a row at a time and a thread every 256th channel of it. Nothing of the row is kept: each pass
// reads it again, from the caches where it fits. Column sums are added up in the block's own row of global
// memory, each by one thread. And the second stage of the sums, for both backward kernels.
#include <algorithm>

#include "adaln_backward.cuh"

namespace dk {
namespace adaln {
namespace {

constexpr int kThreads = 256;

__device__ inline float load_token(const Tokens& tokens, int64_t row, int channel) {
  return load_any(tokens.data, tokens.dtype, row + channel * tokens.stride_channel);
}

__global__ void __launch_bounds__(kThreads) adaln_fwd_any_kernel(const AdalnForward call) {
  __shared__ float2 scratch[64];
  RowSums row_sums(scratch);
  const int channels = call.size.channels, threads = blockDim.x;
  const bool gated = call.residual.data != nullptr, eager = call.form.eager;
  const DType dtype = gated ? call.residual.dtype : call.x.dtype;
  const int64_t tokens = call.size.samples * call.size.length;
  const int64_t first = blockIdx.x * static_cast<int64_t>(call.chunk);
  const int64_t last = first + call.chunk < tokens ? first + call.chunk : tokens;
  for (int64_t token = first; token < last; ++token) {
    const Place place{token / call.size.length, static_cast<int32_t>(token % call.size.length), token};
    const int64_t x_row = row_offset(call.x, place), out_row = token * channels;
    if (gated) {
      float branch_rstd = 1.0f;
      if (call.form.branch_rms) {
        float square = 0.0f;
        for (int c = threadIdx.x; c < channels; c += threads) {
          const float x = load_token(call.x, x_row, c);
          square += x * x;
        }
        branch_rstd = rsqrtf(row_sums(square) / channels + call.form.eps);
        if (call.branch_rstd != nullptr && threadIdx.x == 0) call.branch_rstd[token] = branch_rstd;
      }
      const int64_t residual_row = row_offset(call.residual, place);
      const int64_t gate_row = row_offset(call.gate, call.row_index, place);
      for (int c = threadIdx.x; c < channels; c += threads) {
        float x[1] = {load_token(call.x, x_row, c)};
        const float residual[1] = {load_token(call.residual, residual_row, c)};
        add_branch(x, residual, call, branch_rstd, call.x.dtype, gate_row, c);
        store_channels(call.out, out_row + c, x, dtype);
      }
    }
    if (call.form.norm == Norm::none) continue;

    // a thread reads back only what it wrote itself
    auto stream = [&](int c) { return gated ? load_any(call.out, dtype, out_row + c) : load_token(call.x, x_row, c); };
    const bool rms = call.form.norm == Norm::rms;
    float mean = 0.0f;
    if (!rms) {
      float sum = 0.0f;
      for (int c = threadIdx.x; c < channels; c += threads) sum += stream(c);
      mean = row_sums(sum) / channels;
      if (call.mean != nullptr && threadIdx.x == 0) call.mean[token] = mean;
    }
    float square = 0.0f;
    for (int c = threadIdx.x; c < channels; c += threads) {
      const float x = stream(c) - mean;
      square += x * x;
    }
    const float rstd = rsqrtf(row_sums(square) / channels + call.form.eps);
    if (call.rstd != nullptr && threadIdx.x == 0) call.rstd[token] = rstd;

    const int64_t shift_row = row_offset(call.shift, call.row_index, place);
    const int64_t scale_row = row_offset(call.scale, call.row_index, place);
    const int64_t shift2_row = row_offset(call.shift2, call.row_index, place);
    const int64_t scale2_row = row_offset(call.scale2, call.row_index, place);
    for (int c = threadIdx.x; c < channels; c += threads) {
      float n[1] = {(stream(c) - mean) * rstd};
      apply_affine(n, call.weight, call.bias, c, rms, dtype, eager);
      float y[1] = {n[0]};
      modulate(y, dtype, call.scale, call.scale_table, scale_row, call.shift, call.shift_table, shift_row, c, eager);
      store_channels(call.y, out_row + c, y, dtype);
      if (call.y2 == nullptr) continue;
      modulate(n, dtype, call.scale2, Channels{}, scale2_row, call.shift2, Channels{}, shift2_row, c, eager);
      store_channels(call.y2, out_row + c, n, dtype);
    }
  }
}

// The block's row of each sum; the first token writes, the others add.
struct GlobalSums {
  static constexpr bool STORES = true;
  const AdalnBackward& call;
  int64_t row;
  bool first;
  int channel;

  template <AdalnSum WHICH>
  __device__ void add(int, const float (&values)[1]) {
    const Result& to = call.sums[WHICH];
    if (to.data == nullptr) return;
    float& sum = static_cast<float*>(to.data)[row + channel];
    sum = first ? values[0] : sum + values[0];
  }
};

struct NoSums {
  static constexpr bool STORES = false;

  template <AdalnSum WHICH>
  __device__ void add(int, const float (&)[1]) {}
};

__global__ void __launch_bounds__(kThreads) adaln_bwd_any_kernel(const AdalnBackward call) {
  __shared__ float2 scratch[64];
  RowSums row_sums(scratch);
  const int channels = call.size.channels, threads = blockDim.x;
  const bool normed = call.form.norm != Norm::none, layer = call.form.norm == Norm::layer;
  const bool has_branch = call.dbranch.data != nullptr || call.branch.data != nullptr;
  const bool branch_rms = call.form.branch_rms && has_branch;
  const Walk walk(call);
  GlobalSums sums{call, static_cast<int64_t>(blockIdx.x) * channels, true, 0};
  if (walk.begin >= walk.end) {
    for (int which = 0; which < 8; ++which) {
      if (call.sums[which].data == nullptr) continue;
      for (int c = threadIdx.x; c < channels; c += threads) static_cast<float*>(call.sums[which].data)[sums.row + c] = 0.0f;
    }
  }
  for (int64_t position = walk.begin; position < walk.end; ++position, sums.first = false) {
    const Place place = walk(call, position);
    const int64_t token = place.index, out_row = token * channels;
    const int64_t x_row = row_offset(call.x, place), dout_row = row_offset(call.dout, place);
    const int64_t dy_row = row_offset(call.dy, place), dy2_row = row_offset(call.dy2, place);
    const int64_t branch_row = row_offset(call.branch, place);
    const int64_t scale_row = row_offset(call.scale, call.row_index, place);
    const int64_t scale2_row = row_offset(call.scale2, call.row_index, place);
    const int64_t gate_row = row_offset(call.gate, call.row_index, place);
    const float rstd = normed ? call.rstd[token] : 0.0f, mean = layer ? call.mean[token] : 0.0f;
    const float branch_rstd = branch_rms ? call.branch_rstd[token] : 1.0f;

    // dn is computed again in each pass: only the first adds to the sums and stores rows a token
    NoSums no_sums;
    auto dn_of = [&](int c, float& xhat, auto& to) {
      float dn[1], dy[1] = {0.0f}, dy2[1] = {0.0f};
      const float hat[1] = {(load_token(call.x, x_row, c) - mean) * rstd};
      if (call.dy.data != nullptr) dy[0] = load_token(call.dy, dy_row, c);
      if (call.dy2.data != nullptr) dy2[0] = load_token(call.dy2, dy2_row, c);
      norm_backward<true>(dn, call, to, 0, c, out_row, hat, dy, dy2, scale_row, scale2_row);
      xhat = hat[0];
      return dn[0];
    };
    float along = 0.0f, centre = 0.0f, xhat;
    if (normed) {
      for (int c = threadIdx.x; c < channels; c += threads) {
        sums.channel = c;
        const float dn = dn_of(c, xhat, sums);
        along += dn * xhat;
        centre += dn;
      }
      const float2 both = row_sums(along, centre);
      along = both.x / channels;
      centre = layer ? both.y / channels : 0.0f;
    }
    auto dx_of = [&](int c) {
      float dx = 0.0f;
      if (normed) {
        const float dn = dn_of(c, xhat, no_sums);
        dx = (dn - xhat * along - centre) * rstd;
      }
      return call.dout.data != nullptr ? dx + load_token(call.dout, dout_row, c) : dx;
    };
    auto bhat_of = [&](int c) {
      return call.branch.data != nullptr ? load_token(call.branch, branch_row, c) * branch_rstd : 0.0f;
    };
    float branch_along = 0.0f;
    for (int c = threadIdx.x; c < channels; c += threads) {
      const float dx[1] = {dx_of(c)};
      if (call.dresidual.data != nullptr) store_channels(call.dresidual.data, out_row + c, dx, call.dresidual.dtype);
      if (!has_branch) continue;
      const float bhat[1] = {bhat_of(c)};
      float db[1];
      sums.channel = c;
      gate_backward<true>(db, call, sums, 0, c, out_row, dx, bhat, gate_row);
      branch_along += db[0] * bhat[0];
      if (!branch_rms && call.dbranch.data != nullptr) {
        store_channels(call.dbranch.data, out_row + c, db, call.dbranch.dtype);
      }
    }
    if (!branch_rms) continue;
    branch_along = row_sums(branch_along) / channels;
    if (call.dbranch.data == nullptr) continue;
    for (int c = threadIdx.x; c < channels; c += threads) {
      const float dx[1] = {dx_of(c)}, bhat[1] = {bhat_of(c)};
      float db[1];
      gate_backward<true>(db, call, no_sums, 0, c, out_row, dx, bhat, gate_row);
      db[0] = (db[0] - bhat[0] * branch_along) * branch_rstd;
      store_channels(call.dbranch.data, out_row + c, db, call.dbranch.dtype);
    }
  }
}

constexpr int kSumLanes = 32, kSumRows = 8;

// WIDTH columns a thread
template <int WIDTH>
__global__ void __launch_bounds__(kSumLanes* kSumRows) adaln_bwd_sums_kernel(const AdalnSums call) {
  __shared__ float scratch[kSumRows][kSumLanes * WIDTH];
  const AdalnSums::Item& item = call.items[blockIdx.z];
  const int lane = threadIdx.x % kSumLanes, warp = threadIdx.x / kSumLanes;
  const int channel = (blockIdx.x * kSumLanes + lane) * WIDTH;
  for (int64_t group = blockIdx.y; group < item.groups; group += gridDim.y) {
    const int64_t low = item.rows > 0 ? group * item.rows : call.first[group];
    const int64_t high = item.rows > 0 ? low + item.rows : call.first[group + 1];
    float total[WIDTH], more[WIDTH];
    fill(total, 0.0f);
    if (channel < call.channels) {
#pragma unroll 4
      for (int64_t row = low + warp; row < high; row += kSumRows) {
        load_channels(more, item.sums, row * call.channels + channel, DType::float32);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) total[i] += more[i];
      }
    }
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) scratch[warp][i * kSumLanes + lane] = total[i];
    __syncthreads();
    if (warp == 0 && channel < call.channels) {
      for (int w = 1; w < kSumRows; ++w) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) total[i] += scratch[w][i * kSumLanes + lane];
      }
      store_channels(item.out.data, group * call.channels + channel, total, item.out.dtype);
    }
    __syncthreads();
  }
}

}  // namespace

void forward_any(const AdalnForward& call, cudaStream_t stream) {
  const int64_t tokens = call.size.samples * call.size.length;
  DK_LAUNCH(adaln_fwd_any_kernel, grid_of(ceil_div(tokens, call.chunk)), dim3(call.size.threads), 0, stream, call);
}

void backward_any(const AdalnBackward& call, cudaStream_t stream) {
  DK_LAUNCH(adaln_bwd_any_kernel, grid_of(call.blocks), dim3(call.size.threads), 0, stream, call);
}

}  // namespace adaln

void adaln_backward_sums(const AdalnSums& call, cudaStream_t stream) {
  using namespace adaln;
  int64_t groups = 0;
  for (int i = 0; i < call.count; ++i) groups = std::max(groups, call.items[i].groups);
  // rows of sums and of gradients are contiguous, from addresses that an allocator gave
  with_bool(call.channels % 4 == 0, [&](auto wide) {
    constexpr int WIDTH = decltype(wide)::value ? 4 : 1;
    const dim3 grid(static_cast<unsigned>(ceil_div(call.channels, kSumLanes * WIDTH)),
                    static_cast<unsigned>(std::min(groups, most_blocks())), static_cast<unsigned>(call.count));
    DK_LAUNCH(adaln_bwd_sums_kernel<WIDTH>, grid, dim3(kSumLanes * kSumRows), 0, stream, call);
  });
}

}  // namespace dk
