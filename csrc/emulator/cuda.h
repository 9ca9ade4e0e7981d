// The CUDA language for the host compiler: enough of it for the kernels in this folder's parent.
//
// A kernel is an ordinary function that runs once a thread, on a fiber. The compiler instruments its
// memory accesses (-fsanitize=thread), and sanitizer.cpp checks each. Nothing here is used by nvcc.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <typeinfo>
#include <utility>

#include "runtime.h"

// What a kernel copies by a library function is checked too (sanitizer.cpp). The emulator's own files are not.
#ifdef __SANITIZE_THREAD__
extern "C" {
void* memcpy(void*, const void*, size_t) noexcept __asm__("__tsan_memcpy");
void* memmove(void*, const void*, size_t) noexcept __asm__("__tsan_memmove");
void* memset(void*, int, size_t) noexcept __asm__("__tsan_memset");
}
#endif

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static thread_local __attribute__((aligned(DK_SHARED_ALIGNMENT)))
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
// As many no-ops in front of the function: how a number of its declaration reaches the launch (runtime.cpp).
// sizeof is a number also where the threads depend on a template's argument.
#define DK_BOUND(...) sizeof(char[::emulator::first(__VA_ARGS__)])
#define __launch_bounds__(...) __attribute__((patchable_function_entry(DK_BOUND(__VA_ARGS__), DK_BOUND(__VA_ARGS__))))
namespace emulator {
constexpr int first(int threads, int = 0) { return threads; }
}  // namespace emulator
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __CUDA_ARCH_LIST__ 900

using cudaStream_t = void*;

#define threadIdx (::emulator::thread_index())
#define blockIdx (::emulator::block_index())
#define blockDim (::emulator::block_size())
#define gridDim (::emulator::grid_size())
constexpr int warpSize = 32;

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// Vector types. A copy of one is one access of its size, so that its alignment is checked.
namespace emulator {
template <typename Value, int bytes>
struct Bits;
template <typename Value>
struct Bits<Value, 2> {
  using type = uint16_t;
};
template <typename Value>
struct Bits<Value, 4> {
  using type = uint32_t;
};
template <typename Value>
struct Bits<Value, 8> {
  using type = uint64_t;
};
template <typename Value>
struct Bits<Value, 16> {
  typedef uint32_t type __attribute__((vector_size(16)));
};
template <typename Value>
__forceinline__ void copy(Value* to, const Value* from) {
  using type __attribute__((may_alias)) = typename Bits<Value, sizeof(Value)>::type;
  *reinterpret_cast<type*>(to) = *reinterpret_cast<const type*>(from);
}
}  // namespace emulator

#define DK_VECTOR2(name, T)                                  \
  struct alignas(2 * sizeof(T)) name {                       \
    T x, y;                                                  \
    name() = default;                                        \
    __forceinline__ name(T x, T y) : x(x), y(y) {}           \
    __forceinline__ name(const name& other) { ::emulator::copy(this, &other); } \
    __forceinline__ name& operator=(const name& other) {     \
      ::emulator::copy(this, &other);                        \
      return *this;                                          \
    }                                                        \
  };                                                         \
  inline name make_##name(T x, T y) { return {x, y}; }
