// Forward of adaLN: each input is read once and each output written once.
//
// A block is one row wide: 16 bytes of it a thread, VECTORS times. It walks over a chunk of tokens, and the
// next row is on its way into shared memory while this one is computed: a thread copies only what it reads
// itself, so that no barrier is needed. Modulation rows are read again for every token, from L1.
#include "adaln.cuh"

namespace dk {
namespace {

using namespace adaln;

constexpr int kMaxThreads = 512;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr bool kBlackwell = true;
#else
constexpr bool kBlackwell = false;
#endif

// Blocks of so many threads that a multiprocessor shall have room for: one leaves 128 registers a thread, two
// leave 64; 0 is as ptxas thinks best, which for some kernels is a register less than they need, and spills.
// Five vectors of two float32 rows fill shared memory before registers run out.
template <typename T, int VECTORS, bool GATED>
constexpr int kBlocks = sizeof(T) == 4 && VECTORS == 5 && GATED ? 1
                        : kBlackwell                            ? (VECTORS == 3 && GATED ? 2 : 0)
                                                                : (sizeof(T) == 4 ? 2 : 0);

template <typename T, int VECTORS, bool GATED>
__global__ void __launch_bounds__(kMaxThreads, kBlocks<T, VECTORS, GATED>)
    adaln_fwd_kernel(const AdalnForward call) {
  constexpr int WIDTH = 16 / sizeof(T);
  constexpr int ROWS = GATED ? 2 : 1;
  constexpr DType DTYPE = dtype_of<T>;
  DK_DYNAMIC_SHARED(uint4, ring);  // [2][ROWS][VECTORS][threads]
  __shared__ float2 scratch[64];

  const int64_t first = blockIdx.x * static_cast<int64_t>(call.chunk), first_sample = first / call.size.length;
  const int64_t left = call.size.samples * call.size.length - first;
  const int count = static_cast<int>(left < call.chunk ? left : call.chunk);
  Place next{first_sample, static_cast<int32_t>(first - first_sample * call.size.length), first};
  RowSums row_sums(scratch);
  const int threads = blockDim.x, channels = call.size.channels;
  const bool eager = call.form.eager;
  auto slot = [&](int step, int row, int v) -> uint4* {
    return ring + (((step & 1) * ROWS + row) * VECTORS + v) * threads + threadIdx.x;
  };
  auto fetch_next = [&](int step) {
    if (step < count) {
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        const int channel = (v * threads + threadIdx.x) * WIDTH;
        if (channel < channels) {
          copy_async_row<T>(slot(step, 0, v), call.x, row_offset(call.x, next) + channel);
          if constexpr (GATED) {
            copy_async_row<T>(slot(step, 1, v), call.residual, row_offset(call.residual, next) + channel);
          }
        }
      }
    }
    cp_async_commit();
  };

  fetch_next(0);
  for (int step = 0; step < count; ++step) {
    const Place place = next;
    ++next.index;
    if (++next.n == call.size.length) {
      next.n = 0;
      ++next.sample;
    }
    fetch_next(step + 1);
    cp_async_wait<1>();

    const int64_t token = place.index, out_row = token * channels;
    float x[VECTORS][WIDTH];
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int channel = (v * threads + threadIdx.x) * WIDTH;
      fill(x[v], 0.0f);
      if (channel < channels) load_row_part<T>(x[v], slot(step, 0, v), call.x.dtype);
    }

