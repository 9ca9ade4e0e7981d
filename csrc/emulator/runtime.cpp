// The execution model: a fiber a thread, switched where a thread waits; blocks over a few OS threads.
//
// A fiber's stack is a STACK-aligned piece of one reserved region with its Thread on top, so that the
// running thread is found from the stack pointer alone, and host code is told apart from kernels.
#include "runtime.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cuda.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulator {
namespace {

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
constexpr uint16_t IN_FLIGHT = 0x8000;  // with `thread`: an asynchronous copy that has not landed
struct Granule {
  Stamp written, read, read2;
};
constexpr size_t GRANULE = 2;  // bytes: the smallest element of these kernels

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
  int count = 0, counted = 0, count_result = 0;
  jmp_buf scheduler;

  uint64_t draw() {  // xorshift64*
    random ^= random >> 12;
    random ^= random << 25;
    random ^= random >> 27;
    return random * 0x2545f4914f6cdd1dull;
  }
};

std::vector<Buffer> buffers;
bool only_recording = false;
struct Note {
  const char* kernel;
  Dim3 grid, block;
  size_t shared_bytes;
};
std::vector<Note> notes;
uint64_t seed = 0;
std::mutex one_launch;
Worker workers[MAX_WORKERS];
uintptr_t image_begin, image_end;  // this library: constants of a kernel lie in it
thread_local char tls_anchor;      // in the same thread-local block as every `__shared__` variable

struct Region {
  uintptr_t begin = 0, size = 0;
} stacks;

inline uintptr_t stack_pointer() { return reinterpret_cast<uintptr_t>(__builtin_frame_address(0)); }
inline Thread* thread_at(uintptr_t stack) {
  return reinterpret_cast<Thread*>((stack | (STACK - 1)) + 1 - sizeof(Thread));
}
inline bool in_kernel() { return stack_pointer() - stacks.begin < stacks.size; }

__attribute__((noinline)) Thread& self() { return *thread_at(stack_pointer()); }

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char line[1024];
  va_list rest;
  va_start(rest, format);
  vsnprintf(line, sizeof line, format, rest);
  va_end(rest);
  return line;
}

// "f<float, 4>" from the mangled "emulator::Kernel<&(void dk::(anonymous namespace)::f<float, 4>(float*))>"
std::string kernel_name(const char* mangled) {
  int status = 0;
  char* found = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 ? found : mangled;
  std::free(found);
  for (const char* noise : {"emulator::Kernel<&", "(anonymous namespace)::", "dk::", "void "})
    for (size_t at; (at = name.find(noise)) != std::string::npos;) name.erase(at, strlen(noise));
  if (name[0] == '(') name.erase(0, 1);
  int depth = 0;
  for (size_t i = 0; i < name.size(); ++i) {
    depth += name[i] == '<';
    depth -= name[i] == '>';
    if (depth < 0 || (depth == 0 && name[i] == '(')) return name.substr(0, i);
  }
  return name;
}

std::string place(Dim3 d) { return text("(%u, %u, %u)", d.x, d.y, d.z); }

// "in f() at csrc/f.cu:12", where the library has line numbers and binutils are installed
std::string source_line(const void* code) {
  Dl_info info;
  if (!code || !dladdr(code, &info) || !info.dli_fname) return "";
  const auto offset = reinterpret_cast<uintptr_t>(code) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
  FILE* pipe = popen(text("addr2line -sie '%s' 0x%zx 2>/dev/null", info.dli_fname, size_t(offset)).c_str(), "r");
  if (!pipe) return "";
  std::string found;
  char line[512];
  // outer frames follow; headers of the emulator itself are not where the mistake is
  while (fgets(line, sizeof line, pipe)) {
    line[strcspn(line, " \n")] = 0;
    if (line[0] == '?' || strstr(line, ":?")) break;
    found = line;
    if (!strstr(line, "cuda.h:")) break;
  }
  pclose(pipe);
  return found.empty() ? "" : " at " + found;
}

