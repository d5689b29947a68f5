// Loss of a model, with or without an adapter, on a fixed set: dropout off, every example once, in
// the order of the file.
#pragma once
#include <functional>
#include <vector>

#include "data/dataset.h"
#include "experiments/stepper.h"

namespace qlab {

struct Evaluation {
  double loss = 0;  // mean over trained tokens
  int64_t trained_tokens = 0, tokens = 0;
  std::vector<double> example_loss;  // mean over each example's trained tokens
  bool stopped = false;              // `stop` said so; the rest is then incomplete
};

/// A batch fills a GPU, and on a CPU ends soon enough for Ctrl-C to be seen.
inline int64_t evaluation_tokens(Device device) {
  return device.target == DeviceType::cuda ? 2048 : 256;
}

/// Examples go through the model in batches of about `batch_tokens` tokens, or as few as there is
/// memory for; the result does not depend on it. Before each batch `stop` is told how many examples
/// are done, and asked.
Evaluation evaluate(Stepper& stepper, const Dataset& data, const Adapter* adapter,
                    const std::function<bool(size_t done)>& stop = {}, int64_t batch_tokens = 2048);

}  // namespace qlab
