// What the steps of a gang need, reserved before the first one. A run and the prediction of its
// memory go through the same code, the prediction on a meta device.
#pragma once
#include <limits>
#include <span>
#include <vector>

#include "core/profile.h"
#include "data/dataset.h"
#include "experiments/stepper.h"

namespace qlab {

/// A trial as its reservation sees it.
struct Participant {
  const Adapter* adapter;
  std::vector<int64_t> train_lengths;  // of the sequences of its largest micro-batch
  std::vector<int64_t> eval_lengths;   // of its largest evaluation batch; empty without evaluation
  std::vector<int64_t> usual_lengths;  // of a usual micro-batch
};

/// Tokens of a gang's largest micro-batch, and of a usual one; of Participant or PaperTrial.
template <class Gang>
int64_t largest_tokens(const Gang& gang) {
  int64_t tokens = 0;
  for (const auto& t : gang)
    for (const int64_t length : t.train_lengths) tokens += length;
  return tokens;
}
template <class Gang>
int64_t usual_tokens(const Gang& gang) {
  int64_t tokens = 0;
  for (const auto& t : gang)
    for (const int64_t length : t.usual_lengths) tokens += length;
  return tokens;
}

/// Lengths of the `count` longest examples; a micro-batch that spans several epochs holds examples
/// more than once.
std::vector<int64_t> longest_examples(const Dataset& data, int64_t count);
/// Lengths of a usual micro-batch of `count`: evenly spread over all examples by length, so that
/// one is the median and many are together about as long as the mean.
std::vector<int64_t> usual_examples(const Dataset& data, int64_t count);
/// Lengths of the longest examples in a batch of evaluate(): no other needs much more memory.
std::vector<int64_t> largest_evaluation(const Dataset& data, int64_t batch_tokens);

/// Of a GPU's memory what runs leave to other programs, unless they are told how much to take: 1
/// GiB, of small GPUs an eighth.
int64_t left_to_others(int64_t capacity);

/// The step that needs the most memory.
struct LargestStep {
  StepPlan plan;
  bool train = true;              // or an evaluation
  std::vector<ProfileLine> work;  // of the largest training micro-batch, before weights were held
  int64_t eval_tokens = std::numeric_limits<int64_t>::max();  // at most in a batch of evaluate()
};

/// An evaluation takes no more memory than training, in smaller batches where that is needed; but
/// for one example that needs more alone. Reserves what the largest training and evaluation steps
/// need, or throws OutOfMemory; then holds weights expanded, at most `resident` bytes, within what
/// that leaves free. The largest micro-batch is not known without trying them all; the one made of
/// each trial's longest examples, everything trained, needs at least about as much. Of each policy
/// but the leanest it is that one with its sequences shortened. Where a later shape lays out a
/// little larger, it takes a leaner policy, or where there is none the reservation grows before
/// that step.
LargestStep reserve_steps(Llama& model, Stepper& stepper, std::span<const Participant> gang,
                          int64_t resident);
/// The work of a usual training micro-batch of the gang, which is planned once more.
std::vector<ProfileLine> count_usual_step(Stepper& stepper, std::span<const Participant> gang);

}  // namespace qlab