[[noreturn]] void stop(Thread& t, const std::string& message, const void* code = nullptr) {
  Launch& launch = *t.worker->launch;
  {
    std::lock_guard<std::mutex> lock(launch.mutex);
    if (!launch.failed) {
      launch.error = text("%s: block %s, thread %s", kernel_name(launch.kernel).c_str(), place(t.block).c_str(),
                          place(t.index).c_str()) +
                     source_line(code) + ": " + message;
      launch.failed = true;
    }
  }
  _longjmp(t.worker->scheduler, 2);
}

// --- switching ---------------------------------------------------------------------------------------

void fiber() {
  for (;;) {
    Thread& t = self();
    t.worker->launch->body(t.worker->launch->args);
    Thread& after = self();
    after.done = true;
    after.warp->alive &= ~(1u << after.lane);
    --after.worker->left;
    if (_setjmp(after.context) == 0) _longjmp(after.worker->scheduler, 1);
  }
}

[[noreturn]] void resume(Thread& t) {
  if (t.started) _longjmp(t.context, 1);
  t.started = true;
  ucontext_t context;
  getcontext(&context);
  const uintptr_t top = reinterpret_cast<uintptr_t>(&t) & ~uintptr_t(STACK - 1);
  context.uc_stack.ss_sp = reinterpret_cast<void*>(top);
  context.uc_stack.ss_size = (reinterpret_cast<uintptr_t>(&t) - top) & ~uintptr_t(63);
  context.uc_link = nullptr;
  makecontext(&context, fiber, 0);
  setcontext(&context);
  std::abort();
}

Thread* pick(Worker& w) {
  if (w.ready.empty()) return nullptr;
  const size_t i = w.draw() % w.ready.size();
  Thread* t = w.ready[i];
  w.ready[i] = w.ready.back();
  w.ready.pop_back();
  return t;
}

// The running thread waits for another one to make it ready.
void wait(Thread& t) {
  if (_setjmp(t.context) != 0) return;
  Thread* next = pick(*t.worker);
  if (next) resume(*next);
  _longjmp(t.worker->scheduler, 1);
}

std::string deadlock(Worker& w) {
  std::string message = "deadlock: ";
  unsigned done = 0;
  const char* kinds[8];
  unsigned counts[8], n = 0;
  for (unsigned i = 0; i < w.threads; ++i) {
    Thread& t = *thread_at(stacks.begin + (w.id * MAX_THREADS + i) * STACK);
    if (t.done) {
      ++done;
      continue;
    }
    unsigned k = 0;
    while (k < n && strcmp(kinds[k], t.waits_at)) ++k;
    if (k == n && n < 8) kinds[n] = t.waits_at, counts[n++] = 0;
    if (k < 8) ++counts[k];
  }
  for (unsigned k = 0; k < n; ++k) message += text("%s%u threads wait at %s", k ? ", " : "", counts[k], kinds[k]);
  return message + text(", %u have returned", done);
}

// --- one block ---------------------------------------------------------------------------------------

Shared with_shadow(uintptr_t begin, size_t bytes) {
  const size_t cells = bytes / GRANULE + 1;
  void* shadow = mmap(nullptr, cells * sizeof(Granule), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (shadow == MAP_FAILED) throw std::runtime_error("emulator: no memory for the shadow of shared memory");
  return {begin, begin + bytes, static_cast<Granule*>(shadow)};
}

void drop_shadow(Shared& shared) {
  if (shared.shadow) munmap(shared.shadow, ((shared.end - shared.begin) / GRANULE + 1) * sizeof(Granule));
  shared = {};
}

int find_image(dl_phdr_info* info, size_t, void* result) {
  const auto here = reinterpret_cast<uintptr_t>(&find_image);
  bool ours = false;
  uintptr_t low = UINTPTR_MAX, high = 0;
  size_t tls = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type == PT_TLS) tls = part.p_memsz;
    if (part.p_type != PT_LOAD) continue;
    const uintptr_t begin = info->dlpi_addr + part.p_vaddr, end = begin + part.p_memsz;
    ours = ours || (begin <= here && here < end);
    low = std::min(low, begin), high = std::max(high, end);
  }
  if (!ours) return 0;
  image_begin = low, image_end = high;
  auto* found = static_cast<Shared*>(result);
  found->begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
  found->end = found->begin + tls;
  return 1;
}

