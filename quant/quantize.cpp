#include "quant/quantize.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <mutex>
#include <utility>

#include "core/gpu_limits.h"
#include "core/parallel.h"
#include "core/profile.h"
#include "quant/nf4.h"

namespace qlab {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

/// For every i in 0..6: the means of neighbours among 2^i + 1 points from 0.1 to 1, times 10^(i-6),
/// with both signs, or of twice as many intervals without; 0 and +1 besides. All in fp32, the
/// points by fused multiply-add from the nearer end: that reproduces the stored map of bitsandbytes
/// to the last bit.
std::array<float, 256> make_dynamic_map(bool with_sign) {
  std::array<float, 256> map{};
  size_t filled = 0;
  for (int i = 0; i < 7; ++i) {
    const int intervals = 1 << (with_sign ? i : i + 1), points = intervals + 1;
    const float step = (1.0f - 0.1f) / static_cast<float>(intervals);
    const auto point = [&](int j) {
      return j < points / 2 ? std::fma(step, static_cast<float>(j), 0.1f)
                            : std::fma(-step, static_cast<float>(intervals - j), 1.0f);
    };
    const float decade = static_cast<float>(std::pow(10.0, i - 6));
    for (int j = 0; j < intervals; ++j) {
      const float magnitude = decade * ((point(j) + point(j + 1)) / 2.0f);
      map[filled++] = magnitude;
      if (with_sign) map[filled++] = -magnitude;
    }
  }
  map[filled++] = 0.0f;
  map[filled++] = 1.0f;
  std::sort(map.begin(), map.end());
  return map;
}

/// One copy of the dynamic map per device, while a tensor uses it.
Tensor device_map(Device device) {
  static std::vector<std::pair<Device, std::weak_ptr<Storage>>> maps;
  static std::mutex mutex;
  const std::lock_guard lock(mutex);
  const auto own = std::find_if(maps.begin(), maps.end(),
                                [&](const auto& entry) { return entry.first == device; });
  if (own != maps.end())
    if (const std::shared_ptr<Storage> held = own->second.lock())
      return Tensor::from_storage(held, 0, {256}, DType::f32);
  const MemoryName name("dynamic map");
  const MemoryTag tag(Category::workspace);  // at first: an arena ends with its own tensors
  const std::array<float, 256>& values = dynamic_map();
  const Tensor map =
      device.is_meta()
          ? Tensor::empty({256}, DType::f32, device)
          : Tensor::from_vector(std::vector<float>(values.begin(), values.end()), {256}, device);
  map.storage()->set_category(Category::constants);
  if (own != maps.end())
    own->second = map.storage();
  else
    maps.emplace_back(device, map.storage());
  return map;
}

}  // namespace

const std::array<float, 256>& dynamic_map() {
  static const std::array<float, 256> map = make_dynamic_map(true);
  return map;
}
const std::array<float, 256>& unsigned_dynamic_map() {
  static const std::array<float, 256> map = make_dynamic_map(false);
  return map;
}

