// Patch embedding: a matrix product whose left operand is gathered from the video, never stored.
//
//     tokens[m, c] = sum_k A[m, k] weight[c, k] + bias[c] + pos[n, c],    A[m, k] = video[patch m, value k]
//
// m = (b, gt, gh, gw) counts patches, k = (channel, t, h, w) the values of one. Strides are in elements.
#pragma once

#include "rows.h"

namespace dk {

struct PatchEmbed {
  int64_t samples;
  int32_t grid[3], patch[3];   // of (t, h, w)
  int32_t in_channels, channels;  // Cin, C
  void* video;                 // [B, Cin, F, Y, X]: read, or the gradient that is written
  int64_t video_strides[5];
  DType video_dtype;
  Channels weight;             // [C, Cin, pt, ph, pw], contiguous
  Channels bias;               // [C]
  Channels pos;                // [N, C]
  int64_t pos_strides[2];
  void* tokens;                // [B, N, C]: written, contiguous, or the gradient that is read
  int64_t token_strides[3];
  DType token_dtype;
};

void patch_embed_fwd(const PatchEmbed& call, cudaStream_t stream);
// d(video)
void patch_embed_bwd_video(const PatchEmbed& call, cudaStream_t stream);
// d(weight) and d(bias) of `chunk` patches each, a multiple of 64: [chunks, C, K] and [chunks, C], or null
void patch_embed_bwd_weight(const PatchEmbed& call, int64_t chunk, float* weight_sums, float* bias_sums,
                            cudaStream_t stream);
// d(pos): the sum over samples
void patch_embed_bwd_pos(const PatchEmbed& call, Result dpos, cudaStream_t stream);

}  // namespace dk
