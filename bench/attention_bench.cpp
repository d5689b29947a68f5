// Causal attention over packed sequences. FLOP: 4 L^2 D / 2 per sequence and head forward (two
// products over half of the L x L pairs), 2.5 times that backward (five products).
#include "core/ops/attention.h"

#include <algorithm>
#include <cmath>

#include "bench/support.h"
#include "core/ops/copy.h"

namespace qlab::bench {
namespace {

struct Sizes {
  int64_t sequences, length, heads, kv_heads, dim;

  int64_t tokens() const { return sequences * length; }
  AttentionShape shape() const { return {heads, kv_heads, dim, length, length}; }
  double forward_flops() const {
    return 2.0 * static_cast<double>(tokens()) * static_cast<double>(length * heads * dim);
  }
  std::string str() const {
    return fmt::format("{}x{}/h{}k{}d{}", sequences, length, heads, kv_heads, dim);
  }
};

/// q, k and v side by side, as the merged projection leaves them.
struct Inputs {
  Tensor q, k, v, g, cu;
};

Inputs inputs_of(const Sizes& s, DType dtype, Device device) {
  std::vector<int32_t> ends;
  for (int64_t i = 0; i <= s.sequences; ++i) ends.push_back(static_cast<int32_t>(i * s.length));
  const int64_t rows = s.tokens();
  const auto matrix = [&](int64_t heads) {
    return device.is_meta() ? Tensor::empty({rows, heads * s.dim}, dtype, device)
                            : random({rows, heads * s.dim}, dtype, device);
  };
  const AttentionColumns columns = attention_columns(matrix(s.heads + 2 * s.kv_heads), s.shape());
  Inputs in{columns.q, columns.k, columns.v, matrix(s.heads), {}};
  in.cu = Tensor::from_vector(ends, {s.sequences + 1}, device);
  if (!device.is_meta()) synchronize(device);
  return in;
}

Tensor part(const Tensor& x, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  return on_host(x).slice_rows(row, row + rows).slice_cols(col, col + cols).clone();
}

double largest(const Tensor& x) {
  double most = 0;
  for (int64_t i = 0; i < x.numel(); ++i)
    most = std::max(most, std::abs(static_cast<double>(x.data<float>()[i])));
  return most;
}

/// One key head with its query heads, of one sequence: the reference computes no more than that.
struct Group {
  Sizes s;
  int64_t sequence, kv_head;

