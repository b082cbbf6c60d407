// nearest_anchor for NumPy arrays and, where it is built with CUDA, for arrays on a CUDA device: a Python module that
// needs NumPy alone, no TensorFlow. The rules of what it computes are in nearest_anchor.h.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "nearest_anchor.h"
#include "nearest_anchor_arguments.h"
#include "nearest_anchor_kernel.h"

#if defined(__linux__)
#include <sched.h>
#endif
#if AIB_TF_CUDA
#include <cuda_runtime_api.h>
#endif

namespace aib_tf {
namespace {

namespace py = pybind11;
using py::literals::operator""_a;

void Check(const std::string& problem) {
  if (!problem.empty()) throw py::value_error(problem);
}

// ------------------------------------------------------------------------------------------------------- the threads

// To start a thread and to wait for its end takes about 14,000; for less work than this it is not worth it.
constexpr int64_t kNanosecondsPerThread = 50000;

int64_t ProcessorsOfThisProcess() {
#if defined(__linux__)
  cpu_set_t allowed;
  if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) return std::max(1, CPU_COUNT(&allowed));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// Threads live for one call: a pool of them would not survive a fork, which is how Python's multiprocessing may start.
void RunOnThreads(int64_t most_threads, int64_t tasks, int64_t nanoseconds, const std::function<void(int64_t)>& body) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto work = [&] {
    try {
      for (int64_t task = next++; task < tasks; task = next++) body(task);
    } catch (...) {
      next = tasks;
      const std::lock_guard<std::mutex> lock(failure_mutex);
      failure = std::current_exception();
    }
  };

  int64_t useful = std::min(tasks, tasks * nanoseconds / kNanosecondsPerThread);
  if (useful > 1) useful = std::min(useful, most_threads > 0 ? most_threads : ProcessorsOfThisProcess());
  std::vector<std::thread> others;
  if (useful > 1) others.reserve(useful - 1);
  try {
    while (static_cast<int64_t>(others.size()) + 1 < useful) others.emplace_back(work);
  } catch (const std::system_error&) {
    // The system gives no more threads. Those that there are do all of the work.
  }
  work();
  for (std::thread& other : others) other.join();
  if (failure) std::rethrow_exception(failure);
}

ParallelFor OnThreads(int64_t threads) {
  if (threads < 0) Check("`threads` must not be negative. Received: threads=" + std::to_string(threads));
  return [threads](int64_t tasks, int64_t nanoseconds, const std::function<void(int64_t)>& body) {
    RunOnThreads(threads, tasks, nanoseconds, body);
  };
}

// -------------------------------------------------------------------------------------------------------- the checks

// The __cuda_array_interface__ of an array on a device; null for anything else.
py::object CudaInterface(const py::object& object) {
  if (py::isinstance<py::array>(object)) return py::object();
  PyObject* const interface = PyObject_GetAttrString(object.ptr(), "__cuda_array_interface__");
  if (interface == nullptr) {
    if (!PyErr_ExceptionMatches(PyExc_AttributeError)) throw py::error_already_set();
    PyErr_Clear();
  }
  return py::reinterpret_steal<py::object>(interface);
}

// An argument as Python gives it.
struct Input {
  Input(const char* name, const py::object& object)
      : name(name), object(object), cuda_interface(CudaInterface(object)) {}

