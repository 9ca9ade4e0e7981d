// Python's view of the launchers; the only file that knows pybind11, and none knows torch.
//
// Launchers are functions of positional arguments alone, read by arguments.h: a call shall cost the host little.
// In the emulated build every tensor of a call is declared to the emulator, which lets the kernels touch
// nothing else and fills outputs with NaN.
#include <pybind11/pybind11.h>

#include "arguments.h"

#include <algorithm>
#include <cstdlib>

#include "adaln.h"
#include "column_sums.h"
#include "feed_forward.h"
#include "final_layer.h"
#include "patch_embed.h"
#include "qk_norm_rope.h"
#include "unpatchify.h"

namespace py = pybind11;

using namespace dk;

namespace {

using python::Input;
using python::Output;
using python::Plan;
using python::Tensor;

#ifdef DK_EMULATED
constexpr int kDevice = python::kCpu;

void declare(const Tensor& tensor, bool writable) {
  if (!tensor.given() || emulator::recording()) return;
  int64_t last = 0, elements = 1;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    elements *= tensor.size(axis);
    last += (tensor.size(axis) - 1) * tensor.stride(axis);
  }
  if (elements == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data());
  const auto end = begin + uintptr_t((last + 1) * tensor.bytes_of_element());
  emulator::declare_buffer({begin, end, writable, (writable ? "an output " : "an input ") + tensor.describe()});
}
struct Call {
  Call() = default;
  ~Call() { emulator::forget_buffers(); }
};
class OnDevice {
 public:
  explicit OnDevice(int) {}
};
void settle(cudaStream_t) {}
#else
constexpr int kDevice = python::kGpu;

void declare(const Tensor&, bool) {}
struct Call {};
using dk::OnDevice;

// Under DIT_KERNELS_DEBUG=1: waits, so that an error of a kernel is raised where it was launched
void settle(cudaStream_t stream) {
  static const char* const asked = std::getenv("DIT_KERNELS_DEBUG");
  if (!asked || std::string(asked) != "1") return;
  cudaStreamCaptureStatus capturing;
  dk::check(cudaStreamIsCapturing(stream, &capturing), "cudaStreamIsCapturing");
  if (capturing == cudaStreamCaptureStatusNone) dk::check(cudaStreamSynchronize(stream), "a kernel of this call");
}
#endif

template <typename T>
void prepare(const T& argument) {
  if constexpr (std::is_base_of_v<Tensor, T>) declare(argument, std::is_same_v<T, Output>);
  if constexpr (std::is_same_v<T, std::vector<Output>>) {
    for (const Output& output : argument) declare(output, true);
  }
}

template <typename T>
std::string described(const T& argument) {
  if constexpr (std::is_base_of_v<Tensor, T>) return argument.describe();
  else return "";
}

// module.name(device, stream, arguments...): the launcher's error with the shapes of the call
template <typename... Arguments>
void define(PyObject* module, const char* name, void (*launcher)(cudaStream_t, Arguments...)) {
  struct State {
    const char* name;
    void (*launcher)(cudaStream_t, Arguments...);
  };
  const python::Function call = [](PyObject* self, PyObject* const* given, Py_ssize_t count) {
    return python::guarded([&]() -> PyObject* {
      using namespace python;
      const State& state = state_of<State>(self);
      check_count(state.name, 2 + sizeof...(Arguments), count);
      const int device = number<int>(given[0]);
      const auto stream = reinterpret_cast<cudaStream_t>(number<intptr_t>(given[1]));
      auto arguments = arguments_of<std::decay_t<Arguments>...>(state.name, given, 2, std::index_sequence_for<Arguments...>{});
      [[maybe_unused]] const Call guard;
      try {
        std::apply([](const auto&... each) { (prepare(each), ...); }, arguments);
        OnDevice current(device);
        std::apply([&](auto&... each) { state.launcher(stream, each...); }, arguments);
        settle(stream);
      } catch (const std::exception& error) {
        std::string message = std::string(state.name) + ": " + error.what() + "; called with";
        std::apply(
            [&](const auto&... each) {
              for (const std::string& text : {described(each)...})
                if (!text.empty()) message += " " + text + ",";
            },
            arguments);
        message.pop_back();
        throw std::runtime_error(message);
      }
      return Py_NewRef(Py_None);
    });
  };
  python::add_function(module, name, call, new State{name, launcher});
}

}  // namespace

