// A linear module with its adapter, on the tape: the forward pass, and both passes with the
// gradients of x, A and B. The weight lies expanded, so that what `base` does not need is the
// adapter's. FLOP: 2 T N K of the base and 2 T r (N + K) of the adapter forward; backward the base
// once more and the adapter twice.
#include <array>
#include <map>
#include <memory>

#include "bench/support.h"
#include "core/ops/copy.h"
#include "nn/linear.h"

namespace qlab::bench {
namespace {

struct Sizes {
  Shape weight;  // [N, K]
  int64_t tokens, r;
  double dropout;
  bool folded;

  double flops(bool backward) const {
    const double t = static_cast<double>(tokens), n = static_cast<double>(weight[0]),
                 k = static_cast<double>(weight[1]);
    const double base = 2 * t * n * k, adapter = 2 * t * static_cast<double>(r) * (n + k);
    return backward ? 2 * base + 3 * adapter : base + adapter;
  }
  std::string str() const {
    return fmt::format("{}x{}/m{}/r{}{}/{}", weight[0], weight[1], tokens, r,
                       dropout > 0 ? "-dropout" : "",
                       r == 0   ? "base"
                       : folded ? "folded"
                                : "separate");
  }
};

constexpr const char* module_name = "model.layers.0.mlp.gate_proj";

/// The module and its adapter.
struct Layer {
  LinearGroup group;
  std::unique_ptr<Adapter> adapter;

  Layer(const Sizes& s, const Tensor& weight) {
    const bool f32 = weight.dtype() == DType::f32;
    const WeightSpec spec{f32 ? WeightFormat::fp32 : WeightFormat::bf16};
    group.folded = s.folded;
    group.members.resize(1);
    group.members[0].name = module_name;
    group.members[0].weight = Weight::from_dense(weight, spec);
    if (s.r == 0) return;
    LoraSpec lora;
    lora.r = s.r, lora.alpha = 2.0 * static_cast<double>(s.r), lora.dropout = s.dropout;
    const Adapter::Shape shape{0, module_name, s.weight[1], s.weight[0]};
    adapter =
        std::make_unique<Adapter>(lora, std::vector{shape}, 3, 4, weight.dtype(), weight.device());
    const LoraModule& module = adapter->module(module_name);
    copy(module.b, random(module.b.shape(), DType::f32, weight.device(), 0.02f));
    adapter->refresh();
  }
};

/// What meets the layer, with room for the adapter where it is folded.
struct Inputs {
  Batch batch;
  Tensor x, g;