    if constexpr (GATED) {
      const DType branch_dtype = sizeof(T) == 4 ? call.x.dtype : DTYPE;
      float branch_rstd = 1.0f;
      if (call.form.branch_rms) {
        float square = 0.0f;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) square += x[v][i] * x[v][i];
        }
        branch_rstd = rsqrtf(row_sums(square) / channels + call.form.eps);
        if (call.branch_rstd != nullptr && threadIdx.x == 0) call.branch_rstd[token] = branch_rstd;
      }
      const int64_t gate_row = row_offset(call.gate, call.row_index, place);
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        const int channel = (v * threads + threadIdx.x) * WIDTH;
        if (channel < channels) {
          float residual[WIDTH];
          load_row_part<T>(residual, slot(step, 1, v), DTYPE);
          add_branch(x[v], residual, call, branch_rstd, branch_dtype, gate_row, channel);
          store_channels(call.out, out_row + channel, x[v], DTYPE);
        }
      }
    }

    if (call.form.norm != Norm::none) {
      const bool rms = call.form.norm == Norm::rms;
      if (!rms) {
        float sum = 0.0f;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) sum += x[v][i];
        }
        const float mean = row_sums(sum) / channels;
        if (call.mean != nullptr && threadIdx.x == 0) call.mean[token] = mean;
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
          const int channel = (v * threads + threadIdx.x) * WIDTH;
          if (channel < channels) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) x[v][i] -= mean;
          }
        }
      }
      float square = 0.0f;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) square += x[v][i] * x[v][i];
      }
      const float rstd = rsqrtf(row_sums(square) / channels + call.form.eps);
      if (call.rstd != nullptr && threadIdx.x == 0) call.rstd[token] = rstd;

      const int64_t shift_row = row_offset(call.shift, call.row_index, place);
      const int64_t scale_row = row_offset(call.scale, call.row_index, place);
      const int64_t shift2_row = row_offset(call.shift2, call.row_index, place);
      const int64_t scale2_row = row_offset(call.scale2, call.row_index, place);
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        const int channel = (v * threads + threadIdx.x) * WIDTH;
        if (channel < channels) {
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) x[v][i] *= rstd;
          apply_affine(x[v], call.weight, call.bias, channel, rms, DTYPE, eager);
          float y[WIDTH];
          if (call.y2 != nullptr) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) y[i] = x[v][i];
            modulate(y, DTYPE, call.scale2, Channels{}, scale2_row, call.shift2, Channels{}, shift2_row, channel,
                     eager);
            store_channels(call.y2, out_row + channel, y, DTYPE);
          }
          modulate(x[v], DTYPE, call.scale, call.scale_table, scale_row, call.shift, call.shift_table, shift_row,
                   channel, eager);
          store_channels(call.y, out_row + channel, x[v], DTYPE);
        }
      }
    }
  }
}

template <typename T, int VECTORS, bool GATED>
void launch(const AdalnForward& call, cudaStream_t stream) {
  const int64_t tokens = call.size.samples * call.size.length;
  const size_t shared = 2 * (GATED ? 2 : 1) * VECTORS * call.size.threads * sizeof(uint4);
  DK_LAUNCH((adaln_fwd_kernel<T, VECTORS, GATED>), grid_of(ceil_div(tokens, call.chunk)), dim3(call.size.threads), shared, stream, call);
}

template <typename T>
void launch(const AdalnForward& call, cudaStream_t stream) {
  const bool gated = call.residual.data != nullptr;
  switch (call.size.vectors) {
    case 3: return gated ? launch<T, 3, true>(call, stream) : launch<T, 3, false>(call, stream);
    case 5: return gated ? launch<T, 5, true>(call, stream) : launch<T, 5, false>(call, stream);
  }
  throw std::invalid_argument("no kernel has " + std::to_string(call.size.vectors) + " vectors a thread");
}

}  // namespace

void adaln_forward(const AdalnForward& call, cudaStream_t stream) {
  check(call.size);
  if (call.size.vectors == 0) return forward_any(call, stream);
  const DType dtype = call.residual.data != nullptr ? call.residual.dtype : call.x.dtype;
  check_row(call.size, dtype, kMaxThreads);
  check_vectors(call.residual, dtype);
  check_vectors(call.x, dtype, call.residual.data != nullptr);
  for (const ModulationRows* rows : {&call.gate, &call.shift, &call.scale, &call.shift2, &call.scale2}) {
    check_vectors(*rows);
  }
  for (const Channels* channels : {&call.gate_table, &call.branch_weight, &call.shift_table, &call.scale_table,
                                   &call.weight, &call.bias}) {
    check_vectors(*channels);
  }
  with_dtype(dtype, [&](auto element) { launch<decltype(element)>(call, stream); });
}

}  // namespace dk