#define DK_VECTOR4(name, T)                                  \
  struct alignas(4 * sizeof(T)) name {                       \
    T x, y, z, w;                                            \
    name() = default;                                        \
    __forceinline__ name(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {} \
    __forceinline__ name(const name& other) { ::emulator::copy(this, &other); } \
    __forceinline__ name& operator=(const name& other) {     \
      ::emulator::copy(this, &other);                        \
      return *this;                                          \
    }                                                        \
  };                                                         \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
DK_VECTOR2(float2, float)
DK_VECTOR4(float4, float)
DK_VECTOR2(int2, int)
DK_VECTOR4(int4, int)
DK_VECTOR2(uint2, unsigned)
DK_VECTOR4(uint4, unsigned)
DK_VECTOR2(ushort2, unsigned short)
DK_VECTOR4(ushort4, unsigned short)

// 16-bit floats: storage and conversions, to nearest even
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
DK_VECTOR2(__half2, __half)
DK_VECTOR2(__nv_bfloat162, __nv_bfloat16)
using half = __half;
using half2 = __half2;
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;

inline float __uint_as_float(unsigned bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline int __float_as_int(float value) { return static_cast<int>(__float_as_uint(value)); }

inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(unsigned(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  unsigned bits = __float_as_uint(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16(float value) { return __float2bfloat16_rn(value); }
inline float __half2float(__half value) {
  unsigned sign = unsigned(value.bits & 0x8000u) << 16, rest = value.bits & 0x7fffu;
  if (rest >= 0x7c00u) return __uint_as_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  if (rest >= 0x0400u) return __uint_as_float(sign | ((rest << 13) + 0x38000000u));
  float magnitude = float(rest) * 0x1p-24f;
  return sign ? -magnitude : magnitude;
}
inline __half __float2half_rn(float value) {
  unsigned bits = __float_as_uint(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return {0x7fff};
  if (rest >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};
  if (rest < 0x38800000u) {  // below the least normal number: the float adder rounds
    unsigned units = __float_as_uint(__uint_as_float(rest) + 0.5f) - 0x3f000000u;
    return {static_cast<uint16_t>(sign | units)};
  }
  unsigned rounded = rest + 0xfffu + ((rest >> 13) & 1u) - 0x38000000u;
  return {static_cast<uint16_t>(sign | rounded >> 13)};
}
inline __half __float2half(float value) { return __float2half_rn(value); }
inline float2 __bfloat1622float2(__nv_bfloat162 v) { return {__bfloat162float(v.x), __bfloat162float(v.y)}; }
inline float2 __half22float2(__half2 v) { return {__half2float(v.x), __half2float(v.y)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
inline __nv_bfloat162 __float22bfloat162_rn(float2 v) { return __floats2bfloat162_rn(v.x, v.y); }
inline __half2 __float22half2_rn(float2 v) { return __floats2half2_rn(v.x, v.y); }

// Arithmetic. The host compiler is told not to fuse, so that these are what they say.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __frsqrt_rn(float a) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(a))); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float a) { return __frsqrt_rn(a); }
inline float __expf(float a) { return std::exp(a); }
inline float __logf(float a) { return std::log(a); }
inline float __log2f(float a) { return std::log2(a); }
inline float __sinf(float a) { return std::sin(a); }
inline float __cosf(float a) { return std::cos(a); }
inline float __saturatef(float a) { return a > 0.0f ? std::min(a, 1.0f) : 0.0f; }
template <typename T, std::enable_if_t<std::is_arithmetic_v<T>, int> = 0>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T, std::enable_if_t<std::is_arithmetic_v<T>, int> = 0>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline int __popc(unsigned a) { return __builtin_popcount(a); }
inline int __clz(int a) { return a ? __builtin_clz(static_cast<unsigned>(a)) : 32; }
inline int __ffs(int a) { return __builtin_ffs(a); }
inline unsigned __umulhi(unsigned a, unsigned b) { return uint64_t(a) * b >> 32; }
inline unsigned __brev(unsigned a) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (a >> i & 1u) << (31 - i);
  return reversed;
}

// Loads and stores with a cache hint
template <typename T>
__forceinline__ T __ldg(const T* address) {
  return *address;
}
template <typename T>
__forceinline__ T __ldcs(const T* address) {
  return *address;
}
template <typename T>
__forceinline__ T __ldcg(const T* address) {
  return *address;
}
template <typename T>
__forceinline__ void __stcs(T* address, T value) {
  *address = value;
}
template <typename T>
__forceinline__ void __stcg(T* address, T value) {
  *address = value;
}

// Synchronisation
// All threads of a block must come to the same __syncthreads, which its file and line tell apart.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  ::emulator::barrier(0, 0, true, {file, line});
}
inline int __syncthreads_count(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return ::emulator::block_count(predicate != 0, {file, line});
}
inline int __syncthreads_or(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return __syncthreads_count(predicate, file, line) > 0;
}
inline int __syncthreads_and(int predicate, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return __syncthreads_count(!predicate, file, line) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { ::emulator::warp_barrier(mask); }
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { ::emulator::fail("__trap"); }

#define DK_SHUFFLE(name, kind, operand_type)                                              \
  template <typename T>                                                                   \
  T name(unsigned mask, T value, operand_type operand, int width = 32) {                  \
    static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");                     \
    uint64_t bits = 0;                                                                    \
    __builtin_memcpy(&bits, static_cast<void*>(&value), sizeof(T));                                              \
    bits = ::emulator::shuffle(::emulator::Shuffle::kind, mask, bits, static_cast<int>(operand), width); \
    __builtin_memcpy(static_cast<void*>(&value), &bits, sizeof(T));                            \
    return value;                                                                         \
  }
DK_SHUFFLE(__shfl_sync, index, int)
DK_SHUFFLE(__shfl_up_sync, up, unsigned)
DK_SHUFFLE(__shfl_down_sync, down, unsigned)
DK_SHUFFLE(__shfl_xor_sync, exclusive_or, int)
#undef DK_SHUFFLE
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return ::emulator::vote(::emulator::Vote::ballot, mask, predicate != 0);
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(::emulator::vote(::emulator::Vote::any, mask, predicate != 0));
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(::emulator::vote(::emulator::Vote::all, mask, predicate != 0));
}
inline unsigned __activemask() { return ::emulator::active_mask(); }
template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
  return static_cast<T>(::emulator::reduce(::emulator::Reduce::add, mask, value));
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
  return static_cast<T>(::emulator::reduce(::emulator::Reduce::minimum, mask, value));
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
  return static_cast<T>(::emulator::reduce(::emulator::Reduce::maximum, mask, value));
}

// Atomics
namespace emulator {
template <typename T, typename Change>
__attribute__((no_sanitize("thread"))) T atomically(T* address, Change change) {
  touch_atomic(address, sizeof(T));
  using Raw = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "atomics are of 4 or 8 bytes");
  Raw* raw = reinterpret_cast<Raw*>(address);
  Raw expected = __atomic_load_n(raw, __ATOMIC_RELAXED), wanted;
  T before;
  do {
    __builtin_memcpy(&before, &expected, sizeof(T));
    T after = change(before);
    __builtin_memcpy(&wanted, &after, sizeof(T));
  } while (!__atomic_compare_exchange_n(raw, &expected, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}
}  // namespace emulator
template <typename T>
T atomicAdd(T* address, std::common_type_t<T> value) {
  return ::emulator::atomically(address, [=](T old) { return static_cast<T>(old + value); });
}
template <typename T>
T atomicMax(T* address, std::common_type_t<T> value) {
  return ::emulator::atomically(address, [=](T old) { return old < value ? value : old; });
}
template <typename T>
T atomicMin(T* address, std::common_type_t<T> value) {
  return ::emulator::atomically(address, [=](T old) { return value < old ? value : old; });
}
template <typename T>
T atomicExch(T* address, std::common_type_t<T> value) {
  return ::emulator::atomically(address, [=](T) { return value; });
}
template <typename T>
T atomicCAS(T* address, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return ::emulator::atomically(address, [=](T old) { return old == expected ? value : old; });
}

// --- launching: what <<<>>> is to nvcc -----------------------------------------------------------------

namespace emulator {
// Small, so that small shapes take several steps
inline int multiprocessors() { return recording() ? 132 : 4; }

template <auto kernel>
struct Kernel {};  // its type's name says which template arguments a kernel has

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call{kernel, std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)};
  const auto body = [](const void* address) {
    const Call& c = *static_cast<const Call*>(address);
    std::apply(c.first, c.second);
  };
  run(name, reinterpret_cast<const void*>(kernel), {grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes,
      body, &call, sizeof call);
}
}  // namespace emulator
