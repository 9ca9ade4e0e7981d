// Backward of adaLN: recomputed from what was normalised and the saved mean and rstd.
//
// A block is one row wide, 16 bytes of it a thread, VECTORS times, and walks over tokens that share their
// modulation rows, the next token's rows on their way into shared memory: a thread copies only what it reads
// itself, so that no barrier is needed. Gradients of modulation rows, tables and weights are column sums
// over the block's tokens: those of gate, shift and scale in registers, the others in shared memory that
// only their own thread touches. A second kernel adds the blocks' rows in order: nothing is atomic.
#include "adaln_backward.cuh"

namespace dk {
namespace {

using namespace adaln;

// the most threads of a row, which bounds the registers of one
template <typename T>
constexpr int kMaxThreads = sizeof(T) == 4 ? 512 : 384;

constexpr int kExtraSums = 5;  // shift2, scale2, branch_weight, weight, bias

template <int WIDTH, int VECTORS, bool GATED, bool EXTRA>
struct ColumnSums {
  static constexpr bool STORES = true;
  float registers[GATED ? 3 : 2][VECTORS][WIDTH];
  float4* extra[EXTRA ? kExtraSums : 1];  // [VECTORS][WIDTH / 4][threads], or null

  template <AdalnSum WHICH>
  __device__ void add(int v, const float (&values)[WIDTH]) {
    if constexpr (WHICH == kShiftSum || WHICH == kScaleSum || (WHICH == kGateSum && GATED)) {
      constexpr int R = WHICH == kGateSum ? 2 : WHICH == kShiftSum ? 0 : 1;
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) registers[R][v][i] += values[i];
    } else if constexpr (EXTRA) {
      float4* sums = extra[WHICH - kShift2Sum];
      if (sums == nullptr) return;
#pragma unroll
      for (int i = 0; i < WIDTH / 4; ++i) {
        float4& sum = sums[(v * (WIDTH / 4) + i) * blockDim.x + threadIdx.x];
        const float4 old = sum;
        sum = make_float4(old.x + values[4 * i], old.y + values[4 * i + 1], old.z + values[4 * i + 2],
                          old.w + values[4 * i + 3]);
      }
    }
  }
};

template <typename T, int VECTORS, bool GATED, bool EXTRA>
__global__ void __launch_bounds__(kMaxThreads<T>) adaln_bwd_kernel(const AdalnBackward call) {
  constexpr int WIDTH = 16 / sizeof(T);
  constexpr DType DTYPE = dtype_of<T>;
  // [stages][rows][VECTORS][threads], then the extra sums
  DK_DYNAMIC_SHARED(uint4, ring);
  __shared__ float2 scratch[64];
  RowSums row_sums(scratch);

  const int threads = blockDim.x, channels = call.size.channels;
  const bool normed = call.form.norm != Norm::none, layer = call.form.norm == Norm::layer;
  // where each row is in a stage of the ring
  int rows = 0;
  const int dy_slot = rows;
  rows += call.dy.data != nullptr;
  const int dy2_slot = rows;
  rows += EXTRA && call.dy2.data != nullptr;
  const int x_slot = rows;
  rows += normed;
  const int dout_slot = rows;
  rows += call.dout.data != nullptr;
  const int branch_slot = rows;
  rows += GATED && call.branch.data != nullptr;

  ColumnSums<WIDTH, VECTORS, GATED, EXTRA> sums;
#pragma unroll
  for (int r = 0; r < (GATED ? 3 : 2); ++r) {
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) fill(sums.registers[r][v], 0.0f);
  }
  if constexpr (EXTRA) {
    float4* place = reinterpret_cast<float4*>(ring + call.stages * rows * VECTORS * threads);
#pragma unroll
    for (int e = 0; e < kExtraSums; ++e) {
      sums.extra[e] = call.sums[kShift2Sum + e].data != nullptr ? place : nullptr;
      if (sums.extra[e] == nullptr) continue;
      for (int i = 0; i < VECTORS * (WIDTH / 4); ++i) place[i * threads + threadIdx.x] = make_float4(0, 0, 0, 0);
      place += VECTORS * (WIDTH / 4) * threads;
    }
  }

