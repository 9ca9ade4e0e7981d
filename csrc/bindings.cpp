// Python's view of the launchers; the only file that knows pybind11, and none knows torch.
//
// A tensor comes as the Python object: its address is read by name, its sizes and strides where asked for.
// In the emulated build every tensor of a call is declared to the emulator, which lets the kernels touch
// nothing else and fills outputs with NaN.
#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "column_sums.h"
#include "common.cuh"
#include "feed_forward.h"

namespace py = pybind11;

namespace {

struct Tensor {
  py::handle object;  // null for None
  void* data = nullptr;

  bool given() const { return object.ptr() != nullptr; }
  int64_t dim() const { return py::len(object.attr("shape")); }
  int64_t size(int64_t axis) const { return at("size", axis); }
  int64_t stride(int64_t axis) const { return at("stride", axis); }
  int64_t bytes_of_element() const { return call("element_size"); }
  dk::DType dtype() const {
    static const auto* const known = new std::vector<std::pair<py::object, dk::DType>>{
        {py::module_::import("torch").attr("float32"), dk::DType::float32},
        {py::module_::import("torch").attr("float16"), dk::DType::float16},
        {py::module_::import("torch").attr("bfloat16"), dk::DType::bfloat16}};
    if (!given()) return dk::DType::float32;
    const py::object mine = object.attr("dtype");
    for (const auto& [name, dtype] : *known)
      if (mine.is(name)) return dtype;
    throw py::type_error("the kernels take float32, float16 and bfloat16; got " + describe());
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data);
  }
  std::string describe() const {
    if (!given()) return "None";
    return py::str(object.attr("dtype")).cast<std::string>() + " " +
           py::str(py::list(object.attr("shape"))).cast<std::string>();
  }

 private:
  int64_t call(const char* name) const { return object.attr(name)().cast<int64_t>(); }
  int64_t at(const char* name, int64_t axis) const { return object.attr(name)(axis).cast<int64_t>(); }
};

struct Input : Tensor {};
struct Output : Tensor {};

#ifdef DK_EMULATED
void declare(const Tensor& tensor, bool writable) {
  if (!tensor.given()) return;
  int64_t last = 0, elements = 1;
  for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
    elements *= tensor.size(axis);
    last += (tensor.size(axis) - 1) * tensor.stride(axis);
  }
  if (elements == 0) return;
  const auto begin = reinterpret_cast<uintptr_t>(tensor.data);
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
#else
void declare(const Tensor&, bool) {}
struct Call {};
using dk::OnDevice;
#endif

template <typename T>
bool load_tensor(T& tensor, py::handle source) {
  if (source.is_none()) return true;
  static PyObject* const name = PyUnicode_InternFromString("data_ptr");
  PyObject* address = PyObject_CallMethodNoArgs(source.ptr(), name);
  if (!address) {
    PyErr_Clear();
    return false;
  }
  tensor.object = source;
  tensor.data = PyLong_AsVoidPtr(address);
  Py_DECREF(address);
  declare(tensor, std::is_same_v<T, Output>);
  return true;
}

template <typename T>
std::string described(const T& argument) {
  if constexpr (std::is_base_of_v<Tensor, T>) return argument.describe();
  else return "";
}

// module.name(device, stream, arguments...): the launcher's error with the shapes of the call
template <typename... Arguments>
void define(py::module_& module, const char* name, void (*function)(cudaStream_t, Arguments...)) {
  module.def(
      name,
      [name, function](int device, intptr_t stream, Arguments... arguments) {
        try {
          OnDevice current(device);
          function(reinterpret_cast<cudaStream_t>(stream), arguments...);
        } catch (const std::exception& error) {
          std::string message = std::string(name) + ": " + error.what() + "; called with";
          for (const std::string& text : {described(arguments)...})
            if (!text.empty()) message += " " + text + ",";
          message.pop_back();
          throw std::runtime_error(message);
        }
      },
      py::call_guard<Call>());
}

}  // namespace

namespace pybind11::detail {
template <>
struct type_caster<Input> {
  PYBIND11_TYPE_CASTER(Input, const_name("torch.Tensor | None"));
  bool load(handle source, bool) { return load_tensor(value, source); }
};
template <>
struct type_caster<Output> {
  PYBIND11_TYPE_CASTER(Output, const_name("torch.Tensor | None"));
  bool load(handle source, bool) { return load_tensor(value, source); }
};
}  // namespace pybind11::detail

using namespace dk;

PYBIND11_MODULE(DK_MODULE, module) {
  define(module, "add_rows",
         +[](cudaStream_t stream, Input sums, Output out, int64_t groups, int64_t rows, int64_t columns) {
           add_rows(sums.as<float>(), out.data, groups, rows, columns, out.dtype(), stream);
         });

  define(module, "feed_forward_fwd",
         +[](cudaStream_t stream, Input x, Input bias, Output y, int64_t rows, int64_t inner, int64_t columns,
             int64_t x_outer, int64_t x_inner, int64_t x_column, int act) {
           feed_forward_fwd(x.data, bias.data, y.data, rows, inner, columns, {x_outer, x_inner, x_column},
                            bias.given() ? bias.stride(0) : 0, x.dtype(), bias.dtype(), Activation(act), stream);
         });
  module.def("feed_forward_bwd_parts", &feed_forward_bwd_parts);
  define(module, "feed_forward_bwd",
         +[](cudaStream_t stream, Input dy, Input x, Input bias, Output dx, Output dbias_sums, int64_t rows,
             int64_t inner, int64_t columns, int64_t dy_outer, int64_t dy_inner, int64_t dy_column, int64_t x_outer,
             int64_t x_inner, int64_t x_column, int act) {
           feed_forward_bwd(dy.data, x.data, bias.data, dx.data, dbias_sums.as<float>(), rows, inner, columns,
                            {dy_outer, dy_inner, dy_column}, {x_outer, x_inner, x_column},
                            bias.given() ? bias.stride(0) : 0, x.dtype(), bias.dtype(), Activation(act), stream);
         });

#ifdef DK_EMULATED
  module.def("set_seed", &emulator::set_seed, "The order of threads and blocks in the launches to come");
#endif
}
