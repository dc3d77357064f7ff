#pragma once

#include <memory>
#include <string>
#include <vector>

#include "instructions.h"

namespace natten_tests::ptx {

/// The kernels of PTX files. One is parsed when it is first asked for.
class Module {
 public:
  /// Adds the entries of a PTX text, whose lines are counted from 1.
  void add(const std::string& text);
  void add_file(const std::string& path);

  /// By its name, mangled or not; null where there is none. Throws Fault where it holds what is not
  /// known here.
  Entry* find(const std::string& name);
  const std::vector<std::unique_ptr<Entry>>& parsed() const { return parsed_; }

 private:
  struct Source {
    std::string mangled, name, body;
    int line;
    Entry* parsed = nullptr;
  };
  std::vector<Source> sources_;
  std::vector<std::unique_ptr<Entry>> parsed_;
};

/// The name that C++ shows for a mangled one, or that itself.
std::string demangled(const std::string& name);

}  // namespace natten_tests::ptx