// --- adaln: what a call is but for its addresses comes as tuples of numbers, once for many calls

using Numbers = std::vector<std::array<int64_t, 4>>;  // strides of sample, token, channel; dtype
using RowNumbers = std::vector<std::array<int64_t, 6>>;  // strides of sample, group, channel; length, indexed, dtype
using Codes = std::vector<int>;

Tokens tokens_of(const std::array<int64_t, 4>& n) { return {nullptr, n[0], n[1], n[2], DType(n[3])}; }
ModulationRows rows_of(const std::array<int64_t, 6>& n) {
  return {nullptr, n[0], n[1], n[2], static_cast<int32_t>(n[3]), n[4] != 0, DType(n[5])};
}
Channels channels_of(int dtype) { return {nullptr, DType(dtype)}; }
Result result_of(int dtype) { return {nullptr, DType(dtype)}; }
AdalnSizes sizes_of(const std::array<int64_t, 5>& n) {
  const auto small = [](int64_t value) { return static_cast<int32_t>(value); };
  return {n[0], small(n[1]), small(n[2]), small(n[3]), small(n[4])};
}
AdalnForm form_of(const std::array<int, 4>& n, double eps) {
  return {Norm(n[0]), n[1] != 0, n[2] != 0, n[3] != 0, static_cast<float>(eps)};
}

AdalnForward adaln_forward_plan(const std::array<int64_t, 5>& sizes, const std::array<int, 4>& form, double eps,
                                int32_t chunk, const Numbers& tokens, const RowNumbers& rows, const Codes& vectors) {
  AdalnForward plan{};
  plan.size = sizes_of(sizes);
  plan.form = form_of(form, eps);
  plan.chunk = chunk;
  plan.residual = tokens_of(tokens.at(0));
  plan.x = tokens_of(tokens.at(1));
  ModulationRows* const modulations[] = {&plan.gate, &plan.shift, &plan.scale, &plan.shift2, &plan.scale2};
  for (size_t i = 0; i < 5; ++i) *modulations[i] = rows_of(rows.at(i));
  Channels* const parameters[] = {&plan.gate_table,  &plan.branch_weight, &plan.shift_table,
                                  &plan.scale_table, &plan.weight,        &plan.bias};
  for (size_t i = 0; i < 6; ++i) *parameters[i] = channels_of(vectors.at(i));
  return plan;
}

// `rows`: which row of the workspace each sum of AdalnSum is, or -1
struct BackwardPlan {
  AdalnBackward call;
  std::array<int, 8> rows;
};

BackwardPlan adaln_backward_plan(const std::array<int64_t, 5>& sizes, const std::array<int, 4>& form, double eps,
                                 int32_t segment, int32_t chunk, int32_t stages, int64_t blocks, const Numbers& tokens,
                                 const RowNumbers& rows, const Codes& vectors, const Codes& results,
                                 const std::array<int, 8>& workspace) {
  AdalnBackward plan{};
  plan.size = sizes_of(sizes);
  plan.form = form_of(form, eps);
  plan.segment = segment;
  plan.chunk = chunk;
  plan.stages = stages;
  plan.blocks = blocks;
  Tokens* const all_tokens[] = {&plan.dout, &plan.dy, &plan.dy2, &plan.x, &plan.branch};
  for (size_t i = 0; i < 5; ++i) *all_tokens[i] = tokens_of(tokens.at(i));
  ModulationRows* const modulations[] = {&plan.gate, &plan.scale, &plan.scale2};
  for (size_t i = 0; i < 3; ++i) *modulations[i] = rows_of(rows.at(i));
  Channels* const parameters[] = {&plan.gate_table, &plan.branch_weight, &plan.scale_table, &plan.weight, &plan.bias};
  for (size_t i = 0; i < 5; ++i) *parameters[i] = channels_of(vectors.at(i));
  Result* const tensors[] = {&plan.dresidual, &plan.dbranch, &plan.dgate,  &plan.dshift,
                             &plan.dscale,    &plan.dshift2, &plan.dscale2};
  for (size_t i = 0; i < 7; ++i) *tensors[i] = result_of(results.at(i));
  for (size_t i = 0; i < 8; ++i) plan.sums[i] = result_of(results.at(7 + i));
  return {plan, workspace};
}

