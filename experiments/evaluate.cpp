#include "experiments/evaluate.h"

namespace qlab {

Evaluation evaluate(Stepper& stepper, const Dataset& data, const Adapter* adapter,
                    const std::function<bool(size_t)>& stop, int64_t batch_tokens) {
  Evaluation result;
  double sum = 0;
  for (size_t first = 0; first < data.examples.size();) {
    if (stop && stop(first)) {
      result.stopped = true;
      return result;
    }
    std::vector<Sequence> batch;
    int64_t tokens = 0;
    size_t last = first;
    while (last < data.examples.size()) {
      const Example& e = data.examples[last];
      const auto length = static_cast<int64_t>(e.input_ids.size());
      if (last > first && tokens + length > batch_tokens) break;
      batch.push_back({e.input_ids, e.labels, static_cast<int64_t>(last++)});
      tokens += length;
    }
    BatchBuilder builder;
    builder.add(batch, adapter, false, 0.0f);
    if (batch.size() > 1 && !stepper.fits(builder, false, true)) {
      batch_tokens = tokens / 2;
      continue;
    }
    const std::vector<float> nll = stepper.run(builder, false);
    size_t row = 0;
    for (const Sequence& s : batch) {
      const int64_t n = trained_tokens(s);
      double own = 0;
      for (int64_t i = 0; i < n; ++i) own += nll[row++];
      result.example_loss.push_back(n > 0 ? own / static_cast<double>(n) : 0.0);
      result.trained_tokens += n;
      sum += own;
    }
    result.tokens += tokens;
    first = last;
  }
  result.loss = sum / static_cast<double>(result.trained_tokens);
  return result;
}

}  // namespace qlab