  Tensor of(const Tensor& x, bool queries) const {
    const int64_t heads = queries ? s.heads / s.kv_heads : 1, cols = heads * s.dim;
    return part(x, sequence * s.length, s.length, kv_head * cols, cols);
  }
  Sizes sizes() const { return {1, s.length, s.heads / s.kv_heads, 1, s.dim}; }
};

/// The last group of the last sequence, and the first of the first where the CPU is soon done.
std::vector<Group> checked(const Sizes& s) {
  std::vector<Group> groups{{s, s.sequences - 1, s.kv_heads - 1}};
  if (s.length <= 4096) groups.push_back({s, 0, 0});
  return groups;
}

/// Row after row averages over more keys and grows smaller: each octave of rows has its own scale.
std::string check_output(const Tensor& o, const Tensor& want, double tolerance) {
  for (int64_t begin = 0; begin < want.dim(0);) {
    const int64_t end = std::min(want.dim(0), std::max<int64_t>(1, 2 * begin));
    const std::string wrong =
        difference(fmt::format("o, rows {} to {}", begin, end - 1), o.slice_rows(begin, end),
                   want.slice_rows(begin, end), tolerance);
    if (!wrong.empty()) return wrong;
    begin = end;
  }
  return "";
}

Attention reference(const Group& group, const Inputs& in, const Tensor& cu) {
  return attention(group.of(in.q, true), group.of(in.k, false), group.of(in.v, false), cu, cu,
                   group.sizes().shape());
}

Case forward(const Sizes& s, Device device) {
  const DType dtype = compute_dtype(device);
  const auto run = [shape = s.shape()](const Inputs& in) {
    return std::vector{attention(in.q, in.k, in.v, in.cu, in.cu, shape).o};
  };
  const Inputs in = inputs_of(s, dtype, device), dry = inputs_of(s, dtype, device.meta());
  const auto check = [=](const std::vector<Tensor>& results) {
    for (const Group& group : checked(s)) {
      const Tensor cu = inputs_of(group.sizes(), DType::f32, Device::cpu()).cu;
      const std::string wrong =
          check_output(group.of(results[0], true), reference(group, in, cu).o, tolerance(dtype));
      if (!wrong.empty()) return wrong;
    }
    return std::string();
  };
  return {.device = device,
          .dry = [=] { run(dry); },
          .call = [=](int) { return run(in); },
          .check = check,
          .flops = s.forward_flops()};
}

std::string check_gradients(const Sizes& s, const Inputs& in, const Tensor& dqkv) {
  const AttentionColumns got = attention_columns(dqkv, s.shape());
  for (const Group& group : checked(s)) {
    const AttentionShape shape = group.sizes().shape();
    const Tensor cu = inputs_of(group.sizes(), DType::f32, Device::cpu()).cu;
    const Attention y = reference(group, in, cu);
    const AttentionColumns want = attention_columns(
        attention_backward(group.of(in.g, true), group.of(in.q, true), group.of(in.k, false),
                           group.of(in.v, false), y.o, y.lse, cu, cu, shape),
        shape);
    const Tensor results[] = {group.of(got.q, true), group.of(got.k, false),
                              group.of(got.v, false)};
    const Tensor expected[] = {want.q.clone(), want.k.clone(), want.v.clone()};
    const char* const names[] = {"dq", "dk", "dv"};
    // P and dS are rounded to the compute dtype before they are multiplied, and dP - delta cancels
    // where a query sees few keys: there the scale is that of the largest values.
    for (size_t i = 0; i < 3; ++i) {
      const std::string wrong = difference(names[i], results[i], expected[i],
                                           2 * tolerance(in.q.dtype()), largest(expected[i]));
      if (!wrong.empty()) return wrong;
    }
  }
  return "";
}

Case backward(const Sizes& s, Device device) {
  const DType dtype = compute_dtype(device);
  const auto run = [shape = s.shape()](const Inputs& in, const Attention& out) {
    return std::vector{
        attention_backward(in.g, in.q, in.k, in.v, out.o, out.lse, in.cu, in.cu, shape)};
  };
  const Inputs in = inputs_of(s, dtype, device), dry = inputs_of(s, dtype, device.meta());
  const Attention out = attention(in.q, in.k, in.v, in.cu, in.cu, s.shape());
  const Attention dry_out = attention(dry.q, dry.k, dry.v, dry.cu, dry.cu, s.shape());
  return {
      .device = device,
      .dry = [=] { run(dry, dry_out); },
      .call = [=](int) { return run(in, out); },
      .check =
          [=](const std::vector<Tensor>& results) { return check_gradients(s, in, results[0]); },
      .flops = 2.5 * s.forward_flops()};
}

const Register registered(30, [] {
  for (const Device device : devices()) {
    const std::vector<Sizes> sizes =
        device.is_cuda()
            ? std::vector<Sizes>{{4, 2048, 32, 8, 128}, {1, 8192, 32, 8, 128}, {1, 512, 32, 8, 128},
                                 {4, 2048, 9, 3, 64},   {1, 8192, 9, 3, 64},   {4, 512, 9, 3, 64}}
            : std::vector<Sizes>{{1, 512, 9, 3, 64}};
    for (const Sizes& s : sizes) {
      add(device, "attention/forward/" + s.str() + "/qlab", [=] { return forward(s, device); });
      add(device, "attention/backward/" + s.str() + "/qlab", [=] { return backward(s, device); });
    }
  }
});

}  // namespace
}  // namespace qlab::bench
