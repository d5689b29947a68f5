#include "experiments/generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/ops/copy.h"
#include "core/random.h"

namespace qlab {

int32_t sample(const std::vector<float>& logits, double temperature, double top_p, double draw) {
  if (!std::all_of(logits.begin(), logits.end(), [](float l) { return std::isfinite(l); }))
    fail(
        "the model's logits are not finite: a weight of the base is not, or activations overflow "
        "(then set quant.compute_dtype: bf16 or fp32)");
  const auto best = std::max_element(logits.begin(), logits.end());
  if (temperature <= 0) return static_cast<int32_t>(best - logits.begin());
  std::vector<int32_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  });
  std::vector<double> weight(order.size());
  double total = 0;
  for (size_t i = 0; i < order.size(); ++i)
    total += weight[i] = std::exp((logits[order[i]] - *best) / temperature);
  double kept = 0;
  size_t count = 0;
  do {  // at least the likeliest
    kept += weight[count++];
  } while (count < order.size() && kept < top_p * total);
  double left = draw * kept;
  for (size_t i = 0; i < count; ++i) {
    left -= weight[i];
    if (left < 0) return order[i];
  }
  return order[count - 1];
}

std::vector<int32_t> generate(const Llama& model, const Adapter* adapter,
                              const std::vector<int32_t>& prompt,
                              const std::vector<int32_t>& stop_ids, const SamplingOptions& options,
                              const std::function<bool(int32_t)>& token) {
  const auto prompt_length = static_cast<int64_t>(prompt.size());
  const int64_t positions_left = model.config().max_position_embeddings - prompt_length;
  if (prompt_length == 0)
    fail("the prompt is empty, and the tokenizer puts nothing before a text; give some text");
  if (options.max_new_tokens > positions_left)
    fail("a prompt of {} tokens and {} new ones exceed the model's {} positions", prompt_length,
         options.max_new_tokens, model.config().max_position_embeddings);
  const Device device = model.device();
  KvCache cache = model.make_cache(prompt_length + options.max_new_tokens);
  std::vector<int32_t> pending = prompt, produced;
  for (int64_t i = 0; i < options.max_new_tokens; ++i) {
    const auto count = static_cast<int64_t>(pending.size());
    std::vector<int32_t> positions(pending.size());
    std::iota(positions.begin(), positions.end(), static_cast<int32_t>(cache.length));
    Batch batch;
    batch.ids = Tensor::from_vector(pending, {count}, device);
    batch.positions = Tensor::from_vector(positions, {count}, device);
    batch.cu_seqlens = Tensor::from_vector<int32_t>({0, static_cast<int32_t>(count)}, {2}, device);
    batch.max_length = count;
    batch.segments = {{0, count, 0, 0, adapter, false}};
    batch.generating = true;
    Tape tape(false);
    const Tensor hidden = model.hidden(tape, batch, Recompute::none, &cache).value;
    const Tensor logits = model.logits(hidden.slice_rows(count - 1, count));
    const uint64_t key = stream_key(options.seed, "generate");
    const Philox random = philox(key, static_cast<uint32_t>(i), 0, 0, 0);
    const int32_t next = sample(cast(logits, DType::f32).to_vector<float>(), options.temperature,
                                options.top_p, uniform(random.lane[0]));
    produced.push_back(next);
    if (std::find(stop_ids.begin(), stop_ids.end(), next) != stop_ids.end()) break;
    if (token && !token(next)) break;
    pending = {next};
  }
  return produced;
}

}  // namespace qlab
