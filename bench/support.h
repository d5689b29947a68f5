// What the benchmarks share. A benchmark is a Case: its calls are checked against a reference, then
// timed on the device, walking over enough copies of their inputs that none is found in a cache, in
// memory planned as a training step's is. Rates are set beside the ceilings that the same program
// measures first. Names: device/operation/.../implementation.
#pragma once
#include <benchmark/benchmark.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "core/memory.h"
#include "core/tensor.h"
#include "quant/quantize.h"

namespace qlab::bench {

/// Of QLAB_BENCH_SECONDS; without end where it is not set. Throws where it is no positive number.
double seconds_allowed();

/// The CPU, and the first GPU where there is one. Choose with --benchmark_filter=^cuda.
std::vector<Device> devices();
/// "cuda/linear/forward": the beginning of a benchmark's name.
std::string name(Device device, const std::string& rest);
/// What the device computes in by default: bf16 on a GPU, fp32 on the CPU.
DType compute_dtype(Device device);

/// Normal values times `scale`: a million of them, repeated.
Tensor random(const Shape& shape, DType dtype, Device device, float scale = 1.0f);
Tensor random_integers(int64_t n, int32_t below, Device device);
/// Every byte 0xff: NaN, for outputs that a kernel might leave unwritten.
void poison(const Tensor& x);
/// Copies of an input of this size that together exceed the caches, 4096 at most.
int copies(Device device, double bytes);

/// fp32 on the CPU; of a GPU tensor too, contiguous or not.
Tensor on_host(const Tensor& x);
/// As it is stored, on the CPU; and another one, of which only the map is shared.
Nf4Tensor on_host(const Nf4Tensor& x);
Nf4Tensor copy_of(const Nf4Tensor& x);
/// "" when every element lies within tolerance (|want| + scale), and their rms difference within a
/// third of tolerance rms(want); otherwise what differs. Both fp32 on the CPU. The scale is that
/// rms unless given: some values are small sums of large terms.
std::string difference(const std::string& what, const Tensor& got, const Tensor& want,
                       double tolerance, double scale = 0);
/// The tolerance for results rounded to `dtype` after sums in fp32.
double tolerance(DType dtype);

/// How a Case is timed on a GPU. graph: many calls in one CUDA graph. stream: one by one. host: for
/// calls that wait for the device, by the host's clock and without planned memory.
enum class Clock : uint8_t { graph, stream, host };

struct Case {
  Device device;
  /// One call on meta tensors: the memory of a call is planned from it.
  std::function<void()> dry = [] {};
  /// Call with copy i of the inputs, 0 <= i < inputs.
  std::function<std::vector<Tensor>(int i)> call = {};
  int inputs = 1;
  /// Whether calls also walk over copies of the planned memory, that is of their results.
  bool rotate_results = false;
  /// Given the results of call(0): "" or what is wrong with them.
  std::function<std::string(const std::vector<Tensor>& results)> check = {};
  double bytes = 0, flops = 0;  // of one call, read and written; 0: no rate is reported
  Clock clock = Clock::graph;
  /// Of one sample's calls, at least. Where it matters that a GPU at its power limit slows down,
  /// as training makes it, samples are long.
  double sample_seconds = 2e-3;
  /// What else is reported, by name.
  std::map<std::string, double> figures = {};
  /// Why there is nothing to measure, where there is not.
  std::string left_out = {};
  /// What it is set beside, where a ratio of two benchmarks would be that of two states of a GPU
  /// whose power is limited: their samples take turns.
  std::shared_ptr<const Case> beside = {};
};

struct Timing {
  std::vector<double> seconds;         // of one call, sample by sample
  std::vector<double> beside_seconds;  // of Case::beside, each right before
  double median() const;
  double noise_percent() const;  // median absolute deviation
};

/// Checks, then times while `more` wants another sample, whose seconds `sample` is told. Throws
/// Error with the check's text when the results are wrong.
Timing time_calls(const Case& c, const std::function<bool()>& more,
                  const std::function<void(double)>& sample);

/// Adds benchmark `name`, "operation/.../implementation". `make` builds the case, and with it the
/// inputs, when the benchmark runs. A result that fails its check is the benchmark's error, and the
/// program then ends with 1.
void add(Device device, const std::string& name, std::function<Case()> make);
/// Whether a benchmark ended with an error.
bool any_failed();

/// Runs at the start of main, after every file has registered what it offers. Lower orders first.
struct Register {
  Register(int order, std::function<void()> function);
};
void run_registered();

}  // namespace qlab::bench
