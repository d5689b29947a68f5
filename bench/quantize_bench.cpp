// NF4, both directions. Bytes: dense values, codes, and the scales as they are stored.
#include "quant/quantize.h"

#include "bench/support.h"

namespace qlab::bench {
namespace {

struct Format {
  Shape shape;
  int64_t block;
  bool nested;
  DType dtype;  // of the dense side
  bool pitched = false;

  double dense_bytes() const {
    return static_cast<double>(shape.numel()) * static_cast<double>(size_of(dtype));
  }
  double stored_bytes() const {
    const double n = static_cast<double>(shape.numel()), blocks = n / static_cast<double>(block);
    return n / 2 + (nested ? blocks + 4 * blocks / nested_block_size : 4 * blocks);
  }
  std::string str() const {
    return fmt::format("{}x{}/b{}/{}/{}", shape[0], shape[1], block, nested ? "nested" : "plain",
                       dtype == DType::f32    ? "f32"
                       : dtype == DType::bf16 ? "bf16"
                                              : "f16");
  }
};

Case dequantize(const Format& f, Device device) {
  std::vector<Nf4Tensor> inputs{
      quantize_nf4(random(f.shape, DType::bf16, device), f.block, f.nested)};
  const int count = copies(device, f.stored_bytes());
  while (static_cast<int>(inputs.size()) < count) inputs.push_back(copy_of(inputs.front()));
  std::vector<Tensor> outputs;
  for (int i = 0; i < copies(device, f.dense_bytes()); ++i) {
    outputs.push_back(
        Tensor::with_tail(f.shape[0], f.shape[1], f.pitched ? 64 : 0, f.dtype, device));
    if (i == 0) poison(outputs[0].widened(outputs[0].pitch()));
  }
  const auto check = [host = on_host(inputs[0])](const std::vector<Tensor>& results) {
    const Tensor want = Tensor::empty(host.shape, results[0].dtype(), Device::cpu());
    dequantize_nf4(want, host);
    return difference("y", bench::on_host(results[0]), bench::on_host(want), 0);
  };
  return {.device = device,
          .call =
              [=](int i) {
                const Tensor& y = outputs[static_cast<size_t>(i) % outputs.size()];
                dequantize_nf4(y, inputs[static_cast<size_t>(i)]);
                return std::vector{y};
              },
          .inputs = count,
          .check = check,
          .bytes = f.stored_bytes() + f.dense_bytes()};
}

/// All that is stored: the codes and their scales.
std::vector<Tensor> parts_of(const Nf4Tensor& x) {
  std::vector<Tensor> parts{x.codes};
  for (const Tensor& part : {x.absmax, x.absmax_code, x.absmax2, x.offset})
    if (part.defined()) parts.push_back(part);
  return parts;
}

std::string check_codes(const std::string& what, const Tensor& codes, const Tensor& want) {
  const std::vector<uint8_t> a = codes.to_vector<uint8_t>(), b = want.to_vector<uint8_t>();
  if (a.size() != b.size())
    return fmt::format("{} has {} bytes instead of {}", what, a.size(), b.size());
  for (size_t i = 0; i < b.size(); ++i)
    if (a[i] != b[i]) return fmt::format("byte {} of {} is {} instead of {}", i, what, a[i], b[i]);
  return "";
}

Case quantize(const Format& f, Device device) {
  const Tensor first = random(f.shape, f.dtype, device);
  std::vector<Tensor> inputs{first};
  while (static_cast<int>(inputs.size()) < copies(device, f.dense_bytes()))
    inputs.push_back(first.clone());
  const auto check = [=](const std::vector<Tensor>& results) {
    const std::vector<Tensor> want =
        parts_of(quantize_nf4(first.to(Device::cpu()), f.block, f.nested));
    for (size_t i = 0; i < want.size(); ++i) {
      const std::string name = fmt::format("part {}", i);
      const std::string wrong = want[i].dtype() == DType::u8
                                    ? check_codes(name, results[i], want[i])
                                    : difference(name, bench::on_host(results[i]), want[i], 0);
      if (!wrong.empty()) return wrong;
    }
    return std::string();
  };
  quantize_nf4(first, f.block, f.nested);  // makes the device's map, once for all calls
  const Tensor dry_x = Tensor::empty(f.shape, f.dtype, device.meta());
  quantize_nf4(dry_x, f.block, f.nested);  // and that of meta
  return {.device = device,
          .dry = [=] { quantize_nf4(dry_x, f.block, f.nested); },
          .call =
              [=](int i) {
                return parts_of(quantize_nf4(inputs[static_cast<size_t>(i)], f.block, f.nested));
              },
          .inputs = static_cast<int>(inputs.size()),
          .rotate_results = true,
          .check = check,
          .bytes = f.dense_bytes() + f.stored_bytes()};
}

void register_format(const Format& f, Device device) {
  add(device, fmt::format("dequantize/{}/{}/qlab", f.str(), f.pitched ? "pitched" : "contiguous"),
      [=] { return dequantize(f, device); });
  if (f.pitched) return;
  add(device, fmt::format("quantize/{}/qlab", f.str()), [=] { return quantize(f, device); });
}

const Register registered(10, [] {
  for (const Device device : devices()) {
    const bool gpu = device.is_cuda();
    const Shape usual = gpu ? Shape{14336, 4096} : Shape{1536, 576};
    const std::vector<Shape> shapes =
        gpu ? std::vector<Shape>{{1024, 4096}, {4096, 4096},  {6144, 4096},
                                 usual,        {4096, 14336}, {28672, 4096}}
            : std::vector<Shape>{{576, 576}, usual, {4096, 4096}};
    for (const Shape& shape : shapes)
      for (const DType dtype : {DType::bf16, DType::f16, DType::f32})
        register_format({shape, 64, true, dtype}, device);
    for (int64_t block = 32; block <= 4096; block *= 2)
      for (const bool nested : {true, false})
        for (const DType dtype : {DType::bf16, DType::f16})
          if (block != 64 || !nested) register_format({usual, block, nested, dtype}, device);
    for (const Shape& shape : shapes) register_format({shape, 64, true, DType::bf16, true}, device);
  }
});

}  // namespace
}  // namespace qlab::bench
