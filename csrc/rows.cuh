// What row-wise kernels share: channels of any dtype as float32, rounding, and sums over a row.
#pragma once

#include "rows.h"

namespace dk {

// ---- rounding

__device__ inline float rounded(float value, DType dtype) {
  if (dtype == DType::bfloat16) return __bfloat162float(__float2bfloat16(value));
  if (dtype == DType::float16) return __half2float(__float2half(value));
  return value;
}

__device__ inline DType promoted(DType a, DType b) { return a == b ? a : DType::float32; }

template <int WIDTH>
__device__ inline void round_to(float (&values)[WIDTH], DType dtype) {
  if (dtype == DType::float32) return;
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) values[i] = rounded(values[i], dtype);
}

// ---- a value, or WIDTH adjacent channels, of any dtype

template <typename T>
constexpr DType dtype_of = sizeof(T) == 4 ? DType::float32
                           : std::is_same<T, __half>::value ? DType::float16
                                                            : DType::bfloat16;

__device__ inline void store_one(void* data, int64_t offset, float value, DType dtype) {
  if (dtype == DType::bfloat16) {
    static_cast<__nv_bfloat16*>(data)[offset] = __float2bfloat16(value);
  } else if (dtype == DType::float16) {
    static_cast<__half*>(data)[offset] = __float2half(value);
  } else {
    static_cast<float*>(data)[offset] = value;
  }
}

__device__ inline float2 unpack(uint32_t pair, DType dtype) {
  if (dtype == DType::bfloat16) return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
  return __half22float2(*reinterpret_cast<const __half2*>(&pair));
}

__device__ inline uint32_t pack(float low, float high, DType dtype) {
  if (dtype == DType::bfloat16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
  const __half2 pair = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// WIDTH channels from `offset`: one, or 2, 4 or 8 of which the address is a multiple of their size, at most 16.
template <int WIDTH>
__device__ inline void load_channels(float (&values)[WIDTH], const void* data, int64_t offset, DType dtype) {
  if constexpr (WIDTH == 1) {
    values[0] = load_any(data, dtype, offset);
  } else if constexpr (WIDTH == 2) {
    float2 pair;
    if (dtype == DType::float32) {
      pair = *reinterpret_cast<const float2*>(static_cast<const float*>(data) + offset);
    } else {
      pair = unpack(*reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(data) + offset), dtype);
    }
    values[0] = pair.x;
    values[1] = pair.y;
  } else if (dtype == DType::float32) {
    const float4* from = reinterpret_cast<const float4*>(static_cast<const float*>(data) + offset);
#pragma unroll
    for (int i = 0; i < WIDTH / 4; ++i) {
      const float4 four = from[i];
      values[4 * i] = four.x;
      values[4 * i + 1] = four.y;
      values[4 * i + 2] = four.z;
      values[4 * i + 3] = four.w;
    }
  } else {
    const void* from = static_cast<const uint16_t*>(data) + offset;
    uint32_t pairs[WIDTH / 2];
    if constexpr (WIDTH == 8) {
      const uint4 all = *static_cast<const uint4*>(from);
      pairs[0] = all.x;
      pairs[1] = all.y;
      pairs[2] = all.z;
      pairs[3] = all.w;
    } else {
      const uint2 all = *static_cast<const uint2*>(from);
      pairs[0] = all.x;
      pairs[1] = all.y;
    }
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) {
      const float2 pair = unpack(pairs[i], dtype);
      values[2 * i] = pair.x;
      values[2 * i + 1] = pair.y;
    }
  }
}

template <int WIDTH>
__device__ inline void store_channels(void* data, int64_t offset, const float (&values)[WIDTH], DType dtype) {
  if constexpr (WIDTH == 1) {
    store_one(data, offset, values[0], dtype);
  } else if (dtype == DType::float32) {
    float* to = static_cast<float*>(data) + offset;
#pragma unroll
    for (int i = 0; i < WIDTH; i += 4) {
      store_global(to + i, make_uint4(__float_as_uint(values[i]), __float_as_uint(values[i + 1]),
                                      __float_as_uint(values[i + 2]), __float_as_uint(values[i + 3])));
    }
  } else {
    uint32_t pairs[WIDTH / 2];
#pragma unroll
    for (int i = 0; i < WIDTH / 2; ++i) pairs[i] = pack(values[2 * i], values[2 * i + 1], dtype);
    void* to = static_cast<uint16_t*>(data) + offset;
    if constexpr (WIDTH == 8) {
      store_global(to, make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]));
    } else {
      store_global(to, make_uint2(pairs[0], pairs[1]));
    }
  }
}

template <int WIDTH>
__device__ inline void fill(float (&values)[WIDTH], float value) {
#pragma unroll
  for (int i = 0; i < WIDTH; ++i) values[i] = value;
}

// ---- sums over a row, which all threads of the block get, in a fixed order

struct RowSums {
  float2* scratch;  // [2][32], in shared memory
  int parity = 0;

  __device__ explicit RowSums(float2* scratch) : scratch(scratch) {}

  __device__ float2 operator()(float a, float b) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      a += __shfl_xor_sync(0xffffffffu, a, step);
      b += __shfl_xor_sync(0xffffffffu, b, step);
    }
    const int warps = blockDim.x / 32;
    if (warps == 1) return make_float2(a, b);
    // two places in turn: the next sum's barrier stands between a place's readers and its next writers
    parity ^= 1;
    float2* place = scratch + 32 * parity;
    if (threadIdx.x % 32 == 0) place[threadIdx.x / 32] = make_float2(a, b);
    __syncthreads();
    float2 total = place[0];
    for (int w = 1; w < warps; ++w) {
      total.x += place[w].x;
      total.y += place[w].y;
    }
    return total;
  }

  __device__ float operator()(float a) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) a += __shfl_xor_sync(0xffffffffu, a, step);
    const int warps = blockDim.x / 32;
    if (warps == 1) return a;
    parity ^= 1;
    float2* place = scratch + 32 * parity;
    if (threadIdx.x % 32 == 0) place[threadIdx.x / 32].x = a;
    __syncthreads();
    float total = place[0].x;
    for (int w = 1; w < warps; ++w) total += place[w].x;
    return total;
  }
};

}  // namespace dk