  Inputs(const Sizes& s, const Layer& layer, DType dtype, Device device) {
    Segment segment;
    segment.end = s.tokens, segment.adapter = layer.adapter.get(), segment.dropout = s.dropout > 0;
    batch.segments = {segment};
    std::vector<int32_t> positions(static_cast<size_t>(s.tokens));
    for (size_t i = 0; i < positions.size(); ++i) positions[i] = static_cast<int32_t>(i);
    batch.positions = Tensor::from_vector(positions, {s.tokens}, device);
    batch.examples =
        Tensor::from_vector(std::vector<int64_t>(positions.size(), 7), {s.tokens}, device);
    const auto matrix = [&](int64_t cols, float scale) {
      const Tensor y = Tensor::with_tail(s.tokens, cols, layer.group.tail(batch), dtype, device);
      if (!device.is_meta()) copy(y, random({s.tokens, cols}, dtype, device, scale));
      return y;
    };
    x = matrix(s.weight[1], 1);
    g = matrix(s.weight[0], 0.1f);
    if (!device.is_meta()) synchronize(device);
  }
};

/// Expands the weight as training holds it resident, beside room for the adapter.
void hold_resident(Layer& layer, const Batch& batch, DType dtype, Device device) {
  const int64_t width = layer.group.tail(batch), n = layer.group.out_features(),
                k = layer.group.in_features();
  layer.group.resident = Tensor::with_tail(n + width, k, width, dtype, device).widened(k + width);
  layer.group.members[0].weight.expand(layer.group.resident.slice_rows(0, n).slice_cols(0, k));
}

std::vector<Tensor> run(const Layer& layer, const Inputs& in, bool backward) {
  Tape tape;
  const Variable x = tape.input(in.x, true);
  const Variable y = linear(tape, x, layer.group, in.batch);
  if (!backward) return {y.value};
  tape.backward(y, in.g);
  std::vector<Tensor> results{y.value, tape.gradient(x)};
  if (layer.adapter) {
    results.push_back(layer.adapter->module(module_name).da);
    results.push_back(layer.adapter->module(module_name).db);
  }
  return results;
}

/// All results on 64 tokens, against the CPU in fp32 on equal values.
std::string check_small(Sizes s, Device device) {
  s.tokens = 64;
  const DType dtype = compute_dtype(device);
  const Tensor weight = random(s.weight, dtype, device, 0.02f);
  Layer got(s, weight);
  const Inputs in(s, got, dtype, device);
  if (s.folded) hold_resident(got, in.batch, dtype, device);
  Sizes plain = s;
  plain.folded = false;
  const Layer want(plain, on_host(weight));
  const Inputs want_in(plain, want, DType::f32, Device::cpu());
  copy(want_in.x, on_host(in.x));
  copy(want_in.g, on_host(in.g));
  const std::vector<Tensor> results = run(got, in, true), expected = run(want, want_in, true);
  constexpr std::array names{"y", "dx", "dA", "dB"};
  for (size_t i = 0; i < results.size(); ++i) {
    const std::string wrong =
        difference(names[i], on_host(results[i]), on_host(expected[i]), 2 * tolerance(dtype));
    if (!wrong.empty()) return wrong;
  }
  return "";
}

Case layer_case(const Sizes& s, bool backward, Device device) {
  static std::map<std::string, std::string> checked;
  const std::string key = fmt::format("{}/{}/{}/{}", s.weight, s.r, s.dropout, s.folded);
  if (!checked.contains(key)) checked[key] = check_small(s, device);
  const DType dtype = compute_dtype(device);
  const auto layer = std::make_shared<Layer>(s, random(s.weight, dtype, device, 0.02f));
  const auto in = std::make_shared<Inputs>(s, *layer, dtype, device);
  const auto dry = std::make_shared<Inputs>(s, *layer, dtype, device.meta());
  if (s.folded) hold_resident(*layer, in->batch, dtype, device);
  return {.device = device,
          .dry = [=] { run(*layer, *dry, backward); },
          .call = [=](int) { return run(*layer, *in, backward); },
          .check = [text = checked[key]](const std::vector<Tensor>&) { return text; },
          .flops = s.flops(backward)};
}

void register_layer(const Shape& weight, int64_t tokens, Device device) {
  for (const int64_t r : {0, 4, 8, 16, 32, 64, 128, 256})
    for (const double dropout : {0.0, 0.1})
      for (const bool folded : {false, true}) {
        const bool usual_rank = r == 16 || r == 32;
        if ((dropout > 0 && !usual_rank) || (folded && r == 0)) continue;
        const Sizes s{weight, tokens, r, dropout, folded};
        for (const bool backward : {false, true})
          add(device, fmt::format("lora/{}/{}", backward ? "both" : "forward", s.str()),
              [=] { return layer_case(s, backward, device); });
      }
}

const Register registered(35, [] {
  for (const Device device : devices()) {
    if (device.is_cpu()) {
      register_layer({576, 576}, 256, device);
      continue;
    }
    for (const Shape& weight : {Shape{4096, 4096}, Shape{14336, 4096}})
      for (const int64_t tokens : {512, 8192}) register_layer(weight, tokens, device);
  }
});

}  // namespace
}  // namespace qlab::bench
