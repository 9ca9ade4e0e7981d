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
#elif defined(DK_BINDINGS)
// bindings.cpp of the GPU's module: the host compiler sees declarations of launchers, and no device code
#include <cuda_runtime_api.h>
#else
#include "emulator/cuda.h"
#define DK_DYNAMIC_SHARED(type, name) type* name = static_cast<type*>(::emulator::dynamic_shared())
#endif

namespace dk {

// --- element types -----------------------------------------------------------------------------------

enum class DType : int { float32, float16, bfloat16 };

inline int bytes_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }

#ifndef DK_BINDINGS

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

// 16 or 8 bytes to global memory by one instruction: in a long kernel the compiler cuts a plain store into
// stores of 4 bytes
__device__ __forceinline__ void store_global(void* address, const uint4& value) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(address)), "r"(value.x),
               "r"(value.y), "r"(value.z), "r"(value.w)
               : "memory");
#else
  *static_cast<uint4*>(address) = value;
#endif
}
__device__ __forceinline__ void store_global(void* address, const uint2& value) {
#ifdef __CUDACC__
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(address)), "r"(value.x),
               "r"(value.y)
               : "memory");
#else
  *static_cast<uint2*>(address) = value;
#endif
}

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

// --- asynchronous copies and matrix instructions of sm_80 ----------------------------------------------

// Starts a copy of `bytes` (4, 8 or 16) to shared memory; zeros where not `valid`, and then nothing is
// read. It has landed after the thread's own cp_async_wait; other threads need a barrier after that.
template <int bytes>
__device__ __forceinline__ void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16, "cp.async copies 4, 8 or 16 bytes");
#ifdef __CUDACC__
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int size = valid ? bytes : 0;
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(bytes), "r"(size)
                 : "memory");
#else
  ::emulator::async_copy(shared, global, valid ? bytes : 0, bytes);
#endif
}

__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  ::emulator::async_commit();
#endif
}

// Until at most `groups` of the thread's latest committed groups are under way
template <int groups>
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#else
  ::emulator::async_wait(groups);
#endif
}

// `count` 8x8 matrices of 16-bit elements, one register each; lane 8 i + r gives the address of row r of
// matrix i, 16 bytes aligned. Lane l gets elements (l / 4, 2 (l % 4)) and the next one, or transposed.
template <int count, bool transposed = false>
__device__ __forceinline__ void ldmatrix(unsigned (&registers)[count], const void* row) {
  static_assert(count == 1 || count == 2 || count == 4, "ldmatrix loads 1, 2 or 4 matrices");
#ifdef __CUDACC__
  const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
#define DK_LDMATRIX(suffix, list, ...) \
  asm volatile("ldmatrix.sync.aligned.m8n8." suffix ".shared.b16 " list ";" : __VA_ARGS__ : "r"(from) : "memory")
  if constexpr (count == 1 && !transposed) DK_LDMATRIX("x1", "{%0}, [%1]", "=r"(registers[0]));
  if constexpr (count == 1 && transposed) DK_LDMATRIX("x1.trans", "{%0}, [%1]", "=r"(registers[0]));
  if constexpr (count == 2 && !transposed)
    DK_LDMATRIX("x2", "{%0, %1}, [%2]", "=r"(registers[0]), "=r"(registers[1]));
  if constexpr (count == 2 && transposed)
    DK_LDMATRIX("x2.trans", "{%0, %1}, [%2]", "=r"(registers[0]), "=r"(registers[1]));
  if constexpr (count == 4 && !transposed)
    DK_LDMATRIX("x4", "{%0, %1, %2, %3}, [%4]", "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]),
                "=r"(registers[3]));
  if constexpr (count == 4 && transposed)
    DK_LDMATRIX("x4.trans", "{%0, %1, %2, %3}, [%4]", "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]),
                "=r"(registers[3]));
#undef DK_LDMATRIX
#else
  ::emulator::load_matrix(registers, row, count, transposed);
#endif
}