Nf4Tensor quantize_nf4(const Tensor& x, int64_t block_size, bool double_quant) {
  QLAB_CHECK(std::has_single_bit(static_cast<uint64_t>(block_size)) && block_size >= 32 &&
                 block_size <= 4096,
             "[quantize_nf4] quant.block_size must be a power of two from 32 to 4096, got {}",
             block_size);
  QLAB_CHECK(x.dtype() == DType::f32 || x.dtype() == DType::bf16 || x.dtype() == DType::f16 ||
                 (x.dtype() == DType::f64 && x.device().target == DeviceType::cpu),
             "[quantize_nf4] weights must be float32, bfloat16 or float16, got {}", x.str());
  QLAB_CHECK(x.contiguous(), "[quantize_nf4] weights must be contiguous, got {}", x.str());
  const Device device = x.device();
  const int64_t n = x.numel(), blocks = ceil_div(n, block_size);
  Nf4Tensor out;
  out.shape = x.shape();
  out.block_size = block_size;
  out.double_quant = double_quant;
  {
    const MemoryTag tag(Category::weights);
    out.codes = Tensor::empty({(n + 1) / 2}, DType::u8, device);
  }
  const MemoryTag tag(Category::constants);
  const int64_t nested = ceil_div(blocks, nested_block_size);
  if (double_quant) {
    const Tensor constants = Tensor::empty({nested + 1}, DType::f32, device);
    out.absmax2 = constants.slice_rows(0, nested);
    out.offset = constants.slice_rows(nested, nested + 1);
    out.absmax_code = Tensor::empty({blocks}, DType::u8, device);
    out.map = device_map(device);
  } else {
    out.absmax = Tensor::empty({blocks}, DType::f32, device);
  }
  const MemoryTag scratch(Category::workspace);
  Tensor absmax = out.absmax, sums;
  if (double_quant) {
    absmax = Tensor::empty({blocks}, DType::f32, device);
    sums = Tensor::empty({nested}, DType::f64, device);
  }
  if (n > 0)
    on_device(
        device, [&] { cpu::quantize_nf4(out.codes, absmax, sums, x, block_size); },
        [&] { cuda::quantize_nf4(out.codes, absmax, sums, x, block_size); });
  if (double_quant)
    on_device(
        device, [&] { cpu::quantize_scales(out, absmax, sums); },
        [&] { cuda::quantize_scales(out, absmax, sums); });
  return out;
}

void dequantize_nf4(const Tensor& y, const Nf4Tensor& x) {
  check_shape("dequantize_nf4", "y", y, x.shape);
  check_device("dequantize_nf4", y, x.codes);
  constexpr int64_t most_elements = int64_t{1} << 33;
  check_gpu_count("dequantize_nf4", y, "elements", y.numel(), most_elements);
  if (y.numel() == 0) return;
  const OpScope scope("dequantize_nf4", y.device(),
                      {0, bytes_of_all(y, x.codes, x.absmax, x.absmax_code, x.absmax2)});
  on_device(
      y.device(), [&] { cpu::dequantize_nf4(y, x); }, [&] { cuda::dequantize_nf4(y, x); });
}

namespace cpu {
namespace {

/// Groups of 32 neighbours are folded in halves (i with i + 16, i + 8, ...), their sums likewise:
/// the order of a GPU's warps. n is a multiple of 32, at most 1024; v is overwritten.
double tree_sum(double* v, int64_t n) {
  constexpr int64_t group = 32;
  const auto fold = [](double* first, int64_t count) {
    for (int64_t half = group / 2; half > 0; half /= 2)
      for (int64_t i = 0; i < half && i + half < count; ++i) first[i] += first[i + half];
    return first[0];
  };
  for (int64_t i = 0; i < n / group; ++i) v[i] = fold(v + i * group, group);
  return fold(v, n / group);
}

/// Elements [begin, end) of the flattened tensor, to consecutive places from y on.
template <class T>
void dequantize_range(T* y, const uint8_t* codes, const Nf4Tensor& x, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end;) {
    const int64_t block = i / x.block_size;
    const int64_t stop = std::min(end, (block + 1) * x.block_size);
    const float scale = x.double_quant
                            ? x.map.data<float>()[x.absmax_code.data<uint8_t>()[block]] *
                                      x.absmax2.data<float>()[block / nested_block_size] +
                                  x.offset.data<float>()[0]
                            : x.absmax.data<float>()[block];
    T value[16];
    for (int c = 0; c < 16; ++c) value[c] = static_cast<T>(nf4::value(c) * scale);
    if (i % 2 != 0) *y++ = value[codes[i / 2] & 15], ++i;
    for (; i + 2 <= stop; i += 2, y += 2) {
      const uint8_t byte = codes[i / 2];
      y[0] = value[byte >> 4];
      y[1] = value[byte & 15];
    }
    if (i < stop) *y++ = value[codes[i / 2] >> 4], ++i;
  }
}

}  // namespace

