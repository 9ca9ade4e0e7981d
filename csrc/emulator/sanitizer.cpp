// The entry points that -fsanitize=thread calls at every memory access. The kernels are compiled with it
// and linked with this file instead of libtsan.
#include <cstdint>
#include <cstring>
#include <string>

#include "runtime.h"

namespace emulator {
void access(const void* address, size_t bytes, size_t alignment, bool write, const void* code);
void fail_at(const std::string& message, const void* code);
}  // namespace emulator

using emulator::access;

#define HERE __builtin_return_address(0)
#define HOOK extern "C" __attribute__((visibility("hidden")))

HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}

#define ACCESS(bytes)                                                                             \
  HOOK void __tsan_read##bytes(void* p) { access(p, bytes, bytes, false, HERE); }                 \
  HOOK void __tsan_write##bytes(void* p) { access(p, bytes, bytes, true, HERE); }                 \
  HOOK void __tsan_volatile_read##bytes(void* p) { access(p, bytes, bytes, false, HERE); }        \
  HOOK void __tsan_volatile_write##bytes(void* p) { access(p, bytes, bytes, true, HERE); }        \
  HOOK void __tsan_unaligned_read##bytes(void* p) { access(p, bytes, 1, false, HERE); }           \
  HOOK void __tsan_unaligned_write##bytes(void* p) { access(p, bytes, 1, true, HERE); }
ACCESS(1)
ACCESS(2)
ACCESS(4)
ACCESS(8)
ACCESS(16)
HOOK void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, 1, false, HERE); }
HOOK void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, 1, true, HERE); }
