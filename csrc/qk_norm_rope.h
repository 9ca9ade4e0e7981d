// QK-norm and rotary embedding, q and k in one launch, read in place from a packed projection.
//
//     n = act(norm(x) * weight + bias);   (a, b) -> (a cos - b sin, a sin + b cos)
//
// A row is a head's D channels, or with `hidden` all heads' of a token. Strides are in elements.
#pragma once

#include "rows.h"

namespace dk {

struct Heads {
  const void* data;  // [B, N, H, D]
  int64_t stride_sample, stride_token, stride_head, stride_channel;
  DType dtype;
};

// q or k
struct HeadsSide {
  Heads x, dy;  // dy: the gradient of the result, for the backward
  int64_t samples;
  int32_t length, heads;  // N, H
  int64_t blocks;
  int32_t chunk;  // rows
  Channels weight, bias;          // [D] or, hidden, [H * D]
  float *mean, *rstd;             // [B, N, H] or [B, N]: written by the forward, read by the backward
  Result y;                       // [B, N, H, D], contiguous: the result, or the gradient of x
  float *weight_sums, *bias_sums;  // [blocks, D or H * D]
};

// cos and sin: token rope_start + l turns by row l, of which section s of a head has `turning` angles.
struct Angles {
  const void *cos, *sin;  // [1|B, L, 1|H, R]
  int64_t stride_sample, stride_token, stride_head, stride_angle;
  DType dtype;
  int32_t start, length;  // L
};

struct QkNormRope {
  HeadsSide sides[2];  // q, k; no blocks: not there
  Angles angles;
  int32_t dim;                // D
  int32_t sections, turning;  // equal parts of D; in each the first 2 * turning channels turn
  bool half;                  // pairs (i, i + turning) of a section; else (2i, 2i + 1)
  bool hidden, relu, eager;
  Norm norm;
  float eps;
  // `lanes` threads a row, each with some 16-byte vectors; 0: any stride and dtype, a pair at a time
  int32_t lanes, threads;
};

// d(cos), d(sin): sums over what turns by an angle.
struct QkNormRopeAngles {
  QkNormRope call;
  Result dcos, dsin;  // [samples, L, heads, R], contiguous
  int64_t samples;    // 1 or B
  int32_t heads;      // 1 or H
};

void qk_norm_rope_fwd(const QkNormRope& call, cudaStream_t stream);
void qk_norm_rope_bwd(const QkNormRope& call, cudaStream_t stream);
void qk_norm_rope_bwd_angles(const QkNormRopeAngles& call, cudaStream_t stream);

}  // namespace dk