  const char* name;
  py::object object;
  py::object cuda_interface;
};

// As NumPy calls it, whatever its byte order.
std::string NameOf(const py::dtype& dtype) {
  if (dtype.kind() == 'f' && dtype.itemsize() == 2) return "float16";
  if (dtype.kind() == 'f' && dtype.itemsize() == 4) return "float32";
  if (dtype.kind() == 'f' && dtype.itemsize() == 8) return "float64";
  if (dtype.kind() == 'i' && dtype.itemsize() == 4) return "int32";
  return py::str(dtype.attr("name"));  // takes a microsecond
}

bool IsNative(const py::dtype& dtype) { return dtype.byteorder() == '=' || dtype.byteorder() == '|'; }

// What is known of an argument wherever its elements are.
struct Argument {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  int64_t size;
};

void CheckTypesAndShapes(const Argument& x, const Argument& anchors) {
  Check(ProblemOfTypes(x.dtype, anchors.dtype));
  Check(ProblemOfAnchorShape(anchors.shape));
}

void CheckDtype(const Argument& argument, const std::string& expected) {
  if (argument.dtype != expected) {
    Check("`" + argument.name + "` must be " + expected + ". Received: " + argument.name + ".dtype=" + argument.dtype);
  }
}

void CheckTypesAndShapes(const Argument& x, const Argument& anchors, const Argument& index,
                         const Argument& d_quantized) {
  CheckTypesAndShapes(x, anchors);
  CheckDtype(index, "int32");
  CheckDtype(d_quantized, x.dtype);
  for (const Argument* other : {&index, &d_quantized}) {
    Check(ProblemOfSameShape(other->name, other->shape, x.shape));
  }
}

// Calls body(T{}, A{}) with the type of x and the type of the anchors.
template <typename Body>
auto WithTypes(const std::string& dtype_of_x, const Body& body) {
  if (dtype_of_x == "float16") return body(Half{}, float{});
  if (dtype_of_x == "bfloat16") return body(BFloat16{}, float{});
  if (dtype_of_x == "float32") return body(float{}, float{});
  return body(double{}, double{});
}

// ------------------------------------------------------------------------------------------------------ NumPy arrays

class HostArgument : public Argument {
 public:
  explicit HostArgument(const Input& input) : array_(input.object) {
    name = input.name;
    dtype = NameOf(array_.dtype());
    shape.assign(array_.shape(), array_.shape() + array_.ndim());
    size = array_.size();
  }

  // The elements in row-major order, copied if they are not.
  template <typename T>
  const T* Data() {
    const bool is_aligned = reinterpret_cast<uintptr_t>(array_.data()) % alignof(T) == 0;
    if (!(array_.flags() & py::array::c_style) || !is_aligned || !IsNative(array_.dtype())) {
      array_ = array_.attr("astype")(NativeDtype(), "order"_a = "C");
    }
    return static_cast<const T*>(array_.data());
  }

  py::dtype NativeDtype() const {
    const py::dtype own = array_.dtype();
    return IsNative(own) ? own : py::dtype(py::object(own.attr("newbyteorder")("=")));
  }

  double ToNumber() const {
    Check(ProblemOfScalar(name, shape));
    if (std::string("fiub").find(array_.dtype().kind()) == std::string::npos && dtype != "bfloat16") {
      Check("`" + name + "` must be a real number. Received: " + name + ".dtype=" + dtype);
    }
    return py::float_(py::object(array_[py::tuple()]));
  }

