#include <natten/status.h>

#include <exception>
#include <new>

namespace natten {
namespace {

template <class Function>
Status status_of(const Function& function) noexcept {
  try {
    function();
    return {};
  } catch (const Error& error) {
    return {error.kind(), error.what()};
  } catch (const std::bad_alloc&) {
    return {ErrorKind::runtime, "out of memory"};
  } catch (const std::exception& error) {  // of an executor or Context::interrupted
    return {ErrorKind::runtime, error.what()};
  } catch (...) {
    return {ErrorKind::runtime, "an exception that is not a std::exception"};
  }
}

}  // namespace

Status::Status() noexcept = default;
Status::Status(ErrorKind kind, const char* message) noexcept : ok_(false), kind_(kind) {
  try {
    message_ = std::make_shared<const std::string>(message);
  } catch (...) {  // message() knows
  }
}
Status::Status(const Status&) noexcept = default;
Status& Status::operator=(const Status&) noexcept = default;
Status::~Status() = default;

const char* Status::message() const noexcept {
  if (ok_) return "";
  return message_ ? message_->c_str() : "out of memory, also for the message of an error";
}

Status try_run(const Call& call, const Context& context) noexcept {
  return status_of([&] { run(call, context); });
}
Status try_run(const std::vector<Call>& calls, const Context& context) noexcept {
  return status_of([&] { run(calls, context); });
}

Status try_describe(const Call& call, Problem& result) noexcept {
  return status_of([&] { result = describe(call); });
}

Status try_workspace_bytes(const Call& call, std::size_t& result, const Context& context) noexcept {
  return status_of([&] { result = workspace_bytes(call, context); });
}
Status try_workspace_bytes(const std::vector<Call>& calls, std::size_t& result,
                           const Context& context) noexcept {
  return status_of([&] { result = workspace_bytes(calls, context); });
}

Status try_expected(const Call& call, TensorView Tensors::*tensor, TensorView& result) noexcept {
  return status_of([&] { result = expected(call, tensor); });
}

Status try_merge_attentions(const std::vector<TensorView>& outputs,
                            const std::vector<TensorView>& logsumexps, const TensorView& output,
                            const TensorView& logsumexp, const Context& context) noexcept {
  return status_of([&] { merge_attentions(outputs, logsumexps, output, logsumexp, context); });
}

Status try_merge_attentions_backward(const std::vector<TensorView>& outputs,
                                     const std::vector<TensorView>& logsumexps,
                                     const TensorView& grad_output,
                                     const TensorView& grad_logsumexp,
                                     const std::vector<TensorView>& grad_outputs,
                                     const std::vector<TensorView>& grad_logsumexps,
                                     const Context& context) noexcept {
  return status_of([&] {
    merge_attentions_backward(outputs, logsumexps, grad_output, grad_logsumexp, grad_outputs,
                              grad_logsumexps, context);
  });
}

}  // namespace natten