void quantize_nf4(const Tensor& codes, const Tensor& absmax, const Tensor& sums, const Tensor& x,
                  int64_t block_size) {
  const int64_t n = x.numel(), blocks = absmax.numel();
  uint8_t* out = codes.data<uint8_t>();
  float* scale = absmax.data<float>();
  dispatch(CpuFloats{}, x.dtype(), "quantize_nf4", [&]<class T>() {
    const T* in = x.data<T>();
    parallel_for(blocks, 16, [=](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * block_size, end = std::min(begin + block_size, n);
        float largest = 0;
        for (int64_t i = begin; i < end; ++i) {
          const float magnitude = std::abs(static_cast<float>(in[i]));
          if (magnitude > largest) largest = magnitude;  // passes over NaN
        }
        scale[block] = largest;
        const float inverse = flushed_reciprocal(largest);
        const auto code = [&](int64_t i) {
          return nf4::code(i < end ? flushed(static_cast<float>(in[i])) * inverse : 0.0f * inverse);
        };
        for (int64_t i = begin; i < end; i += 2)
          out[i / 2] = static_cast<uint8_t>(code(i) << 4 | code(i + 1));
      }
    });
  });
  if (!sums.defined()) return;
  for (int64_t i = 0; i < sums.numel(); ++i) {
    double lane[nested_block_size] = {};
    const int64_t first = i * nested_block_size;
    for (int64_t j = first; j < std::min(first + nested_block_size, blocks); ++j)
      lane[j - first] = scale[j];
    sums.data<double>()[i] = tree_sum(lane, nested_block_size);
  }
}

// Sum i of 256 scales is a tree; sum i goes to lane i % 1024 of a second tree.
void quantize_scales(const Nf4Tensor& out, const Tensor& absmax, const Tensor& sums) {
  const int64_t blocks = absmax.numel();
  double lane[mean_lanes] = {};
  for (int64_t i = 0; i < sums.numel(); ++i) lane[i % mean_lanes] += sums.data<double>()[i];
  const double sum = tree_sum(lane, mean_lanes);
  const float mean = blocks == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(blocks));
  out.offset.data<float>()[0] = mean;
  const float *scale = absmax.data<float>(), *map = out.map.data<float>();
  uint8_t* codes = out.absmax_code.data<uint8_t>();
  float* absmax2 = out.absmax2.data<float>();
  parallel_for(sums.numel(), 16, [=](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      const int64_t begin = b * nested_block_size;
      const int64_t end = std::min(begin + nested_block_size, blocks);
      float largest = 0;
      for (int64_t i = begin; i < end; ++i) largest = std::max(largest, std::abs(scale[i] - mean));
      absmax2[b] = largest;
      const float inverse = flushed_reciprocal(largest);
      for (int64_t i = begin; i < end; ++i)
        codes[i] = dynamic_code(map, flushed(scale[i] - mean) * inverse);
    }
  });
}

void dequantize_nf4(const Tensor& y, const Nf4Tensor& x) {
  const uint8_t* codes = x.codes.data<uint8_t>();
  // A run of elements that lies together: a row, or, without a pitch, some blocks.
  const int64_t n = y.numel(), run = y.contiguous() ? 16 * x.block_size : y.cols();
  const int64_t pitch = y.contiguous() ? run : y.pitch();
  dispatch(CpuFloats{}, y.dtype(), "dequantize_nf4", [&]<class T>() {
    T* out = y.data<T>();
    parallel_for(
        ceil_div(n, run), std::max<int64_t>(1, 16384 / run), [&, out](int64_t first, int64_t last) {
          for (int64_t r = first; r < last; ++r)
            dequantize_range(out + r * pitch, codes, x, r * run, std::min((r + 1) * run, n));
        });
  });
}

}  // namespace cpu
}  // namespace qlab