 private:
  py::array array_;
};

// Copies them, so that no other thread can write to the anchors after they were found to be finite.
template <typename A>
std::vector<A> FiniteAnchors(HostArgument* anchors) {
  const A* const data = anchors->Data<A>();
  std::vector<A> copy(data, data + anchors->size);
  Check(ProblemOfAnchorValues(copy.data(), anchors->size));
  return copy;
}

py::object NearestAnchorOnHost(const py::object& result_type, const std::vector<Input>& inputs,
                               const ParallelFor& parallel_for) {
  HostArgument x(inputs[0]), anchors(inputs[1]);
  CheckTypesAndShapes(x, anchors);
  return WithTypes(x.dtype, [&](auto t, auto a) -> py::object {
    using T = decltype(t);
    using A = decltype(a);
    const std::vector<A> anchor_values = FiniteAnchors<A>(&anchors);
    const T* const x_data = x.Data<T>();
    py::array quantized(x.NativeDtype(), x.shape);
    py::array_t<int32_t> index(x.shape);
    T* const quantized_data = static_cast<T*>(quantized.mutable_data());
    int32_t* const index_data = index.mutable_data();
    A loss;
    {
      const py::gil_scoped_release others_run;
      NearestAnchorCpu(x_data, x.size, anchor_values.data(), static_cast<int>(anchors.size), quantized_data, index_data,
                       &loss, parallel_for);
    }
    const py::object loss_scalar = py::cast(py::numpy_scalar<A>(loss));
    return result_type(quantized, index, loss_scalar, loss_scalar);
  });
}

py::object GradientOnHost(const py::object& result_type, const std::vector<Input>& inputs,
                          const ParallelFor& parallel_for) {
  HostArgument x(inputs[0]), anchors(inputs[1]), index(inputs[2]), d_quantized(inputs[3]);
  CheckTypesAndShapes(x, anchors, index, d_quantized);
  const double d_codebook = HostArgument(inputs[4]).ToNumber();
  const double d_commitment = HostArgument(inputs[5]).ToNumber();
  return WithTypes(x.dtype, [&](auto t, auto a) -> py::object {
    using T = decltype(t);
    using A = decltype(a);
    const std::vector<A> anchor_values = FiniteAnchors<A>(&anchors);
    const T* const x_data = x.Data<T>();
    const int32_t* const index_data = index.Data<int32_t>();
    const T* const d_quantized_data = d_quantized.Data<T>();
    py::array d_x(x.NativeDtype(), x.shape);
    py::array_t<A> d_anchors(anchors.shape);
    T* const d_x_data = static_cast<T*>(d_x.mutable_data());
    A* const d_anchors_data = d_anchors.mutable_data();
    int64_t bad;
    {
      const py::gil_scoped_release others_run;
      bad = NearestAnchorGradCpu(x_data, x.size, anchor_values.data(), static_cast<int>(anchors.size), index_data,
                                 d_quantized_data, static_cast<A>(d_codebook), static_cast<A>(d_commitment), d_x_data,
                                 d_anchors_data, parallel_for);
    }
    if (bad >= 0) {
      Check(ProblemOfIndex(bad, index_data[bad], index.shape, anchors.size));
    }
    return result_type(d_x, d_anchors);
  });
}

// ------------------------------------------------------------------------------------------------------ device arrays

#if !AIB_TF_CUDA

constexpr bool kHasCuda = false;

void CheckAreOnHost(const std::vector<Input>& inputs) {
  for (const Input& input : inputs) {
    if (!input.cuda_interface) continue;
    const py::object type = py::type::of(input.object);
    const std::string name = input.name;
    Check("`" + name + "` is on a CUDA device, and this aib_tf was built without CUDA; install it with AIB_TF_CUDA=1 " +
          "where nvcc is. Received: " + name + " of type " + std::string(py::str(type.attr("__module__"))) + "." +
          std::string(py::str(type.attr("__qualname__"))));
  }
}

#else  // AIB_TF_CUDA

constexpr bool kHasCuda = true;

// Whether the first `num_arrays` inputs, the arrays, are on a device. The others, scalars, can be numbers even then.
bool AreOnDevice(const std::vector<Input>& inputs, size_t num_arrays) {
  std::string on_device, on_host;
  for (size_t i = 0; i < inputs.size(); ++i) {
    if (inputs[i].cuda_interface) {
      on_device = inputs[i].name;
    } else if (i < num_arrays) {
      on_host = inputs[i].name;
    }
  }
  if (!on_device.empty() && !on_host.empty()) {
    Check("Either all arrays must be on the CUDA device, or none. Received: `" + on_device + "` is, `" + on_host +
          "` is not");
  }
  return !on_device.empty();
}

void CheckCuda(int code) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // or whoever asks next would be told of it
  if (code == cudaErrorMemoryAllocation) throw std::bad_alloc();
  throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(static_cast<cudaError_t>(code)));
}

class CurrentDevice {
 public:
  explicit CurrentDevice(int device) {
    CheckCuda(cudaGetDevice(&before_));
    changed_ = device != before_;
    if (changed_) CheckCuda(cudaSetDevice(device));
  }
  ~CurrentDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_;
  bool changed_;
};

