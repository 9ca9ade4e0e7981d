// The entry points that -fsanitize=thread calls at every memory access, and -fsanitize=bounds at an index
// that is not of its array. The kernels are linked with this file instead of libtsan and libubsan.
#include <cstdint>
#include <cstring>
#include <string>

#include "execution.h"

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
// memcpy, memmove and memset in the kernels' files, by the names that cuda.h gives them
void range(const void* p, size_t bytes, bool write, const void* code) {
  if (bytes) access(p, bytes, 1, write, code);
}
HOOK void* __tsan_memcpy(void* to, const void* from, size_t bytes) {
  range(from, bytes, false, HERE);
  range(to, bytes, true, HERE);
  return std::memcpy(to, from, bytes);
}
HOOK void* __tsan_memmove(void* to, const void* from, size_t bytes) {
  range(from, bytes, false, HERE);
  range(to, bytes, true, HERE);
  return std::memmove(to, from, bytes);
}
HOOK void* __tsan_memset(void* to, int value, size_t bytes) {
  range(to, bytes, true, HERE);
  return std::memset(to, value, bytes);
}
// what gcc makes of a copy of a large struct
HOOK void __tsan_read_range(void* p, size_t bytes) { access(p, bytes, 1, false, HERE); }
HOOK void __tsan_write_range(void* p, size_t bytes) { access(p, bytes, 1, true, HERE); }

// std::atomic and guards of static variables, in host code mostly
#define ATOMIC(bits)                                                                                          \
  HOOK uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {                     \
    access(const_cast<uint##bits##_t*>(p), bits / 8, bits / 8, false, HERE);                                  \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                           \
  HOOK void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t value, int) {              \
    access(const_cast<uint##bits##_t*>(p), bits / 8, bits / 8, true, HERE);                                   \
    __atomic_store_n(p, value, __ATOMIC_SEQ_CST);                                                             \
  }                                                                                                           \
  HOOK uint##bits##_t __tsan_atomic##bits##_exchange(volatile uint##bits##_t* p, uint##bits##_t value, int) { \
    access(const_cast<uint##bits##_t*>(p), bits / 8, bits / 8, true, HERE);                                   \
    return __atomic_exchange_n(p, value, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                           \
  HOOK uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* p, uint##bits##_t value, int) { \
    access(const_cast<uint##bits##_t*>(p), bits / 8, bits / 8, true, HERE);                                   \
    return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST);                                                    \
  }                                                                                                           \
  HOOK int __tsan_atomic##bits##_compare_exchange_strong(volatile uint##bits##_t* p, uint##bits##_t* expected, \
                                                         uint##bits##_t value, int, int) {                    \
    access(const_cast<uint##bits##_t*>(p), bits / 8, bits / 8, true, HERE);                                   \
    return __atomic_compare_exchange_n(p, expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);        \
  }
ATOMIC(8)
ATOMIC(16)
ATOMIC(32)
ATOMIC(64)

// gcc's description of an array index (libsanitizer/ubsan/ubsan_handlers.h, ubsan_value.h)
struct Type {
  uint16_t kind, info;
  char name[1];
};
struct Index {
  struct {
    const char* file;
    uint32_t line, column;
  } place;
  const Type *array, *index;
};

HOOK void __ubsan_handle_out_of_bounds(Index* where, uintptr_t value) {
  const char* file = std::strrchr(where->place.file, '/');
  emulator::fail_at("index " + std::to_string(static_cast<intptr_t>(value)) + " is out of bounds of " +
                        where->array->name + " at " + (file ? file + 1 : where->place.file) + ":" +
                        std::to_string(where->place.line),
                    nullptr);
}
HOOK void __ubsan_handle_out_of_bounds_abort(Index* where, uintptr_t value) {
  __ubsan_handle_out_of_bounds(where, value);
}
