// Tokens to video, or with `inverse` back: one permutation.
//
//     video[b, c, gt * pt + t, gh * ph + h, gw * pw + w] = tokens[b, (gt, gh, gw), (t, h, w, c)]
#pragma once

#include <cstdint>

#include "common.cuh"

namespace dk {

struct Unpatchify {
  void* tokens;  // [B, Gt * Gh * Gw, pt * ph * pw * channels], of `bytes` an element
  int64_t token_strides[3];
  void* video;  // [B, channels, Gt * pt, Gh * ph, Gw * pw]
  int64_t video_strides[5];
  int64_t samples;
  int32_t grid[3], patch[3], channels;
  int32_t steps[4];           // of t, h, w and c in a token's values: their order
  int32_t block_h, block_w;   // patches of a block
  int32_t bytes;              // 2 or 4
  bool inverse;
};

void unpatchify(const Unpatchify& call, cudaStream_t stream);

}  // namespace dk
