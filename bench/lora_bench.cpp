// A linear module with its adapter, on the tape: the forward pass, and both passes with the
// gradients of x, A and B. The weight lies expanded, so that what `base` does not need is the
// adapter's. FLOP: 2 T N K of the base and 2 T r (N + K) of the adapter forward; backward the base
// once more and the adapter twice.
#include <array>
#include <map>
#include <memory>
#include <numeric>

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

std::vector<int32_t> positions_to(int64_t tokens) {
  std::vector<int32_t> positions(static_cast<size_t>(tokens));
  std::iota(positions.begin(), positions.end(), 0);
  return positions;
}

/// What meets the layer, with room for the adapter where it is folded.
struct Inputs {
  Batch batch;
  Tensor x, g;

  Inputs(const Sizes& s, const Layer& layer, DType dtype, Device device)
      : Inputs(s, layer, dtype, device, positions_to(s.tokens)) {}

  /// Tokens of one sequence at these positions.
  Inputs(const Sizes& s, const Layer& layer, DType dtype, Device device,
         const std::vector<int32_t>& positions) {
    const int64_t tokens = static_cast<int64_t>(positions.size());
    Segment segment;
    segment.end = tokens, segment.adapter = layer.adapter.get(), segment.dropout = s.dropout > 0;
    batch.segments = {segment};
    batch.positions = Tensor::from_vector(positions, {tokens}, device);
    batch.examples =
        Tensor::from_vector(std::vector<int64_t>(positions.size(), 7), {tokens}, device);
    const auto matrix = [&](int64_t cols, float scale) {
      const Tensor y = Tensor::with_tail(tokens, cols, layer.group.tail(batch), dtype, device);
      if (!device.is_meta()) copy(y, random({tokens, cols}, dtype, device, scale));
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

constexpr std::array result_names{"y", "dx", "dA", "dB"};

/// The weights of a shape in fp32 on the CPU; another shape takes their place.
const Tensor& host_weight(const Shape& shape, DType dtype, Device device) {
  static Tensor weight;
  if (!weight.defined() || !(weight.shape() == shape))
    weight = on_host(random(shape, dtype, device, 0.02f));
  return weight;
}

/// y, dx, dA and dB of the CPU in fp32, of tokens at these positions with rows `x` and `g`.
std::vector<Tensor> reference(Sizes s, const Layer& layer, const std::vector<int32_t>& positions,
                              const Tensor& x, const Tensor& g) {
  s.folded = false;
  const Inputs in(s, layer, DType::f32, Device::cpu(), positions);
  copy(in.x, x);
  copy(in.g, g);
  return run(layer, in, true);
}

/// A layer like `s` on the CPU, in fp32.
Layer host_layer(Sizes s, DType dtype, Device device) {
  s.folded = false;
  return Layer(s, host_weight(s.weight, dtype, device));
}

/// All results on 64 tokens: the gradients of A and B are sums over them.
std::string check_small(Sizes s, Device device, const Layer& want) {
  s.tokens = 64;
  const DType dtype = compute_dtype(device);
  Layer got(s, random(s.weight, dtype, device, 0.02f));
  const Inputs in(s, got, dtype, device);
  if (s.folded) hold_resident(got, in.batch, dtype, device);
  const std::vector<Tensor> results = run(got, in, true);
  const std::vector<Tensor> expected =
      reference(s, want, positions_to(s.tokens), on_host(in.x), on_host(in.g));
  for (size_t i = 0; i < results.size(); ++i) {
    const std::string wrong = difference(result_names[i], on_host(results[i]), on_host(expected[i]),
                                         2 * tolerance(dtype));
    if (!wrong.empty()) return wrong;
  }
  return "";
}

Tensor rows_of(const Tensor& x, const std::vector<int32_t>& rows) {
  const Tensor y =
      Tensor::empty({static_cast<int64_t>(rows.size()), x.dim(1)}, DType::f32, Device::cpu());
  for (size_t i = 0; i < rows.size(); ++i)
    copy(y.slice_rows(static_cast<int64_t>(i), static_cast<int64_t>(i) + 1),
         on_host(x.slice_rows(rows[i], rows[i] + 1)));
  return y;
}

/// Rows of y and dx as they were timed: a row depends on no other.
std::string check_rows(const Sizes& s, const Layer& want, const Inputs& in,
                       const std::vector<Tensor>& results) {
  const int32_t last = static_cast<int32_t>(s.tokens) - 1;
  const std::vector<int32_t> rows{0, 63, last / 2 + 1, last};
  const std::vector<Tensor> expected =
      reference(s, want, rows, rows_of(in.x, rows), rows_of(in.g, rows));
  for (size_t i = 0; i < std::min<size_t>(results.size(), 2); ++i) {
    const std::string wrong =
        difference(fmt::format("{} of the rows checked", result_names[i]),
                   rows_of(results[i], rows), on_host(expected[i]), 2 * tolerance(in.x.dtype()));
    if (!wrong.empty()) return wrong;
  }
  return "";
}

/// As many layers and inputs as exceed the caches.
struct Copies {
  std::vector<std::unique_ptr<Layer>> layers;
  std::vector<Inputs> inputs;
};

std::shared_ptr<Copies> copies_of(const Sizes& s, DType dtype, Device device) {
  const auto all = std::make_shared<Copies>();
  const double size = static_cast<double>(size_of(dtype)),
               weights = size * static_cast<double>(s.weight.numel()),
               values = size * static_cast<double>(s.tokens * (s.weight[0] + s.weight[1]));
  for (int i = 0; i < copies(device, weights); ++i)
    all->layers.push_back(std::make_unique<Layer>(s, random(s.weight, dtype, device, 0.02f)));
  const size_t inputs = std::max(all->layers.size(), static_cast<size_t>(copies(device, values)));
  for (size_t i = 0; i < inputs; ++i)
    all->inputs.emplace_back(s, *all->layers[i % all->layers.size()], dtype, device);
  if (s.folded)
    for (const auto& layer : all->layers)
      hold_resident(*layer, all->inputs[0].batch, dtype, device);
  return all;
}

Case layer_case(const Sizes& s, bool backward, Device device) {
  static std::map<std::string, std::string> checked;  // on few tokens
  const DType dtype = compute_dtype(device);
  const auto want = std::make_shared<Layer>(host_layer(s, dtype, device));
  const std::string key = fmt::format("{}/{}/{}/{}", s.weight, s.r, s.dropout, s.folded);
  if (!checked.contains(key)) checked[key] = check_small(s, device, *want);
  const auto all = copies_of(s, dtype, device);
  const auto dry = std::make_shared<Inputs>(s, *all->layers[0], dtype, device.meta());
  return {.device = device,
          .dry = [=] { run(*all->layers[0], *dry, backward); },
          .call =
              [=](int i) {
                const size_t n = static_cast<size_t>(i);
                return run(*all->layers[n % all->layers.size()], all->inputs[n], backward);
              },
          .inputs = static_cast<int>(all->inputs.size()),
          .rotate_results = true,
          .check =
              [=, few = checked[key]](const std::vector<Tensor>& results) {
                return few.empty() ? check_rows(s, *want, all->inputs[0], results) : few;
              },
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
    for (const Shape& weight :
         {Shape{4096, 4096}, Shape{14336, 4096}, Shape{1024, 4096}, Shape{4096, 14336}})
      for (const int64_t tokens : {512, 8192}) register_layer(weight, tokens, device);
  }
});

}  // namespace
}  // namespace qlab::bench
