// What the emulated CUDA headers need from the scheduler: see runtime.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#define DK_SHARED_ALIGNMENT 32768

namespace emulator {

struct Dim3 {
  unsigned x, y, z;
};

// One buffer that a launch may touch. `writable` ones are filled with NaN first.
struct Buffer {
  uintptr_t begin, end;
  bool writable;
  std::string name;
};

// Buffers of the calls to come, until `forget_buffers`. A kernel may touch nothing else.
void declare_buffer(const Buffer& buffer);
void forget_buffers();

// Threads of a block run in an order drawn from this seed, and so do the blocks.
void set_seed(uint64_t seed);

// Blocks along y or z of a grid: 65535, or fewer, so that a small call has more than fit
int64_t most_blocks();
void set_most_blocks(int64_t blocks);

// Bytes that the kernels have written to tensors so far: more, where two blocks do one's work
uint64_t written();

// One launch, in the order of `record`
struct Launched {
  std::string kernel;  // with its template arguments
  Dim3 grid, block;
  size_t shared_bytes;
};

// From now on launches are only noted, or run again. Tensors of calls are not looked at meanwhile.
void record(bool on);
bool recording();
std::vector<Launched> recorded();  // since `record`

// Runs body(args) once a thread. Throws std::runtime_error with kernel, block and thread.
// kernel: the mangled name of its type Kernel<...>. code: where it begins.
void run(const char* kernel, const void* code, Dim3 grid, Dim3 block, size_t shared_bytes,
         void (*body)(const void*), const void* args, size_t args_bytes);

// Inside a kernel. A fiber's identity never changes while the kernel runs.
__attribute__((const)) Dim3 thread_index() noexcept;
__attribute__((const)) Dim3 block_index() noexcept;
__attribute__((const)) Dim3 block_size() noexcept;
__attribute__((const)) Dim3 grid_size() noexcept;
__attribute__((const)) void* dynamic_shared() noexcept;
size_t dynamic_shared_bytes() noexcept;

[[noreturn]] void fail(const char* message);

enum class Shuffle { index, up, down, exclusive_or };
enum class Vote { ballot, any, all };
enum class Reduce { add, minimum, maximum, bit_and, bit_or, bit_xor };

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width);
unsigned vote(Vote kind, unsigned mask, bool predicate);
int64_t reduce(Reduce kind, unsigned mask, int64_t value);
void warp_barrier(unsigned mask);
unsigned active_mask();

// Where a barrier is in the source: two threads that meet there from two calls of one function, or from two
// copies of it that the compiler made, are at one place. Named barriers have none: PTX lets any of them meet.
struct Place {
  const char* file;
  int line;
};

// bar.sync (wait) and bar.arrive. `threads` 0 stands for the whole block.
void barrier(int id, int threads, bool wait, Place place = {});
int block_count(bool predicate, Place place);  // __syncthreads_count

// Says that the running thread touches this memory, as an instrumented access would.
void touch(const void* address, size_t bytes, bool write);
void touch_atomic(const void* address, size_t bytes);

// cp.async: `bytes` to copy, `size` to write; the rest is zeros. Lands at the thread's own wait.
void async_copy(void* shared, const void* global, size_t bytes, size_t size);
void async_commit();
void async_wait(int groups_left);

// ldmatrix: `count` 8x8 matrices of 16-bit elements, the row addresses from lanes 0..8*count-1
void load_matrix(unsigned* registers, const void* row, int count, bool transposed);

enum class Element { half, bfloat16, tf32 };
// mma.sync.m16n8k16 (k8 for tf32): d += a * b, in the fragment layouts of the PTX manual
void multiply(float* d, const unsigned* a, const unsigned* b, Element element);

}  // namespace emulator
