#include "views.h"

#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <iterator>
#include <string>
#include <string_view>

namespace nb = nanobind;

namespace natten::bindings {
namespace {

/// DLPack's tensor and C exchange API, by the layouts that DLPack 1.2 fixes.
struct DLTensor {
  void* data;
  struct {
    std::int32_t type, id;
  } device;
  std::int32_t ndim;
  struct {
    std::uint8_t code, bits;
    std::uint16_t lanes;
  } dtype;
  std::int64_t* shape;
  std::int64_t* strides;
  std::uint64_t byte_offset;
};
struct ExchangeApi {  // as far as it is used
  struct {
    std::uint32_t major, minor;
  } version;
  void* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*borrow)(void* object, DLTensor* out);
};

/// Its numbers for types of elements (kDLFloat, ...) and of devices (kDLCPU, ...).
enum Code : int { floating = 2, bfloat = 4, boolean = 6 };
enum DlpackDevice : int { cpu = 1, cuda = 2, cuda_host = 3 };
/// All its types by number: first those that come in several sizes.
constexpr const char* kSizedTypes[] = {"int", "uint", "float", "opaque", "bfloat", "complex"};
constexpr const char* kOtherTypes[] = {
    "bool",           "float8_e3m4",     "float8_e4m3",   "float8_e4m3b11fnuz",
    "float8_e4m3fn",  "float8_e4m3fnuz", "float8_e5m2",   "float8_e5m2fnuz",
    "float8_e8m0fnu", "float6_e2m3fn",   "float6_e3m2fn", "float4_e2m1fn"};

/// The exchange API of a type, or null. Remembers the last type; the GIL guards it.
const ExchangeApi* exchange_api(PyTypeObject* type) {
  static PyTypeObject* last_type = nullptr;
  static const ExchangeApi* last_api = nullptr;
  if (type == last_type) return last_api;
  const ExchangeApi* api = nullptr;
  if (PyObject* capsule =
          PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__")) {
    api = static_cast<const ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
    if (api && api->version.major != 1) api = nullptr;
  }
  PyErr_Clear();
  if (api) {
    Py_INCREF(reinterpret_cast<PyObject*>(type));  // the address must not be reused by another type
    last_type = type;
    last_api = api;
  }
  return api;
}

/// Most elements to allocate. More have no address, and strides would overflow.
constexpr double kMostElements = 0x1p57;

[[noreturn]] void fail(ErrorKind kind, const char* name, const std::string& message) {
  throw Error(kind, std::string(name) + ": " + message);
}

[[noreturn]] void bad_dtype(const char* name, const std::string& got) {
  const bool is_mask = std::string_view(name) == "key_mask";
  fail(ErrorKind::invalid_type, name,
       "got dtype " + got + "; must be " +
           (is_mask ? "bool" : "float64, float32, bfloat16 or float16"));
}

DType dtype_of(int code, int bits, int lanes, const char* name) {
  if (lanes == 1 && code == Code::floating) {
    if (bits == 64) return DType::float64;
    if (bits == 32) return DType::float32;
    if (bits == 16) return DType::float16;
  }
  if (lanes == 1 && code == Code::bfloat && bits == 16) return DType::bfloat16;
  if (lanes == 1 && code == Code::boolean && bits == 8) return DType::boolean;
  constexpr int sized = std::size(kSizedTypes), other = std::size(kOtherTypes);
  if (code < sized) bad_dtype(name, kSizedTypes[code] + std::to_string(bits));
  if (code < sized + other) bad_dtype(name, kOtherTypes[code - sized]);
  bad_dtype(name, "number " + std::to_string(code) + " of DLPack, which is unknown");
}

DType dtype_of(const std::string& dtype, const char* name) {
  for (DType d : {DType::float64, DType::float32, DType::bfloat16, DType::float16, DType::boolean})
    if (dtype == name_of(d)) return d;
  bad_dtype(name, dtype);
}

Device device_of(int type, int id, const char* name) {
  if (type == DlpackDevice::cpu || type == DlpackDevice::cuda_host) return {DeviceType::cpu, 0};
  if (type == DlpackDevice::cuda) return {DeviceType::cuda, id};
  fail(ErrorKind::invalid_value, name,
       "is on a device of DLPack type " + std::to_string(type) + "; must be on CPU or CUDA");
}

void check_ndim(std::int64_t ndim, const char* name) {
  if (ndim > kMaxDims)
    fail(ErrorKind::invalid_value, name,
         "got " + std::to_string(ndim) + " dimensions; must have at most " +
             std::to_string(kMaxDims));
}

TensorView view_of(const DLTensor& t, const char* name) {
  TensorView v;
  v.dtype = dtype_of(t.dtype.code, t.dtype.bits, t.dtype.lanes, name);
  v.device = device_of(t.device.type, t.device.id, name);
  v.data = t.data ? static_cast<char*>(t.data) + t.byte_offset : nullptr;
  check_ndim(t.ndim, name);
  v.ndim = t.ndim;
  std::int64_t contiguous = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    v.shape[i] = t.shape[i];
    v.strides[i] = t.strides ? t.strides[i] : contiguous;
    contiguous *= t.shape[i];
  }
  return v;
}

