#include "core/ops/swiglu.h"

#include "core/lanes.h"
#include "core/parallel.h"

namespace qlab {
namespace {

void check_pair(const char* op, const char* name, const Tensor& gate, const Tensor& other) {
  check_shape(op, name, other, gate.shape());
  QLAB_CHECK(gate.contiguous() && other.contiguous(),
             "[{}] gate and {} must be contiguous, got {} and {}", op, name, gate.str(),
             other.str());
  QLAB_CHECK(gate.dtype() == other.dtype(), "[{}] gate and {} must have one dtype, got {} and {}",
             op, name, gate.str(), other.str());
  check_device(op, gate, other);
}

}  // namespace

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  check_pair("swiglu", "up", gate, up);
  const Tensor y = Tensor::empty(gate.shape(), gate.dtype(), gate.device());
  if (y.numel() == 0) return y;
  on_device(
      y.device(), [&] { cpu::swiglu(y, gate, up); }, [&] { cuda::swiglu(y, gate, up); });
  return y;
}

SwigluGradient swiglu_backward(const Tensor& g, const Tensor& gate, const Tensor& up) {
  check_pair("swiglu_backward", "up", gate, up);
  check_pair("swiglu_backward", "g", gate, g);
  SwigluGradient out{Tensor::empty(gate.shape(), gate.dtype(), gate.device()),
                     Tensor::empty(gate.shape(), gate.dtype(), gate.device())};
  if (gate.numel() == 0) return out;
  on_device(
      gate.device(), [&] { cpu::swiglu_backward(out.dgate, out.dup, g, gate, up); },
      [&] { cuda::swiglu_backward(out.dgate, out.dup, g, gate, up); });
  return out;
}

namespace cpu {
namespace {

constexpr int64_t grain = 1 << 13;

template <class L>
QLAB_INLINE inline L sigmoid(const L& z) {
  return L::all(1) / (L::all(1) + exp(L::all(0) - z));
}

}  // namespace

void swiglu(const Tensor& y, const Tensor& gate, const Tensor& up) {
  dispatch(CpuFloats{}, y.dtype(), "swiglu", [&]<class T>() {
    T* out = y.data<T>();
    const T *z = gate.data<T>(), *u = up.data<T>();
    parallel_for(y.numel(), grain, [=](int64_t begin, int64_t end) {
      vectorized([&]<int width>() QLAB_INLINE {
        using L = Lanes<accumulate_t<T>, width>;
        for (int64_t i = begin; i < end; i += 16) {
          const int64_t n = end - i;
          const L zi = L::load(z + i, n);
          (zi / (L::all(1) + exp(L::all(0) - zi)) * L::load(u + i, n)).store(out + i, n);
        }
      });
    });
  });
}

void swiglu_backward(const Tensor& dgate, const Tensor& dup, const Tensor& g, const Tensor& gate,
                     const Tensor& up) {
  dispatch(CpuFloats{}, gate.dtype(), "swiglu_backward", [&]<class T>() {
    T *dz = dgate.data<T>(), *du = dup.data<T>();
    const T *grad = g.data<T>(), *z = gate.data<T>(), *u = up.data<T>();
    parallel_for(gate.numel(), grain, [=](int64_t begin, int64_t end) {
      vectorized([&]<int width>() QLAB_INLINE {
        using L = Lanes<accumulate_t<T>, width>;
        for (int64_t i = begin; i < end; i += 16) {
          const int64_t n = end - i;
          const L gi = L::load(grad + i, n), zi = L::load(z + i, n), s = sigmoid(zi);
          (gi * L::load(u + i, n) * (s + zi * s * (L::all(1) - s))).store(dz + i, n);
          (gi * (zi * s)).store(du + i, n);
        }
      });
    });
  });
}

}  // namespace cpu
}  // namespace qlab