// The static `__shared__` variables of the calling OS thread
void find_statics(Worker& w) {
  *const_cast<volatile char*>(&tls_anchor) = 1;  // makes the block exist
  Shared found;
  dl_iterate_phdr(find_image, &found);
  if (found.begin == w.statics.begin && found.end == w.statics.end) return;
  drop_shadow(w.statics);
  w.statics = with_shadow(found.begin, found.end - found.begin);
}

void begin_block(Worker& w, uint64_t number) {
  Launch& launch = *w.launch;
  const Dim3 grid = launch.grid, size = launch.block;
  const Dim3 block{unsigned(number % grid.x), unsigned(number / grid.x % grid.y),
                   unsigned(number / grid.x / grid.y)};
  w.random = (seed + 1) * 0x9e3779b97f4a7c15ull ^ (number + 1) * 0xbf58476d1ce4e5b9ull;
  w.random |= 1;
  w.threads = w.left = launch.threads;
  w.first_epoch = ++w.epoch;
  w.count = w.counted = 0;
  w.ready.clear();
  for (auto& barrier : w.barriers) {
    barrier.arrived = barrier.expected = 0;
    barrier.waiting.clear();
  }
  for (unsigned i = 0; i < (w.threads + 31) / 32; ++i) {
    w.warps[i].alive = w.threads - 32 * i >= 32 ? ~0u : (1u << (w.threads - 32 * i)) - 1;
    w.warps[i].meetings.clear();
  }
  for (unsigned i = 0; i < w.threads; ++i) {
    Thread& t = *thread_at(stacks.begin + (w.id * MAX_THREADS + i) * STACK);
    if (!t.worker) new (&t) Thread{};
    t.worker = &w;
    t.warp = &w.warps[i / 32];
    t.linear = i, t.lane = i % 32;
    t.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    t.block = block, t.block_size = size, t.grid_size = grid;
    t.done = false;
    t.clock = 0;
    t.groups = 0;
    t.waits_at = "";
    t.copies.clear();
    w.ready.push_back(&t);
  }
}

void run_blocks(Worker& w) {
  find_statics(w);
  Launch& launch = *w.launch;
  // blocks in a seeded order too: multiplication by a number prime to their count
  uint64_t step = (seed * 2654435761ull + 7919) % launch.blocks | 1;
  while (launch.blocks > 1 && std::__gcd(step, launch.blocks) != 1) step += 2;
  for (uint64_t i; !launch.failed && (i = launch.next++) < launch.blocks;) {
    const auto number = uint64_t((unsigned __int128)(i) * step % launch.blocks);
    begin_block(w, number);
    const int why = _setjmp(w.scheduler);
    if (why == 2) {  // an error: the fibers of this block are given up where they stand
      for (unsigned k = 0; k < w.threads; ++k)
        thread_at(stacks.begin + (w.id * MAX_THREADS + k) * STACK)->started = false;
      return;
    }
    if (Thread* next = pick(w)) resume(*next);
    if (w.left) {
      for (unsigned k = 0; k < w.threads; ++k) {
        Thread& t = *thread_at(stacks.begin + (w.id * MAX_THREADS + k) * STACK);
        if (t.done) continue;
        if (_setjmp(w.scheduler) == 0) stop(t, deadlock(w));
        break;
      }
      for (unsigned k = 0; k < w.threads; ++k)
        thread_at(stacks.begin + (w.id * MAX_THREADS + k) * STACK)->started = false;
      return;
    }
  }
}

// --- warp operations ---------------------------------------------------------------------------------

using Combine = void (*)(Meeting&);

