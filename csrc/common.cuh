// What every kernel shares: element types, vector access, reductions, and how a kernel is launched.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define DK_DYNAMIC_SHARED(type, name)                                 \
  extern __shared__ __align__(1024) unsigned char dk_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(dk_dynamic_shared)
#else
#include "emulator/cuda.h"
#define DK_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::emulator::dynamic_shared())
#endif

namespace dk {

// --- element types -----------------------------------------------------------------------------------

enum class DType : int { float32, float16, bfloat16 };

inline int bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

// action(T{}) with the element type T
template <typename Action>
void with_dtype(DType dtype, Action&& action) {
  switch (dtype) {
    case DType::float32: return action(float{});
    case DType::float16: return action(__half{});
    case DType::bfloat16: return action(__nv_bfloat16{});
  }
  throw std::invalid_argument("no such dtype: " + std::to_string(static_cast<int>(dtype)));
}

// action(std::true_type) or action(std::false_type)
template <typename Action>
void with_bool(bool value, Action&& action) {
  if (value) return action(std::true_type{});
  return action(std::false_type{});
}

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) return value;
  else if constexpr (std::is_same_v<T, __half>) return __float2half_rn(value);
  else return __float2bfloat16_rn(value);
}

// An element of a tensor whose type is known only at run time: for what is read once a block
__device__ __forceinline__ float load_any(const void* address, DType dtype, int64_t index) {
  if (dtype == DType::float32) return static_cast<const float*>(address)[index];
  if (dtype == DType::float16) return __half2float(static_cast<const __half*>(address)[index]);
  return __bfloat162float(static_cast<const __nv_bfloat16*>(address)[index]);
}

// --- vector access -----------------------------------------------------------------------------------

// Elements of T in 16 bytes
template <typename T>
constexpr int VECTOR = 16 / sizeof(T);

template <int bytes>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// `count` adjacent elements as they are in memory, `count * sizeof(T)` aligned: one access of up to 16 bytes
template <typename T, int count>
struct alignas(sizeof(T) * count) Packed {
  T at[count];

  __device__ __forceinline__ void load(const T* address) {
    using Word = typename Word<sizeof(T) * count>::type;
    *reinterpret_cast<Word*>(at) = *reinterpret_cast<const Word*>(address);
  }
  __device__ __forceinline__ void store(T* address) const {
    using Word = typename Word<sizeof(T) * count>::type;
    *reinterpret_cast<Word*>(address) = *reinterpret_cast<const Word*>(at);
  }
};

// `count` adjacent elements as float
template <int count, typename T>
__device__ __forceinline__ void load_vector(const T* address, float (&values)[count]) {
  Packed<T, count> packed;
  packed.load(address);
#pragma unroll
  for (int i = 0; i < count; ++i) values[i] = to_float(packed.at[i]);
}

// rounds to nearest even
template <int count, typename T>
__device__ __forceinline__ void store_vector(T* address, const float (&values)[count]) {
  Packed<T, count> packed;
#pragma unroll
  for (int i = 0; i < count; ++i) packed.at[i] = from_float<T>(values[i]);
  packed.store(address);
}

// --- reductions --------------------------------------------------------------------------------------

// Over the 32 lanes; every lane gets the sum, added in one fixed order
__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(0xffffffffu, value, distance);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, distance));
  return value;
}

// Over all `WARPS` warps of a block; `partial` holds one float a warp and may be used again after a barrier
template <int WARPS>
__device__ __forceinline__ float block_sum(float value, float* partial) {
  value = warp_sum(value);
  if constexpr (WARPS == 1) return value;
  const int thread = threadIdx.x;
  if (thread % 32 == 0) partial[thread / 32] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) total += partial[warp];
  return total;
}

// --- asynchronous copies -----------------------------------------------------------------------------

// 16 or 8 bytes from global to shared memory, there when the thread has waited for their group
template <int BYTES>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#ifdef __CUDACC__
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to), "l"(global), "n"(BYTES) : "memory");
#else
  ::emulator::async_copy(shared, global, BYTES, BYTES);
#endif
}

// Closes a group: the copies since the last
__device__ __forceinline__ void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  ::emulator::async_commit();
#endif
}

// Until at most `LEFT` of the thread's groups are under way
template <int LEFT>
__device__ __forceinline__ void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#else
  ::emulator::async_wait(LEFT);
#endif
}

// --- launching ---------------------------------------------------------------------------------------

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A one-dimensional grid
inline dim3 grid_of(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::invalid_argument(std::to_string(blocks) + " blocks are more than a grid holds");
  return dim3(static_cast<unsigned>(blocks));
}

// Whether `address` and every stride, in elements of `bytes`, keep 16-byte accesses aligned
template <typename... Strides>
bool aligned16(const void* address, int bytes, Strides... strides) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && ((strides * bytes % 16 == 0) && ...);
}

#ifdef __CUDACC__

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it: the next call shall not report this one's
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int multiprocessors() {
  static int counts[64] = {};
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (device >= 64) return 132;
  if (!counts[device])
    check(cudaDeviceGetAttribute(&counts[device], cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return counts[device];
}

// The current device for the time of a launch
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ == device) previous_ = -1;
    else check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~OnDevice() {
    if (previous_ >= 0) cudaSetDevice(previous_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int previous_ = -1;
};

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto call = [&](Parameters... parameters) {
    void* addresses[] = {static_cast<void*>(&parameters)...};
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > 48 * 1024)
      check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)), name);
    const cudaError_t error = cudaLaunchKernel(function, grid, block, addresses, shared_bytes, stream);
    if (error == cudaSuccess) return;
    cudaGetLastError();
    throw std::runtime_error(std::string(name) + ", grid (" + std::to_string(grid.x) + ", " +
                             std::to_string(grid.y) + ", " + std::to_string(grid.z) + "), block (" +
                             std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
                             std::to_string(block.z) + "), " + std::to_string(shared_bytes) +
                             " bytes of shared memory: " + cudaGetErrorString(error));
  };
  call(static_cast<Parameters>(arguments)...);
}

#else

inline int multiprocessors() { return ::emulator::multiprocessors(); }

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t, const Arguments&... arguments) {
  ::emulator::launch(name, kernel, grid, block, shared_bytes, arguments...);
}

#endif

// DK_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...): asynchronous; throws with the kernel's
// name; an empty grid launches nothing. A template's commas need parentheses: DK_LAUNCH((kernel<T, 4>), ...)
#define DK_LAUNCH(kernel, ...) ::dk::launch(#kernel, kernel, __VA_ARGS__)

}  // namespace dk
