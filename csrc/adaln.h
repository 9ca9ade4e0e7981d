// Adaptive layer norm: the family of ops.adaln, ops.gated_residual and ops.gated_adaln.
//
//     residual_out = residual + act(gate) * branch_norm(branch)
//     y            = norm(residual_out) * (1 + scale) + shift
//
// The three are one kernel each way: what is not asked for has a null pointer. Strides are in elements.
#pragma once

#include "rows.h"

namespace dk {

struct Tokens {
  const void* data;  // [B, N, C]
  int64_t stride_sample, stride_token, stride_channel;
  DType dtype;
};

// shift, scale or gate: token (b, n) reads row (b, n / group_length), or row row_index[b, n].
struct ModulationRows {
  const void* data;       // [B, C], [B, G, C], [B, N, C], or [R, C] where indexed
  int64_t stride_sample;  // of the R rows where indexed
  int64_t stride_group, stride_channel;
  int32_t group_length;
  bool indexed;
  DType dtype;
};

struct AdalnSizes {
  int64_t samples;   // B
  int32_t length;    // N
  int32_t channels;  // C
  // `vectors` 16-byte vectors of a row a thread, `threads` of them, one row at a time; vectors = 0: any
  // C, stride and dtype, a channel at a time
  int32_t vectors, threads;
};

struct AdalnForm {
  Norm norm;
  bool tanh, branch_rms, eager;
  float eps;
};

struct AdalnForward {
  AdalnSizes size;
  AdalnForm form;
  int32_t chunk;  // tokens a block
  Tokens residual;
  Tokens x;  // the branch where there is a residual
  ModulationRows gate, shift, scale, shift2, scale2;
  Channels gate_table, branch_weight, shift_table, scale_table, weight, bias;
  const int32_t* row_index;  // [B, N]
  void *out, *y, *y2;        // [B, N, C], contiguous, in residual's dtype, or x's where there is none
  float *branch_rstd, *mean, *rstd;  // [B, N]
};

struct AdalnBackward {
  AdalnSizes size;
  AdalnForm form;
  // Blocks walk over `chunk` tokens of one segment of a sample, or, with `order`, over positions of the
  // sorted order.
  int32_t segment, chunk;
  // tokens whose rows are in shared memory at a time: 2, or 1 where two do not fit
  int32_t stages;
  int64_t blocks;
  const int64_t* order;               // [B * N]: tokens sorted by their modulation row
  const int32_t *begin, *end;         // [blocks]: with `order` a block's positions
  Tokens dout, dy, dy2;               // [B, N, C]: gradients of residual_out, y and y2
  Tokens x;                           // what was normalised
  Tokens branch;
  ModulationRows gate, scale, scale2;
  Channels gate_table, branch_weight, scale_table, weight, bias;
  const int32_t* row_index;  // [B, N]
  const float *branch_rstd, *mean, *rstd;  // [B, N]
  Result dresidual, dbranch;               // [B, N, C], contiguous; dresidual is dx where there is no residual
  Result dgate, dshift, dscale, dshift2, dscale2;  // [B, N, C], contiguous: of a row a token
  // [blocks, C]: sums over a block's tokens, in the order of AdalnSum
  Result sums[8];
};

enum AdalnSum { kGateSum, kShiftSum, kScaleSum, kShift2Sum, kScale2Sum, kBranchWeightSum, kWeightSum, kBiasSum };

// The second stage: out[g] = the rows of sums of group g, added in order.
struct AdalnSums {
  struct Item {
    const float* sums;  // [rows, C]
    Result out;         // [groups, C]
    int64_t groups;
    int32_t rows;  // a group, or 0: group g has rows first[g] to first[g + 1]
  };
  Item items[13];
  int32_t count;
  int32_t channels;
  const int64_t* first;  // [groups + 1]
};

void adaln_forward(const AdalnForward& call, cudaStream_t stream);
void adaln_backward(const AdalnBackward& call, cudaStream_t stream);
void adaln_backward_sums(const AdalnSums& call, cudaStream_t stream);

}  // namespace dk