// The last lane to arrive runs `combine`, which writes every lane's output.
void meet(const char* what, unsigned mask, const void* input, void* output, Combine combine) {
  Thread& t = self();
  const unsigned bit = 1u << t.lane;
  if (!(mask & bit)) stop(t, text("%s: the mask 0x%08x lacks the calling lane %u", what, mask, t.lane));
  if (mask & ~t.warp->alive)
    stop(t, text("%s: lanes 0x%08x of the mask 0x%08x have returned or don't exist", what, mask & ~t.warp->alive, mask));
  auto& meetings = t.warp->meetings;
  size_t found = 0;
  while (found < meetings.size() && !(meetings[found].mask & mask)) ++found;
  if (found == meetings.size()) meetings.push_back({mask, 0, what, {}});
  Meeting& meeting = meetings[found];
  if (meeting.mask != mask || strcmp(meeting.what, what))
    stop(t, text("%s with mask 0x%08x, while lanes 0x%08x of the warp wait in %s with mask 0x%08x", what, mask,
                 meeting.arrived, meeting.what, meeting.mask));
  meeting.arrived |= bit;
  meeting.lanes[t.lane] = &t;
  t.input = input, t.output = output;
  if (meeting.arrived != mask) {
    t.waits_at = what;
    wait(t);
    return;
  }
  combine(meeting);
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1 && i != int(t.lane)) t.worker->ready.push_back(meeting.lanes[i]);
  meetings.erase(meetings.begin() + long(found));
}

template <typename Input>
const Input& input(const Meeting& m, int lane) {
  return *static_cast<const Input*>(m.lanes[lane]->input);
}
template <typename Output>
Output& output(const Meeting& m, int lane) {
  return *static_cast<Output*>(m.lanes[lane]->output);
}

template <typename Do>
void each_lane(const Meeting& m, Do action) {
  for (int i = 0; i < 32; ++i)
    if (m.mask >> i & 1) action(i);
}

void advance_clocks(Meeting& m) {
  uint16_t latest = 0;
  each_lane(m, [&](int i) { latest = std::max(latest, m.lanes[i]->clock); });
  each_lane(m, [&](int i) { m.lanes[i]->clock = uint16_t(latest + 1); });
}

// --- checks of memory --------------------------------------------------------------------------------

std::string who(const Worker& w, unsigned linear) {
  const Dim3 s = w.launch->block;
  return place({linear % s.x, linear / s.x % s.y, linear / s.x / s.y});
}

bool ordered(const Stamp& before, const Thread& t) {
  if (before.epoch != t.worker->epoch || before.thread == t.linear) return true;
  return before.thread / 32 == t.linear / 32 && before.clock < t.clock;
}

[[noreturn]] void race(Thread& t, const Shared& shared, uintptr_t p, const char* does, const char* did, const Stamp& other,
                       const void* code) {
  stop(t, text("race on shared memory: it %s byte %zu of the %s, which thread %s %s, with no barrier between", does,
               size_t(p - shared.begin), &shared == &t.worker->dynamic ? "dynamic part" : "static part",
               who(*t.worker, other.thread).c_str(), did),
       code);
}

void shared_access(Thread& t, Shared& shared, uintptr_t p, size_t n, bool write, const void* code) {
  if (p % GRANULE + n > GRANULE && p % GRANULE) ++n;
  const Stamp now{t.worker->epoch, t.clock, uint16_t(t.linear)};
  for (uintptr_t at = p & ~uintptr_t(GRANULE - 1); at < p + n; at += GRANULE) {
    Granule& g = shared.shadow[(at - shared.begin) / GRANULE];
    const uint32_t first = t.worker->first_epoch;
    if (g.written.epoch < first && g.read.epoch < first) {
      memset(reinterpret_cast<void*>(at), 0xff, GRANULE);  // NaN in every format
      g = {};
    }
    if (g.written.thread & IN_FLIGHT && g.written.epoch >= first)
      stop(t, text("it %s byte %zu of the shared memory, where an asynchronous copy of thread %s has not landed: its wait is missing",
                   write ? "writes" : "reads", size_t(at - shared.begin),
                   who(*t.worker, g.written.thread & ~IN_FLIGHT).c_str()),
           code);
    if (!ordered(g.written, t)) race(t, shared, at, write ? "writes" : "reads", "wrote", g.written, code);
    if (write) {
      if (!ordered(g.read, t)) race(t, shared, at, "writes", "read", g.read, code);
      if (!ordered(g.read2, t)) race(t, shared, at, "writes", "read", g.read2, code);
      g.written = now;
    } else if (ordered(g.read, t)) {
      g.read = now;
    } else if (ordered(g.read2, t)) {
      g.read2 = now;
    }
  }
}

