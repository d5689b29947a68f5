// The comparison of kernels for a frozen linear layer whose weights are in NF4 with double
// quantization: y = x W^T and dx = dy W, W [N, K], M rows. To compare a kernel of your own, add one
// file to this folder that does what scratch.cpp does, a .cu where it launches kernels itself
// (HACKING.md has one): no other line changes.
#pragma once
#include <functional>
#include <string>
#include <vector>

#include "bench/support.h"
#include "quant/quantize.h"

namespace qlab::bench {

struct LinearShape {
  int64_t n, k, m;
  bool forward;  // else dx
};

/// A layer's weights, in as many copies as exceed the caches: number i is used by call i.
struct LinearWeights {
  std::vector<Nf4Tensor> nf4;
  DType compute;
  Device device;
};

/// y [M, N] from x [M, K], and dx [M, K] from dy [M, N], with weight number i. Scratch comes from
/// Tensor::empty. Each is also called with tensors on a meta device, for the plan of that scratch:
/// these have no values, and nothing may be launched on them (on_device does not).
struct LinearCalls {
  std::function<void(const Tensor& y, const Tensor& x, int i)> forward;
  std::function<void(const Tensor& dx, const Tensor& dy, int i)> dx;
};

struct LinearKernel {
  std::string name;
  double weight_bytes;  // that a call reads per weight
  std::function<bool(const LinearShape&, Device)> supports;
  /// Brings the weights into the form that the kernel reads.
  std::function<LinearCalls(const LinearWeights&)> prepare;
};

struct RegisterLinear {
  explicit RegisterLinear(LinearKernel kernel);
};

inline constexpr double nf4_weight_bytes = 0.5 + 1.0 / 64 + 4.0 / (64 * 256);

/// The weights in the compute dtype, `tail` spare columns behind each row.
std::vector<Tensor> dense_weights(const LinearWeights& weights, int64_t tail = 0);

}  // namespace qlab::bench
