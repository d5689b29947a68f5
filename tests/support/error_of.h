#pragma once
#include <string>

#include "core/error.h"

namespace qlab::test {

/// The text of the Error that `action` throws, "" when it throws none.
template <class Action>
std::string error_of(Action&& action) {
  try {
    action();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace qlab::test