void global_access(Thread& t, uintptr_t p, size_t n, bool write, const void* code) {
  Worker& w = *t.worker;
  auto holds = [&](const Buffer& b) { return b.begin <= p && p + n <= b.end && (b.writable || !write); };
  if (w.last_buffer < buffers.size() && holds(buffers[w.last_buffer])) return;
  for (size_t i = 0; i < buffers.size(); ++i)
    if (holds(buffers[i])) {
      w.last_buffer = i;
      return;
    }
  const Launch& launch = *w.launch;
  if (!write && p >= launch.args_begin && p + n <= launch.args_end) return;
  if (!write && p >= image_begin && p + n <= image_end) return;
  std::string where = "which belongs to no tensor of the call";
  size_t nearest = SIZE_MAX;
  for (const Buffer& b : buffers) {
    if (b.begin <= p && p < b.end && p + n <= b.end) {
      where = "in " + b.name + ", which is an input";
      break;
    }
    const size_t after = p + n > b.end ? p + n - b.end : SIZE_MAX, before = p < b.begin ? b.begin - p : SIZE_MAX;
    if (std::min(after, before) < nearest) {
      nearest = std::min(after, before);
      where = after < before ? text("%zu bytes past the end of %s", after, b.name.c_str())
                             : text("%zu bytes before the start of %s", before, b.name.c_str());
    }
  }
  stop(t, text("it %s %zu bytes at %p, ", write ? "writes" : "reads", n, reinterpret_cast<void*>(p)) + where, code);
}

void check(Thread& t, uintptr_t p, size_t n, bool write, const void* code) {
  Worker& w = *t.worker;
  if (p - w.statics.begin < w.statics.end - w.statics.begin) return shared_access(t, w.statics, p, n, write, code);
  if (p - w.dynamic.begin < MAX_SHARED) {
    if (p - w.dynamic.begin + n > w.launch->shared)
      stop(t, text("it %s byte %zu of dynamic shared memory; the launch gave %zu", write ? "writes" : "reads",
                   size_t(p - w.dynamic.begin + n - 1), w.launch->shared),
           code);
    return shared_access(t, w.dynamic, p, n, write, code);
  }
  if (p - stacks.begin < stacks.size) stop(t, "it touches a local variable of another thread", code);
  global_access(t, p, n, write, code);
}

}  // namespace

// --- what sanitizer.cpp and cuda.h call --------------------------------------------------------------

void access(const void* address, size_t bytes, size_t alignment, bool write, const void* code) {
  const uintptr_t stack = stack_pointer();
  if (stack - stacks.begin >= stacks.size) return;
  const auto p = reinterpret_cast<uintptr_t>(address);
  if ((stack & (STACK - 1)) < 4096) stop(*thread_at(stack), "its local variables need more than 60 KiB", code);
  if (((p ^ stack) & ~uintptr_t(STACK - 1)) == 0) return;
  Thread& t = *thread_at(stack);
  if (p & (alignment - 1))
    stop(t, text("it %s %zu bytes at %p, which is not a multiple of %zu", write ? "writes" : "reads", bytes, address,
                 alignment),
         code);
  check(t, p, bytes, write, code);
}

void touch(const void* address, size_t bytes, bool write) {
  access(address, bytes, 1, write, __builtin_return_address(0));
}

void touch_atomic(const void* address, size_t bytes) {
  if (!in_kernel()) return;
  Thread& t = self();
  const auto p = reinterpret_cast<uintptr_t>(address);
  const void* code = __builtin_return_address(0);
  if (p & (bytes - 1)) stop(t, text("an atomic of %zu bytes at %p", bytes, address), code);
  const Worker& w = *t.worker;
  // atomics don't race with one another: on shared memory only the bounds are checked
  if (p - w.statics.begin < w.statics.end - w.statics.begin) return;
  if (p - w.dynamic.begin + bytes <= w.launch->shared) return;
  check(t, p, bytes, true, code);
}

Dim3 thread_index() noexcept { return self().index; }
Dim3 block_index() noexcept { return self().block; }
Dim3 block_size() noexcept { return self().block_size; }
Dim3 grid_size() noexcept { return self().grid_size; }
void* dynamic_shared() noexcept { return self().worker->dynamic_memory; }
size_t dynamic_shared_bytes() noexcept { return self().worker->launch->shared; }
void fail(const char* message) { stop(self(), message, __builtin_return_address(0)); }
void fail_at(const std::string& message, const void* code) {
  if (in_kernel()) stop(self(), message, code);
  throw std::runtime_error(message);
}
unsigned active_mask() { return self().warp->alive; }

