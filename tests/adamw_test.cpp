#include "optim/adamw.h"

#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

Tensor workspace(const Tensor& like) {
  return Tensor::empty({grad_norm_partials}, DType::f64, like.device());
}

using AdamwTest = OpTest;
INSTANTIATE_TEST_SUITE_P(Ops, AdamwTest, testing::Values(cpu_f32, cuda_f32), name);

AdamWStep step_at(int t, float lr, float weight_decay, float max_grad_norm) {
  AdamWStep s;
  s.lr = lr, s.weight_decay = weight_decay, s.max_grad_norm = max_grad_norm;
  s.correction1 = static_cast<float>(1 - std::pow(static_cast<double>(s.beta1), t));
  s.correction2_sqrt = static_cast<float>(std::sqrt(1 - std::pow(static_cast<double>(s.beta2), t)));
  return s;
}
Tensor tensor_of_step(const AdamWStep& s, const Case& c) {
  return tensor({s.lr, s.beta1, s.beta2, s.eps, s.weight_decay, s.correction1, s.correction2_sqrt,
                 s.max_grad_norm},
                {8}, c);
}

struct State {
  Tensor param, m, v, norm;
  State(const std::vector<double>& p, const Case& c)
      : param(tensor(p, {static_cast<int64_t>(p.size())}, c)),
        m(Tensor::zeros(param.shape(), DType::f32, c.device)),
        v(Tensor::zeros(param.shape(), DType::f32, c.device)),
        norm(Tensor::zeros({1}, DType::f32, c.device)) {}
  void step(const Tensor& grad, const AdamWStep& s, const Case& c) {
    grad_norm(norm, grad, workspace(grad));
    adamw(param, m, v, grad, tensor_of_step(s, c), norm);
  }
};

// First step, no clipping: the update is lr * sign(g) up to eps, after the decay.
TEST_P(AdamwTest, Golden) {
  State s({2, -4}, GetParam());
  s.step(tensor({3, -4}, {2}, GetParam()), step_at(1, 0.5f, 0.1f, 0), GetParam());
  EXPECT_EQ(values(s.norm)[0], 5);
  EXPECT_NEAR(values(s.param)[0], 2 * 0.95 - 0.5, 1e-6);
  EXPECT_NEAR(values(s.param)[1], -4 * 0.95 + 0.5, 1e-6);
  EXPECT_NEAR(values(s.m)[0], 0.3, 1e-7);
  EXPECT_NEAR(values(s.v)[1], 16 * (1 - static_cast<double>(0.999f)), 1e-8);
}

// Against the formula in f64, with a norm that is clipped in some steps and not in others.
TEST_P(AdamwTest, TenStepsFollowTheFormula) {
  for (const int64_t n : {1, 7, 1000, 70001}) {
    SCOPED_TRACE(n);
    std::vector<double> p = values(random_f32({n})), m(p.size(), 0), v(p.size(), 0);
    State s(p, GetParam());
    const float lr = 1e-2f, decay = 0.1f;
    const double limit = 1.5 * std::sqrt(static_cast<double>(n));
    for (int t = 1; t <= 10; ++t) {
      const Tensor grad = random_f32({n}, 0.3 * t);
      const AdamWStep step = step_at(t, lr, decay, static_cast<float>(limit));
      s.step(grad, step, GetParam());
      const std::vector<double> g = values(grad);
      double squares = 0;
      for (const double x : g) squares += x * x;
      const double clip =
          std::min(1.0, static_cast<double>(step.max_grad_norm) / (std::sqrt(squares) + 1e-6));
      const double b1 = step.beta1, b2 = step.beta2;
      for (size_t i = 0; i < p.size(); ++i) {
        p[i] *= 1 - static_cast<double>(lr) * decay;
        m[i] = b1 * m[i] + (1 - b1) * clip * g[i];
        v[i] = b2 * v[i] + (1 - b2) * clip * clip * g[i] * g[i];
        const double c1 = 1 - std::pow(b1, t), c2 = 1 - std::pow(b2, t);
        p[i] -= static_cast<double>(lr) * (m[i] / c1) /
                (std::sqrt(v[i] / c2) + static_cast<double>(step.eps));
      }
    }
    // 1 - beta carries the roundoff of beta times beta / (1 - beta): 1000 for beta2.
    expect_close(s.param, tensor(p, {n}, cpu_f64), 100);
    expect_close(s.m, tensor(m, {n}, cpu_f64), 100);
    expect_close(s.v, tensor(v, {n}, cpu_f64), 100 * 100);
  }
}

