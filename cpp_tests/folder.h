#pragma once

#include <chrono>
#include <filesystem>
#include <random>
#include <string>
#include <system_error>

namespace natten_tests {

/// A folder of its own for the life of a scope. It is not made.
class Folder {
 public:
  Folder()
      : path_(std::filesystem::temp_directory_path() /
              ("natten_tests_" + std::to_string(std::random_device()()) + "_" +
               std::to_string(std::chrono::steady_clock::now().time_since_epoch().count()))) {}
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  Folder(const Folder&) = delete;
  Folder& operator=(const Folder&) = delete;
  std::string path() const { return path_.string(); }

 private:
  std::filesystem::path path_;
};

}  // namespace natten_tests
