// The queries of a layer, rotated in place. Bytes: x read and written. The backward pass is the
// same kernel.
#include "core/ops/rope.h"

#include "bench/support.h"

namespace qlab::bench {
namespace {

Case rotation(int64_t rows, int64_t heads, int64_t dim, Device device) {
  const DType dtype = compute_dtype(device);
  const double bytes =
      static_cast<double>(rows * heads * dim * 2) * static_cast<double>(size_of(dtype));
  const auto tables = [&](Device d) {
    return rope_tables(8192, dim, 500000, RopeScaling{}, {}, d);
  };
  const Tensor positions = random_integers(rows, 8192, device);
  std::vector<Tensor> x;
  for (int i = 0; i < copies(device, bytes); ++i)
    x.push_back(random({rows, heads * dim}, dtype, device));
  const RopeTables table = tables(device);
  const Tensor before = on_host(x[0]);
  const auto check = [=, host = tables(Device::cpu())](const std::vector<Tensor>& results) {
    const Tensor want = before.clone();
    rope_inplace(want, positions.to(Device::cpu()), host, dim);
    return difference("y", on_host(results[0]), want, tolerance(dtype));
  };
  return {.device = device,
          .call =
              [=](int i) {
                rope_inplace(x[static_cast<size_t>(i)], positions, table, dim);
                return std::vector{x[static_cast<size_t>(i)]};
              },
          .inputs = static_cast<int>(x.size()),
          .check = check,
          .bytes = bytes};
}

const Register registered(42, [] {
  struct Sizes {
    int64_t rows, heads, dim;
  };
  for (const Device device : devices())
    for (const Sizes& s : device.is_cuda()
                              ? std::vector<Sizes>{{8192, 32, 128}, {512, 32, 128}, {2048, 9, 64}}
                              : std::vector<Sizes>{{512, 9, 64}})
      add(device, fmt::format("rope/forward/{}x{}x{}/qlab", s.rows, s.heads, s.dim),
          [=] { return rotation(s.rows, s.heads, s.dim, device); });
});

}  // namespace
}  // namespace qlab::bench