/// `(shape, dtype name)`: no memory.
TensorView view_of(const nb::tuple& spec, Device device, const char* name) {
  std::vector<std::int64_t> shape;
  std::string dtype;
  if (spec.size() != 2 || !nb::try_cast(nb::handle(spec[0]), shape) ||
      !nb::try_cast(nb::handle(spec[1]), dtype))
    fail(ErrorKind::invalid_type, name,
         "got " + nb::cast<std::string>(nb::repr(spec)) +
             "; must be an array, or (shape, dtype name) where there is none");
  check_ndim(static_cast<std::int64_t>(shape.size()), name);
  double elements = 1;  // in float64, as the product of integers may overflow
  for (const std::int64_t size : shape) elements *= static_cast<double>(size);
  if (std::any_of(shape.begin(), shape.end(), [](std::int64_t size) { return size < 0; }) ||
      elements > kMostElements)
    fail(ErrorKind::invalid_value, name,
         "got " + nb::cast<std::string>(nb::repr(spec)) + "; must be a shape that memory can hold");
  return contiguous_view(nullptr, dtype_of(dtype, name), device, shape.data(),
                         static_cast<int>(shape.size()));
}

/// JAX's arrays are immutable, but DLPack does not say so.
bool is_jax_array(nb::handle object) {
  const nb::object module = nb::getattr(object.type(), "__module__", nb::none());
  std::string name;
  return nb::try_cast(module, name) && name.rfind("jax", 0) == 0;
}

}  // namespace

TensorView Views::view(nb::handle object, const char* name, bool is_output) {
  const TensorView view = make(object, name, is_output);
  has_cuda_ = has_cuda_ || view.device.type == DeviceType::cuda;
  return view;
}

TensorView Views::make(nb::handle object, const char* name, bool is_output) {
  if (object.is_none()) return {};
  if (const ExchangeApi* api = exchange_api(Py_TYPE(object.ptr()))) {
    DLTensor t;
    if (api->borrow(object.ptr(), &t) != 0) {
      PyErr_Clear();
      fail(ErrorKind::invalid_type, name,
           "this kind of tensor has no memory to read; must be on CPU or CUDA");
    }
    return view_of(t, name);
  }
  if (nb::isinstance<nb::tuple>(object))
    return view_of(nb::borrow<nb::tuple>(object), device_, name);
  nb::ndarray<nb::ro> array;
  if (!nb::try_cast(object, array))
    fail(ErrorKind::invalid_type, name,
         "got " + nb::cast<std::string>(nb::repr(object.type())) +
             "; must be an array that supports DLPack");
  nb::ndarray<> writable;
  if (is_output && (is_jax_array(object) || !nb::try_cast(object, writable)))
    fail(ErrorKind::invalid_value, name, "got a read-only array; must be writable, as an output");
  kept_.push_back(array);
  DLTensor t{};
  t.data = const_cast<void*>(static_cast<const void*>(array.data()));
  t.device = {array.device_type(), array.device_id()};
  t.ndim = static_cast<std::int32_t>(array.ndim());
  t.dtype = {array.dtype().code, array.dtype().bits, array.dtype().lanes};
  t.shape = const_cast<std::int64_t*>(array.shape_ptr());
  t.strides = const_cast<std::int64_t*>(array.stride_ptr());
  return view_of(t, name);
}

}  // namespace natten::bindings
