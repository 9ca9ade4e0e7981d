// What the emulator's own files share: the threads, warps and blocks that run, and how one stops.
//
// A fiber's stack is a STACK-aligned piece of one reserved region with its Thread on top, so that the
// running thread is found from the stack pointer alone, and host code is told apart from kernels.
#pragma once

#include <setjmp.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "runtime.h"

namespace emulator {

constexpr size_t STACK = 64 * 1024;
constexpr unsigned MAX_THREADS = 1024;
constexpr unsigned MAX_WORKERS = 4;
constexpr size_t MAX_SHARED = 227 * 1024;
constexpr int BARRIERS = 16;

// When a granule of shared memory was last touched, and by whom. Two accesses are ordered if a barrier of
// the block lies between them (another epoch), or within a warp a __syncwarp (an earlier clock).
struct Stamp {
  uint32_t epoch = 0;
  uint16_t clock = 0;
  uint16_t thread = 0;
};
constexpr uint16_t IN_FLIGHT = 0x8000;  // with `thread` of a write: an asynchronous copy that has not landed
constexpr uint16_t ATOMIC = 0x4000;     // with `thread` of a read: an atomic, which is one and a write too
constexpr uint16_t THREAD = ATOMIC - 1;
struct Granule {
  Stamp written, read, read2;
};
constexpr size_t GRANULE = 2;  // bytes: the smallest element of these kernels

// cuda.h aligns every `__shared__` variable to this, so that one ends well before the next one begins.
constexpr size_t SHARED_ALIGNMENT = DK_SHARED_ALIGNMENT;
constexpr size_t RED_ZONE = 512;  // at least

struct Shared {
  uintptr_t begin = 0, end = 0;
  Granule* shadow = nullptr;
};

struct Copy {
  unsigned char* to;
  const unsigned char* from;
  uint32_t bytes, size;
  uint32_t group;
};

struct Worker;
struct Warp;

struct Thread {
  Dim3 index, block, block_size, grid_size;
  Worker* worker;
  Warp* warp;
  unsigned linear, lane;
  uint16_t clock;
  bool started, done;
  const char* waits_at;
  const void* input;  // of the warp operation that it waits in
  void* output;
  uint32_t groups;
  jmp_buf context;
  std::vector<Copy> copies;
};

// Lanes that have arrived at one warp operation
struct Meeting {
  unsigned mask, arrived;
  const char* what;
  Thread* lanes[32];
};

struct Warp {
  unsigned alive;
  std::vector<Meeting> meetings;
};

struct Barrier {
  int expected = 0, arrived = 0;
  Place place{};  // of those that have arrived
  std::vector<Thread*> waiting;
};

struct Launch {
  const char* kernel;
  Dim3 grid, block;
  size_t shared;
  void (*body)(const void*);
  const void* args;
  uintptr_t args_begin, args_end;
  unsigned threads;
  uint64_t blocks;
  std::atomic<uint64_t> next{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  std::string error;
};

struct Worker {
  unsigned id = 0;
  Launch* launch = nullptr;
  uint64_t random = 1;
  unsigned threads = 0, left = 0;
  uint32_t epoch = 1, first_epoch = 1;
  std::vector<Thread*> ready;
  Warp warps[MAX_THREADS / 32];
  Barrier barriers[BARRIERS];
  Shared statics, dynamic;
  unsigned char* dynamic_memory = nullptr;
  size_t last_buffer = 0;
  uint64_t written = 0;  // bytes, of tensors
  int count = 0, counted = 0, count_result = 0;
  jmp_buf scheduler;

  uint64_t draw() {  // xorshift64*
    random ^= random >> 12;
    random ^= random << 25;
    random ^= random >> 27;
    return random * 0x2545f4914f6cdd1dull;
  }
};

struct Region {
  uintptr_t begin = 0, size = 0;
};

extern std::vector<Buffer> buffers;
extern Region stacks;

inline uintptr_t stack_pointer() { return reinterpret_cast<uintptr_t>(__builtin_frame_address(0)); }
inline Thread* thread_at(uintptr_t stack) {
  return reinterpret_cast<Thread*>((stack | (STACK - 1)) + 1 - sizeof(Thread));
}
inline bool in_kernel() { return stack_pointer() - stacks.begin < stacks.size; }

// The running thread. A fiber may go on in another call of its scheduler: never inlined, never kept.
Thread& self();
// The running thread waits for another one to make it ready.
void wait(Thread& t);
// Ends the launch with an error that names kernel, block and thread, and the line of `code`.
[[noreturn]] void stop(Thread& t, const std::string& message, const void* code = nullptr);
// The same of the running thread, or of host code.
void fail_at(const std::string& message, const void* code);

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string place(Dim3 d);

// memory.cpp: what is checked of every access, and the shadow that knows who touched shared memory
void access(const void* address, size_t bytes, size_t alignment, bool write, const void* code);
Shared with_shadow(uintptr_t begin, size_t bytes);
void read_variables();
void find_statics(Worker& w);

}  // namespace emulator
