// A frozen linear layer, y = x W^T and dx = dy W, with W in NF4 (dequantized into a scratch by
// every call) and in the compute dtype itself. TFLOP/s count 2 M N K, whatever the format.
#include "core/ops/gemm.h"

#include "bench/support.h"
#include "quant/weight.h"

namespace qlab::bench {
namespace {

enum class Pass : uint8_t { forward, backward };

struct Case {
  Device device;
  DType dtype;
  Shape weight;  // [N, K]
  int64_t m;
  WeightFormat format;
  Pass pass;
};

Tensor product(const Tensor& x, const Weight& weight, const Case& c, Device device) {
  const Tensor w = weight.dense(c.dtype, device);
  return c.pass == Pass::forward ? matmul_nt(x, w) : matmul_nn(x, w);
}

void linear(benchmark::State& state, Case c) {
  const int64_t cols = c.weight[c.pass == Pass::forward ? 1 : 0];
  const int n = copies(c.device, c.weight.numel() * static_cast<int64_t>(size_of(c.dtype)));
  const WeightSpec spec{.format = c.format};
  const Tensor x = random({c.m, cols}, c.dtype, c.device);
  std::vector<Weight> weights;
  {
    const Tensor dense = random(c.weight, c.dtype, c.device);
    for (int i = 0; i < n; ++i) weights.push_back(Weight::from_dense(dense, spec));
  }
  const Device meta = c.device.meta();
  const Tensor dry_x = Tensor::empty(x.shape(), c.dtype, meta);
  const Weight dry_weight = Weight::from_dense(Tensor::empty(c.weight, c.dtype, meta), spec);
  measure(
      state, c.device, [&] { product(dry_x, dry_weight, c, meta); },
      [&](int i) { product(x, weights[i % n], c, c.device); });
  report(state, "TFLOP/s",
         2e-12 * static_cast<double>(c.m) * static_cast<double>(c.weight.numel()));
}

void register_case(const Case& c) {
  const std::string name =
      fmt::format("linear_{}/{}/{}/{}/{}x{}/{}", c.pass == Pass::forward ? "forward" : "dx",
                  bench::name(c.device), qlab::name_of(c.dtype), qlab::name_of(c.format),
                  c.weight[0], c.weight[1], c.m);
  benchmark::RegisterBenchmark(name.c_str(), linear, c)->UseRealTime();
}

const bool registered = [] {
  for (const Device device : devices()) {
    const bool gpu = device.is_cuda();
    const DType dtype = gpu ? DType::bf16 : DType::f32;
    const std::vector<Shape> weights =
        gpu ? std::vector<Shape>{{4096, 4096}, {1024, 4096}, {14336, 4096}, {4096, 14336}}
            : std::vector<Shape>{{576, 576}, {1536, 576}, {576, 1536}};
    const std::vector<int64_t> rows = gpu ? std::vector<int64_t>{1, 16, 64, 256, 1024, 4096, 8192}
                                          : std::vector<int64_t>{1, 64, 512};
    for (const Shape& weight : weights)
      for (const int64_t m : rows)
        for (const WeightFormat format :
             {gpu ? WeightFormat::bf16 : WeightFormat::fp32, WeightFormat::nf4})
          for (const Pass pass : {Pass::forward, Pass::backward})
            register_case({device, dtype, weight, m, format, pass});
  }
  return true;
}();

}  // namespace
}  // namespace qlab::bench
