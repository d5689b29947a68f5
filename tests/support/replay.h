// Work that is issued as it comes, and on a GPU from a recorded graph as well.
#pragma once
#include <functional>

#include "core/device.h"

namespace qlab::test {

/// Issues the work several times, recorded and not; `expect` looks at what the last time has left.
inline void issue_and_replay(Device device, const std::function<void()>& issue,
                             const std::function<void()>& expect) {
  for (int pass = 0; pass < 3; ++pass) issue();
  expect();
  if (!device.is_cuda()) return;
  const cuda::Graph graph(issue);
  for (int pass = 0; pass < 3; ++pass) graph.launch();
  expect();
  issue();
  expect();
}

}  // namespace qlab::test
