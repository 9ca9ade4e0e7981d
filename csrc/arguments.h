// Arguments from Python, without torch's headers: tensors, numbers, tuples of numbers, and plans.
//
// A tensor's address, sizes and strides come from the table of functions that torch exports by the DLPack
// standard (__dlpack_c_exchange_api__): no call into Python. Where there is no table they are read by name.
#pragma once

#include <Python.h>

#include <array>
#include <climits>
#include <cstring>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "common.cuh"

namespace dk::python {

// The exception that is set in Python
struct Raised {};

inline PyObject* checked(PyObject* object) {
  if (object == nullptr) throw Raised{};
  return object;
}

// Owns a reference
class Object {
 public:
  explicit Object(PyObject* object) : object_(checked(object)) {}
  ~Object() { Py_DECREF(object_); }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  operator PyObject*() const { return object_; }

 private:
  PyObject* object_;
};

inline std::string text_of(PyObject* object) {
  const Object text(PyObject_Str(object));
  const char* const bytes = PyUnicode_AsUTF8(text);
  if (bytes == nullptr) throw Raised{};
  return bytes;
}

[[noreturn]] inline void type_error(const std::string& message) {
  PyErr_SetString(PyExc_TypeError, message.c_str());
  throw Raised{};
}

// --- DLPack: what version 1 of the standard lays out

struct View {
  void* data;
  int32_t device_type, device;
  int32_t dim;
  uint8_t code, bits;
  uint16_t lanes;
  const int64_t* shape;
  const int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeTable {
  uint32_t major, minor;
  const ExchangeTable* previous;
  void *allocator, *to_managed, *from_managed;
  int (*view)(void* object, View* out);
  void* current_stream;
};

constexpr int kSigned = 0, kUnsigned = 1, kFloat = 2, kBrain = 4, kBool = 6;
constexpr int kCpu = 1, kGpu = 2;

// torch.Tensor, and its table or null
struct Torch {
  PyTypeObject* tensor;
  const ExchangeTable* table = nullptr;

  Torch() {
    const Object module(PyImport_ImportModule("torch"));
    tensor = reinterpret_cast<PyTypeObject*>(checked(PyObject_GetAttrString(module, "Tensor")));
    PyObject* const capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(tensor), "__dlpack_c_exchange_api__");
    if (capsule != nullptr) {
      table = static_cast<const ExchangeTable*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
      while (table != nullptr && table->major != 1) table = table->previous;
      if (table != nullptr && table->view == nullptr) table = nullptr;
      Py_DECREF(capsule);
    }
    PyErr_Clear();
  }

  static const Torch& instance() {
    static const Torch torch;
    return torch;
  }
};

// --- tensors

// A tensor, or None
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(PyObject* source) {
    if (source == Py_None) return;
    object_ = source;
    const Torch& torch = Torch::instance();
    if (torch.table != nullptr && PyObject_TypeCheck(source, torch.tensor)) {
      if (torch.table->view(source, &view_) == 0 && view_.strides != nullptr) {
        view_.data = static_cast<char*>(view_.data) + view_.byte_offset;
        return;
      }
      PyErr_Clear();
    }
    read_attributes();
  }

  bool given() const { return object_ != nullptr; }
  void* data() const { return view_.data; }
  int64_t dim() const { return view_.dim; }
  int64_t size(int64_t axis) const { return shape()[axis < 0 ? axis + view_.dim : axis]; }
  int64_t stride(int64_t axis) const { return strides()[axis < 0 ? axis + view_.dim : axis]; }
  int64_t bytes_of_element() const { return view_.bits / 8; }
  const View& view() const { return view_; }
  const int64_t* shape() const { return own_.empty() ? view_.shape : own_.data(); }
  const int64_t* strides() const { return own_.empty() ? view_.strides : own_.data() + view_.dim; }
  bool whole() const { return view_.code == kSigned || view_.code == kUnsigned || view_.code == kBool; }
  // whether it holds elements of the kernels' types
  bool floating() const {
    return view_.code == kFloat ? view_.bits == 16 || view_.bits == 32 : view_.code == kBrain && view_.bits == 16;
  }
  DType dtype() const {
    if (!given()) return DType::float32;
    if (!floating()) throw std::invalid_argument("the kernels take float32, float16 and bfloat16; got " + describe());
    return view_.bits == 32 ? DType::float32 : view_.code == kBrain ? DType::bfloat16 : DType::float16;
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(view_.data);
  }
  std::string describe() const {
    if (!given()) return "None";
    const Object dtype(PyObject_GetAttrString(object_, "dtype"));
    std::string sizes;
    for (int axis = 0; axis < view_.dim; ++axis) sizes += (axis ? ", " : "") + std::to_string(shape()[axis]);
    return text_of(dtype) + " [" + sizes + "]";
  }

 private:
  int64_t call(const char* name) const {
    const Object value(PyObject_CallMethod(object_, name, nullptr));
    const int64_t number = PyLong_AsLongLong(value);
    if (number == -1 && PyErr_Occurred()) throw Raised{};
    return number;
  }

