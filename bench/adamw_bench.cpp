// One optimizer step over a trial's flat buffer: gradient norm, clipping, update. Bytes: the
// gradient twice, and parameters and both moments read and written.
#include "optim/adamw.h"

#include "bench/support.h"

namespace qlab::bench {
namespace {

std::vector<float> step_values() {
  AdamWStep s;
  s.lr = 1e-4f, s.correction1 = 0.1f, s.correction2_sqrt = 0.03f, s.max_grad_norm = 1;
  return {
      s.lr,           s.beta1, s.beta2, s.eps, s.weight_decay, s.correction1, s.correction2_sqrt,
      s.max_grad_norm};
}

struct State {
  Tensor param, m, v, grad, step, norm, partials;
  State(int64_t n, Device device)
      : param(random({n}, DType::f32, device)),
        m(Tensor::zeros({n}, DType::f32, device)),
        v(Tensor::zeros({n}, DType::f32, device)),
        grad(random({n}, DType::f32, device, 1e-3f)),
        step(Tensor::from_vector(step_values(), {8}, device)),
        norm(Tensor::zeros({1}, DType::f32, device)),
        partials(Tensor::zeros({grad_norm_partials}, DType::f64, device)) {
    synchronize(device);
  }
  void update() const {
    grad_norm(norm, grad, partials);
    adamw(param, m, v, grad, step, norm);
  }
};

Case update(int64_t n, Device device) {
  std::vector<State> states;
  for (int i = 0; i < copies(device, 16.0 * static_cast<double>(n)); ++i)
    states.emplace_back(n, device);
  const auto check = [=](const std::vector<Tensor>& results) {
    const State want(n, Device::cpu());
    want.update();
    const Tensor expected[] = {want.norm, want.param, want.m, want.v};
    for (size_t i = 0; i < 4; ++i) {
      const std::string wrong = difference(fmt::format("result {}", i), on_host(results[i]),
                                           expected[i], tolerance(DType::f32));
      if (!wrong.empty()) return wrong;
    }
    return std::string();
  };
  return {.device = device,
          .call =
              [=](int i) {
                const State& state = states[static_cast<size_t>(i)];
                state.update();
                return std::vector{state.norm, state.param, state.m, state.v};
              },
          .inputs = static_cast<int>(states.size()),
          .check = check,
          .bytes = 4.0 * 8 * static_cast<double>(n)};
}

const Register registered(44, [] {
  for (const Device device : devices())
    for (const int64_t n :
         device.is_cuda() ? std::vector<int64_t>{41943040, 4884480} : std::vector<int64_t>{4884480})
      add(device, fmt::format("adamw/{}/qlab", n), [=] { return update(n, device); });
});

}  // namespace
}  // namespace qlab::bench
