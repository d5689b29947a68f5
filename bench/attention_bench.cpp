// Causal attention over packed sequences. FLOP: 4 L^2 D / 2 per sequence and head forward (two
// products over half of the L x L pairs), 2.5 times that backward (five products).
#include "core/ops/attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "bench/support.h"
#include "core/ops/copy.h"

namespace qlab::bench {
namespace {

struct Sizes {
  std::vector<int64_t> lengths;  // of the sequences, packed one after the other
  int64_t heads, kv_heads, dim;

  int64_t count() const { return static_cast<int64_t>(lengths.size()); }
  int64_t begin(int64_t sequence) const {
    return std::accumulate(lengths.begin(), lengths.begin() + sequence, int64_t{0});
  }
  int64_t tokens() const { return begin(count()); }
  int64_t longest() const { return std::ranges::max(lengths); }
  bool ragged() const { return std::ranges::min(lengths) != longest(); }
  AttentionShape shape() const { return {heads, kv_heads, dim, longest(), longest()}; }
  double forward_flops() const {
    double sum = 0;
    for (const int64_t length : lengths)
      sum += 2.0 * static_cast<double>(length * length) * static_cast<double>(heads * dim);
    return sum;
  }
  std::string str() const {
    const std::string rows =
        ragged() ? fmt::format("packed{}", tokens()) : fmt::format("{}x{}", count(), longest());
    return fmt::format("{}/h{}k{}d{}", rows, heads, kv_heads, dim);
  }
};

/// q, k and v side by side, as the merged projection leaves them.
struct Inputs {
  Tensor q, k, v, g, cu;
};

Inputs inputs_of(const Sizes& s, DType dtype, Device device) {
  std::vector<int32_t> ends;
  for (int64_t i = 0; i <= s.count(); ++i) ends.push_back(static_cast<int32_t>(s.begin(i)));
  const int64_t rows = s.tokens();
  const auto matrix = [&](int64_t heads) {
    return device.is_meta() ? Tensor::empty({rows, heads * s.dim}, dtype, device)
                            : random({rows, heads * s.dim}, dtype, device);
  };
  const AttentionColumns columns = attention_columns(matrix(s.heads + 2 * s.kv_heads), s.shape());
  Inputs in{columns.q, columns.k, columns.v, matrix(s.heads), {}};
  in.cu = Tensor::from_vector(ends, {s.count() + 1}, device);
  if (!device.is_meta()) synchronize(device);
  return in;
}

/// As many as exceed the caches.
std::vector<Inputs> all_inputs(const Sizes& s, DType dtype, Device device) {
  const double bytes = static_cast<double>(s.tokens() * 2 * (s.heads + s.kv_heads) * s.dim) *
                       static_cast<double>(size_of(dtype));
  std::vector<Inputs> inputs;
  for (int i = 0; i < copies(device, bytes); ++i) inputs.push_back(inputs_of(s, dtype, device));
  return inputs;
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

  int64_t length() const { return s.lengths[static_cast<size_t>(sequence)]; }
  Tensor of(const Tensor& x, bool queries) const {
    const int64_t heads = queries ? s.heads / s.kv_heads : 1, cols = heads * s.dim;
    return part(x, s.begin(sequence), length(), kv_head * cols, cols);
  }
  Sizes sizes() const { return {{length()}, s.heads / s.kv_heads, 1, s.dim}; }
};

/// The last group of the last sequence, and of the first, or of each where their lengths differ,
/// one where the CPU is soon done.
std::vector<Group> checked(const Sizes& s) {
  std::vector<Group> groups{{s, s.count() - 1, s.kv_heads - 1}};
  const int64_t others = s.ragged() ? s.count() - 1 : 1;
  for (int64_t i = 0; i < others; ++i)
    if (s.lengths[static_cast<size_t>(i)] <= 4096) groups.push_back({s, i, i % s.kv_heads});
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
  const std::vector<Inputs> inputs = all_inputs(s, dtype, device);
  const Inputs dry = inputs_of(s, dtype, device.meta());
  const auto check = [=, in = inputs[0]](const std::vector<Tensor>& results) {
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
          .call = [=](int i) { return run(inputs[static_cast<size_t>(i)]); },
          .inputs = static_cast<int>(inputs.size()),
          .rotate_results = true,
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
      if (group.length() == 1 && i < 2) {  // the weight of a single key is 1, whatever q and k
        if (!(largest(results[i]) <= tolerance(in.q.dtype())))
          return fmt::format("{} of a single token is not 0", names[i]);
        continue;
      }
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
  const std::vector<Inputs> inputs = all_inputs(s, dtype, device);
  const Inputs dry = inputs_of(s, dtype, device.meta());
  const auto output = [&](const Inputs& in) {
    return attention(in.q, in.k, in.v, in.cu, in.cu, s.shape());
  };
  std::vector<Attention> outputs;
  for (const Inputs& in : inputs) outputs.push_back(output(in));
  return {.device = device,
          .dry = [=, out = output(dry)] { run(dry, out); },
          .call =
              [=](int i) {
                return run(inputs[static_cast<size_t>(i)], outputs[static_cast<size_t>(i)]);
              },
          .inputs = static_cast<int>(inputs.size()),
          .rotate_results = true,
          .check =
              [=, in = inputs[0]](const std::vector<Tensor>& results) {
                return check_gradients(s, in, results[0]);
              },
          .flops = 2.5 * s.forward_flops()};
}

const Register registered(30, [] {
  for (const Device device : devices()) {
    const auto equal = [](int64_t sequences, int64_t length, int64_t heads, int64_t kv_heads,
                          int64_t dim) {
      return Sizes{std::vector(static_cast<size_t>(sequences), length), heads, kv_heads, dim};
    };
    std::vector<Sizes> sizes{equal(1, 512, 9, 3, 64)};
    if (device.is_cuda())
      sizes = {equal(4, 2048, 32, 8, 128),
               equal(1, 8192, 32, 8, 128),
               equal(1, 512, 32, 8, 128),
               equal(4, 2048, 9, 3, 64),
               equal(1, 8192, 9, 3, 64),
               equal(4, 512, 9, 3, 64),
               equal(4, 2048, 32, 32, 80),
               equal(4, 2048, 32, 32, 96),
               {{1, 17, 130, 511, 1000, 2048, 385, 4100}, 32, 8, 128}};
    for (const Sizes& s : sizes) {
      add(device, "attention/forward/" + s.str() + "/qlab", [=] { return forward(s, device); });
      add(device, "attention/backward/" + s.str() + "/qlab", [=] { return backward(s, device); });
    }
  }
});

}  // namespace
}  // namespace qlab::bench
