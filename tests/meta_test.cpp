// Every operation on a meta device: the shapes of the result, nothing computed, and weights that
// may be real.
#include "core/ops/add.h"
#include "core/ops/attention.h"
#include "core/ops/cross_entropy.h"
#include "core/ops/dropout.h"
#include "core/ops/gemm.h"
#include "core/ops/rms_norm.h"
#include "core/ops/rope.h"
#include "core/ops/rows.h"
#include "core/ops/swiglu.h"
#include "optim/adamw.h"
#include "quant/quantize.h"
#include "tests/support/op_test.h"

namespace qlab::test {
namespace {

void expect_meta(const Tensor& x, const Shape& shape) {
  EXPECT_TRUE(x.device().is_meta());
  EXPECT_EQ(x.raw(), nullptr);
  EXPECT_EQ(x.shape().str(), shape.str());
}

class MetaTest : public testing::TestWithParam<Device> {
 protected:
  Tensor matrix(int64_t rows, int64_t cols) const {
    return Tensor::empty({rows, cols}, DType::bf16, GetParam());
  }
  Tensor vector(int64_t n, DType dtype) const { return Tensor::empty({n}, dtype, GetParam()); }
};
INSTANTIATE_TEST_SUITE_P(Ops, MetaTest,
                         testing::Values(Device::cpu().meta(), Device::cuda().meta()),
                         [](const testing::TestParamInfo<Device>& info) {
                           return std::string(info.param.target == DeviceType::cpu ? "for_cpu"
                                                                                   : "for_gpu");
                         });

TEST_P(MetaTest, ElementwiseAndNorms) {
  const Tensor x = matrix(6, 32);
  const auto [y, r] = rms_norm(x, vector(32, DType::f32), 1e-5f);
  expect_meta(y, {6, 32});
  expect_meta(r, {6});
  expect_meta(rms_norm_backward(x, x, vector(32, DType::f32), r), {6, 32});
  expect_meta(rms_norm_backward(x, x, vector(32, DType::f32), r, matrix(6, 32), 16), {6, 32});
  expect_meta(add(x, x), {6, 32});
  add_inplace(x, x);
  add_bias(x, vector(32, DType::f32));
  expect_meta(swiglu(matrix(6, 64)), {6, 32});
  expect_meta(swiglu_backward(x, matrix(6, 64)), {6, 64});
  expect_meta(dropout(x, vector(6, DType::i64), vector(6, DType::i32), {1, 0.1f}), {6, 32});
  const RopeTables tables = rope_tables(10, 16, 1e4, std::nullopt, {}, GetParam());
  expect_meta(tables.cos, {10, 8});
  rope_inplace(x, vector(6, DType::i32), tables, 16);
}

TEST_P(MetaTest, RowsLossAndProducts) {
  const Tensor x = matrix(6, 32), w = matrix(50, 32);
  expect_meta(gather_rows(w, vector(6, DType::i32), DType::bf16), {6, 32});
  expect_meta(scatter_rows(x, vector(6, DType::i32), 9), {9, 32});
  expect_meta(matmul_nt(x, w), {6, 50});
  expect_meta(matmul_nn(matrix(6, 50), w), {6, 32});
  cross_entropy_inplace(vector(6, DType::f32), matrix(6, 50), vector(6, DType::i32), Tensor());
}

TEST_P(MetaTest, AttentionTakesWorkspaceFromItsCategory) {
  const AttentionShape shape{4, 2, 16, 40, 40};
  const Tensor q = matrix(60, 64), k = matrix(60, 32), cu = vector(3, DType::i32);
  PlanRecorder recorder;
  const Attention a = attention(q, k, k, cu, cu, shape);
  const Tensor dqkv = attention_backward(q, q, k, k, a.o, a.lse, cu, cu, shape, 8);
  const StepPlan plan = recorder.finish();
  expect_meta(a.o, {60, 64});
  expect_meta(a.lse, {60, 4});
  expect_meta(dqkv, {60, 128});
  EXPECT_EQ(dqkv.pitch(), 192);
  EXPECT_GT(plan.at_peak[static_cast<int>(Category::workspace)], 0);
}

TEST_P(MetaTest, QuantizationAndOptimizer) {
  const Nf4Tensor q = quantize_nf4(matrix(64, 64), 64, true);
  expect_meta(q.codes, {2048});
  expect_meta(q.absmax_code, {64});
  expect_meta(q.absmax2, {1});
  dequantize_nf4(matrix(64, 64), q);
  const Tensor p = vector(100, DType::f32), norm = vector(1, DType::f32);
  grad_norm(norm, p, Tensor::empty({grad_norm_partials}, DType::f64, p.device()));
  adamw(p, p, p, p, vector(8, DType::f32), norm);
}

TEST(Meta, WeightsMayBeReal) {
  const Tensor x = Tensor::empty({6, 64}, DType::f32, Device::cpu().meta());
  const Tensor w = tensor(normals(64, 1), {64}, cpu_f32);
  expect_meta(rms_norm(x, w, 1e-5f).y, {6, 64});
  const Nf4Tensor q = quantize_nf4(tensor(normals(64 * 6, 1), {6, 64}, cpu_f32), 64, true);
  dequantize_nf4(x, q);
  const Tensor table = tensor(normals(640, 1), {10, 64}, cpu_f32);
  const Tensor index = Tensor::empty({3}, DType::i32, Device::cpu().meta());
  expect_meta(gather_rows(table, index, DType::f32), {3, 64});
  EXPECT_ERROR(rms_norm(Tensor::empty({6, 64}, DType::f32, Device::cuda().meta()), w, 0),
               "arguments live on");
}

}  // namespace
}  // namespace qlab::test
