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

/// Examples go through the model in batches of about `batch_tokens` tokens; the result does not
/// depend on it. `stop` is asked between batches.
Evaluation evaluate(Stepper& stepper, const Dataset& data, const Adapter* adapter,
                    const std::function<bool()>& stop = {}, int64_t batch_tokens = 2048);

}  // namespace qlab
