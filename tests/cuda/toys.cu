// Small kernels for test_emulator.py: correct ones, and one with each kind of bug.
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "common.cuh"

using namespace dk;

namespace {

// The sum over the block in every thread: warps, then shared memory
__global__ void block_sums(const float* in, float* out) {
  __shared__ float partial[4];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = block_sum<4>(in[i], partial);
}

__global__ void order(int* counter, int* out) { out[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1); }

__global__ void order_of_blocks(int* counter, int* out) { out[blockIdx.x] = atomicAdd(counter, 1); }

__global__ void leaves_some_unwritten(float* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = 1.0f;
}

__global__ void reads_unwritten_shared(float* out, int written) {
  __shared__ float tile[64];
  if (int(threadIdx.x) < written) tile[threadIdx.x] = 1.0f;
  out[threadIdx.x] = tile[threadIdx.x];
}

template <bool BARRIER>
__global__ void reverses(const float* in, float* out) {
  __shared__ float tile[64];
  tile[threadIdx.x] = in[threadIdx.x];
  if (BARRIER) __syncthreads();
  out[threadIdx.x] = tile[63 - threadIdx.x];
}

template <bool BARRIER>
__global__ void reverses_in_warps(const float* in, float* out) {
  __shared__ float tile[64];
  tile[threadIdx.x] = in[threadIdx.x];
  if (BARRIER) __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 31];
}

// Every thread has read before the next round writes, or not
template <bool BARRIER>
__global__ void overwrites(const float* in, float* out) {
  __shared__ float value;
  float total = 0.0f;
  for (int i = 0; i < 4; ++i) {
    if (threadIdx.x == 0) value = in[i];
    __syncthreads();
    total += value;
    if (BARRIER) __syncthreads();
  }
  out[threadIdx.x] = total;
}

// Through global memory, which two threads of a block may both touch: only the order of threads tells
template <bool BARRIER>
__global__ void hands_over(const float* in, float* out) {
  out[64 + threadIdx.x] = in[threadIdx.x];
  if (BARRIER) __syncthreads();
  out[threadIdx.x] = out[64 + 63 - threadIdx.x];
}

enum class Counts { right, starts_late, reads_early, writes_early };

// All threads add to one number; a barrier lies between that and what is no atomic, or not
template <Counts HOW>
__global__ void counts(int* out) {
  __shared__ int count;
  const auto barrier = [] {
    if (blockDim.x == 32) __syncwarp();
    else __syncthreads();
  };
  if (threadIdx.x == 5) count = 0;
  if (HOW != Counts::starts_late) barrier();
  atomicAdd(&count, 1);
  if (HOW == Counts::writes_early && threadIdx.x == 9) count = 3;
  atomicMax(&count, 1);
  if (HOW != Counts::reads_early) barrier();
  out[threadIdx.x] = count;
}