// The second stage, but for its addresses: of each sum its row of the workspace, groups, blocks a group
struct BackwardSums {
  int32_t channels;
  int64_t blocks;
  std::vector<std::array<int64_t, 3>> items;
};

BackwardSums adaln_backward_sums_plan(int32_t channels, int64_t blocks,
                                      const std::vector<std::array<int64_t, 3>>& items) {
  if (items.size() > std::size(AdalnSums{}.items)) {
    throw std::invalid_argument("at most " + std::to_string(std::size(AdalnSums{}.items)) + " sums; got " +
                                std::to_string(items.size()));
  }
  return {channels, blocks, items};
}

namespace {

// --- qk_norm_rope

QkNormRope qk_norm_rope_plan(const std::array<int, 5>& form, double eps, const std::array<int32_t, 5>& row,
                             const std::array<int64_t, 7>& angles, const std::vector<std::array<int64_t, 18>>& sides) {
  QkNormRope plan{};
  plan.norm = Norm(form[0]);
  plan.hidden = form[1] != 0;
  plan.relu = form[2] != 0;
  plan.eager = form[3] != 0;
  plan.half = form[4] != 0;
  plan.eps = static_cast<float>(eps);
  plan.dim = row[0];
  plan.sections = row[1];
  plan.turning = row[2];
  plan.lanes = row[3];
  plan.threads = row[4];
  plan.angles = {nullptr, nullptr, angles[0], angles[1], angles[2], angles[3], DType(angles[4]),
                 static_cast<int32_t>(angles[5]), static_cast<int32_t>(angles[6])};
  for (size_t i = 0; i < 2; ++i) {
    const auto& n = sides.at(i);
    HeadsSide& side = plan.sides[i];
    side.samples = n[0];
    side.length = static_cast<int32_t>(n[1]);
    side.heads = static_cast<int32_t>(n[2]);
    side.blocks = n[3];
    side.chunk = static_cast<int32_t>(n[4]);
    side.x = {nullptr, n[5], n[6], n[7], n[8], DType(n[9])};
    side.dy = {nullptr, n[10], n[11], n[12], n[13], DType(n[14])};
    side.weight = channels_of(static_cast<int>(n[15]));
    side.bias = channels_of(static_cast<int>(n[16]));
    side.y = result_of(static_cast<int>(n[17]));
  }
  return plan;
}

void set_parameters(QkNormRope& call, const Input& q, const Input& k, const Input& q_weight, const Input& q_bias,
                    const Input& k_weight, const Input& k_bias, const Input& cos, const Input& sin) {
  call.sides[0].x.data = q.data();
  call.sides[1].x.data = k.data();
  call.sides[0].weight.data = q_weight.data();
  call.sides[0].bias.data = q_bias.data();
  call.sides[1].weight.data = k_weight.data();
  call.sides[1].bias.data = k_bias.data();
  call.angles.cos = cos.data();
  call.angles.sin = sin.data();
}

void set_gradients(QkNormRope& call, const Input& dq, const Input& dk, const Input& q_mean, const Input& q_rstd,
                   const Input& k_mean, const Input& k_rstd) {
  call.sides[0].dy.data = dq.data();
  call.sides[1].dy.data = dk.data();
  call.sides[0].mean = q_mean.as<float>();
  call.sides[0].rstd = q_rstd.as<float>();
  call.sides[1].mean = k_mean.as<float>();
  call.sides[1].rstd = k_rstd.as<float>();
}

}  // namespace