class DeviceArgument : public Argument {
 public:
  explicit DeviceArgument(const Input& input) {
    const py::dict interface(input.cuda_interface);
    name = input.name;
    shape = interface["shape"].cast<std::vector<int64_t>>();
    size = 1;
    for (int64_t length : shape) size *= length;
    const auto type = py::dtype::from_args(interface["typestr"]);
    dtype = NameOf(type);
    if (type.kind() == 'V' && type.itemsize() == 2 && py::hasattr(input.object, "dtype")) {
      // The interface has no name for bfloat16. NumPy's ends with it, and so does PyTorch's.
      const std::string own = py::str(input.object.attr("dtype"));
      const std::string bfloat16 = "bfloat16";
      if (own.size() >= bfloat16.size() && own.substr(own.size() - bfloat16.size()) == bfloat16) dtype = bfloat16;
    }
    if (!IsNative(type)) {
      Check("`" + name + "` must have the byte order of this machine. Received: typestr=" +
            std::string(py::str(interface["typestr"])));
    }
    if (!Get(interface, "mask").is_none()) Check("`" + name + "` must not have a mask. Received: an array with one");
    const py::object strides = Get(interface, "strides");
    if (!strides.is_none()) CheckContiguous(strides.cast<std::vector<int64_t>>(), type.itemsize());
    const auto address = py::tuple(interface["data"])[0].cast<uintptr_t>();
    // A device cannot load such an element, and after it tried, the process can use the device no more.
    if (size > 0 && type.itemsize() > 0 && address % type.itemsize() != 0) {
      Check("`" + name + "` must begin at a multiple of " + std::to_string(type.itemsize()) +
            " bytes, the size of its elements. Received: data=" + std::to_string(address));
    }
    data_ = reinterpret_cast<void*>(address);
    const py::object stream = Get(interface, "stream");
    if (!stream.is_none()) {
      const auto number = stream.cast<uintptr_t>();
      if (number == 0) Check("`" + name + "` must name its stream. Received: stream=0, which is ambiguous");
      stream_ = reinterpret_cast<cudaStream_t>(number);  // 1 and 2 are CUDA's own handles of the default streams
    }
    // Before version 3, nothing says when the elements are there.
    names_stream_ = interface["version"].cast<int>() >= 3;
  }

  template <typename T>
  const T* Data() const {
    return static_cast<const T*>(data_);
  }
  cudaStream_t stream() const { return stream_; }  // null where nothing has to be waited for
  bool names_stream() const { return names_stream_; }

  int Device() const {
    cudaPointerAttributes attributes;
    CheckCuda(cudaPointerGetAttributes(&attributes, data_));
    if (attributes.type == cudaMemoryTypeUnregistered) Check("`" + name + "` must be in the memory of a CUDA device");
    return attributes.device;
  }

 private:
  static py::object Get(const py::dict& interface, const char* key) {
    return interface.contains(key) ? py::object(interface[key]) : py::none();
  }

  void CheckContiguous(const std::vector<int64_t>& strides, int64_t stride) const {
    for (size_t i = shape.size(); i > 0 && size > 0; --i) {
      if (shape[i - 1] != 1 && strides.at(i - 1) != stride) {
        Check("`" + name + "` must be contiguous in row-major order. Received: " + name + ".shape=" + ShapeText(shape) +
              " with strides " + ShapeText(strides));
      }
      stride *= shape[i - 1];
    }
  }

  void* data_;
  cudaStream_t stream_ = nullptr;
  bool names_stream_;
};

// Where the work is done: the device of the arrays, on the stream of the first array that names one. The work comes
// after what was queued before on the streams of the other arrays, and what is queued there later comes after the work,
// since that may be to give the memory of an argument to somebody else.
class Place {
 public:
  explicit Place(const std::vector<const DeviceArgument*>& arguments) {
    for (const DeviceArgument* argument : arguments) {
      if (argument->size > 0) {
        const int device = argument->Device();
        if (device_ >= 0 && device != device_) {
          Check("All arrays must be on one device. Received: `" + argument->name + "` is on device " +
                std::to_string(device) + ", one before it on device " + std::to_string(device_));
        }
        device_ = device;
      }
      const cudaStream_t stream = argument->stream();
      const bool is_new = std::find(streams_.begin(), streams_.end(), stream) == streams_.end();
      if (stream != nullptr && is_new) streams_.push_back(stream);
      must_wait_ = must_wait_ || !argument->names_stream();
    }
    if (streams_.empty()) streams_.push_back(cudaStreamLegacy);
  }

