// NF4 with double quantization: both directions. GB/s count the bytes read and written.
#include "quant/quantize.h"

#include "bench/support.h"

namespace qlab::bench {
namespace {

/// Codes, 8-bit scales of 64 values, fp32 scales of 256 of those.
double stored_bytes(const Shape& shape) {
  const double n = static_cast<double>(shape.numel());
  return n / 2 + n / 64 + n * 4 / (64 * 256);
}
double dense_bytes(const Shape& shape, DType dtype) {
  return static_cast<double>(shape.numel()) * static_cast<double>(size_of(dtype));
}

void dequantize(benchmark::State& state, Device device, Shape shape, DType dtype) {
  const int n = copies(device, static_cast<int64_t>(stored_bytes(shape)));
  const Tensor x = random(shape, DType::bf16, device);
  std::vector<Nf4Tensor> weights;
  std::vector<Tensor> outputs;
  for (int i = 0; i < n; ++i) {
    weights.push_back(quantize_nf4(x, 64, true));
    outputs.push_back(Tensor::empty(shape, dtype, device));
  }
  measure(
      state, device, [] {}, [&](int i) { dequantize_nf4(outputs[i % n], weights[i % n]); });
  report(state, "GB/s", (stored_bytes(shape) + dense_bytes(shape, dtype)) * 1e-9);
}

void quantize(benchmark::State& state, Device device, Shape shape, DType dtype) {
  const int n = copies(device, static_cast<int64_t>(dense_bytes(shape, dtype)));
  std::vector<Tensor> inputs;
  for (int i = 0; i < n; ++i) inputs.push_back(random(shape, dtype, device));
  const Tensor meta = Tensor::empty(shape, dtype, device.meta());
  quantize_nf4(meta, 64, true);  // makes the device's map, once for all calls
  quantize_nf4(inputs[0], 64, true);
  measure(
      state, device, [&] { quantize_nf4(meta, 64, true); },
      [&](int i) { quantize_nf4(inputs[i % n], 64, true); });
  report(state, "GB/s", (stored_bytes(shape) + dense_bytes(shape, dtype)) * 1e-9);
}

const bool registered = [] {
  for (const Device device : devices()) {
    const std::vector<Shape> shapes =
        device.is_cuda()
            ? std::vector<Shape>{{1024, 4096}, {4096, 4096}, {6144, 4096}, {14336, 4096}}
            : std::vector<Shape>{{576, 576}, {1536, 576}, {4096, 4096}};
    for (const Shape& shape : shapes)
      for (const DType dtype : {DType::bf16, DType::f32}) {
        const std::string suffix =
            fmt::format("/{}/{}/{}x{}", name(device), name_of(dtype), shape[0], shape[1]);
        benchmark::RegisterBenchmark(("nf4_dequantize" + suffix).c_str(), dequantize, device, shape,
                                     dtype)
            ->UseRealTime();
        benchmark::RegisterBenchmark(("nf4_quantize" + suffix).c_str(), quantize, device, shape,
                                     dtype)
            ->UseRealTime();
      }
  }
  return true;
}();

}  // namespace
}  // namespace qlab::bench