namespace {

// --- what follows from the tensors' sizes and strides

using Axes = std::array<int32_t, 3>;

void copy_strides(const Tensor& from, int64_t* to) { std::copy_n(from.strides(), from.dim(), to); }

void check_dim(const Tensor& tensor, const char* name, int64_t dim) {
  if (tensor.dim() == dim) return;
  throw std::invalid_argument(std::string(name) + " has " + std::to_string(dim) + " axes; got " + tensor.describe());
}

// The video and the weight give the sizes, the tokens their strides; no gradient of a video is a weight's.
PatchEmbed patch_embed_of(const Tensor& video, const Tensor& weight, const Tensor& tokens) {
  check_dim(video, "video", 5);
  check_dim(weight, "weight", 5);
  check_dim(tokens, "tokens", 3);
  PatchEmbed call{};
  call.samples = video.size(0);
  call.in_channels = static_cast<int32_t>(video.size(1));
  call.channels = static_cast<int32_t>(weight.size(0));
  for (int axis = 0; axis < 3; ++axis) {
    call.patch[axis] = static_cast<int32_t>(weight.size(2 + axis));
    if (call.patch[axis] <= 0) throw std::invalid_argument("weight is of no pixels: " + weight.describe());
    call.grid[axis] = static_cast<int32_t>(video.size(2 + axis) / call.patch[axis]);
  }
  call.video = video.data();
  call.video_dtype = video.dtype();
  copy_strides(video, call.video_strides);
  call.tokens = tokens.data();
  call.token_dtype = tokens.dtype();
  copy_strides(tokens, call.token_strides);
  return call;
}

// --- final_layer

// [B, C] or [B, G, C]
ModulationRows rows_of(const Tensor& m, int64_t samples, int64_t tokens) {
  if (!m.given()) return {nullptr, 0, 0, 0, 1, false, DType::float32};
  const bool groups = m.dim() == 3;
  return {m.data(), samples > 1 ? m.stride(0) : 0, groups && m.size(1) > 1 ? m.stride(1) : 0, m.stride(-1),
          static_cast<int32_t>(groups ? tokens / std::max<int64_t>(1, m.size(1)) : tokens), false, m.dtype()};
}

FinalLayer final_layer_of(const Axes& grid, const Axes& patch, int32_t channels, const std::array<int32_t, 4>& steps,
                          int norm, double eps, const Tensor& x, const Tensor& shift, const Tensor& scale,
                          const Tensor& weight, const Tensor& video, const Tensor& mean, const Tensor& rstd) {
  check_dim(x, "x", 3);
  check_dim(video, "video", 5);
  FinalLayer call{};
  call.samples = x.size(0);
  call.width = static_cast<int32_t>(x.size(2));
  std::copy(grid.begin(), grid.end(), call.grid);
  std::copy(patch.begin(), patch.end(), call.patch);
  std::copy(steps.begin(), steps.end(), call.steps);
  call.channels = channels;
  call.norm = Norm(norm);
  call.eps = static_cast<float>(eps);
  const auto stride = [&](int axis, int64_t one) { return x.size(axis) > 1 ? x.stride(axis) : one; };
  call.x = {x.data(), stride(0, 0), stride(1, 0), stride(2, 1), x.dtype()};
  call.shift = rows_of(shift, x.size(0), x.size(1));
  call.scale = rows_of(scale, x.size(0), x.size(1));
  call.weight = {weight.data(), weight.dtype()};
  call.video = video.data();
  call.video_dtype = video.dtype();
  copy_strides(video, call.video_strides);
  call.mean = mean.as<float>();
  call.rstd = rstd.as<float>();
  return call;
}

#ifdef DK_EMULATED
py::list recorded() {
  py::list result;
  for (const auto& l : emulator::recorded()) {
    result.append(py::make_tuple(l.kernel, py::make_tuple(l.grid.x, l.grid.y, l.grid.z),
                                 py::make_tuple(l.block.x, l.block.y, l.block.z), l.shared_bytes));
  }
  return result;
}
#endif

}  // namespace

