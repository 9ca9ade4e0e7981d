// The DiT's last layer: norm, modulation, projection and unpatchify.
//
//     video = unpatchify(y weight^T + bias),    y = norm(x) * (1 + scale) + shift
//
// Strides are in elements.
#pragma once

#include "adaln.h"

namespace dk {

struct FinalLayer {
  int64_t samples;     // B
  int32_t grid[3];     // N = Gt * Gh * Gw
  int32_t patch[3], channels;  // of (t, h, w), and of the video
  int32_t steps[4];    // of t, h, w and c among the weight's rows
  int32_t width;       // C
  Norm norm;           // rms or layer
  float eps;
  Tokens x;                     // [B, N, C]
  ModulationRows shift, scale;  // none indexed
  Channels weight;              // [K = pt * ph * pw * channels, C], contiguous
  Channels bias;                // [K]
  void* video;                  // [B, channels, F, Y, X]: written, or the gradient that is read
  int64_t video_strides[5];
  DType video_dtype;
  float *mean, *rstd;  // [B, N]: written by the forward where given, read by the backward
};

void final_layer_fwd(const FinalLayer& call, cudaStream_t stream);

// d(x) [B, N, C], contiguous, or null. d(shift) and d(scale) of tokens that share their rows, `segment` of a
// sample at a time: of a row a token the gradient itself, [B, N, C]; else [blocks, C] float32, a row a block of
// 128 tokens.
struct FinalLayerRows {
  int32_t segment;
  Result dx;
  Result dshift, dscale;          // of a row a token, or null
  float *shift_sums, *scale_sums;  // [B * (N / segment) * ceil(segment / 128), C], or null
};
void final_layer_bwd_rows(const FinalLayer& call, const FinalLayerRows& rows, cudaStream_t stream);

// d(weight) and d(bias) of `chunk` tokens each, a multiple of 64: [chunks, K, C] and [chunks, K], or null
void final_layer_bwd_weight(const FinalLayer& call, int64_t chunk, float* weight_sums, float* bias_sums,
                            cudaStream_t stream);

}  // namespace dk