// d [16, 8] += a [16, 16] b [16, 8] in float32, T __half or __nv_bfloat16; with T float the operands are
// tf32 and 8 deep. With g = lane / 4 and t = lane % 4, two elements a register: a holds (g, 2t),
// (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8); b (2t, g), (2t + 8, g); d (g, 2t), (g, 2t + 1), (g + 8, 2t), ...
// tf32, one element a register: a (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4); b (t, g), (t + 4, g).
template <typename T>
__device__ __forceinline__ void mma(float (&d)[4], const unsigned (&a)[4], const unsigned (&b)[2]) {
#ifdef __CUDACC__
#define DK_MMA(shape, type)                                                                                  \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 "                               \
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                             \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, __half>) DK_MMA("m16n8k16", "f16");
  else if constexpr (std::is_same_v<T, __nv_bfloat16>) DK_MMA("m16n8k16", "bf16");
  else DK_MMA("m16n8k8", "tf32");
#undef DK_MMA
#else
  ::emulator::multiply(d, a, b, std::is_same_v<T, __half> ? ::emulator::Element::half
                                : std::is_same_v<T, float> ? ::emulator::Element::tf32
                                                           : ::emulator::Element::bfloat16);
#endif
}

// Barrier `id` (1 to 15) for `threads` of the block, whole warps; 0 is __syncthreads
__device__ __forceinline__ void barrier_sync(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  ::emulator::barrier(id, threads, true);
#endif
}

// Counts the calling thread in without waiting
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  ::emulator::barrier(id, threads, false);
#endif
}

#endif  // DK_BINDINGS

// --- launching ---------------------------------------------------------------------------------------

inline int64_t ceil_div(int64_t a, int64_t b) {
  if (a < 0 || b <= 0) throw std::invalid_argument(std::to_string(a) + " in pieces of " + std::to_string(b));
  return (a + b - 1) / b;
}

// A one-dimensional grid
inline dim3 grid_of(int64_t blocks) {
  if (blocks < 0 || blocks > 0x7fffffff) {
    throw std::invalid_argument("a grid holds up to 2^31 - 1 blocks; got " + std::to_string(blocks));
  }
  return dim3(static_cast<unsigned>(blocks));
}

// Whether `address` and every stride, in elements of `bytes`, keep 16-byte accesses aligned
template <typename... Strides>
bool aligned16(const void* address, int bytes, Strides... strides) {
  return reinterpret_cast<uintptr_t>(address) % 16 == 0 && ((strides * bytes % 16 == 0) && ...);
}

#if defined(__CUDACC__) || defined(DK_BINDINGS)

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clears it: the next call shall not report this one's
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Blocks along y or z of a grid
inline int64_t most_blocks() { return 65535; }

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

// Dynamic shared memory that a launch may have without asking: 48 KB less what kernels declare (see the audit)
constexpr size_t kUnasked = 32 * 1024;

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t stream, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  const auto call = [&](Parameters... parameters) {
    void* addresses[] = {static_cast<void*>(&parameters)...};
    const void* function = reinterpret_cast<const void*>(kernel);
    if (shared_bytes > kUnasked)
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

inline int64_t most_blocks() { return ::emulator::most_blocks(); }

inline int multiprocessors() { return ::emulator::multiprocessors(); }

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            cudaStream_t, const Arguments&... arguments) {
  ::emulator::launch(name, kernel, grid, block, shared_bytes, arguments...);
}

#endif

// DK_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...): asynchronous; throws with the kernel's
// name; an empty grid launches nothing. A template's commas need parentheses: DK_LAUNCH((kernel<T, 4>), ...)
#ifdef __CUDACC__
#define DK_LAUNCH(kernel, ...) ::dk::launch(#kernel, kernel, __VA_ARGS__)
#else
#define DK_LAUNCH(kernel, ...) ::dk::launch(typeid(::emulator::Kernel<(kernel)>).name(), kernel, __VA_ARGS__)
#endif

}  // namespace dk