PYBIND11_MODULE(DK_MODULE, module) {
  PyObject* const extension = module.ptr();
  define(extension, "add_rows",
         +[](cudaStream_t stream, Input sums, Output out, int64_t groups, int64_t rows, int64_t columns) {
           add_rows(sums.as<float>(), out.data(), groups, rows, columns, out.dtype(), stream);
         });

  python::define_plan(extension, "AdalnForward", &adaln_forward_plan);
  define(extension, "adaln_forward",
         +[](cudaStream_t stream, Plan<AdalnForward> plan, Input residual, Input x, Input gate, Input shift,
             Input scale, Input shift2, Input scale2, Input gate_table, Input branch_weight, Input shift_table,
             Input scale_table, Input weight, Input bias, Input row_index, Output out, Output y, Output y2,
             Output branch_rstd, Output mean, Output rstd) {
           AdalnForward call = *plan.value;
           call.residual.data = residual.data();
           call.x.data = x.data();
           call.gate.data = gate.data();
           call.shift.data = shift.data();
           call.scale.data = scale.data();
           call.shift2.data = shift2.data();
           call.scale2.data = scale2.data();
           call.gate_table.data = gate_table.data();
           call.branch_weight.data = branch_weight.data();
           call.shift_table.data = shift_table.data();
           call.scale_table.data = scale_table.data();
           call.weight.data = weight.data();
           call.bias.data = bias.data();
           call.row_index = row_index.as<int32_t>();
           call.out = out.data();
           call.y = y.data();
           call.y2 = y2.data();
           call.branch_rstd = branch_rstd.as<float>();
           call.mean = mean.as<float>();
           call.rstd = rstd.as<float>();
           adaln_forward(call, stream);
         });
  python::define_plan(extension, "AdalnBackward", &adaln_backward_plan);
  define(extension, "adaln_backward",
         +[](cudaStream_t stream, Plan<BackwardPlan> plan, Input dout, Input dy, Input dy2, Input x, Input branch,
             Input gate, Input scale, Input scale2, Input gate_table, Input branch_weight, Input scale_table,
             Input weight, Input bias, Input row_index, Input branch_rstd, Input mean, Input rstd, Input order,
             Input begin, Input end, Output dresidual, Output dbranch, Output dgate, Output dshift, Output dscale,
             Output dshift2, Output dscale2, Output gate_sums, Output shift_sums, Output scale_sums,
             Output shift2_sums, Output scale2_sums, Output branch_weight_sums, Output weight_sums,
             Output bias_sums, Output workspace) {
           AdalnBackward call = plan.value->call;
           call.dout.data = dout.data();
           call.dy.data = dy.data();
           call.dy2.data = dy2.data();
           call.x.data = x.data();
           call.branch.data = branch.data();
           call.gate.data = gate.data();
           call.scale.data = scale.data();
           call.scale2.data = scale2.data();
           call.gate_table.data = gate_table.data();
           call.branch_weight.data = branch_weight.data();
           call.scale_table.data = scale_table.data();
           call.weight.data = weight.data();
           call.bias.data = bias.data();
           call.row_index = row_index.as<int32_t>();
           call.branch_rstd = branch_rstd.as<float>();
           call.mean = mean.as<float>();
           call.rstd = rstd.as<float>();
           call.order = order.as<int64_t>();
           call.begin = begin.as<int32_t>();
           call.end = end.as<int32_t>();
           call.dresidual.data = dresidual.data();
           call.dbranch.data = dbranch.data();
           call.dgate.data = dgate.data();
           call.dshift.data = dshift.data();
           call.dscale.data = dscale.data();
           call.dshift2.data = dshift2.data();
           call.dscale2.data = dscale2.data();
           const Output* const sums[] = {&gate_sums,   &shift_sums,         &scale_sums,  &shift2_sums,
                                         &scale2_sums, &branch_weight_sums, &weight_sums, &bias_sums};
           for (int i = 0; i < 8; ++i) {
             const int row = plan.value->rows[i];
             if (row < 0) call.sums[i].data = sums[i]->data();
             else call.sums[i].data = workspace.as<float>() + row * call.blocks * call.size.channels;
           }
           adaln_backward(call, stream);
         });
  python::define_plan(extension, "AdalnSums", &adaln_backward_sums_plan);
  define(extension, "adaln_backward_sums",
         +[](cudaStream_t stream, Plan<BackwardSums> plan, Input sums, Input first, std::vector<Output> outs) {
           const BackwardSums& of = *plan.value;
           if (of.items.size() != outs.size()) {
             throw std::invalid_argument(std::to_string(of.items.size()) + " sums for " + std::to_string(outs.size()) +
                                         " gradients");
           }
           AdalnSums call{};
           for (size_t i = 0; i < outs.size(); ++i) {
             const auto& [row, groups, rows] = of.items[i];
             call.items[i] = {sums.as<float>() + row * of.blocks * of.channels, {outs[i].data(), outs[i].dtype()},
                              groups, static_cast<int32_t>(rows)};
           }
           call.count = static_cast<int32_t>(outs.size());
           call.channels = of.channels;
           call.first = first.as<int64_t>();
           adaln_backward_sums(call, stream);
         });

  define(extension, "feed_forward_fwd",
         +[](cudaStream_t stream, Input x, Input bias, Output y, int64_t rows, int64_t inner, int64_t columns,
             int64_t x_outer, int64_t x_inner, int64_t x_column, int act) {
           feed_forward_fwd(x.data(), bias.data(), y.data(), rows, inner, columns, {x_outer, x_inner, x_column},
                            bias.given() ? bias.stride(0) : 0, x.dtype(), bias.dtype(), Activation(act), stream);
         });
  module.def("feed_forward_bwd_parts", &feed_forward_bwd_parts);
  define(extension, "feed_forward_bwd",
         +[](cudaStream_t stream, Input dy, Input x, Input bias, Output dx, Output dbias_sums, int64_t rows,
             int64_t inner, int64_t columns, int64_t dy_outer, int64_t dy_inner, int64_t dy_column, int64_t x_outer,
             int64_t x_inner, int64_t x_column, int act) {
           feed_forward_bwd(dy.data(), x.data(), bias.data(), dx.data(), dbias_sums.as<float>(), rows, inner, columns,
                            {dy_outer, dy_inner, dy_column}, {x_outer, x_inner, x_column},
                            bias.given() ? bias.stride(0) : 0, x.dtype(), bias.dtype(), Activation(act), stream);
         });

  python::define_plan(extension, "QkNormRope", &qk_norm_rope_plan);
  define(extension, "qk_norm_rope_fwd",
         +[](cudaStream_t stream, Plan<QkNormRope> plan, Input q, Input k, Input q_weight, Input q_bias,
             Input k_weight, Input k_bias, Input cos, Input sin, Output q_out, Output k_out, Output q_mean,
             Output q_rstd, Output k_mean, Output k_rstd) {
           QkNormRope call = *plan.value;
           set_parameters(call, q, k, q_weight, q_bias, k_weight, k_bias, cos, sin);
           call.sides[0].y.data = q_out.data();
           call.sides[1].y.data = k_out.data();
           call.sides[0].mean = q_mean.as<float>();
           call.sides[0].rstd = q_rstd.as<float>();
           call.sides[1].mean = k_mean.as<float>();
           call.sides[1].rstd = k_rstd.as<float>();
           qk_norm_rope_fwd(call, stream);
         });
  define(extension, "qk_norm_rope_bwd",
         +[](cudaStream_t stream, Plan<QkNormRope> plan, Input dq_out, Input dk_out, Input q, Input k,
             Input q_weight, Input q_bias, Input k_weight, Input k_bias, Input cos, Input sin, Input q_mean,
             Input q_rstd, Input k_mean, Input k_rstd, Output dq, Output dk, Output q_weight_sums,
             Output q_bias_sums, Output k_weight_sums, Output k_bias_sums) {
           QkNormRope call = *plan.value;
           set_parameters(call, q, k, q_weight, q_bias, k_weight, k_bias, cos, sin);
           set_gradients(call, dq_out, dk_out, q_mean, q_rstd, k_mean, k_rstd);
           call.sides[0].y.data = dq.data();
           call.sides[1].y.data = dk.data();
           call.sides[0].weight_sums = q_weight_sums.as<float>();
           call.sides[0].bias_sums = q_bias_sums.as<float>();
           call.sides[1].weight_sums = k_weight_sums.as<float>();
           call.sides[1].bias_sums = k_bias_sums.as<float>();
           qk_norm_rope_bwd(call, stream);
         });
  define(extension, "qk_norm_rope_bwd_angles",
         +[](cudaStream_t stream, Plan<QkNormRope> plan, Input dq_out, Input dk_out, Input q, Input k,
             Input q_weight, Input q_bias, Input k_weight, Input k_bias, Input cos, Input sin, Input q_mean,
             Input q_rstd, Input k_mean, Input k_rstd, int64_t samples, int32_t heads, Output dcos, Output dsin) {
           QkNormRopeAngles angles{*plan.value, {dcos.data(), dcos.dtype()}, {dsin.data(), dsin.dtype()}, samples, heads};
           set_parameters(angles.call, q, k, q_weight, q_bias, k_weight, k_bias, cos, sin);
           set_gradients(angles.call, dq_out, dk_out, q_mean, q_rstd, k_mean, k_rstd);
           qk_norm_rope_bwd_angles(angles, stream);
         });

  // inverse: from the video to tokens
  define(extension, "unpatchify",
         +[](cudaStream_t stream, Input from, Output to, bool inverse, Axes grid, Axes patch, int32_t channels,
             std::array<int32_t, 4> steps, std::array<int32_t, 2> block) {
           const Tensor& tokens = inverse ? static_cast<const Tensor&>(to) : from;
           const Tensor& video = inverse ? static_cast<const Tensor&>(from) : to;
           check_dim(tokens, "tokens", 3);
           check_dim(video, "video", 5);
           Unpatchify call{};
           call.tokens = tokens.data();
           copy_strides(tokens, call.token_strides);
           call.video = video.data();
           copy_strides(video, call.video_strides);
           std::copy(grid.begin(), grid.end(), call.grid);
           std::copy(patch.begin(), patch.end(), call.patch);
           std::copy(steps.begin(), steps.end(), call.steps);
           call.samples = tokens.size(0);
           call.channels = channels;
           call.block_h = block[0];
           call.block_w = block[1];
           call.bytes = static_cast<int32_t>(tokens.bytes_of_element());
           call.inverse = inverse;
           unpatchify(call, stream);
         });

  define(extension, "patch_embed_fwd",
         +[](cudaStream_t stream, Input video, Input weight, Input bias, Input pos, Output tokens) {
           PatchEmbed call = patch_embed_of(video, weight, tokens);
           call.weight = {weight.data(), weight.dtype()};
           call.bias = {bias.data(), bias.dtype()};
           call.pos = {pos.data(), pos.dtype()};
           if (pos.given()) copy_strides(pos, call.pos_strides);
           patch_embed_fwd(call, stream);
         });
  define(extension, "patch_embed_bwd_video",
         +[](cudaStream_t stream, Output dvideo, Input weight, Input dtokens) {
           PatchEmbed call = patch_embed_of(dvideo, weight, dtokens);
           call.weight = {weight.data(), weight.dtype()};
           patch_embed_bwd_video(call, stream);
         });
  define(extension, "patch_embed_bwd_weight",
         +[](cudaStream_t stream, Input video, Input weight, Input dtokens, int64_t chunk, Output weight_sums,
             Output bias_sums) {
           patch_embed_bwd_weight(patch_embed_of(video, weight, dtokens), chunk, weight_sums.as<float>(),
                                  bias_sums.as<float>(), stream);
         });
  define(extension, "patch_embed_bwd_pos",
         +[](cudaStream_t stream, Input video, Input weight, Input dtokens, Output dpos) {
           patch_embed_bwd_pos(patch_embed_of(video, weight, dtokens), {dpos.data(), dpos.dtype()}, stream);
         });

  define(extension, "final_layer_fwd",
         +[](cudaStream_t stream, Axes grid, Axes patch, int32_t channels, std::array<int32_t, 4> steps, int norm,
             double eps, Input x, Input shift, Input scale, Input weight, Input bias, Output video, Output mean,
             Output rstd) {
           FinalLayer call =
               final_layer_of(grid, patch, channels, steps, norm, eps, x, shift, scale, weight, video, mean, rstd);
           call.bias = {bias.data(), bias.dtype()};
           final_layer_fwd(call, stream);
         });
  define(extension, "final_layer_bwd_rows",
         +[](cudaStream_t stream, Axes grid, Axes patch, int32_t channels, std::array<int32_t, 4> steps, int norm,
             double eps, Input x, Input shift, Input scale, Input weight, Input dvideo, Input mean, Input rstd,
             int32_t segment, Output dx, Output dshift, Output dscale, Output shift_sums, Output scale_sums) {
           const FinalLayer call =
               final_layer_of(grid, patch, channels, steps, norm, eps, x, shift, scale, weight, dvideo, mean, rstd);
           final_layer_bwd_rows(call,
                                {segment,
                                 {dx.data(), dx.dtype()},
                                 {dshift.data(), dshift.dtype()},
                                 {dscale.data(), dscale.dtype()},
                                 shift_sums.as<float>(),
                                 scale_sums.as<float>()},
                                stream);
         });
  define(extension, "final_layer_bwd_weight",
         +[](cudaStream_t stream, Axes grid, Axes patch, int32_t channels, std::array<int32_t, 4> steps, int norm,
             double eps, Input x, Input shift, Input scale, Input weight, Input dvideo, Input mean, Input rstd,
             int64_t chunk, Output weight_sums, Output bias_sums) {
           const FinalLayer call =
               final_layer_of(grid, patch, channels, steps, norm, eps, x, shift, scale, weight, dvideo, mean, rstd);
           final_layer_bwd_weight(call, chunk, weight_sums.as<float>(), bias_sums.as<float>(), stream);
         });

  // of any tensors or None
  python::add_function(extension, "key", +[](PyObject*, PyObject* const* tensors, Py_ssize_t count) {
    return python::guarded([&] { return python::key(tensors, count); });
  }, nullptr);
  python::add_function(extension, "takes", +[](PyObject*, PyObject* const* tensors, Py_ssize_t count) {
    return python::guarded([&] { return PyBool_FromLong(python::takes(tensors, count, kDevice)); });
  }, nullptr);

#ifdef DK_EMULATED
  module.def("set_seed", &emulator::set_seed, "The order of threads and blocks in the launches to come");
  module.def("set_most_blocks", &emulator::set_most_blocks, "What y of a grid may be in the launches to come");
  module.def("written", &emulator::written, "Bytes that the kernels have written to tensors so far");
  module.def("record", &emulator::record, "Launches are only noted from now on, or run again");
  module.def("recorded", &recorded, "(kernel, grid, block, bytes of dynamic shared memory) of each launch since `record`");
#endif
}