  int device() const { return device_; }
  cudaStream_t stream() const { return streams_[0]; }

  void Begin() const {
    if (must_wait_) CheckCuda(cudaDeviceSynchronize());
    for (cudaStream_t other : streams_) Order(other, stream());
  }
  void End() const {
    for (cudaStream_t other : streams_) Order(stream(), other);
    if (must_wait_) CheckCuda(cudaStreamSynchronize(stream()));
  }

 private:
  static void Order(cudaStream_t first, cudaStream_t second) {
    if (first == second) return;
    cudaEvent_t event;
    CheckCuda(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    int code = cudaEventRecord(event, first);
    if (code == cudaSuccess) code = cudaStreamWaitEvent(second, event, 0);
    cudaEventDestroy(event);  // CUDA keeps it until it is no longer waited for
    CheckCuda(code);
  }

  int device_ = -1;
  std::vector<cudaStream_t> streams_;
  bool must_wait_ = false;
};

// Memory of the current device, cut into parts that are aligned to 256 bytes. To free it waits until the device has
// done all that it was given, so that nothing uses it any more.
class DeviceMemory {
 public:
  explicit DeviceMemory(const std::vector<size_t>& bytes) {
    constexpr size_t kAlignment = 256;
    size_t total = 0;
    for (size_t part : bytes) {
      offsets_.push_back(total);
      total += (part + kAlignment - 1) / kAlignment * kAlignment;
    }
    void* memory;
    CheckCuda(cudaMalloc(&memory, std::max(total, kAlignment)));
    memory_ = std::shared_ptr<void>(memory, [](void* unused) { cudaFree(unused); });
  }

  template <typename T>
  T* Part(size_t part) const {
    return reinterpret_cast<T*>(static_cast<char*>(memory_.get()) + offsets_[part]);
  }
  std::shared_ptr<void> Share(size_t part) const { return std::shared_ptr<void>(memory_, Part<char>(part)); }

 private:
  std::shared_ptr<void> memory_;
  std::vector<size_t> offsets_;
};

// An array on a device, for Python.
class DeviceArray {
 public:
  DeviceArray(std::shared_ptr<void> data, std::string dtype, std::vector<int64_t> shape, cudaStream_t stream)
      : data_(std::move(data)), dtype_(std::move(dtype)), shape_(std::move(shape)), stream_(stream) {}

  py::dtype dtype() const {
    if (dtype_ == "bfloat16") return py::dtype::from_args(py::module_::import("ml_dtypes").attr("bfloat16"));
    return py::dtype(dtype_);
  }
  py::tuple shape() const { return py::tuple(py::cast(shape_)); }
  py::dict Interface() const {
    const bool empty = std::count(shape_.begin(), shape_.end(), 0) > 0;
    const auto address = empty ? uintptr_t{0} : reinterpret_cast<uintptr_t>(data_.get());
    return py::dict("shape"_a = shape(), "typestr"_a = dtype_ == "bfloat16" ? py::str("<V2") : dtype().attr("str"),
                    "data"_a = py::make_tuple(address, false), "version"_a = 3, "strides"_a = py::none(),
                    "stream"_a = reinterpret_cast<uintptr_t>(stream_));
  }

