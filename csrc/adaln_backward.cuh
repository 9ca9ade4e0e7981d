// The backward of adaLN, WIDTH channels of a row at a time: what both of its kernels compute.
//
//     dn        = dy * (1 + scale) + dy2 * (1 + scale2), times the norm's weight
//     dx        = rstd * (dn - mean(dn) - xhat * mean(dn * xhat)) + dout      rms: without the first mean
//     dbranch   = act(gate) * dx, through the branch's norm where it has one
#pragma once

#include "adaln.cuh"

namespace dk::adaln {

// dn of `WIDTH` channels; adds to the sums of shift, scale, weight and bias and stores their rows a token.
//
// `sums.add<which>(v, values)` adds to the block's column sums; STORES: also rows a token. EXTRA: an affine norm or a second output.
template <bool EXTRA, int WIDTH, typename Sums>
__device__ inline void norm_backward(float (&dn)[WIDTH], const AdalnBackward& call, Sums& sums, int v, int channel,
                                     int64_t out_row, const float (&xhat)[WIDTH], const float (&dy)[WIDTH],
                                     const float (&dy2)[WIDTH], int64_t scale_row, int64_t scale2_row) {
  const bool eager = call.form.eager;
  float normed[WIDTH], part[WIDTH];
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) normed[i] = xhat[i];
  if constexpr (EXTRA) {
    apply_affine(normed, call.weight, call.bias, channel, call.form.norm == Norm::rms, call.x.dtype, eager);
  } else if (eager) {
    round_to(normed, call.x.dtype);
  }

  if (!EXTRA || call.dy.data != nullptr) {
    sums.template add<kShiftSum>(v, dy);
    if (Sums::STORES && call.dshift.data != nullptr) store_channels(call.dshift.data, out_row + channel, dy, call.dshift.dtype);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) part[i] = dy[i] * normed[i];
    sums.template add<kScaleSum>(v, part);
    if (Sums::STORES && call.dscale.data != nullptr) store_channels(call.dscale.data, out_row + channel, part, call.dscale.dtype);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) dn[i] = dy[i];
    if (call.scale.data != nullptr) {
      const DType of = load_modulation(part, call.scale, call.scale_table, scale_row, channel, eager);
      one_plus(part, of, eager);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) dn[i] *= part[i];
    }
  } else {
    fill(dn, 0.0f);
  }

  if constexpr (EXTRA) {
    if (call.dy2.data != nullptr) {
      sums.template add<kShift2Sum>(v, dy2);
      if (Sums::STORES && call.dshift2.data != nullptr) store_channels(call.dshift2.data, out_row + channel, dy2, call.dshift2.dtype);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) part[i] = dy2[i] * normed[i];
      sums.template add<kScale2Sum>(v, part);
      if (Sums::STORES && call.dscale2.data != nullptr) store_channels(call.dscale2.data, out_row + channel, part, call.dscale2.dtype);
      fill(part, 1.0f);
      if (call.scale2.data != nullptr) {
        const DType of = load_modulation(part, call.scale2, Channels{}, scale2_row, channel, eager);
        one_plus(part, of, eager);
      }
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) dn[i] += dy2[i] * part[i];
    }
    sums.template add<kBiasSum>(v, dn);
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) part[i] = dn[i] * xhat[i];
    sums.template add<kWeightSum>(v, part);
    if (call.weight.data != nullptr) {
      load_channels(part, call.weight.data, channel, call.weight.dtype);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) dn[i] *= part[i];
    }
  }
}

// db, the gradient before the branch's norm, from dx; adds to the sums of gate and branch_weight.
//
// bhat: the branch, times its rstd where it is normalised.
template <bool EXTRA, int WIDTH, typename Sums>
__device__ inline void gate_backward(float (&db)[WIDTH], const AdalnBackward& call, Sums& sums, int v, int channel,
                                     int64_t out_row, const float (&dx)[WIDTH], const float (&bhat)[WIDTH],
                                     int64_t gate_row) {
  const bool eager = call.form.eager, rms = EXTRA && call.form.branch_rms;
  float gate[WIDTH], part[WIDTH];
  fill(gate, 1.0f);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) part[i] = bhat[i];
  if constexpr (EXTRA) {
    if (rms) apply_affine(part, call.branch_weight, Channels{}, channel, true, call.branch.dtype, eager);
  }
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) part[i] *= dx[i];
  if (call.gate.data != nullptr) {
    const DType of = load_modulation(gate, call.gate, call.gate_table, gate_row, channel, eager);
    if (call.form.tanh) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        gate[i] = tanhf(gate[i]);
        part[i] *= 1.0f - gate[i] * gate[i];
      }
      if (eager) round_to(gate, of);
    }
  }
  sums.template add<kGateSum>(v, part);
  if (Sums::STORES && call.dgate.data != nullptr) store_channels(call.dgate.data, out_row + channel, part, call.dgate.dtype);
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) db[i] = dx[i] * gate[i];
  if constexpr (EXTRA) {
    if (rms) {
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) part[i] = db[i] * bhat[i];
      sums.template add<kBranchWeightSum>(v, part);
      if (call.branch_weight.data != nullptr) {
        load_channels(part, call.branch_weight.data, channel, call.branch_weight.dtype);
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) db[i] *= part[i];
      }
    }
  }
}

// The positions of a block, and the token at each.
struct Walk {
  int64_t begin, end;  // positions
  int64_t sample;

  __device__ explicit Walk(const AdalnBackward& call) {
    if (call.order != nullptr) {
      begin = call.begin[blockIdx.x];
      end = call.end[blockIdx.x];
      sample = 0;
      return;
    }
    const int chunks = (call.segment + call.chunk - 1) / call.chunk;
    const int per_sample = call.size.length / call.segment * chunks;
    sample = blockIdx.x / per_sample;
    const int rest = blockIdx.x % per_sample;
    const int first = rest / chunks * call.segment, from = rest % chunks * call.chunk;
    begin = first + from;
    end = first + (from + call.chunk < call.segment ? from + call.chunk : call.segment);
  }

  __device__ Place operator()(const AdalnBackward& call, int64_t position) const {
    if (call.order == nullptr) {
      return Place{sample, static_cast<int32_t>(position), sample * call.size.length + position};
    }
    const int64_t token = call.order[position];
    return Place{token / call.size.length, static_cast<int32_t>(token % call.size.length), token};
  }
};

}  // namespace dk::adaln
