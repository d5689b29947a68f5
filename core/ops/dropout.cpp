#include "core/ops/dropout.h"

#include <algorithm>

#include "core/gpu_limits.h"
#include "core/lanes.h"
#include "core/parallel.h"
#include "core/profile.h"

namespace qlab {
namespace {

void check_arguments(const char* op, const Tensor& x, const Tensor& example, const Tensor& position,
                     DropoutKey key) {
  QLAB_CHECK(x.rank() == 2, "[{}] x must be [T, C], got {}", op, x.str());
  check_shape(op, "example", example, {x.dim(0)});
  check_shape(op, "position", position, {x.dim(0)});
  QLAB_CHECK(example.dtype() == DType::i64, "[{}] example must be int64, got {}", op,
             example.str());
  QLAB_CHECK(position.dtype() == DType::i32, "[{}] position must be int32, got {}", op,
             position.str());
  QLAB_CHECK(key.p >= 0 && key.p < 1, "[{}] p must be in [0, 1), got {}", op, key.p);
  check_device(op, x, example);
  check_device(op, x, position);
  check_gpu_matrix(op, x);
}

}  // namespace

Tensor dropout(const Tensor& x, const Tensor& example, const Tensor& position, DropoutKey key) {
  check_arguments("dropout", x, example, position, key);
  const Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device());
  if (x.numel() == 0) return y;
  const OpScope scope("dropout", x.device(), {0, bytes_of_all(x, y)});
  on_device(
      x.device(), [&] { cpu::dropout(y, x, example, position, key, false); },
      [&] { cuda::dropout(y, x, example, position, key, false); });
  return y;
}

void dropout_add(const Tensor& y, const Tensor& x, const Tensor& example, const Tensor& position,
                 DropoutKey key) {
  check_arguments("dropout_add", x, example, position, key);
  check_shape("dropout_add", "y", y, x.shape());
  QLAB_CHECK(y.dtype() == x.dtype(), "[dropout_add] y must be {}, got {}", name_of(x.dtype()),
             y.str());
  check_device("dropout_add", x, y);
  if (x.numel() == 0) return;
  const OpScope scope("dropout_add", x.device(), {0, bytes_of_all(x, y, y)});
  on_device(
      x.device(), [&] { cpu::dropout(y, x, example, position, key, true); },
      [&] { cuda::dropout(y, x, example, position, key, true); });
}

namespace cpu {
namespace {

/// dropout_bits() for units first, first + 1, ... of one token, side by side in the lanes of vector
/// registers; random[j] decides feature j.
template <int width>
struct PhiloxVector {
  static constexpr int counters = width / 4, features = 8 * counters;
  using U32 = typename VectorOf<uint32_t, width>::type;
  using U64 = typename VectorOf<uint64_t, width>::type;

  QLAB_INLINE static U32 high_product(const U32& x, uint64_t factor) {
    const U64 even = ((U64)x & 0xffffffffu) * factor, odd = ((U64)x >> 32) * factor;
    return (U32)((even >> 32) | (odd & 0xffffffff00000000u));
  }
  QLAB_INLINE static void fill(uint32_t* random, uint64_t key, uint32_t first, int32_t position,
                               int64_t example) {
    U32 c0;
    for (int l = 0; l < counters; ++l) c0[l] = first + static_cast<uint32_t>(l);
    U32 c1 = U32{} + static_cast<uint32_t>(position);
    U32 c2 = U32{} + static_cast<uint32_t>(example);
    U32 c3 = U32{} + static_cast<uint32_t>(static_cast<uint64_t>(example) >> 32);
    uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
    for (int round = 0; round < dropout_rounds; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      const U32 h0 = high_product(c0, 0xD2511F53u), h1 = high_product(c2, 0xCD9E8D57u);
      const U32 l0 = c0 * 0xD2511F53u, l1 = c2 * 0xCD9E8D57u;
      c0 = h1 ^ c1 ^ k0, c1 = l1;
      c2 = h0 ^ c3 ^ k1, c3 = l0;
    }
    for (int l = 0; l < counters; ++l) {
      const uint32_t lanes[4] = {c0[l], c1[l], c2[l], c3[l]};
      for (int j = 0; j < 8; ++j) random[8 * l + j] = lanes[j / 2] >> j % 2 * 16 & 0xffff;
    }
  }
};

}  // namespace

void dropout(const Tensor& y, const Tensor& x, const Tensor& example, const Tensor& position,
             DropoutKey key, bool accumulate) {
  const int64_t cols = x.cols(), y_pitch = y.pitch(), x_pitch = x.pitch();
  const int64_t* owner = example.data<int64_t>();
  const int32_t* place = position.data<int32_t>();
  const uint32_t threshold = dropout_threshold(key.p);
  dispatch(CpuFloats{}, x.dtype(), "dropout", [&]<class T>() {
    using A = accumulate_t<T>;
    T* out = y.data<T>();
    const T* in = x.data<T>();
    const A factor = static_cast<A>(dropout_factor(key.p));
    parallel_for(x.rows(), std::max<int64_t>(1, 16384 / cols), [=](int64_t begin, int64_t end) {
      vectorized([&]<int width>() QLAB_INLINE {
        for (int64_t t = begin; t < end; ++t)
          for (int64_t i = 0; i < cols; i += PhiloxVector<width>::features) {
            constexpr int features = PhiloxVector<width>::features;
            uint32_t random[features];
            PhiloxVector<width>::fill(random, key.key, static_cast<uint32_t>(i >> 3), place[t],
                                      owner[t]);
            const int64_t n = std::min<int64_t>(features, cols - i);
            T* to = out + t * y_pitch + i;
            const T* from = in + t * x_pitch + i;
            A kept[features];
            for (int64_t j = 0; j < n; ++j) {
              const A grown = static_cast<A>(from[j]) * factor;
              kept[j] = random[j] >= threshold ? grown : A(0);
            }
            if (accumulate)
              for (int64_t j = 0; j < n; ++j) kept[j] += static_cast<A>(to[j]);
            for (int64_t j = 0; j < n; ++j) to[j] = static_cast<T>(kept[j]);
          }
      });
    });
  });
}

}  // namespace cpu
}  // namespace qlab