 private:
  std::shared_ptr<void> data_;
  std::string dtype_;
  std::vector<int64_t> shape_;
  cudaStream_t stream_;
};

py::object NearestAnchorOnDevice(const py::object& result_type, const std::vector<Input>& inputs) {
  const DeviceArgument x(inputs[0]), anchors(inputs[1]);
  CheckTypesAndShapes(x, anchors);
  const int num_anchors = static_cast<int>(anchors.size);
  return WithTypes(x.dtype, [&](auto t, auto a) -> py::object {
    using T = decltype(t);
    using A = decltype(a);
    std::vector<DeviceArray> outputs;
    {
      const py::gil_scoped_release others_run;
      const Place place({&x, &anchors});
      const CurrentDevice current(place.device());
      const DeviceMemory quantized({x.size * sizeof(T)}), index({x.size * sizeof(int32_t)});
      // The workspace must be there until the device is done. In one memory with the losses, it is.
      const DeviceMemory rest({sizeof(A), sizeof(A), NearestAnchorCudaWorkspace<T, A>(x.size, num_anchors)});
      place.Begin();
      CheckCuda(NearestAnchorCuda(x.Data<T>(), x.size, anchors.Data<A>(), num_anchors, quantized.Part<T>(0),
                                  index.Part<int32_t>(0), rest.Part<A>(0), rest.Part<A>(1), rest.Part<void>(2),
                                  place.stream()));
      place.End();
      outputs = {DeviceArray(quantized.Share(0), x.dtype, x.shape, place.stream()),
                 DeviceArray(index.Share(0), "int32", x.shape, place.stream()),
                 DeviceArray(rest.Share(0), anchors.dtype, {}, place.stream()),
                 DeviceArray(rest.Share(1), anchors.dtype, {}, place.stream())};
    }
    return result_type(outputs[0], outputs[1], outputs[2], outputs[3]);
  });
}

// The gradient of a loss: a 0-d array on the device, or a number.
class DeviceScalar {
 public:
  DeviceScalar(const Input& input, const std::string& dtype) {
    if (input.cuda_interface) {
      on_device_ = std::make_unique<DeviceArgument>(input);
      CheckDtype(*on_device_, dtype);
      Check(ProblemOfScalar(on_device_->name, on_device_->shape));
    } else {
      number_ = HostArgument(input).ToNumber();
    }
  }

  const DeviceArgument* on_device() const { return on_device_.get(); }

  // Where it is on the device: where it was, or `place`, to which it is copied.
  template <typename A>
  const A* Data(A* place, cudaStream_t stream) const {
    if (on_device_ != nullptr) return on_device_->Data<A>();
    const A value = static_cast<A>(number_);
    CheckCuda(cudaMemcpyAsync(place, &value, sizeof(value), cudaMemcpyHostToDevice, stream));
    return place;
  }

 private:
  std::unique_ptr<DeviceArgument> on_device_;
  double number_ = 0;
};

py::object GradientOnDevice(const py::object& result_type, const std::vector<Input>& inputs) {
  const DeviceArgument x(inputs[0]), anchors(inputs[1]), index(inputs[2]), d_quantized(inputs[3]);
  CheckTypesAndShapes(x, anchors, index, d_quantized);
  const DeviceScalar d_codebook(inputs[4], anchors.dtype), d_commitment(inputs[5], anchors.dtype);
  std::vector<const DeviceArgument*> arguments = {&x, &anchors, &index, &d_quantized};
  for (const DeviceScalar* scalar : {&d_codebook, &d_commitment}) {
    if (scalar->on_device() != nullptr) arguments.push_back(scalar->on_device());
  }
  const int num_anchors = static_cast<int>(anchors.size);
  return WithTypes(x.dtype, [&](auto t, auto a) -> py::object {
    using T = decltype(t);
    using A = decltype(a);
    std::vector<DeviceArray> outputs;
    {
      const py::gil_scoped_release others_run;
      const Place place(arguments);
      const CurrentDevice current(place.device());
      const DeviceMemory d_x({x.size * sizeof(T)});
      const DeviceMemory rest(
          {anchors.size * sizeof(A), sizeof(A), sizeof(A), NearestAnchorGradCudaWorkspace<T, A>(x.size, num_anchors)});
      place.Begin();
      CheckCuda(NearestAnchorGradCuda(x.Data<T>(), x.size, anchors.Data<A>(), num_anchors, index.Data<int32_t>(),
                                      d_quantized.Data<T>(), d_codebook.Data(rest.Part<A>(1), place.stream()),
                                      d_commitment.Data(rest.Part<A>(2), place.stream()), d_x.Part<T>(0),
                                      rest.Part<A>(0), rest.Part<void>(3), place.stream()));
      place.End();
      outputs = {DeviceArray(d_x.Share(0), x.dtype, x.shape, place.stream()),
                 DeviceArray(rest.Share(0), anchors.dtype, anchors.shape, place.stream())};
    }
    return result_type(outputs[0], outputs[1]);
  });
}

#endif  // AIB_TF_CUDA

// -------------------------------------------------------------------------------------------------------- the module

// A collections.namedtuple of the module.
py::object NamedTuple(py::module_& module, const char* name, const std::vector<std::string>& fields, const char* doc) {
  const py::object type =
      py::module_::import("collections").attr("namedtuple")(name, fields, "module"_a = module.attr("__name__"));
  type.attr("__doc__") = doc;
  module.attr(name) = type;
  return type;
}

}  // namespace

