// What the benchmarks share. Timed calls take their memory from a planned step, as in training, and
// walk over enough copies of their inputs that none is found in a cache.
#pragma once
#include <benchmark/benchmark.h>

#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "core/memory.h"
#include "core/tensor.h"

namespace qlab::bench {

/// The CPU, and the first GPU where there is one. Choose with --benchmark_filter=cuda.
inline std::vector<Device> devices() {
  std::vector<Device> all{Device::cpu()};
  if (cuda::device_count() > 0) all.push_back(Device::cuda());
  return all;
}

inline std::string name(const Device& device) { return device.is_cuda() ? "cuda" : "cpu"; }

/// Normal values; a million of them, repeated.
inline Tensor random(const Shape& shape, DType dtype, Device device) {
  std::vector<float> distinct(1 << 20);
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  for (float& value : distinct) value = normal(generator);
  const auto fill = [&]<class T>() {
    std::vector<T> values(static_cast<size_t>(shape.numel()));
    for (size_t i = 0; i < values.size(); ++i)
      values[i] = static_cast<T>(distinct[i % distinct.size()]);
    return Tensor::from_vector(values, shape, device);
  };
  return dtype == DType::f32 ? fill.template operator()<float>() : fill.template operator()<bf16>();
}

/// Copies that together exceed the caches: at least 256 MB on a GPU, 64 MB on a CPU.
inline int copies(Device device, int64_t bytes) {
  const int64_t cache = device.is_cuda() ? 256 << 20 : 64 << 20;
  return static_cast<int>(std::clamp<int64_t>(cache / std::max<int64_t>(bytes, 1), 1, 16));
}

/// One timed step is `calls` calls, numbered on, and one synchronization. `dry` is a call on meta
/// tensors, from which the memory of a call is planned.
inline void measure(benchmark::State& state, Device device, const std::function<void()>& dry,
                    const std::function<void(int)>& call) {
  StepPlan plan;
  {
    PlanRecorder recorder;
    dry();
    plan = recorder.finish();
  }
  StepMemory memory(device);
  memory.reserve(plan);
  const int calls = device.is_cuda() ? 32 : 1;
  int number = 0;
  const auto step = [&] {
    for (int i = 0; i < calls; ++i) {
      const StepMemory::Scope scope(memory, plan);
      call(number++);
    }
    synchronize(device);
  };
  step();
  for (auto _ : state) step();
  state.counters["calls"] = calls;
}

/// `amount` per call, as a rate with the unit's name: "GB/s", "TFLOP/s".
inline void report(benchmark::State& state, const char* unit, double amount) {
  const double calls = static_cast<double>(state.iterations()) * state.counters["calls"];
  state.counters[unit] = benchmark::Counter(amount * calls, benchmark::Counter::kIsRate);
  state.counters["time of a call"] =
      benchmark::Counter(calls, benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
}

}  // namespace qlab::bench
