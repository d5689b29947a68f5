// The one exception type, and the check macro used wherever a user can cause a failure.
#pragma once
#if defined(__CUDACC__)
#define FMT_USE_CONSTEXPR 1  // fmt 9 turns it off for nvcc, which then fails on fmt itself
#endif
#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <utility>

namespace qlab {

/// Anything a user can cause or must be told: bad input, missing files, wrong shapes. The command
/// line prints what() and exits with 2.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A reservation that does not fit; the text lists what was asked and what is held, by category.
class OutOfMemory : public Error {
 public:
  using Error::Error;
};

template <class... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

}  // namespace qlab

/// Throws qlab::Error with the formatted text and the place of the check when `condition` is false.
#define QLAB_CHECK(condition, ...)                                              \
  do {                                                                          \
    if (!(condition))                                                           \
      throw ::qlab::Error(fmt::format(__VA_ARGS__) +                            \
                          "\n  check failed: " #condition " at " __FILE__ ":" + \
                          std::to_string(__LINE__));                            \
  } while (false)