// There is no state beside the types of the results, which never change: nothing that the GIL would have to guard.
PYBIND11_MODULE(nearest_anchor_numpy, module, py::mod_gil_not_used()) {
  module.doc() = R"doc(Anchor-nearest quantization of NumPy arrays, compiled, without TensorFlow.

Where `has_cuda` is true, also of arrays on a CUDA device: those of any library that gives them a
`__cuda_array_interface__`, like CuPy.)doc";
  // Python reads a signature from the docstring itself; pybind11's would not say more than `object`.
  py::options options;
  options.disable_function_signatures();

  const py::object result_type = NamedTuple(
      module, "NearestAnchor", {"quantized", "index", "codebook_loss", "commitment_loss"},
      R"doc(What `nearest_anchor` returns.

Attributes:
    quantized: the nearest anchor of each element; shape and dtype of `x`.
    index: int32, shape of `x`; which anchor that is.
    codebook_loss: scalar of the anchors' dtype.
    commitment_loss: the same value.)doc");
  const py::object gradient_type =
      NamedTuple(module, "NearestAnchorGradient", {"d_x", "d_anchors"},
                 R"doc(What `nearest_anchor_gradient` returns.

Attributes:
    d_x: the gradient of `x`; its shape and dtype.
    d_anchors: the gradient of `anchors`; its shape and dtype.)doc");

#if AIB_TF_CUDA
  py::class_<DeviceArray>(module, "DeviceArray", py::module_local(), py::is_final(),
                          py::release_gil_before_calling_cpp_dtor(),
                          R"doc(An array in memory of a CUDA device, to be taken over by, say, `cupy.asarray(array)`.

Attributes:
    shape: tuple of int.
    dtype: numpy.dtype.
    __cuda_array_interface__: version 3; it names the stream on which the array is filled.)doc")
      .def_property_readonly("shape", &DeviceArray::shape)
      .def_property_readonly("dtype", &DeviceArray::dtype)
      .def_property_readonly("__cuda_array_interface__", &DeviceArray::Interface);
