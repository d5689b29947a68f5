// A block of logits replaced by its gradient. Bytes: the logits read and written once.
#include "core/ops/cross_entropy.h"

#include "bench/support.h"

namespace qlab::bench {
namespace {

Case loss(int64_t rows, int64_t vocabulary, Device device) {
  const DType dtype = compute_dtype(device);
  const double bytes =
      2.0 * static_cast<double>(rows * vocabulary) * static_cast<double>(size_of(dtype));
  const Tensor labels = random_integers(rows, static_cast<int32_t>(vocabulary), device);
  const Tensor scale = random({rows}, DType::f32, device);
  const Tensor nll = Tensor::empty({rows}, DType::f32, device);
  poison(nll);
  std::vector<Tensor> z;
  for (int i = 0; i < copies(device, bytes); ++i)
    z.push_back(random({rows, vocabulary}, dtype, device, 3.0f));
  const Tensor before = on_host(z[0]);
  const auto check = [=](const std::vector<Tensor>& results) {
    const Tensor want = before.clone(), want_nll = Tensor::empty({rows}, DType::f32, Device::cpu());
    cross_entropy_inplace(want_nll, want, labels.to(Device::cpu()), on_host(scale));
    const std::string wrong = difference("nll", on_host(results[0]), want_nll, 1e-4);
    if (!wrong.empty()) return wrong;
    return difference("dz", on_host(results[1]), want, tolerance(dtype));
  };
  return {.device = device,
          .call =
              [=](int i) {
                cross_entropy_inplace(nll, z[static_cast<size_t>(i)], labels, scale);
                return std::vector{nll, z[static_cast<size_t>(i)]};
              },
          .inputs = static_cast<int>(z.size()),
          .check = check,
          .bytes = bytes};
}

const Register registered(43, [] {
  for (const Device device : devices())
    for (const Shape& shape : device.is_cuda() ? std::vector<Shape>{{512, 128256}, {512, 49152}}
                                               : std::vector<Shape>{{64, 49152}})
      add(device, fmt::format("cross_entropy/{}x{}/qlab", shape[0], shape[1]),
          [=] { return loss(shape[0], shape[1], device); });
});

}  // namespace
}  // namespace qlab::bench
