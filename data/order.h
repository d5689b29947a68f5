// The order in which examples are visited: a function of (seed, epoch), the same for every trial.
#pragma once
#include <cstdint>
#include <vector>

namespace qlab {

/// Which example is the running_index-th one. Each epoch is a fresh permutation (Fisher-Yates with
/// Philox numbers); the identity when `shuffle` is false. Not for use by several threads at once.
class ExampleOrder {
 public:
  ExampleOrder(int64_t size, uint64_t seed, bool shuffle);
  int64_t at(int64_t running_index) const;

 private:
  void permute(int64_t epoch) const;

  int64_t size_;
  uint64_t key_;
  bool shuffle_;
  mutable int64_t epoch_ = -1;  // the one that permutation_ is for
  mutable std::vector<int64_t> permutation_;
};

}  // namespace qlab