#endif
  module.attr("has_cuda") = kHasCuda;

  module.def("instruction_set", &CpuInstructionSet, R"doc(instruction_set()
--

Names the instructions that are used on the CPU.

Returns:
    "avx512", "avx2" or "baseline".)doc");

  module.def(
      "nearest_anchor",
      [result_type](const py::object& x, const py::object& anchors, int64_t threads) {
        const ParallelFor parallel_for = OnThreads(threads);
        const std::vector<Input> inputs = {{"x", x}, {"anchors", anchors}};
#if AIB_TF_CUDA
        if (AreOnDevice(inputs, /*num_arrays=*/2)) return NearestAnchorOnDevice(result_type, inputs);
#else
        CheckAreOnHost(inputs);
#endif
        return NearestAnchorOnHost(result_type, inputs, parallel_for);
      },
      "x"_a, "anchors"_a, py::kw_only(), "threads"_a = 0,
      R"doc(nearest_anchor(x, anchors, *, threads=0)
--

Replaces each element of `x` by its nearest anchor.

    index     = argmin_k |x - anchors[k]|         (the lowest k on ties and duplicates)
    quantized = anchors[index]
    codebook_loss = commitment_loss = mean((x - anchors[index])^2)

A NaN in `x` stays NaN with index 0 and makes the losses NaN; plus and minus infinity go to the largest and the smallest
anchor. The losses of an empty `x` are 0. The result is the same for any number of threads, bit for bit.

On a CUDA device, nothing waits for the result: it is computed on the stream of `x`, which it names. (Only for an array
of an interface before version 3, which cannot name its stream, the device is waited for.) Anchors that are not finite
are no error there; they make the quantized values and the losses NaN.

Args:
    x: float16, bfloat16, float32 or float64 array of any shape, or what `numpy.asarray` makes one of; or an array on a
        CUDA device, contiguous and aligned.
    anchors: finite numbers in any order, float32 (float64 when `x` is float64), shape (Q,), 1 <= Q <= 65,536; where
        `x` is.
    threads: how many threads to use at most; 0 for as many as there are processors for this process. Other Python
        threads run meanwhile.

Returns:
    A `NearestAnchor(quantized, index, codebook_loss, commitment_loss)`; of `DeviceArray` if `x` is on a device.

Raises:
    ValueError: if a dtype, a shape or an anchor is not as described, `threads` is negative, or `x` is on a device and
        `has_cuda` is false.)doc");

  module.def(
      "nearest_anchor_gradient",
      [gradient_type](const py::object& x, const py::object& anchors, const py::object& index,
                      const py::object& d_quantized, const py::object& d_codebook_loss,
                      const py::object& d_commitment_loss, int64_t threads) {
        const ParallelFor parallel_for = OnThreads(threads);
        const std::vector<Input> inputs = {{"x", x},
                                           {"anchors", anchors},
                                           {"index", index},
                                           {"d_quantized", d_quantized},
                                           {"d_codebook_loss", d_codebook_loss},
                                           {"d_commitment_loss", d_commitment_loss}};
#if AIB_TF_CUDA
        if (AreOnDevice(inputs, /*num_arrays=*/4)) return GradientOnDevice(gradient_type, inputs);
#else
        CheckAreOnHost(inputs);
#endif
        return GradientOnHost(gradient_type, inputs, parallel_for);
      },
      "x"_a, "anchors"_a, "index"_a, "d_quantized"_a, "d_codebook_loss"_a, "d_commitment_loss"_a, py::kw_only(),
      "threads"_a = 0,
      R"doc(nearest_anchor_gradient(x, anchors, index, d_quantized, d_codebook_loss, d_commitment_loss, *, threads=0)
--

Computes the straight-through gradient of `nearest_anchor`. With N elements in `x`,

    d_x          = d_quantized + d_commitment_loss * 2 (x - anchors[index]) / N
    d_anchors[k] = d_codebook_loss * 2 / N * sum over index = k of (anchors[k] - x)

A loss whose gradient is 0 adds nothing, also where `x` is infinite or NaN; if both are 0, `index` is not read.

On a CUDA device, nothing waits for the result, and an index out of range is no error: it makes that element of d_x NaN
and counts for no anchor.

Args:
    x: as in `nearest_anchor`.
    anchors: as in `nearest_anchor`.
    index: int32, shape of `x`: what `nearest_anchor` returned.
    d_quantized: the gradient of the quantized values, shape and dtype of `x`.
    d_codebook_loss: the gradient of that loss, a number or a 0-d array.
    d_commitment_loss: likewise.
    threads: as in `nearest_anchor`.

Returns:
    A `NearestAnchorGradient(d_x, d_anchors)`.

Raises:
    ValueError: if a dtype, a shape, an anchor or an index is not as described, `threads` is negative, or an array is on
        a device and `has_cuda` is false.)doc");
}

}  // namespace aib_tf
