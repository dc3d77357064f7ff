#pragma once

#include <natten/attention.h>

#include <memory>

/// The functions of attention.h for callers built without exceptions: they return a Status where
/// the others throw.
namespace natten {

/// How a call ended: well, or with what an Error would say. Cheap to copy.
class NATTEN_EXPORT Status {
 public:
  Status() noexcept;  ///< ok
  Status(ErrorKind kind, const char* message) noexcept;
  Status(const Status&) noexcept;
  Status& operator=(const Status&) noexcept;
  ~Status();

  bool ok() const noexcept { return ok_; }
  /// What went wrong; `ErrorKind::runtime` also for failures that are not an Error, such as a lack
  /// of memory. Without meaning where `ok()`.
  ErrorKind kind() const noexcept { return kind_; }
  /// `Error::what()`, or "" where `ok()`. Lives as long as any copy of this status.
  const char* message() const noexcept;

 private:
  bool ok_ = true;
  ErrorKind kind_ = ErrorKind::runtime;
  std::shared_ptr<const std::string> message_;
};

/// As `run`.
[[nodiscard]] NATTEN_EXPORT Status try_run(const Call& call, const Context& context = {}) noexcept;
[[nodiscard]] NATTEN_EXPORT Status try_run(const std::vector<Call>& calls,
                                           const Context& context = {}) noexcept;

/// As the functions of the same names. A result is written where the status is ok, and only there.
[[nodiscard]] NATTEN_EXPORT Status try_describe(const Call& call, Problem& result) noexcept;
[[nodiscard]] NATTEN_EXPORT Status try_workspace_bytes(const Call& call, std::size_t& result,
                                                       const Context& context = {}) noexcept;
[[nodiscard]] NATTEN_EXPORT Status try_workspace_bytes(const std::vector<Call>& calls,
                                                       std::size_t& result,
                                                       const Context& context = {}) noexcept;
[[nodiscard]] NATTEN_EXPORT Status try_expected(const Call& call, TensorView Tensors::*tensor,
                                                TensorView& result) noexcept;

/// As `merge_attentions` and `merge_attentions_backward`.
[[nodiscard]] NATTEN_EXPORT Status try_merge_attentions(const std::vector<TensorView>& outputs,
                                                        const std::vector<TensorView>& logsumexps,
                                                        const TensorView& output,
                                                        const TensorView& logsumexp,
                                                        const Context& context = {}) noexcept;
[[nodiscard]] NATTEN_EXPORT Status try_merge_attentions_backward(
    const std::vector<TensorView>& outputs, const std::vector<TensorView>& logsumexps,
    const TensorView& grad_output, const TensorView& grad_logsumexp,
    const std::vector<TensorView>& grad_outputs, const std::vector<TensorView>& grad_logsumexps,
    const Context& context = {}) noexcept;

}  // namespace natten