TEST_P(AdamwTest, ANotFiniteNormSkipsTheStep) {
  const AdamWStep step = step_at(1, 0.1f, 0.1f, 1);
  for (const double poison : {static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
    State s(normals(3000, 1), GetParam());
    const std::vector<uint8_t> p = bytes_of(s.param), m = bytes_of(s.m), v = bytes_of(s.v);
    std::vector<double> g = normals(3000, 2);
    g[1234] = poison;
    s.step(tensor(g, {3000}, GetParam()), step, GetParam());
    EXPECT_FALSE(std::isfinite(values(s.norm)[0]));
    EXPECT_EQ(bytes_of(s.param), p);
    EXPECT_EQ(bytes_of(s.m), m);
    EXPECT_EQ(bytes_of(s.v), v);
  }
}

TEST_P(AdamwTest, NormIsExactToFloat32) {
  for (const int64_t n : {0, 1, 5, 1023, 1024, 1025, 300001}) {
    const Tensor g = random_f32({n}, 1e3), norm = Tensor::zeros({1}, DType::f32, device());
    double squares = 0;
    for (const double x : values(g)) squares += x * x;
    grad_norm(norm, g, workspace(g));
    EXPECT_NEAR(values(norm)[0], std::sqrt(squares), 0x1p-23 * std::sqrt(squares)) << n;
  }
  // The square of 1e30 is beyond fp32, the norm is not.
  const Tensor norm = Tensor::zeros({1}, DType::f32, device());
  const Tensor large = tensor({3e30, 4e30}, {2}, GetParam());
  grad_norm(norm, large, workspace(large));
  EXPECT_NEAR(values(norm)[0] / 5e30, 1, 1e-6);
}

TEST_P(AdamwTest, TwiceTheSameBits) {
  const auto run = [&] {
    State s(normals(5000, 1), GetParam());
    for (int t = 1; t <= 3; ++t)
      s.step(tensor(normals(5000, 10 + t), {5000}, GetParam()), step_at(t, 1e-3f, 0.01f, 1),
             GetParam());
    return s;
  };
  const State a = run(), b = run();
  expect_same_bits(a.param, b.param);
  expect_same_bits(a.m, b.m);
  expect_same_bits(a.v, b.v);
}

TEST(Adamw, DoesNotDependOnTheNumberOfThreads) {
  expect_same_for_all_thread_counts([&] {
    State s(normals(100003, 1), cpu_f32);
    s.step(tensor(normals(100003, 2), {100003}, cpu_f32), step_at(1, 1e-3f, 0.01f, 1), cpu_f32);
    return std::vector<Tensor>{s.param, s.m, s.v, s.norm};
  });
}

TEST(Adamw, RejectsWhatDoesNotFit) {
  const State s({1, 2}, cpu_f32);
  const Tensor g = tensor({1, 2}, {2}, cpu_f32), step = tensor_of_step({}, cpu_f32);
  const Tensor three = tensor({1, 2, 3}, {3}, cpu_f32), f64 = cast(g, DType::f64);
  EXPECT_ERROR(adamw(s.param, three, s.v, g, step, s.norm), "[adamw] m must be [2]");
  EXPECT_ERROR(adamw(s.param, s.m, three, g, step, s.norm), "[adamw] v must be [2]");
  EXPECT_ERROR(adamw(s.param, s.m, s.v, three, step, s.norm), "[adamw] grad must be [2]");
  EXPECT_ERROR(adamw(s.param, s.m, s.v, f64, step, s.norm), "[adamw] grad must be float32");
  EXPECT_ERROR(adamw(s.param, s.m, s.v, g, three, s.norm), "[adamw] step must be [8]");
  EXPECT_ERROR(adamw(s.param, s.m, s.v, g, step, g), "[adamw] norm must be [1]");
  EXPECT_ERROR(grad_norm(g, g, workspace(g)), "[grad_norm] norm must be [1]");
  EXPECT_ERROR(grad_norm(s.norm, f64, workspace(f64)), "[grad_norm] grad must be float32");
}

}  // namespace
}  // namespace qlab::test
