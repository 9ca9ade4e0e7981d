// The execution model: a fiber a thread, switched where a thread waits; blocks over a few OS threads.
#include "runtime.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "execution.h"

namespace emulator {

std::vector<Buffer> buffers;
Region stacks;

namespace {

bool only_recording = false;
struct Note {
  const char* kernel;
  Dim3 grid, block;
  size_t shared_bytes;
};
std::vector<Note> notes;
uint64_t seed = 0;
constexpr int64_t MOST_BLOCKS = 65535;  // along y or z
int64_t blocks_allowed = MOST_BLOCKS;
std::mutex one_launch;
Worker workers[MAX_WORKERS];

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

// The most threads of a kernel's block, 0 where it doesn't say: cuda.h puts as many no-ops in front of it, and
// the compiler lists where those begin.
extern "C" __attribute__((weak, visibility("hidden"))) const uintptr_t __start___patchable_function_entries[];
extern "C" __attribute__((weak, visibility("hidden"))) const uintptr_t __stop___patchable_function_entries[];

unsigned launch_bound(const void* kernel) {
  const auto* code = static_cast<const unsigned char*>(kernel);
  for (auto* entry = __start___patchable_function_entries; entry < __stop___patchable_function_entries; ++entry) {
    const auto* begin = reinterpret_cast<const unsigned char*>(*entry);
    if (begin >= code || code - begin > 65535) continue;
    if (std::all_of(begin, code, [](unsigned char byte) { return byte == 0x90; })) return unsigned(code - begin);
  }
  return 0;
}

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

}  // namespace

__attribute__((noinline)) Thread& self() { return *thread_at(stack_pointer()); }

std::string text(const char* format, ...) {
  char line[1024];
  va_list rest;
  va_start(rest, format);
  vsnprintf(line, sizeof line, format, rest);
  va_end(rest);
  return line;
}

std::string place(Dim3 d) { return text("(%u, %u, %u)", d.x, d.y, d.z); }

void stop(Thread& t, const std::string& message, const void* code) {
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

namespace {

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

}  // namespace

void wait(Thread& t) {
  if (_setjmp(t.context) != 0) return;
  Thread* next = pick(*t.worker);
  if (next) resume(*next);
  _longjmp(t.worker->scheduler, 1);
}

// --- blocks ------------------------------------------------------------------------------------------

namespace {

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

// Number i of 0 to count - 1 in an order drawn from the seed: a Feistel network permutes the next power of four,
// and what falls past the end goes through it again
uint64_t shuffled(uint64_t i, uint64_t count) {
  unsigned half = 0;
  while (count > uint64_t{1} << 2 * half) ++half;
  const uint64_t mask = (uint64_t{1} << half) - 1;
  do {
    uint64_t low = i & mask, high = i >> half;
    for (uint64_t round = 0; round < 6; ++round) {
      uint64_t mixed = (low + 1) * 0x9e3779b97f4a7c15ull ^ (seed + 1) * 0xbf58476d1ce4e5b9ull ^ round << 56;
      mixed = (mixed ^ mixed >> 30) * 0xbf58476d1ce4e5b9ull;
      mixed = (mixed ^ mixed >> 27) * 0x94d049bb133111ebull;
      const uint64_t next = high ^ (mixed >> 32 & mask);
      high = low, low = next;
    }
    i = high << half | low;
  } while (i >= count);
  return i;
}

void run_blocks(Worker& w) {
  find_statics(w);
  Launch& launch = *w.launch;
  for (uint64_t i; !launch.failed && (i = launch.next++) < launch.blocks;) {
    begin_block(w, shuffled(i, launch.blocks));
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

}  // namespace

// --- launches ----------------------------------------------------------------------------------------

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

int64_t most_blocks() { return blocks_allowed; }
void set_most_blocks(int64_t blocks) {
  if (blocks < 1 || blocks > MOST_BLOCKS) throw std::invalid_argument(text("1 to %d blocks", int(MOST_BLOCKS)));
  blocks_allowed = blocks;
}

uint64_t written() {
  uint64_t bytes = 0;
  for (const Worker& w : workers) bytes += w.written;
  return bytes;
}

void run(const char* kernel, const void* code, Dim3 grid, Dim3 block, size_t shared_bytes, void (*body)(const void*),
         const void* args, size_t args_bytes) {
  std::lock_guard<std::mutex> lock(one_launch);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z;
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  if (threads == 0 || threads > MAX_THREADS || block.z > 64 || grid.x > 0x7fffffffu ||
      grid.y > most_blocks() || grid.z > MOST_BLOCKS || shared_bytes > MAX_SHARED)
    throw std::runtime_error(text("%s: invalid launch: grid %s, block %s, %zu bytes of shared memory", kernel_name(kernel).c_str(),
                                  place(grid).c_str(), place(block).c_str(), shared_bytes));
  const unsigned bound = launch_bound(code);
  if (bound && threads > bound)
    throw std::runtime_error(text("%s: invalid launch: block %s, and the kernel has __launch_bounds__(%u)",
                                  kernel_name(kernel).c_str(), place(block).c_str(), bound));
  if (only_recording) {
    notes.push_back({kernel, grid, block, shared_bytes});
    return;
  }
  if (!stacks.size) {
    const size_t size = MAX_WORKERS * MAX_THREADS * STACK;
    void* memory = mmap(nullptr, size + STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for the threads' stacks");
    stacks.begin = (reinterpret_cast<uintptr_t>(memory) + STACK - 1) & ~uintptr_t(STACK - 1);
    stacks.size = size;
  }
  read_variables();
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
