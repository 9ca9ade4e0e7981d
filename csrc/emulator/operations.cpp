// The operations of a warp and of a block: shuffles, votes, barriers, asynchronous copies, matrix instructions.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cuda.h"
#include "execution.h"

#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim

namespace emulator {
namespace {

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

std::string line_of(const Place& place) {
  const char* file = strrchr(place.file, '/');
  return text("%s:%d", file ? file + 1 : place.file, place.line);
}

void advance_clocks(Meeting& m) {
  uint16_t latest = 0;
  each_lane(m, [&](int i) { latest = std::max(latest, m.lanes[i]->clock); });
  each_lane(m, [&](int i) { m.lanes[i]->clock = uint16_t(latest + 1); });
}

}  // namespace

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

void barrier(int id, int threads, bool wait_here, Place place) {
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
  if (!barrier.arrived) barrier.place = place;
  const Place& first = barrier.place;
  if (place.file && first.file && (place.line != first.line || strcmp(place.file, first.file)))
    stop(t, text("__syncthreads of %s, while %d threads of the block wait at that of %s", line_of(place).c_str(),
                 barrier.arrived, line_of(first).c_str()));
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

int block_count(bool predicate, Place place) {
  Worker& w = *self().worker;
  w.count += predicate;
  if (++w.counted == int(w.threads)) w.count_result = w.count, w.count = w.counted = 0;
  barrier(0, 0, true, place);
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

}  // namespace emulator
