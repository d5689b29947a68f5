// Temporary folders and golden files for tests.
#pragma once
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include "tests/support/error_of.h"

namespace qlab::test {

/// Tests run in the root of the source tree.
inline std::string golden(const std::string& name) { return "tests/golden/" + name; }

/// The demo model, or "" where it has not been fetched.
inline std::string demo_model() {
  const char* set = std::getenv("QLAB_DEMO_MODEL");
  const std::string path = set != nullptr ? set : "models/smollm2-135m-instruct-q4_1.gguf";
  return std::filesystem::exists(path) ? path : "";
}

/// A folder that goes with its test.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "qlab-test-XXXXXX").string();
    if (::mkdtemp(name.data()) == nullptr) fail("cannot create {}", name);
    path_ = name;
  }
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  std::string path() const { return path_.string(); }
  /// Writes a file and returns its path.
  std::string write(const std::string& name, const std::string& text) const {
    const std::string path = *this / name;
    std::filesystem::create_directories(std::filesystem::path(path).parent_path());
    std::ofstream(path, std::ios::binary) << text;
    return path;
  }

 private:
  std::filesystem::path path_;
};

}  // namespace qlab::test

#define QLAB_SKIP_WITHOUT_DEMO_MODEL()                                                  \
  if (::qlab::test::demo_model().empty())                                               \
  GTEST_SKIP() << "the demo model is not there (tools/fetch_demo_model.sh fetches it, " \
                  "QLAB_DEMO_MODEL names it)"
