// What is checked of every access of a kernel: bounds, alignment, races on shared memory, copies in flight.
#include <cxxabi.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "execution.h"

namespace emulator {
namespace {

uintptr_t image_begin, image_end;  // this library: constants of a kernel lie in it
thread_local char tls_anchor;      // in the same thread-local block as every `__shared__` variable

// A `__shared__` variable: its place in that block. No two begin in the same SHARED_ALIGNMENT bytes.
struct Variable {
  size_t begin = 0, end = 0;
  const char* symbol = nullptr;
};
std::vector<Variable> variables;  // of each SHARED_ALIGNMENT bytes of the block
std::vector<size_t> guards;       // the compiler's own, sorted: whether a variable has been constructed

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

// "scratch" from the mangled "kernel(float*)::scratch"
std::string variable_name(const Variable& variable) {
  int status = 0;
  char* found = abi::__cxa_demangle(variable.symbol, nullptr, nullptr, &status);
  const std::string name = status == 0 ? found : variable.symbol;
  std::free(found);
  return name.substr(name.rfind(':') + 1);
}

std::string who(const Worker& w, unsigned linear) {
  const Dim3 s = w.launch->block;
  return place({linear % s.x, linear / s.x % s.y, linear / s.x / s.y});
}

bool ordered(const Stamp& before, const Thread& t) {
  if (before.epoch != t.worker->epoch) return true;
  const unsigned thread = before.thread & THREAD;
  return thread == t.linear || (thread / 32 == t.linear / 32 && before.clock < t.clock);
}

[[noreturn]] void race(Thread& t, const Shared& shared, uintptr_t p, const char* does, const char* did, const Stamp& other,
                       const void* code) {
  const bool dynamic = &shared == &t.worker->dynamic;
  const Variable variable = dynamic ? Variable{} : variables[(p - shared.begin) / SHARED_ALIGNMENT];
  stop(t, text("race on shared memory: it %s byte %zu of %s, which thread %s %s, with no barrier between", does,
               size_t(p - shared.begin) - variable.begin, dynamic ? "the dynamic part" : variable_name(variable).c_str(),
               who(*t.worker, other.thread & THREAD).c_str(), did),
       code);
}

const char* done(const Stamp& read) { return read.thread & ATOMIC ? "updated" : "read"; }

// The granule at `at`, which nothing that is under way or unordered has written
Granule& granule(Thread& t, Shared& shared, uintptr_t at, const char* does, const void* code) {
  Granule& g = shared.shadow[(at - shared.begin) / GRANULE];
  const uint32_t first = t.worker->first_epoch;
  if (g.written.epoch < first && g.read.epoch < first) {
    memset(reinterpret_cast<void*>(at), 0xff, GRANULE);  // NaN in every format
    g = {};
  }
  if (g.written.thread & IN_FLIGHT && g.written.epoch >= first)
    stop(t, text("it %s byte %zu of the shared memory, where an asynchronous copy of thread %s has not landed: its wait is missing",
                 does, size_t(at - shared.begin), who(*t.worker, g.written.thread & ~IN_FLIGHT).c_str()),
         code);
  if (!ordered(g.written, t)) race(t, shared, at, does, "wrote", g.written, code);
  return g;
}

// Remembers a read or an atomic: two of them, unordered ones, of two warps if there are as many. A later
// access that is ordered after both is ordered after all, unless three warps and a __syncwarp meet.
void remember(Granule& g, const Thread& t, const Stamp& now) {
  const auto spare = [&](const Stamp& s) {  // what was a read must not become an atomic, nor the reverse
    return ordered(s, t) && (s.epoch != now.epoch || (s.thread & ATOMIC) == (now.thread & ATOMIC));
  };
  if (spare(g.read)) g.read = now;
  else if (spare(g.read2)) g.read2 = now;
  else if (ordered(g.read2, t) || (g.read2.thread & THREAD) / 32 == (g.read.thread & THREAD) / 32) g.read2 = now;
}

void shared_access(Thread& t, Shared& shared, uintptr_t p, size_t n, bool write, const void* code) {
  if (p % GRANULE + n > GRANULE && p % GRANULE) ++n;
  const Stamp now{t.worker->epoch, t.clock, uint16_t(t.linear)};
  const char* does = write ? "writes" : "reads";
  for (uintptr_t at = p & ~uintptr_t(GRANULE - 1); at < p + n; at += GRANULE) {
    Granule& g = granule(t, shared, at, does, code);
    if (write || (g.read.thread | g.read2.thread) & ATOMIC) {
      for (const Stamp& before : {g.read, g.read2})
        if ((write || before.thread & ATOMIC) && !ordered(before, t)) race(t, shared, at, does, done(before), before, code);
    }
    if (write) g.written = now;
    else remember(g, t, now);
  }
}

// Atomics don't race with one another.
void shared_atomic(Thread& t, Shared& shared, uintptr_t p, size_t n, const void* code) {
  const Stamp now{t.worker->epoch, t.clock, uint16_t(t.linear | ATOMIC)};
  for (uintptr_t at = p; at < p + n; at += GRANULE) {
    Granule& g = granule(t, shared, at, "updates", code);
    for (const Stamp& before : {g.read, g.read2})
      if (!(before.thread & ATOMIC) && !ordered(before, t)) race(t, shared, at, "updates", "read", before, code);
    remember(g, t, now);
  }
}

void global_access(Thread& t, uintptr_t p, size_t n, bool write, const void* code) {
  Worker& w = *t.worker;
  if (write) w.written += n;
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

// Within one variable: none lies right behind another. false: it is none of the kernel's.
bool check_variable(Thread& t, size_t at, size_t n, bool write, const void* code) {
  const size_t page = at / SHARED_ALIGNMENT;
  const Variable here = page < variables.size() ? variables[page] : Variable{};
  if (here.begin <= at && at + n <= here.end) return true;
  if (std::binary_search(guards.begin(), guards.end(), at)) return false;
  const Variable next = page + 1 < variables.size() ? variables[page + 1] : Variable{};
  const bool before = next.begin > at && (!here.symbol || next.begin - at < at + n - here.end);
  const Variable& nearest = before ? next : here;
  stop(t, text("it %s %zu bytes of shared memory, %zu bytes %s of %s, which has %zu", write ? "writes" : "reads", n,
               before ? next.begin - at : at + n - here.end, before ? "before the start" : "past the end",
               nearest.symbol ? variable_name(nearest).c_str() : "all variables", nearest.end - nearest.begin),
       code);
}

void check(Thread& t, uintptr_t p, size_t n, bool write, const void* code, bool atomic = false) {
  Worker& w = *t.worker;
  Shared* shared = nullptr;
  if (p - w.statics.begin < w.statics.end - w.statics.begin) {
    if (!check_variable(t, p - w.statics.begin, n, write, code)) return;
    shared = &w.statics;
  } else if (p - w.dynamic.begin < MAX_SHARED) {
    if (p - w.dynamic.begin + n > w.launch->shared)
      stop(t, text("it %s byte %zu of dynamic shared memory; the launch gave %zu", write ? "writes" : "reads",
                   size_t(p - w.dynamic.begin + n - 1), w.launch->shared),
           code);
    shared = &w.dynamic;
  }
  if (shared) return atomic ? shared_atomic(t, *shared, p, n, code) : shared_access(t, *shared, p, n, write, code);
  if (p - stacks.begin < stacks.size) stop(t, "it touches a local variable of another thread", code);
  global_access(t, p, n, write, code);
}

}  // namespace

Shared with_shadow(uintptr_t begin, size_t bytes) {
  const size_t cells = bytes / GRANULE + 1;
  void* shadow = mmap(nullptr, cells * sizeof(Granule), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (shadow == MAP_FAILED) throw std::runtime_error("emulator: no memory for the shadow of shared memory");
  return {begin, begin + bytes, static_cast<Granule*>(shadow)};
}

// Where each `__shared__` variable is: from the symbols in this library's file, which the loader does not map
void read_variables() {
  if (!variables.empty()) return;
  Dl_info library{};
  dladdr(&variables, &library);
  const auto failed = [&](const char* why) {
    return std::runtime_error(text("emulator: the sizes of __shared__ variables are in %s, %s", library.dli_fname, why));
  };
  const int file = open(library.dli_fname, O_RDONLY | O_CLOEXEC);
  struct stat status{};
  if (file < 0 || fstat(file, &status)) throw failed("which can't be opened");
  const auto* bytes = static_cast<const char*>(mmap(nullptr, size_t(status.st_size), PROT_READ, MAP_PRIVATE, file, 0));
  close(file);
  if (bytes == MAP_FAILED) throw failed("which can't be mapped");  // it stays so: names point into it
  const auto& header = *reinterpret_cast<const ElfW(Ehdr)*>(bytes);
  const auto* sections = reinterpret_cast<const ElfW(Shdr)*>(bytes + header.e_shoff);
  const auto* table = std::find_if(sections, sections + header.e_shnum, [](auto& s) { return s.sh_type == SHT_SYMTAB; });
  if (table == sections + header.e_shnum) throw failed("which has lost its symbols: don't strip it");
  const char* names = bytes + sections[table->sh_link].sh_offset;
  const auto* symbols = reinterpret_cast<const ElfW(Sym)*>(bytes + table->sh_offset);
  std::vector<Variable> found(1);
  for (const auto* symbol = symbols; symbol < symbols + table->sh_size / sizeof *symbols; ++symbol) {
    const Variable variable{symbol->st_value, symbol->st_value + symbol->st_size, names + symbol->st_name};
    if (!strncmp(variable.symbol, "_ZGV", 4)) guards.push_back(variable.begin);
    // of functions' variables, "_ZZ", those that cuda.h has aligned
    if (ELF64_ST_TYPE(symbol->st_info) != STT_TLS || strncmp(variable.symbol, "_ZZ", 3)) continue;
    if (symbol->st_size == 0 || variable.begin % SHARED_ALIGNMENT) continue;
    const size_t last = (variable.end + RED_ZONE - 1) / SHARED_ALIGNMENT;
    if (last > (variable.end - 1) / SHARED_ALIGNMENT)
      throw failed(text("where less than %zu bytes are free behind the %zu of %s: raise DK_SHARED_ALIGNMENT", RED_ZONE,
                        size_t(symbol->st_size), variable_name(variable).c_str()).c_str());
    if (found.size() <= last) found.resize(last + 1);
    std::fill(found.begin() + long(variable.begin / SHARED_ALIGNMENT), found.begin() + long(last) + 1, variable);
  }
  std::sort(guards.begin(), guards.end());
  variables = std::move(found);
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
  check(t, p, bytes, true, code, true);
}

}  // namespace emulator