uint64_t shuffle(Shuffle kind, unsigned mask, uint64_t value, int operand, int width) {
  struct Input {
    uint64_t value;
    Shuffle kind;
    int operand, width;
  } in{value, kind, operand, width};
  uint64_t out;
  meet("a shuffle", mask, &in, &out, [](Meeting& m) {
    each_lane(m, [&](int lane) {
      const Input& i = input<Input>(m, lane);
      const int first = lane & ~(i.width - 1), last = first + i.width - 1;
      int source = lane;
      switch (i.kind) {
        case Shuffle::index: source = first + (i.operand & (i.width - 1)); break;
        case Shuffle::up: source = lane - i.operand; break;
        case Shuffle::down: source = lane + i.operand; break;
        case Shuffle::exclusive_or: source = lane ^ i.operand; break;
      }
      if (source < first && i.kind == Shuffle::up) source = lane;
      if (source > last) source = lane;
      if (!(m.mask >> source & 1))
        stop(self(), text("a shuffle: lane %d reads lane %d, which the mask 0x%08x lacks", lane, source, m.mask));
      output<uint64_t>(m, lane) = input<Input>(m, source).value;
    });
  });
  return out;
}

unsigned vote(Vote kind, unsigned mask, bool predicate) {
  struct Input {
    Vote kind;
    bool predicate;
  } in{kind, predicate};
  unsigned out;
  meet("a vote", mask, &in, &out, [](Meeting& m) {
    unsigned ballot = 0;
    each_lane(m, [&](int lane) { ballot |= unsigned(input<Input>(m, lane).predicate) << lane; });
    each_lane(m, [&](int lane) {
      const Vote kind = input<Input>(m, lane).kind;
      output<unsigned>(m, lane) = kind == Vote::ballot ? ballot : kind == Vote::any ? ballot != 0 : ballot == m.mask;
    });
  });
  return out;
}

int64_t reduce(Reduce kind, unsigned mask, int64_t value) {
  struct Input {
    Reduce kind;
    int64_t value;
  } in{kind, value};
  int64_t out;
  meet("a reduction", mask, &in, &out, [](Meeting& m) {
    bool first = true;
    int64_t total = 0;
    each_lane(m, [&](int lane) {
      const auto [kind, v] = input<Input>(m, lane);
      if (first) total = v;
      else
        switch (kind) {
          case Reduce::add: total += v; break;
          case Reduce::minimum: total = std::min(total, v); break;
          case Reduce::maximum: total = std::max(total, v); break;
          case Reduce::bit_and: total &= v; break;
          case Reduce::bit_or: total |= v; break;
          case Reduce::bit_xor: total ^= v; break;
        }
      first = false;
    });
    each_lane(m, [&](int lane) { output<int64_t>(m, lane) = total; });
  });
  return out;
}

void warp_barrier(unsigned mask) { meet("__syncwarp", mask, nullptr, nullptr, advance_clocks); }

void barrier(int id, int threads, bool wait_here) {
  Thread& t = self();
  Worker& w = *t.worker;
  static const char* const names[2] = {"__syncthreads", "a named barrier"};
  const int expected = threads ? threads : int(w.threads);
  if (id < 0 || id >= BARRIERS) stop(t, text("barrier %d: there are %d", id, BARRIERS));
  if (expected % 32 && expected != int(w.threads))
    stop(t, text("barrier %d for %d threads: it must be a multiple of 32", id, expected));
  Barrier& barrier = w.barriers[id];
  if (barrier.arrived && barrier.expected != expected)
    stop(t, text("barrier %d for %d threads, while others wait there for %d", id, expected, barrier.expected));
  barrier.expected = expected;
  if (++barrier.arrived < expected) {
    if (!wait_here) return;
    barrier.waiting.push_back(&t);
    t.waits_at = names[threads != 0];
    wait(t);
    return;
  }
  barrier.arrived = 0;
  ++w.epoch;  // of a part of the block too: the race detector then sees more order than there is
  for (Thread* other : barrier.waiting) w.ready.push_back(other);
  barrier.waiting.clear();
}

