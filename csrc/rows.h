// What launchers of row-wise kernels take.
#pragma once

#include <cstdint>

#include "common.cuh"

namespace dk {

enum class Norm : int32_t { none, rms, layer };

// A [C] parameter or table, contiguous, and a tensor that a kernel writes: null where there is none.
struct Channels {
  const void* data;
  DType dtype;
};

struct Result {
  void* data;
  DType dtype;
};

}  // namespace dk