__global__ void dynamic(float* out) {
  DK_DYNAMIC_SHARED(float, tile);
  tile[threadIdx.x] = float(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = tile[(threadIdx.x + 1) % blockDim.x];
}

__global__ void past_the_array(float* out, int offset) {
  __shared__ float tile[64];
  tile[threadIdx.x + offset] = 1.0f;
  out[threadIdx.x] = 1.0f;
}

// Through a pointer, behind which the compiler no longer sees the array
__global__ void leaves_its_array(float* out, int offset) {
  __shared__ float first[32], second[32];
  float* to = offset & 1 ? first : second;
  to[int(threadIdx.x) + (offset >> 1)] = 1.0f;
  __syncthreads();
  out[threadIdx.x] = first[threadIdx.x] + second[threadIdx.x];
}

__global__ void shifted(const float* in, float* out, int read, int write) {
  out[int(threadIdx.x) + write] = in[int(threadIdx.x) + read];
}

__global__ void writes_its_input(float* in, float* out) { out[threadIdx.x] = in[threadIdx.x] = 1.0f; }

struct Row {
  float at[64];
};

enum class Copies { memcpy, memmove, memset, constant, row };

// 64 floats and `more` bytes, by one thread: in -> shared -> out
template <Copies HOW>
__global__ void copies(const float* in, float* out, int more, int from, int to) {
  __shared__ float tile[64];
  const int bytes = 256 + more;
  const float* source = in + from;
  float* target = out + to;
  if (HOW == Copies::memcpy) memcpy(tile, source, bytes), memcpy(target, tile, bytes);
  if (HOW == Copies::memmove) memmove(tile, source, bytes), memmove(target, tile, bytes);
  if (HOW == Copies::memset) memset(target, 0, bytes);
  if (HOW == Copies::constant) memcpy(tile, source, 256), memcpy(target, tile, 256);
  if (HOW == Copies::row) *reinterpret_cast<Row*>(target) = *reinterpret_cast<const Row*>(source);
}

__global__ void vectors(const float* in, float* out, int offset) {
  float values[4];
  load_vector(in + offset + 4 * threadIdx.x, values);
  store_vector(out + 4 * threadIdx.x, values);
}

__global__ void divergent_barrier(float* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1.0f;
}

// Each thread comes to a barrier, but not to the same
__global__ void two_barriers(float* out, int warps) {
  if (int(threadIdx.x) < 32 * warps) {
    out[threadIdx.x] = 1.0f;
    __syncthreads();
  } else {
    out[threadIdx.x] = 2.0f;
    __syncthreads();
  }
}

// One barrier for all, which the compiler may copy into both of its neighbours' branches, and a function's in two calls
__global__ void shared_barriers(const float* in, float* out) {
  __shared__ float partial[2][4];
  float sum;
  if (threadIdx.x < 40) sum = 1.0f;
  else sum = in[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 40) sum += in[threadIdx.x];
  else sum += 1.0f;
  sum = block_sum<2>(sum, partial[0]) + block_sum<2>(sum, partial[1]);
  out[threadIdx.x] = sum;
}

__global__ void divergent_shuffle(float* out) {
  float value = 1.0f;
  if (threadIdx.x % 32 != 7) value = __shfl_xor_sync(0xffffffffu, value, 1);
  __syncthreads();
  out[threadIdx.x] = value;
}

__global__ void shuffle_after_return(float* out) {
  if (threadIdx.x % 32 == 7) return;
  out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void shuffle_outside_its_mask(float* out) {
  float value = 1.0f;
  if (threadIdx.x % 32 < 16) value = __shfl_xor_sync(0x0000ffffu, value, 16);
  out[threadIdx.x] = value;
}

__global__ void different_shuffles(float* out) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  else out[threadIdx.x] = float(__ballot_sync(0xffffffffu, 1));
}

enum class Async { right, no_wait, wait_for_too_few, no_barrier };

// Two stages of 64 floats, copied by 16 threads each
template <Async HOW>
__global__ void prefetches(const float* in, float* out) {
  __shared__ __align__(16) float tile[2][64];
  for (int stage = 0; stage < 2; ++stage) {
    if (threadIdx.x < 16) cp_async<16>(&tile[stage][4 * threadIdx.x], in + 64 * stage + 4 * threadIdx.x);
    cp_async_commit();
  }
  for (int stage = 0; stage < 2; ++stage) {
    if (HOW == Async::wait_for_too_few || (HOW != Async::no_wait && stage == 0)) cp_async_wait<1>();
    else if (HOW != Async::no_wait) cp_async_wait<0>();
    if (HOW != Async::no_barrier) __syncthreads();
    out[64 * stage + threadIdx.x] = tile[stage][threadIdx.x ^ 1];
  }
}

__global__ void zero_fills(const float* in, float* out) {
  __shared__ __align__(16) float tile[64];
  cp_async<4>(tile + threadIdx.x, in + threadIdx.x, threadIdx.x % 2 == 0);
  cp_async_commit();
  cp_async_wait<0>();
  out[threadIdx.x] = tile[threadIdx.x];
}

// out [16, 8] = a [16, 16] b [16, 8], through shared memory and ldmatrix
template <typename T>
__global__ void multiplies(const T* a, const T* b, float* out) {
  __shared__ __align__(16) T tile_a[16][16], tile_b[16][8];
  for (int i = threadIdx.x; i < 256; i += 32) tile_a[i / 16][i % 16] = a[i];
  for (int i = threadIdx.x; i < 128; i += 32) tile_b[i / 8][i % 8] = b[i];
  __syncwarp();
  const int lane = threadIdx.x;
  unsigned left[4], right[2];
  float d[4] = {};
  ldmatrix<4>(left, &tile_a[lane % 16][lane / 16 * 8]);
  ldmatrix<2, true>(right, &tile_b[lane % 16][0]);
  mma<T>(d, left, right);
  for (int i = 0; i < 4; ++i) out[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}

__global__ void multiplies_tf32(const float* a, const float* b, float* out) {  // a [16, 8], b [8, 8]
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  unsigned left[4], right[2];
  float d[4] = {};
  for (int i = 0; i < 4; ++i) left[i] = __float_as_uint(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; ++i) right[i] = __float_as_uint(b[(t + 4 * i) * 8 + g]);
  mma<float>(d, left, right);
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = d[i];
}

// Warps 0 and 1 hand a value over through barrier 1, warps 2 and 3 through barrier 2
__global__ void named_barriers(const float* in, float* out) {
  __shared__ float tile[2][32];
  const int pair = threadIdx.x / 64, lane = threadIdx.x % 32;
  if (threadIdx.x / 32 % 2 == 0) {
    tile[pair][lane] = in[32 * pair + lane];
    barrier_arrive(1 + pair, 64);
  } else {
    barrier_sync(1 + pair, 64);
    out[32 * pair + lane] = tile[pair][31 - lane];
  }
}

__global__ void votes(int* out) {
  const int lane = threadIdx.x % 32;
  int i = 9 * threadIdx.x;
  out[i++] = int(__ballot_sync(0xffffffffu, lane % 3 == 0));
  out[i++] = __any_sync(0xffffffffu, lane == 5);
  out[i++] = __all_sync(0xffffffffu, lane < 31);
  out[i++] = __shfl_up_sync(0xffffffffu, lane, 3);
  out[i++] = __shfl_down_sync(0xffffffffu, lane, 3, 8);
  out[i++] = __shfl_sync(0xffffffffu, lane, 2, 8);
  out[i++] = __reduce_max_sync(0xffffffffu, lane);
  out[i++] = __reduce_add_sync(0xffffffffu, lane);
  out[i++] = __syncthreads_count(lane == 4);
}

__global__ void needs_a_large_stack(float* out) {
  volatile float local[15500];
  for (int i = 0; i < 15500; ++i) local[i] = 1.0f;
  out[threadIdx.x] = local[threadIdx.x];
}

template <int THREADS>
__global__ void __launch_bounds__(2 * THREADS, 1) bounded(float* out) {
  out[threadIdx.x] = THREADS;
}

__global__ void __launch_bounds__(64) also_bounded(float* out) { out[threadIdx.x] = 1.0f; }

__global__ void unbounded(float* out) { out[threadIdx.x] = 1.0f; }

template <typename T>
T* array(const void* data) {
  return static_cast<T*>(const_cast<void*>(data));
}

using Toy = std::function<void(const void*, const void*, void*, int)>;  // a, b, out, number

#define TOY(name, grid, block, shared, ...)                                     \
  {                                                                             \
#name, [](const void* a, const void* b, void* out, int n) {                 \
      (void)a, (void)b, (void)out, (void)n;                                     \
      DK_LAUNCH(name, grid, block, shared, nullptr, __VA_ARGS__);               \
    }                                                                           \
  }
#define A array<float>(a)
#define B array<float>(b)
#define OUT array<float>(out)

#define COPIES(how)                                                                              \
  TOY(copies<Copies::how>, 1, 1, 0, A, OUT, n > 1 ? 4 : 0, n == 1 ? 1 : 0, n == -1 ? 1 : 0)

const std::map<std::string, Toy> toys = {
    TOY(block_sums, n, 128, 0, A, OUT),
    TOY(order, 4, 64, 0, array<int>(out), array<int>(out) + 1),
    TOY(order_of_blocks, n, 1, 0, array<int>(out), array<int>(out) + 1),
    TOY(leaves_some_unwritten, 1, 64, 0, OUT),
    TOY(reads_unwritten_shared, 1, 64, 0, OUT, n),
    TOY(reverses<true>, 1, 64, 0, A, OUT),
    TOY(reverses<false>, 1, 64, 0, A, OUT),
    TOY(reverses_in_warps<true>, 1, 64, 0, A, OUT),
    TOY(reverses_in_warps<false>, 1, 64, 0, A, OUT),
    TOY(overwrites<true>, 1, 64, 0, A, OUT),
    TOY(overwrites<false>, 1, 64, 0, A, OUT),
    TOY(hands_over<true>, 1, 64, 0, A, OUT),
    TOY(hands_over<false>, 1, 64, 0, A, OUT),
    TOY(counts<Counts::right>, 1, n, 0, array<int>(out)),
    TOY(counts<Counts::starts_late>, 1, n, 0, array<int>(out)),
    TOY(counts<Counts::reads_early>, 1, n, 0, array<int>(out)),
    TOY(counts<Counts::writes_early>, 1, n, 0, array<int>(out)),
    TOY(dynamic, 1, 64, n, OUT),
    TOY(past_the_array, 1, 64, 0, OUT, n),
    TOY(leaves_its_array, 1, 32, 0, OUT, n),
    TOY(shifted, 2, 32, 0, A, OUT, 0, 0),
    {"shifted_read", [](const void* a, const void*, void* out, int n) { DK_LAUNCH(shifted, 1, 64, 0, nullptr, A, OUT, n, 0); }},
    {"shifted_write", [](const void* a, const void*, void* out, int n) { DK_LAUNCH(shifted, 1, 64, 0, nullptr, A, OUT, 0, n); }},
    TOY(writes_its_input, 1, 64, 0, A, OUT),
    COPIES(memcpy), COPIES(memmove), COPIES(memset), COPIES(constant), COPIES(row),
    TOY(vectors, 1, 16, 0, A, OUT, n),
    TOY(divergent_barrier, 1, 64, 0, OUT),
    TOY(two_barriers, 1, 64, 0, OUT, n),
    TOY(shared_barriers, 1, 64, 0, A, OUT),
    TOY(divergent_shuffle, 1, 64, 0, OUT),
    TOY(shuffle_after_return, 1, 64, 0, OUT),
    TOY(shuffle_outside_its_mask, 1, 64, 0, OUT),
    TOY(different_shuffles, 1, 64, 0, OUT),
    TOY(prefetches<Async::right>, 1, 64, 0, A, OUT),
    TOY(prefetches<Async::no_wait>, 1, 64, 0, A, OUT),
    TOY(prefetches<Async::wait_for_too_few>, 1, 64, 0, A, OUT),
    TOY(prefetches<Async::no_barrier>, 1, 64, 0, A, OUT),
    TOY(zero_fills, 1, 64, 0, A, OUT),
    TOY(multiplies<__half>, 1, 32, 0, array<__half>(a), array<__half>(b), OUT),
    TOY(multiplies<__nv_bfloat16>, 1, 32, 0, array<__nv_bfloat16>(a), array<__nv_bfloat16>(b), OUT),
    TOY(multiplies_tf32, 1, 32, 0, A, B, OUT),
    TOY(named_barriers, 1, 128, 0, A, OUT),
    TOY(votes, 1, 64, 0, array<int>(out)),
    TOY(needs_a_large_stack, 1, 32, 0, OUT),
    TOY(bounded<48>, 1, n, 0, OUT),
    TOY(also_bounded, 1, n, 0, OUT),
    TOY(unbounded, 1, n, 0, OUT),
};

}  // namespace

