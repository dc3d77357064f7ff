#include <natten/error.h>
#include <natten/problem.h>

namespace natten {

Error::Error(ErrorKind kind, const std::string& message)
    : std::runtime_error(message), kind_(kind) {}
Error::Error(const Error&) noexcept = default;
Error::~Error() = default;

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::float64: return "float64";
    case DType::float32: return "float32";
    case DType::bfloat16: return "bfloat16";
    case DType::float16: return "float16";
    case DType::boolean: return "bool";
  }
  return "unknown";
}

std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::float64: return 8;
    case DType::float32: return 4;
    case DType::boolean: return 1;
    default: return 2;
  }
}

const char* name_of(DeviceType type) {
  switch (type) {
    case DeviceType::cpu: return "cpu";
    case DeviceType::cuda: return "cuda";
  }
  return "unknown";
}

const char* name_of(Boundary boundary) {
  switch (boundary) {
    case Boundary::shift: return "shift";
    case Boundary::cut: return "cut";
    case Boundary::circular: return "circular";
  }
  return "unknown";
}

const char* name_of(Op op) {
  switch (op) {
    case Op::attention_forward: return "attention_forward";
    case Op::attention_backward: return "attention_backward";
    case Op::qk: return "qk";
    case Op::av: return "av";
    case Op::av_transpose: return "av_transpose";
    case Op::rpb_gather: return "rpb_gather";
    case Op::rpb_scatter: return "rpb_scatter";
  }
  return "unknown";
}

}  // namespace natten
