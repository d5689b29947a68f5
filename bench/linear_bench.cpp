// Every kernel of bench/linear on the linear layers of Llama 7B, 8B, 13B, 70B and SmolLM2-135M.
// FLOP: 2 M N K. Bytes: the weights as the kernel reads them, once, and x and y.
#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <numeric>

#include "bench/linear/linear.h"
#include "core/ops/copy.h"
#include "core/parallel.h"

namespace qlab::bench {
namespace {

std::vector<LinearKernel>& kernels() {
  static std::vector<LinearKernel> all;
  return all;
}

/// Rows of a result that are compared with the reference, where M reaches that far.
constexpr std::array<int64_t, 14> checked_rows = {0,    3,    7,    15,   63,   200,   255,
                                                  1023, 2047, 4095, 5000, 8191, 12345, 16383};

/// What one direction reads, and the checked rows of its result: fp32 [checked rows, cols].
struct Direction {
  Tensor input, reference;
};

/// The weights of one shape, and what each kernel made of them.
struct Layer {
  Shape shape;
  LinearWeights weights;
  Tensor values;  // fp32 on the CPU
  std::map<std::string, LinearCalls> calls;
  std::map<bool, Direction> directions;  // by forward, made when first needed
};

int64_t largest_m(Device device) { return device.is_cuda() ? 16384 : 512; }

/// Distance between the inputs of consecutive calls, in rows, so that they start aligned.
int64_t slot_rows(int64_t m) { return (m + 15) / 16 * 16; }

/// Rows for the largest M, and for smaller ones enough that the calls walk past the caches.
Tensor input_rows(Device device, int64_t cols) {
  const int64_t bytes_per_row = cols * static_cast<int64_t>(size_of(compute_dtype(device)));
  const int64_t rows = std::max(largest_m(device), int64_t{128000000} / bytes_per_row / 16 * 16);
  return random({rows, cols}, compute_dtype(device), device);
}

/// In eight interleaved sums, so that the CPU adds them side by side.
double dot(const float* a, const float* b, int64_t n) {
  constexpr int64_t lanes = 8;
  std::array<double, lanes> sums{};
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes)
    for (int64_t lane = 0; lane < lanes; ++lane)
      sums[lane] += static_cast<double>(a[i + lane]) * b[i + lane];
  for (; i < n; ++i) sums[0] += static_cast<double>(a[i]) * b[i];
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

/// In double, from the exact values of the codes: sum over the shared dimension, row by row.
Tensor reference(const Tensor& x, const Tensor& w, bool forward, int64_t rows) {
  const int64_t n = w.dim(0), k = w.dim(1), out = forward ? n : k;
  std::vector<Tensor> inputs;
  for (const int64_t row : checked_rows)
    if (row < rows) inputs.push_back(on_host(x.slice_rows(row, row + 1)));
  const Tensor y =
      Tensor::empty({static_cast<int64_t>(inputs.size()), out}, DType::f32, Device::cpu());
  const float* const weight = w.data<float>();
  const auto sum_range = [&](const float* in, float* result, int64_t begin, int64_t end) {
    if (forward) {
      for (int64_t i = begin; i < end; ++i)
        result[i] = static_cast<float>(dot(in, weight + i * k, k));
      return;
    }
    std::vector<double> sums(static_cast<size_t>(end - begin));
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = begin; j < end; ++j)
        sums[j - begin] += static_cast<double>(in[i]) * weight[i * k + j];
    for (int64_t j = begin; j < end; ++j) result[j] = static_cast<float>(sums[j - begin]);
  };
  parallel_for(out, 32, [&](int64_t begin, int64_t end) {
    for (size_t r = 0; r < inputs.size(); ++r)
      sum_range(inputs[r].data<float>(), y.data<float>() + static_cast<int64_t>(r) * out, begin,
                end);
  });
  return y;
}

Tensor host_values(const Nf4Tensor& weight) {
  const Tensor values = Tensor::empty(weight.shape, DType::f32, Device::cpu());
  dequantize_nf4(values, on_host(weight));
  return values;
}

std::shared_ptr<Layer> make_layer(const Shape& shape, Device device) {
  auto layer = std::make_shared<Layer>();
  layer->shape = shape;
  layer->weights = {.nf4 = {}, .compute = compute_dtype(device), .device = device};
  auto& nf4 = layer->weights.nf4;
  nf4.push_back(quantize_nf4(random(shape, compute_dtype(device), device, 0.02f), 64, true));
  const int count = copies(device, static_cast<double>(shape.numel()) * nf4_weight_bytes);
  while (static_cast<int>(nf4.size()) < count) nf4.push_back(copy_of(nf4.front()));
  layer->values = host_values(nf4.front());
  return layer;
}

const Direction& direction_of(Layer& layer, bool forward) {
  const auto [entry, fresh] = layer.directions.try_emplace(forward);
  if (fresh) {
    const Device device = layer.weights.device;
    const Tensor x = input_rows(device, layer.shape[forward ? 1 : 0]);
    entry->second = {x, reference(x, layer.values, forward, largest_m(device))};
  }
  return entry->second;
}

/// The layer in use; another shape takes its place.
std::shared_ptr<Layer> layer_of(const Shape& shape, Device device) {
  static std::shared_ptr<Layer> current;
  if (!current || !(current->shape == shape) || !(current->weights.device == device)) {
    current.reset();
    current = make_layer(shape, device);
  }
  return current;
}

std::string check_rows(const Tensor& y, const Tensor& want) {
  for (int64_t i = 0; i < want.dim(0); ++i) {
    const int64_t row = checked_rows[static_cast<size_t>(i)];
    if (row >= y.dim(0)) break;
    const std::string wrong =
        difference(fmt::format("row {}", row), on_host(y.slice_rows(row, row + 1)),
                   want.slice_rows(i, i + 1), tolerance(y.dtype()));
    if (!wrong.empty()) return wrong;
  }
  return "";
}

Case make_case(const LinearKernel& kernel, const LinearShape& shape, Device device) {
  const auto layer = layer_of({shape.n, shape.k}, device);
  if (!layer->calls.contains(kernel.name))
    layer->calls[kernel.name] = kernel.prepare(layer->weights);
  const LinearCalls& calls = layer->calls[kernel.name];
  const auto& compute = shape.forward ? calls.forward : calls.dx;
  if (!compute)
    fail("kernel {} says that it supports {}, and has no call for it", kernel.name,
         shape.forward ? "forward" : "dx");
  const int64_t in = shape.forward ? shape.k : shape.n, out = shape.forward ? shape.n : shape.k;
  const DType dtype = layer->weights.compute;
  const auto [x, want] = direction_of(*layer, shape.forward);
  const int64_t slot = slot_rows(shape.m);
  const int results =
      copies(device, static_cast<double>(slot * out) * static_cast<double>(size_of(dtype)));
  const Tensor y = Tensor::empty({slot * results, out}, dtype, device);
  poison(y);
  const Tensor dry_x = Tensor::empty({shape.m, in}, dtype, device.meta()),
               dry_y = Tensor::empty({shape.m, out}, dtype, device.meta());
  const int64_t slots = std::max<int64_t>(1, x.dim(0) / slot);
  const int weights = static_cast<int>(layer->weights.nf4.size());
  const double m = static_cast<double>(shape.m), n = static_cast<double>(shape.n),
               k = static_cast<double>(shape.k);
  return {.device = device,
          .dry = [=] { compute(dry_y, dry_x, 0); },
          .call =
              [=, x = x, keep = layer](int i) {
                const int64_t from = i % slots * slot, to = i % results * slot;
                const Tensor result = y.slice_rows(to, to + shape.m);
                compute(result, x.slice_rows(from, from + shape.m), i % weights);
                return std::vector{result};
              },
          .inputs = std::max({weights, results, static_cast<int>(std::min<int64_t>(slots, 4096))}),
          .check = [want = want](
                       const std::vector<Tensor>& results) { return check_rows(results[0], want); },
          .bytes = n * k * kernel.weight_bytes + m * (n + k) * static_cast<double>(size_of(dtype)),
          .flops = 2 * m * n * k};
}

/// 8B and SmolLM2 come first: the rest may be left out when the time is up. The last four are q, k,
/// v and gate, up of 13B and 70B as one.
std::vector<Shape> shapes(Device device) {
  if (device.is_cpu()) return {{576, 576}, {1536, 576}, {576, 1536}};
  return {{4096, 4096},  {14336, 4096}, {1024, 4096},  {4096, 14336}, {6144, 4096},  {28672, 4096},
          {576, 576},    {192, 576},    {1536, 576},   {576, 1536},   {11008, 4096}, {4096, 11008},
          {5120, 5120},  {13824, 5120}, {5120, 13824}, {8192, 8192},  {1024, 8192},  {28672, 8192},
          {8192, 28672}, {15360, 5120}, {27648, 5120}, {10240, 8192}, {57344, 8192}};
}

std::vector<int64_t> rows(Device device) {
  if (device.is_cpu()) return {1, 64, 512};
  return {1, 4, 8, 16, 64, 256, 1024, 2048, 4096, 8192, 16384};
}

/// From as many rows on each kernel is timed in turns with `dense`: long products run at what the
/// power allows, and `dense` alone takes 10 % more or less from call to call.
int64_t least_paired_rows(Device device) { return device.is_cuda() ? 64 : 512; }

void register_shape(const Shape& shape, Device device) {
  const LinearKernel& dense = *std::ranges::find(kernels(), "dense", &LinearKernel::name);
  for (const bool forward : {true, false})
    for (const int64_t m : rows(device))
      for (const LinearKernel& kernel : kernels()) {
        const LinearShape linear{shape[0], shape[1], m, forward};
        if (!kernel.supports(linear, device)) continue;
        const bool paired = m >= least_paired_rows(device) && kernel.name != dense.name;
        add(device,
            fmt::format("linear/{}/{}x{}/m{}/{}", forward ? "forward" : "dx", shape[0], shape[1], m,
                        kernel.name),
            [=] {
              Case c = make_case(kernel, linear, device);
              if (paired) c.beside = std::make_shared<const Case>(make_case(dense, linear, device));
              return c;
            });
      }
}

// The longest part of the program, hence last.
const Register registered(90, [] {
  std::ranges::sort(kernels(), {}, &LinearKernel::name);
  const auto twice = std::ranges::adjacent_find(kernels(), {}, &LinearKernel::name);
  QLAB_CHECK(twice == kernels().end(), "two kernels of bench/linear/ are called '{}'", twice->name);
  for (const Device device : devices())
    for (const Shape& shape : shapes(device)) register_shape(shape, device);
});

}  // namespace

RegisterLinear::RegisterLinear(LinearKernel kernel) { kernels().push_back(std::move(kernel)); }

std::vector<Tensor> dense_weights(const LinearWeights& weights, int64_t tail) {
  const Shape shape = weights.nf4.front().shape;
  const double bytes =
      static_cast<double>(shape.numel()) * static_cast<double>(size_of(weights.compute));
  std::vector<Tensor> dense;
  const int count = std::min(copies(weights.device, bytes), static_cast<int>(weights.nf4.size()));
  for (int i = 0; i < count; ++i) {
    dense.push_back(Tensor::with_tail(shape[0], shape[1], tail, weights.compute, weights.device));
    dequantize_nf4(dense.back(), weights.nf4[static_cast<size_t>(i)]);
  }
  return dense;
}

}  // namespace qlab::bench
