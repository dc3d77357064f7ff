#pragma once

#include <natten/export.h>

#include <stdexcept>
#include <string>

namespace natten {

/// What kind of mistake an Error reports. Bindings map it to the host language's exception.
enum class ErrorKind {
  invalid_value,  ///< a value or shape is wrong (Python: ValueError)
  invalid_type,   ///< an element type is wrong (Python: TypeError)
  unsupported,    ///< not defined, or not counted by work_of (Python: NotImplementedError)
  runtime,        ///< the device or the system failed (Python: RuntimeError)
  interrupted,  ///< `Context::interrupted` ended the call (Python: what the signal handler raised)
};

/// The only exception type the library throws. `what()` names the argument, the value it got and
/// what it must be.
class NATTEN_EXPORT Error : public std::runtime_error {
 public:
  Error(ErrorKind kind, const std::string& message);
  Error(const Error&) noexcept;
  ~Error() override;
  ErrorKind kind() const noexcept { return kind_; }

 private:
  ErrorKind kind_;
};

}  // namespace natten
