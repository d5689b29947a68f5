// The smallest Llama that tests train: vocabulary 512, hidden 64, 2 layers of 4 heads over 2, MLP
// of 160. Its weights are large enough that gradients stand well above fp32 rounding.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "experiments/stepper.h"
#include "nn/load.h"
#include "tests/support/op_test.h"

namespace qlab::test {

inline Tensor tiny_tensor(const std::string& name, const Shape& shape) {
  const bool norm = name.ends_with("norm.weight");
  std::vector<double> x = normals(shape.numel(), stream_key(1, name));
  for (double& value : x) value = norm ? 1 + 0.2 * value : 0.125 * value;
  return tensor(x, shape, cpu_f32);
}

/// What NF4 with double quantization makes of a linear's weight, as plain fp32.
inline Tensor rounded_to_nf4(const std::string& name, const Shape& shape) {
  const Tensor w = tiny_tensor(name, shape);
  if (!name.ends_with("_proj.weight")) return w;
  const Tensor y = Tensor::empty(shape, DType::f32, Device::cpu());
  dequantize_nf4(y, quantize_nf4(w, 64, true));
  return y;
}

inline std::unique_ptr<Llama> tiny_llama(WeightFormat format, const Case& c,
                                         const TensorSource& source = tiny_tensor) {
  return std::make_unique<Llama>(synthetic_config("tiny"), WeightSpec{format}, c.dtype, c.device,
                                 source);
}

/// A sequence of random tokens, all trained.
struct Tokens {
  std::vector<int32_t> ids;
  int64_t example = 0;
  Sequence sequence() const { return {ids, ids, example}; }
};
inline Tokens random_tokens(int64_t length, uint64_t seed, int64_t example = 0) {
  return {integers(length, 512, seed), example};
}

inline std::unique_ptr<Adapter> fresh_adapter(const Llama& model, const LoraSpec& spec) {
  return std::make_unique<Adapter>(spec, model.adapter_shapes(spec), 3, 4, model.compute_dtype(),
                                   model.device());
}
/// B away from zero, as after some training.
inline std::unique_ptr<Adapter> trained_adapter(const Llama& model, const LoraSpec& spec) {
  auto adapter = fresh_adapter(model, spec);
  for (const Adapter::Shape& m : adapter->modules()) {
    std::vector<double> b = normals(m.out * spec.r, stream_key(5, m.name));
    for (double& value : b) value *= 0.1;
    copy(adapter->module(m.name).b, tensor(b, {m.out, spec.r}, {model.device(), DType::f32}));
  }
  adapter->refresh();
  return adapter;
}

inline double mean(const std::vector<float>& x) {
  double sum = 0;
  for (const float value : x) sum += value;
  return sum / static_cast<double>(x.size());
}

/// A relative bound for two runs of the tiny model that round differently: about 50 roundings to
/// `dtype` lie one after another on the way through forward and backward, beside fp32 sums of at
/// most `n` terms; they add up as a random walk, with a factor of 4 for the tails.
inline double model_bound(DType dtype, int64_t n) {
  return 4 * (unit_roundoff(dtype) * std::sqrt(50.0) +
              unit_roundoff(DType::f32) * std::sqrt(50.0 * static_cast<double>(n)));
}
/// ||a - b|| / ||b||
inline double relative_difference(const Tensor& a, const Tensor& b) {
  const std::vector<double> x = values(a), y = values(b);
  double difference = 0, norm = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    difference += (x[i] - y[i]) * (x[i] - y[i]);
    norm += y[i] * y[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

}  // namespace qlab::test