// The error of one toy, or "". a and b are inputs and out an output, each with its size in bytes.
extern "C" __attribute__((visibility("default"))) const char* toy(
    const char* name, unsigned long seed, const void* a, size_t a_bytes, const void* b, size_t b_bytes, void* out,
    size_t out_bytes, int number) {
  static std::string error;
  error.clear();
  const auto declare = [](const void* data, size_t bytes, bool writable, const char* what) {
    const auto begin = reinterpret_cast<uintptr_t>(data);
    if (bytes) emulator::declare_buffer({begin, begin + bytes, writable, what});
  };
  emulator::set_seed(seed);
  declare(a, a_bytes, false, "a");
  declare(b, b_bytes, false, "b");
  declare(out, out_bytes, true, "out");
  try {
    toys.at(name)(a, b, out, number);
  } catch (const std::exception& e) {
    error = e.what();
  }
  emulator::forget_buffers();
  return error.c_str();
}

extern "C" __attribute__((visibility("default"))) void convert(const float* in, uint16_t* bits, float* back, int n,
                                                               bool half) {
  for (int i = 0; i < n; ++i) {
    if (half) {
      const __half h = __float2half_rn(in[i]);
      bits[i] = h.bits, back[i] = __half2float(h);
    } else {
      const __nv_bfloat16 b = __float2bfloat16_rn(in[i]);
      bits[i] = b.bits, back[i] = __bfloat162float(b);
    }
  }
}