int block_count(bool predicate) {
  Worker& w = *self().worker;
  w.count += predicate;
  if (++w.counted == int(w.threads)) w.count_result = w.count, w.count = w.counted = 0;
  barrier(0, 0, true);
  return self().worker->count_result;
}

void async_copy(void* shared, const void* global, size_t bytes, size_t size) {
  Thread& t = self();
  const void* code = __builtin_return_address(0);
  access(shared, size, size, true, code);
  if (bytes) access(global, bytes, size, false, code);
  Worker& w = *t.worker;
  const auto p = reinterpret_cast<uintptr_t>(shared);
  Shared& memory = p - w.dynamic.begin < MAX_SHARED ? w.dynamic : w.statics;
  if (p - memory.begin >= memory.end - memory.begin) stop(t, "an asynchronous copy to where no shared memory is", code);
  memset(shared, 0xff, size);
  for (size_t i = 0; i < size; i += GRANULE)
    memory.shadow[(p + i - memory.begin) / GRANULE].written.thread |= IN_FLIGHT;
  t.copies.push_back({static_cast<unsigned char*>(shared), static_cast<const unsigned char*>(global), uint32_t(bytes),
                      uint32_t(size), t.groups});
}

void async_commit() { ++self().groups; }

void async_wait(int groups_left) {
  Thread& t = self();
  Worker& w = *t.worker;
  auto lands = [&](const Copy& c) { return int64_t(c.group) < int64_t(t.groups) - groups_left; };
  for (const Copy& c : t.copies) {
    if (!lands(c)) continue;
    const auto p = reinterpret_cast<uintptr_t>(c.to);
    Shared& memory = p - w.dynamic.begin < MAX_SHARED ? w.dynamic : w.statics;
    for (size_t i = 0; i < c.size; i += GRANULE)
      memory.shadow[(p + i - memory.begin) / GRANULE].written = {w.epoch, t.clock, uint16_t(t.linear)};
    memcpy(c.to, c.from, c.bytes);
    memset(c.to + c.bytes, 0, c.size - c.bytes);
  }
  t.copies.erase(std::remove_if(t.copies.begin(), t.copies.end(), lands), t.copies.end());
}

void load_matrix(unsigned* registers, const void* row, int count, bool transposed) {
  struct Input {
    const uint16_t* row;
    int count;
    bool transposed;
  } in{static_cast<const uint16_t*>(row), count, transposed};
  const Thread& t = self();
  if (int(t.lane) < 8 * count) access(row, 16, 16, false, __builtin_return_address(0));
  meet("ldmatrix", ~0u, &in, registers, [](Meeting& m) {
    each_lane(m, [&](int lane) {
      const Input& mine = input<Input>(m, lane);
      for (int i = 0; i < mine.count; ++i) {
        auto element = [&](int r, int c) { return unsigned(input<Input>(m, 8 * i + r).row[c]); };
        const int r = lane / 4, c = 2 * (lane % 4);
        (&output<unsigned>(m, lane))[i] =
            mine.transposed ? element(c, r) | element(c + 1, r) << 16 : element(r, c) | element(r, c + 1) << 16;
      }
    });
  });
}

void multiply(float* d, const unsigned* a, const unsigned* b, Element element) {
  struct Input {
    const unsigned *a, *b;
    Element element;
  } in{a, b, element};
  meet("mma", ~0u, &in, d, [](Meeting& m) {
    float left[16][16], right[16][8];
    const Element kind = input<Input>(m, 0).element;
    const int depth = kind == Element::tf32 ? 8 : 16;
    auto value = [&](unsigned bits) {
      return kind == Element::half ? __half2float({uint16_t(bits)}) : __bfloat162float({uint16_t(bits)});
    };
    each_lane(m, [&](int lane) {
      const Input& i = input<Input>(m, lane);
      const int row = lane / 4, col = lane % 4;
      if (kind == Element::tf32) {
        for (int r = 0; r < 4; ++r)
          left[row + 8 * (r % 2)][col + 4 * (r / 2)] = __uint_as_float(i.a[r] & 0xffffe000u);
        for (int r = 0; r < 2; ++r) right[col + 4 * r][row] = __uint_as_float(i.b[r] & 0xffffe000u);
        return;
      }
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < 4; ++r)
          left[row + 8 * (r % 2)][2 * col + half + 8 * (r / 2)] = value(i.a[r] >> 16 * half);
        for (int r = 0; r < 2; ++r) right[2 * col + half + 8 * r][row] = value(i.b[r] >> 16 * half);
      }
    });
    each_lane(m, [&](int lane) {
      float* out = &output<float>(m, lane);
      for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + 8 * (i / 2), col = 2 * (lane % 4) + i % 2;
        float sum = out[i];
        for (int k = 0; k < depth; ++k) sum += left[row][k] * right[k][col];
        out[i] = sum;
      }
    });
  });
}