  const Walk walk(call);
  auto slot = [&](int64_t position, int row, int v) -> uint4* {
    const int stage = static_cast<int>(position - walk.begin) & (call.stages - 1);
    return ring + ((stage * rows + row) * VECTORS + v) * threads + threadIdx.x;
  };
  auto fetch = [&](int64_t position, const Place& place) {
    if (position < walk.end) {
      auto copy = [&](const Tokens& from, int row) {
        const int64_t offset = row_offset(from, place);
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
          const int channel = (v * threads + threadIdx.x) * WIDTH;
          if (channel < channels) copy_async_row<T>(slot(position, row, v), from, offset + channel);
        }
      };
      if (call.dy.data != nullptr) copy(call.dy, dy_slot);
      if (EXTRA && call.dy2.data != nullptr) copy(call.dy2, dy2_slot);
      if (normed) copy(call.x, x_slot);
      if (call.dout.data != nullptr) copy(call.dout, dout_slot);
      if (GATED && call.branch.data != nullptr) copy(call.branch, branch_slot);
    }
    cp_async_commit();
  };

  Place next{};
  if (walk.begin < walk.end) next = walk(call, walk.begin);
  if (call.stages == 2) fetch(walk.begin, next);
  for (int64_t position = walk.begin; position < walk.end; ++position) {
    const Place place = next;
    if (position + 1 < walk.end) next = walk(call, position + 1);
    if (call.stages == 2) {
      fetch(position + 1, next);
      cp_async_wait<1>();
    } else {
      fetch(position, place);
      cp_async_wait<0>();
    }
    const int64_t token = place.index, out_row = token * channels;

    // dn, then db
    float dn[VECTORS][WIDTH];
    float along = 0.0f, centre = 0.0f, mean = 0.0f, rstd = 0.0f;
    auto load_xhat = [&](float(&xhat)[WIDTH], int v) {
      load_row_part<T>(xhat, slot(position, x_slot, v), DTYPE);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) xhat[i] = (xhat[i] - mean) * rstd;
    };
    if (normed) {
      rstd = call.rstd[token];
      if (layer) mean = call.mean[token];
      const int64_t scale_row = row_offset(call.scale, call.row_index, place);
      const int64_t scale2_row = EXTRA ? row_offset(call.scale2, call.row_index, place) : 0;
#pragma unroll
      for (int v = 0; v < VECTORS; ++v) {
        const int channel = (v * threads + threadIdx.x) * WIDTH;
        if (channel < channels) {
          float xhat[WIDTH], dy[WIDTH], dy2[WIDTH];
          load_xhat(xhat, v);
          if (!EXTRA || call.dy.data != nullptr) load_row_part<T>(dy, slot(position, dy_slot, v), DTYPE);
          if (EXTRA && call.dy2.data != nullptr) load_row_part<T>(dy2, slot(position, dy2_slot, v), DTYPE);
          norm_backward<EXTRA>(dn[v], call, sums, v, channel, out_row, xhat, dy, dy2, scale_row, scale2_row);
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) {
            along += dn[v][i] * xhat[i];
            centre += dn[v][i];
          }
        }
      }
      if (layer) {
        const float2 both = row_sums(along, centre);
        along = both.x / channels;
        centre = both.y / channels;
      } else {
        along = row_sums(along) / channels;
        centre = 0.0f;
      }
    }

    const bool branch_rms = EXTRA && GATED && call.form.branch_rms;
    const bool has_branch = GATED && (call.dbranch.data != nullptr || call.branch.data != nullptr);
    const float branch_rstd = branch_rms ? call.branch_rstd[token] : 1.0f;
    const int64_t gate_row = GATED ? row_offset(call.gate, call.row_index, place) : 0;
    float branch_along = 0.0f;
    auto load_bhat = [&](float(&bhat)[WIDTH], int v) {
      fill(bhat, 0.0f);
      if (call.branch.data == nullptr) return;
      load_row_part<T>(bhat, slot(position, branch_slot, v), call.branch.dtype);
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) bhat[i] *= branch_rstd;
    };
#pragma unroll
    for (int v = 0; v < VECTORS; ++v) {
      const int channel = (v * threads + threadIdx.x) * WIDTH;
      if (channel < channels) {
        float dx[WIDTH];
        fill(dx, 0.0f);
        if (normed) {
          float xhat[WIDTH];
          load_xhat(xhat, v);
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) dx[i] = (dn[v][i] - xhat[i] * along - centre) * rstd;
        }
        if (call.dout.data != nullptr) {
          float dout[WIDTH];
          load_row_part<T>(dout, slot(position, dout_slot, v), DTYPE);
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) dx[i] += dout[i];
        }
        if (call.dresidual.data != nullptr) store_channels(call.dresidual.data, out_row + channel, dx, DTYPE);
        if (has_branch) {
          float bhat[WIDTH];
          load_bhat(bhat, v);
          gate_backward<EXTRA>(dn[v], call, sums, v, channel, out_row, dx, bhat, gate_row);
          if (branch_rms) {
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) branch_along += dn[v][i] * bhat[i];
          } else if (call.dbranch.data != nullptr) {
            store_channels(call.dbranch.data, out_row + channel, dn[v], sizeof(T) == 4 ? call.dbranch.dtype : DTYPE);
          }
        }
      }
    }
    if (branch_rms) {
      branch_along = row_sums(branch_along) / channels;
      if (call.dbranch.data != nullptr) {
#pragma unroll
        for (int v = 0; v < VECTORS; ++v) {
          const int channel = (v * threads + threadIdx.x) * WIDTH;
          if (channel < channels) {
            float bhat[WIDTH];
            load_bhat(bhat, v);
#pragma unroll
            for (int i = 0; i < WIDTH; ++i) dn[v][i] = (dn[v][i] - bhat[i] * branch_along) * branch_rstd;
            store_channels(call.dbranch.data, out_row + channel, dn[v], sizeof(T) == 4 ? call.dbranch.dtype : DTYPE);
          }
        }
      }
    }
  }

  const int64_t sums_row = static_cast<int64_t>(blockIdx.x) * channels;