  void read_attributes() {
    if (!PyObject_HasAttrString(object_, "data_ptr")) {
      type_error("expected a tensor or None; got " + text_of(reinterpret_cast<PyObject*>(Py_TYPE(object_))));
    }
    const Object address(PyObject_CallMethod(object_, "data_ptr", nullptr));
    view_.data = PyLong_AsVoidPtr(address);
    const Object shape(PyObject_GetAttrString(object_, "shape")), stride(PyObject_CallMethod(object_, "stride", nullptr));
    const Object dtype(PyObject_GetAttrString(object_, "dtype")), device(PyObject_GetAttrString(object_, "device"));
    for (PyObject* numbers : {static_cast<PyObject*>(shape), static_cast<PyObject*>(stride)}) {
      const Object sequence(PySequence_Tuple(numbers));
      view_.dim = static_cast<int32_t>(PyTuple_GET_SIZE(static_cast<PyObject*>(sequence)));
      for (int axis = 0; axis < view_.dim; ++axis) own_.push_back(PyLong_AsLongLong(PyTuple_GET_ITEM(static_cast<PyObject*>(sequence), axis)));
    }
    const std::string name = text_of(dtype), place = text_of(device);
    view_.code = name == "torch.bfloat16" ? kBrain : name.rfind("torch.float", 0) == 0 ? kFloat : kSigned;
    view_.bits = static_cast<uint8_t>(8 * call("element_size"));
    view_.device_type = place == "cpu" ? kCpu : place.rfind("cuda", 0) == 0 ? kGpu : 0;
    const size_t colon = place.find(':');
    view_.device = colon == std::string::npos ? 0 : std::atoi(place.c_str() + colon + 1);
    if (PyErr_Occurred()) throw Raised{};
  }

  PyObject* object_ = nullptr;
  View view_{};
  std::vector<int64_t> own_;  // shape and strides where there is no table
};

struct Input : Tensor {
  using Tensor::Tensor;
};
struct Output : Tensor {
  using Tensor::Tensor;
};

// --- one argument

template <typename T>
struct Convert;

template <typename T>
T number(PyObject* object) {
  if constexpr (std::is_same_v<T, bool>) {
    const int truth = PyObject_IsTrue(object);
    if (truth < 0) throw Raised{};
    return truth != 0;
  } else if constexpr (std::is_floating_point_v<T>) {
    const double value = PyFloat_AsDouble(object);
    if (value == -1.0 && PyErr_Occurred()) throw Raised{};
    return static_cast<T>(value);
  } else {
    const long long value = PyLong_AsLongLong(object);
    if (value == -1 && PyErr_Occurred()) throw Raised{};
    if (static_cast<long long>(static_cast<T>(value)) != value) {
      throw std::invalid_argument(std::to_string(value) + " is more than " + std::to_string(8 * sizeof(T)) + " bits hold");
    }
    return static_cast<T>(value);
  }
}

template <typename T>
struct Convert {
  static T from(PyObject* object) { return number<T>(object); }
};
template <>
struct Convert<Input> {
  static Input from(PyObject* object) { return Input(object); }
};
template <>
struct Convert<Output> {
  static Output from(PyObject* object) { return Output(object); }
};
template <typename T>
struct Convert<std::vector<T>> {
  static std::vector<T> from(PyObject* object) {
    const Object items(PySequence_Fast(object, "expected a sequence"));
    std::vector<T> result;
    for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(static_cast<PyObject*>(items)); ++i) {
      result.push_back(Convert<T>::from(PySequence_Fast_GET_ITEM(static_cast<PyObject*>(items), i)));
    }
    return result;
  }
};
template <typename T, size_t N>
struct Convert<std::array<T, N>> {
  static std::array<T, N> from(PyObject* object) {
    const Object items(PySequence_Fast(object, "expected a sequence"));
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(static_cast<PyObject*>(items));
    if (count != static_cast<Py_ssize_t>(N)) {
      type_error("expected " + std::to_string(N) + " values; got " + std::to_string(count));
    }
    std::array<T, N> result;
    for (size_t i = 0; i < N; ++i) result[i] = Convert<T>::from(PySequence_Fast_GET_ITEM(static_cast<PyObject*>(items), i));
    return result;
  }
};

// As given to `function`: an error says where
template <typename T>
T argument(const char* function, PyObject* const* given, Py_ssize_t position) {
  try {
    return Convert<T>::from(given[position]);
  } catch (const Raised&) {
    PyObject *type, *value, *trace;
    PyErr_Fetch(&type, &value, &trace);
    PyErr_NormalizeException(&type, &value, &trace);
    PyErr_Format(type, "%s: argument %zd: %S", function, position, value);
    Py_XDECREF(type);
    Py_XDECREF(value);
    Py_XDECREF(trace);
    throw;
  } catch (const std::exception& error) {
    throw std::invalid_argument(std::string(function) + ": argument " + std::to_string(position) + ": " + error.what());
  }
}