void record(bool on) {
  only_recording = on;
  notes.clear();
}
bool recording() { return only_recording; }
std::vector<Launched> recorded() {
  std::vector<Launched> result;
  for (const Note& n : notes) result.push_back({kernel_name(n.kernel), n.grid, n.block, n.shared_bytes});
  return result;
}

void declare_buffer(const Buffer& buffer) {
  if (buffer.writable) memset(reinterpret_cast<void*>(buffer.begin), 0xff, buffer.end - buffer.begin);
  buffers.push_back(buffer);
}
void forget_buffers() { buffers.clear(); }
void set_seed(uint64_t value) { seed = value; }

void run(const char* kernel, Dim3 grid, Dim3 block, size_t shared_bytes, void (*body)(const void*), const void* args,
         size_t args_bytes) {
  std::lock_guard<std::mutex> lock(one_launch);
  if (only_recording) {
    notes.push_back({kernel, grid, block, shared_bytes});
    return;
  }
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > MAX_THREADS || block.z > 64 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535 || shared_bytes > MAX_SHARED)
    throw std::runtime_error(text("%s: invalid launch: grid %s, block %s, %zu bytes of shared memory", kernel_name(kernel).c_str(),
                                  place(grid).c_str(), place(block).c_str(), shared_bytes));
  if (!stacks.size) {
    const size_t size = MAX_WORKERS * MAX_THREADS * STACK;
    void* memory = mmap(nullptr, size + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for the threads' stacks");
    stacks.begin = (reinterpret_cast<uintptr_t>(memory) + STACK - 1) & ~uintptr_t(STACK - 1);
    stacks.size = size;
  }
  Launch launch;
  launch.kernel = kernel, launch.grid = grid, launch.block = block, launch.shared = shared_bytes;
  launch.body = body, launch.args = args;
  launch.args_begin = reinterpret_cast<uintptr_t>(args), launch.args_end = launch.args_begin + args_bytes;
  launch.threads = unsigned(threads), launch.blocks = blocks;
  const char* asked = std::getenv("DIT_KERNELS_EMULATOR_THREADS");
  unsigned n = asked ? unsigned(std::atoi(asked)) : std::thread::hardware_concurrency();
  if (blocks * threads < 8192) n = 1;  // a thread of the system costs more than that
  n = std::max(1u, std::min({n, MAX_WORKERS, unsigned(std::min<uint64_t>(blocks, MAX_WORKERS))}));
  for (unsigned i = 0; i < n; ++i) {
    Worker& w = workers[i];
    w.id = i, w.launch = &launch;
    if (!w.dynamic_memory) {
      w.dynamic_memory = static_cast<unsigned char*>(std::aligned_alloc(1024, (MAX_SHARED + 1023) / 1024 * 1024));
      w.dynamic = with_shadow(reinterpret_cast<uintptr_t>(w.dynamic_memory), MAX_SHARED);
    }
  }
  std::vector<std::thread> others;
  for (unsigned i = 1; i < n; ++i) others.emplace_back([i] { run_blocks(workers[i]); });
  run_blocks(workers[0]);
  for (auto& other : others) other.join();
  if (launch.failed)
    throw std::runtime_error(launch.error + text(" (grid %s, block %s, seed %llu)", place(grid).c_str(),
                                                 place(block).c_str(), (unsigned long long)seed));
}

}  // namespace emulator