#pragma unroll
  for (int v = 0; v < VECTORS; ++v) {
    const int channel = (v * threads + threadIdx.x) * WIDTH;
    if (channel < channels) {
      auto store = [&](const Result& to, const float(&values)[WIDTH]) {
        if (to.data != nullptr) store_channels(to.data, sums_row + channel, values, to.dtype);
      };
      store(call.sums[kShiftSum], sums.registers[0][v]);
      store(call.sums[kScaleSum], sums.registers[1][v]);
      if constexpr (GATED) store(call.sums[kGateSum], sums.registers[2][v]);
      if constexpr (EXTRA) {
#pragma unroll
        for (int e = 0; e < kExtraSums; ++e) {
          if (sums.extra[e] == nullptr) continue;
          float values[WIDTH];
#pragma unroll
          for (int i = 0; i < WIDTH / 4; ++i) {
            const float4 four = sums.extra[e][(v * (WIDTH / 4) + i) * threads + threadIdx.x];
            values[4 * i] = four.x;
            values[4 * i + 1] = four.y;
            values[4 * i + 2] = four.z;
            values[4 * i + 3] = four.w;
          }
          store(call.sums[kShift2Sum + e], values);
        }
      }
    }
  }
}

template <typename T, int VECTORS, bool GATED, bool EXTRA>
void launch(const AdalnBackward& call, cudaStream_t stream) {
  int rows = call.form.norm != Norm::none;
  for (const Tokens& t : {call.dy, call.dy2, call.dout, call.branch}) rows += t.data != nullptr;
  int extra = 0;
  for (int e = 0; e < kExtraSums; ++e) extra += call.sums[kShift2Sum + e].data != nullptr;
  const size_t row_bytes = sizeof(uint4) * VECTORS * call.size.threads;
  const size_t shared = call.stages * rows * row_bytes + extra * row_bytes * (4 / sizeof(T));
  DK_LAUNCH((adaln_bwd_kernel<T, VECTORS, GATED, EXTRA>), grid_of(call.blocks),
            dim3(call.size.threads), shared, stream, call);
}

template <typename T>
void launch(const AdalnBackward& call, cudaStream_t stream) {
  constexpr bool NARROW = sizeof(T) == 2;  // a float32 row of the same length is twice the vectors
  bool extra = call.dy2.data != nullptr || call.form.branch_rms || call.weight.data != nullptr || call.bias.data != nullptr;
  for (int e = 0; e < kExtraSums; ++e) extra = extra || call.sums[kShift2Sum + e].data != nullptr;
  const bool gated = call.dbranch.data != nullptr || call.branch.data != nullptr;
  if (extra && call.size.vectors == (NARROW ? 2 : 3)) return launch<T, NARROW ? 2 : 3, true, true>(call, stream);
  if (!extra && call.size.vectors == 3) {
    return gated ? launch<T, 3, true, false>(call, stream) : launch<T, 3, false, false>(call, stream);
  }
  if constexpr (NARROW) {
    if (!extra && call.size.vectors == 2) {
      return gated ? launch<T, 2, true, false>(call, stream) : launch<T, 2, false, false>(call, stream);
    }
  }
  throw std::invalid_argument("no kernel has " + std::to_string(call.size.vectors) + " vectors a thread");
}

}  // namespace

void adaln_backward(const AdalnBackward& call, cudaStream_t stream) {
  check(call.size);
  if (call.size.vectors == 0) return backward_any(call, stream);
  const DType dtype = call.dy.data != nullptr    ? call.dy.dtype
                      : call.dy2.data != nullptr ? call.dy2.dtype
                                                 : call.dout.dtype;
  check_row(call.size, dtype, dtype == DType::float32 ? kMaxThreads<float> : kMaxThreads<__half>);
  if (call.stages != 1 && call.stages != 2) {
    throw std::invalid_argument("there are 1 or 2 stages; got " + std::to_string(call.stages));
  }
  for (const Tokens* tokens : {&call.dy, &call.dy2, &call.x, &call.dout}) check_vectors(*tokens, dtype);
  check_vectors(call.branch, dtype, true);
  for (const ModulationRows* rows : {&call.gate, &call.scale, &call.scale2}) check_vectors(*rows);
  for (const Channels* channels :
       {&call.gate_table, &call.branch_weight, &call.scale_table, &call.weight, &call.bias}) {
    check_vectors(*channels);
  }
  with_dtype(dtype, [&](auto element) { launch<decltype(element)>(call, stream); });
}

}  // namespace dk
