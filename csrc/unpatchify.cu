// Unpatchify and its inverse: a block moves some patches of a frame through shared memory, so that both sides
// are read and written in the order of memory, 16 bytes at a time where strides allow it.
#include "unpatchify.h"

namespace dk {
namespace {

constexpr int kThreads = 256;

// Division by a number that the host knows, of less than 2^31 by a multiplication
struct Divisor {
  uint32_t by, factor, shift;

  Divisor() = default;
  explicit Divisor(uint32_t by) : by(by) {
    shift = 0;
    while ((uint64_t{1} << shift) < by) ++shift;
    factor = static_cast<uint32_t>(((uint64_t{1} << 32) * ((uint64_t{1} << shift) - by)) / by + 1);
  }
  // the quotient; `n` becomes the remainder
  __device__ uint32_t split(uint32_t& n) const {
    const uint32_t quotient = (__umulhi(n, factor) + n) >> shift;
    n -= quotient * by;
    return quotient;
  }
};

struct Divisors {
  Divisor values, row, height, frames, width;  // K; elements of a video row; patch's h, t, w
};

template <typename Word, bool INVERSE, int TOKEN_VECTOR, int VIDEO_VECTOR>
__global__ void __launch_bounds__(kThreads) unpatchify_kernel(const Unpatchify call, const Divisors by) {
  DK_DYNAMIC_SHARED(Word, tile);  // [patches][stride]: odd, so that neighbours lie in different banks
  const int channels = call.channels, pt = call.patch[0], ph = call.patch[1], pw = call.patch[2];
  const int values = pt * ph * pw * channels, stride = values | 1;
  int64_t block = blockIdx.x;
  const int blocks_w = (call.grid[2] + call.block_w - 1) / call.block_w;
  const int blocks_h = (call.grid[1] + call.block_h - 1) / call.block_h;
  const int gw0 = static_cast<int>(block % blocks_w) * call.block_w;
  block /= blocks_w;
  const int gh0 = static_cast<int>(block % blocks_h) * call.block_h;
  block /= blocks_h;
  const int gt = static_cast<int>(block % call.grid[0]);
  const int64_t sample = block / call.grid[0];
  const int bw = gw0 + call.block_w < call.grid[2] ? call.block_w : call.grid[2] - gw0;
  const int bh = gh0 + call.block_h < call.grid[1] ? call.block_h : call.grid[1] - gh0;

  // a patch's values, TOKEN_VECTOR at a time
  auto tokens = [&] {
    Word* const rows = static_cast<Word*>(call.tokens) + sample * call.token_strides[0];
    for (int at = threadIdx.x; at < bh * bw * values / TOKEN_VECTOR; at += kThreads) {
      uint32_t k = at * TOKEN_VECTOR;
      const int patch = by.values.split(k);
      const int64_t n = (static_cast<int64_t>(gt) * call.grid[1] + gh0 + patch / bw) * call.grid[2] + gw0 + patch % bw;
      Word* const token = rows + n * call.token_strides[1] + k * call.token_strides[2];
      Word* const shared = tile + patch * stride + k;
      Packed<Word, TOKEN_VECTOR> packed;
      if constexpr (INVERSE) {
#pragma unroll
        for (int i = 0; i < TOKEN_VECTOR; ++i) packed.at[i] = shared[i];
        packed.store(token);
      } else {
        packed.load(token);
#pragma unroll
        for (int i = 0; i < TOKEN_VECTOR; ++i) shared[i] = packed.at[i];
      }
    }
  };
  // rows of the video that the patches hold, VIDEO_VECTOR adjacent elements at a time, in one row or in several
  auto video = [&] {
    Word* const frame = static_cast<Word*>(call.video) + sample * call.video_strides[0];
    const int row = bw * pw, total = channels * pt * bh * ph * row;
    for (int at = threadIdx.x * VIDEO_VECTOR; at < total; at += kThreads * VIDEO_VECTOR) {
      uint32_t x = at;
      uint32_t h = bw == call.block_w ? by.row.split(x) : x / row;
      if (bw != call.block_w) x -= h * row;
      uint32_t patch_h = by.height.split(h);  // h: in the patch
      uint32_t t = patch_h / bh;
      patch_h -= t * bh;
      const uint32_t c = by.frames.split(t);
      uint32_t w = x;
      uint32_t patch_w = by.width.split(w);
      const int64_t y = static_cast<int64_t>(gh0 + patch_h) * ph + h;
      Word* const pixels = frame + c * call.video_strides[1] +
                           (static_cast<int64_t>(gt) * pt + t) * call.video_strides[2] + y * call.video_strides[3] +
                           (static_cast<int64_t>(gw0) * pw + x) * call.video_strides[4];
      int k = t * call.steps[0] + h * call.steps[1] + c * call.steps[3];
      Packed<Word, VIDEO_VECTOR> packed;
      if constexpr (INVERSE) packed.load(pixels);
#pragma unroll
      for (int i = 0; i < VIDEO_VECTOR; ++i) {
        Word& shared = tile[(patch_h * bw + patch_w) * stride + k + w * call.steps[2]];
        if constexpr (INVERSE) shared = packed.at[i];
        else packed.at[i] = shared;
        if (++w == static_cast<uint32_t>(pw)) {
          w = 0;
          // rows that follow one another in memory: a vector may reach into the next
          if (++patch_w == static_cast<uint32_t>(bw)) {
            patch_w = 0;
            k += call.steps[1];
            if (++h == static_cast<uint32_t>(ph)) {
              h = 0;
              k -= ph * call.steps[1];
              ++patch_h;
            }
          }
        }
      }
      if constexpr (!INVERSE) packed.store(pixels);
    }
  };
  if constexpr (INVERSE) {
    video();
    __syncthreads();
    tokens();
  } else {
    tokens();
    __syncthreads();
    video();
  }
}

template <typename Word, bool INVERSE>
void launch(const Unpatchify& call, cudaStream_t stream) {
  constexpr int VECTOR = 16 / sizeof(Word);
  const int64_t values = int64_t{call.patch[0]} * call.patch[1] * call.patch[2] * call.channels;
  // elements that are adjacent in the video: of a row, or of all rows where the block has the whole width
  const int64_t row = int64_t{call.block_w} * call.patch[2];
  int64_t last = call.grid[2] % call.block_w * call.patch[2];
  const bool whole = call.block_w == call.grid[2] && call.video_strides[3] == row;
  const int64_t adjacent = whole ? row * call.patch[1] * call.block_h : row;
  if (whole) last = row * call.patch[1] * (call.grid[1] % call.block_h);
  const size_t shared = sizeof(Word) * call.block_h * call.block_w * (values | 1);
  if (shared > 96 * 1024 || call.block_h < 1 || call.block_w < 1) {
    throw std::invalid_argument(std::to_string(call.block_h) + " x " + std::to_string(call.block_w) +
                                " patches of " + std::to_string(values) + " values do not fit shared memory");
  }
  Divisors by;
  by.values = Divisor(static_cast<uint32_t>(values));
  by.row = Divisor(static_cast<uint32_t>(row));
  by.height = Divisor(call.patch[1]);
  by.frames = Divisor(call.patch[0]);
  by.width = Divisor(call.patch[2]);
  const int64_t blocks = call.samples * call.grid[0] * ceil_div(call.grid[1], call.block_h) *
                         ceil_div(call.grid[2], call.block_w);
  const bool wide_tokens = values % VECTOR == 0 && call.token_strides[2] == 1 &&
                           aligned16(call.tokens, sizeof(Word), call.token_strides[0], call.token_strides[1]);
  const bool wide_video = adjacent % VECTOR == 0 && last % VECTOR == 0 && call.video_strides[4] == 1 &&
                          aligned16(call.video, sizeof(Word), call.video_strides[0], call.video_strides[1],
                                    call.video_strides[2], whole ? 0 : call.video_strides[3]);
  with_bool(wide_tokens, [&](auto tokens) {
    with_bool(wide_video, [&](auto video) {
      constexpr int TOKENS = decltype(tokens)::value ? VECTOR : 1, VIDEO = decltype(video)::value ? VECTOR : 1;
      DK_LAUNCH((unpatchify_kernel<Word, INVERSE, TOKENS, VIDEO>), grid_of(blocks), dim3(kThreads), shared, stream,
                call, by);
    });
  });
}

}  // namespace

void unpatchify(const Unpatchify& call, cudaStream_t stream) {
  if (call.bytes != 2 && call.bytes != 4) {
    throw std::invalid_argument("values have 2 or 4 bytes; got " + std::to_string(call.bytes));
  }
  with_bool(call.inverse, [&](auto inverse) {
    constexpr bool INVERSE = decltype(inverse)::value;
    if (call.bytes == 2) launch<uint16_t, INVERSE>(call, stream);
    else launch<uint32_t, INVERSE>(call, stream);
  });
}

}  // namespace dk
