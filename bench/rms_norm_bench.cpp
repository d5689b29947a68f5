// Bytes: x and y forward; x, g and dx backward; the weight and r besides.
#include "core/ops/rms_norm.h"

#include "bench/support.h"

namespace qlab::bench {
namespace {

constexpr float eps = 1e-5f;

Case norm(bool forward, int64_t rows, int64_t cols, Device device) {
  const DType dtype = compute_dtype(device);
  const Tensor w = random({cols}, DType::f32, device), r = random({rows}, DType::f32, device, 0.1f);
  std::vector<Tensor> x, g;
  const double bytes = static_cast<double>(rows * cols) * static_cast<double>(size_of(dtype));
  for (int i = 0; i < copies(device, bytes); ++i) {
    x.push_back(random({rows, cols}, dtype, device));
    g.push_back(random({rows, cols}, dtype, device, 0.5f));
  }
  const auto run = [forward](const Tensor& x, const Tensor& g, const Tensor& w, const Tensor& r) {
    return std::vector{forward ? rms_norm(x, w, eps).y : rms_norm_backward(g, x, w, r)};
  };
  const Device meta = device.meta();
  const Tensor dry_x = Tensor::empty({rows, cols}, dtype, meta),
               dry_w = Tensor::empty({cols}, DType::f32, meta),
               dry_r = Tensor::empty({rows}, DType::f32, meta);
  const auto check = [=](const std::vector<Tensor>& results) {
    const Tensor want = run(on_host(x[0]), on_host(g[0]), on_host(w), on_host(r))[0];
    return difference(forward ? "y" : "dx", on_host(results[0]), want, tolerance(dtype));
  };
  return {
      .device = device,
      .dry = [=] { run(dry_x, dry_x, dry_w, dry_r); },
      .call =
          [=](int i) { return run(x[static_cast<size_t>(i)], g[static_cast<size_t>(i)], w, r); },
      .inputs = static_cast<int>(x.size()),
      .rotate_results = true,
      .check = check,
      .bytes = (forward ? 2 : 3) * bytes + 4.0 * static_cast<double>(rows + cols)};
}

const Register registered(40, [] {
  for (const Device device : devices())
    for (const Shape& shape : device.is_cuda()
                                  ? std::vector<Shape>{{8192, 4096}, {512, 4096}, {2048, 576}}
                                  : std::vector<Shape>{{512, 576}})
      for (const bool forward : {true, false})
        add(device,
            fmt::format("rms_norm/{}/{}x{}/qlab", forward ? "forward" : "backward", shape[0],
                        shape[1]),
            [=] { return norm(forward, shape[0], shape[1], device); });
});

}  // namespace
}  // namespace qlab::bench