template <typename... Arguments, size_t... I>
std::tuple<Arguments...> arguments_of(const char* function, PyObject* const* given, Py_ssize_t first,
                                      std::index_sequence<I...>) {
  return {argument<Arguments>(function, given, first + static_cast<Py_ssize_t>(I))...};
}

// What a call is but for its addresses, made once for many calls: a capsule in Python
template <typename T>
struct Plan {
  const T* value;
  static constexpr const char* kName = "dit_kernels.plan";
  // tells plans apart
  static void* tag() {
    static char tag;
    return &tag;
  }
  static PyObject* capsule(const T& plan) {
    PyObject* const made = checked(PyCapsule_New(new T(plan), kName, [](PyObject* object) {
      delete static_cast<T*>(PyCapsule_GetPointer(object, kName));
    }));
    PyCapsule_SetContext(made, tag());
    return made;
  }
};
template <typename T>
struct Convert<Plan<T>> {
  static Plan<T> from(PyObject* object) {
    if (!PyCapsule_IsValid(object, Plan<T>::kName) || PyCapsule_GetContext(object) != Plan<T>::tag()) {
      type_error("expected the plan of this call; got " + text_of(reinterpret_cast<PyObject*>(Py_TYPE(object))));
    }
    return {static_cast<const T*>(PyCapsule_GetPointer(object, Plan<T>::kName))};
  }
};

// --- keys

// The bytes by which a plan is found: all that launches depend on but the addresses themselves
inline PyObject* key(PyObject* const* tensors, Py_ssize_t count) {
  int64_t small[512];
  std::vector<int64_t> large;
  size_t used = 0;
  auto add = [&](int64_t value) {
    if (used < std::size(small)) {
      small[used] = value;
    } else {
      if (large.empty()) large.assign(small, small + used);
      large.push_back(value);
    }
    ++used;
  };
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (tensors[i] == Py_None) {
      add(-1);
      continue;
    }
    const Tensor tensor(tensors[i]);
    const View& v = tensor.view();
    const auto low = reinterpret_cast<uintptr_t>(v.data) & 15;
    add(int64_t(v.code) | int64_t(v.bits) << 8 | int64_t(low) << 16 | int64_t(v.device & 0xff) << 24 |
        int64_t(v.device_type & 0xff) << 32 | int64_t(v.dim) << 40);
    for (int axis = 0; axis < v.dim; ++axis) add(tensor.shape()[axis]);
    for (int axis = 0; axis < v.dim; ++axis) add(tensor.strides()[axis]);
  }
  const int64_t* const all = large.empty() ? small : large.data();
  return checked(PyBytes_FromStringAndSize(reinterpret_cast<const char*>(all), Py_ssize_t(used * sizeof(int64_t))));
}

// Whether all are on a device of this type, and of dtypes that the kernels take
inline bool takes(PyObject* const* tensors, Py_ssize_t count, int device_type) {
  for (Py_ssize_t i = 0; i < count; ++i) {
    if (tensors[i] == Py_None) continue;
    const Tensor tensor(tensors[i]);
    if (tensor.view().device_type != device_type || !(tensor.floating() || tensor.whole())) return false;
  }
  return true;
}

// --- functions of a module, called with positional arguments only

// What C++ throws as an exception of Python
template <typename Action>
PyObject* guarded(Action&& action) {
  try {
    return action();
  } catch (const Raised&) {
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

using Function = PyObject* (*)(PyObject* self, PyObject* const* arguments, Py_ssize_t count);

// `state` lives as long as the process, as the module does
inline void add_function(PyObject* module, const char* name, Function function, void* state) {
  auto* const definition = new PyMethodDef{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, nullptr};
  static char none;
  const Object self(PyCapsule_New(state != nullptr ? state : &none, nullptr, nullptr));
  const Object made(PyCFunction_New(definition, self));
  if (PyObject_SetAttrString(module, name, made) < 0) throw Raised{};
}

template <typename State>
State& state_of(PyObject* self) {
  return *static_cast<State*>(PyCapsule_GetPointer(self, nullptr));
}

inline void check_count(const char* name, Py_ssize_t expected, Py_ssize_t count) {
  if (count != expected) {
    type_error(std::string(name) + " takes " + std::to_string(expected) + " arguments; got " + std::to_string(count));
  }
}

// module.name(arguments...) -> a plan
template <typename T, typename... Arguments>
void define_plan(PyObject* module, const char* name, T (*make)(Arguments...)) {
  struct State {
    const char* name;
    T (*make)(Arguments...);
  };
  const Function call = [](PyObject* self, PyObject* const* given, Py_ssize_t count) {
    return guarded([&]() -> PyObject* {
      const State& state = state_of<State>(self);
      check_count(state.name, sizeof...(Arguments), count);
      return Plan<T>::capsule(std::apply(state.make, arguments_of<std::decay_t<Arguments>...>(
                                                         state.name, given, 0, std::index_sequence_for<Arguments...>{})));
    });
  };
  add_function(module, name, call, new State{name, make});
}

}  // namespace dk::python
