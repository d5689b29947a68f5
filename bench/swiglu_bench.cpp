// Bytes: gate, up and y forward; gate, up, g, dgate and dup backward.
#include "core/ops/swiglu.h"

#include "bench/support.h"

namespace qlab::bench {
namespace {

Case activation(bool forward, int64_t rows, int64_t cols, Device device) {
  const DType dtype = compute_dtype(device);
  const double bytes = static_cast<double>(rows * cols) * static_cast<double>(size_of(dtype));
  struct Input {
    Tensor gate_up, g;
  };
  std::vector<Input> inputs;
  for (int i = 0; i < copies(device, 2 * bytes); ++i)
    inputs.push_back(
        {random({rows, 2 * cols}, dtype, device), random({rows, cols}, dtype, device, 0.5f)});
  const auto run = [forward](const Input& in) {
    return std::vector{forward ? swiglu(in.gate_up) : swiglu_backward(in.g, in.gate_up)};
  };
  const Tensor dry = Tensor::empty({rows, cols}, dtype, device.meta()),
               dry_wide = Tensor::empty({rows, 2 * cols}, dtype, device.meta());
  const auto check = [=](const std::vector<Tensor>& results) {
    // A second holder: the gradient then takes no place but its own.
    const Input in{on_host(inputs[0].gate_up), on_host(inputs[0].g)}, other = in;
    return difference(forward ? "y" : "dgate | dup", on_host(results[0]), run(in)[0],
                      tolerance(dtype));
  };
  return {.device = device,
          .dry =
              [=] {
                const Input in{dry_wide, dry};
                run(in);
              },
          .call = [=](int i) { return run(inputs[static_cast<size_t>(i)]); },
          .inputs = static_cast<int>(inputs.size()),
          .rotate_results = true,
          .check = check,
          .bytes = (forward ? 3 : 5) * bytes};
}

const Register registered(41, [] {
  for (const Device device : devices())
    for (const Shape& shape : device.is_cuda()
                                  ? std::vector<Shape>{{8192, 14336}, {512, 14336}, {2048, 1536}}
                                  : std::vector<Shape>{{512, 1536}})
      for (const bool forward : {true, false})
        add(device,
            fmt::format("swiglu/{}/{}x{}/qlab", forward ? "forward" : "backward", shape[0],
                        shape[1]),
            [=] { return activation(forward, shape[0], shape[1], device); });
});

}  // namespace
}  // namespace qlab::bench
