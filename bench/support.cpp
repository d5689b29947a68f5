#include "bench/support.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <optional>
#include <random>

#include "bench/ceilings.h"
#include "core/ops/copy.h"

namespace qlab::bench {
namespace {

bool failed = false;

std::multimap<int, std::function<void()>>& registrations() {
  static std::multimap<int, std::function<void()>> all;
  return all;
}

double median_of(std::vector<double> values) {
  QLAB_CHECK(!values.empty(), "no sample was taken");
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

/// The median absolute deviation from `middle`.
double deviation_percent(std::vector<double> values, double middle) {
  for (double& value : values) value = std::abs(value - middle);
  return 100 * median_of(std::move(values)) / middle;
}

double host_seconds(Device device, const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  synchronize(device);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

StepPlan plan_of(const Case& c) {
  PlanRecorder recorder;
  c.dry();
  return recorder.finish();
}

/// Fills the memory that a call will be served from, so that stale results are none.
void poison_plan(StepMemory& memory, const StepPlan& plan, Device device) {
  const StepMemory::Scope scope(memory, plan);
  for (const StepPlan::Block& block : plan.blocks)
    poison(Tensor::empty({block.bytes}, DType::u8, device));
}

/// Runs calls of a case in their planned memory, counting on through its inputs.
class Caller {
 public:
  explicit Caller(const Case& c) : case_(c), plan_(plan_of(c)) {
    const int count = c.rotate_results
                          ? std::min(c.inputs, copies(c.device, static_cast<double>(plan_.bytes)))
                          : 1;
    for (int i = 0; i < count; ++i) memories_.emplace_back(c.device).reserve(plan_);
  }

  void check() {
    poison_plan(memories_.front(), plan_, case_.device);
    const std::vector<Tensor> results = call(0);
    synchronize(case_.device);
    if (!case_.check) return;
    const std::string wrong = case_.check(results);
    if (!wrong.empty()) fail("wrong result: {}", wrong);
  }

  void run(int calls) {
    for (int i = 0; i < calls; ++i) call(next_++ % case_.inputs);
  }

 private:
  std::vector<Tensor> call(int i) {
    if (case_.clock == Clock::host) return case_.call(i);
    const StepMemory::Scope scope(memories_[static_cast<size_t>(i) % memories_.size()], plan_);
    return case_.call(i);
  }

  const Case& case_;
  StepPlan plan_;
  std::deque<StepMemory> memories_;
  int next_ = 0;
};

constexpr double most_copies = 4096;

/// Calls per graph: a sample's time of them, or a walk through all inputs where that takes at most
/// 10 ms.
int calls_per_sample(const Case& c, double seconds) {
  const double walk = std::min<double>(c.inputs, 10e-3 / seconds);
  return static_cast<int>(std::clamp(std::max(c.sample_seconds / seconds, walk), 1.0, most_copies));
}

void report(benchmark::State& state, const Case& c, const Timing& timing) {
  const double seconds = timing.median();
  state.counters["us"] = seconds * 1e6;
  state.counters["noise_percent"] = timing.noise_percent();
  if (c.beside) {
    std::vector<double> ratios;
    for (size_t i = 0; i < timing.seconds.size(); ++i)
      ratios.push_back(timing.seconds[i] / timing.beside_seconds[i]);
    state.counters["beside_us"] = median_of(timing.beside_seconds) * 1e6;
    const double middle = median_of(ratios);
    state.counters["over_beside"] = middle;
    state.counters["over_beside_noise_percent"] = deviation_percent(ratios, middle);
  }
  if (c.bytes > 0) {
    state.counters["GB/s"] = c.bytes / seconds * 1e-9;
    state.counters["copy_percent"] = 100 * c.bytes / seconds / ceilings(c.device).copy;
  }
  for (const auto& [figure, value] : c.figures) state.counters[figure] = value;
  if (c.flops > 0) {
    state.counters["TFLOP/s"] = c.flops / seconds * 1e-12;
    state.counters["product_percent"] = 100 * c.flops / seconds / ceilings(c.device).product;
  }
}

/// QLAB_BENCH_SECONDS: a benchmark that would begin later is left out.
bool time_is_up() {
  static const auto start = std::chrono::steady_clock::now();
  static const double limit = seconds_allowed();
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  return elapsed.count() > limit;
}

void run(benchmark::State& state, Device device, const std::function<Case()>& make) {
  if (time_is_up()) return state.SkipWithError("left out: QLAB_BENCH_SECONDS have passed");
  try {
    ceilings(device);
    const Case c = make();
    if (!c.left_out.empty()) return state.SkipWithError(("left out: " + c.left_out).c_str());
    report(state, c,
           time_calls(
               c, [&] { return state.KeepRunning(); },
               [&](double seconds) { state.SetIterationTime(seconds); }));
  } catch (const std::exception& error) {  // of a kernel that somebody added, too
    failed = true;
    state.SkipWithError(error.what());
  }
}

}  // namespace

double seconds_allowed() {
  const char* const text = std::getenv("QLAB_BENCH_SECONDS");
  if (text == nullptr || *text == 0) return std::numeric_limits<double>::infinity();
  char* end = nullptr;
  const double seconds = std::strtod(text, &end);
  if (*end != 0 || !(seconds > 0))
    fail("QLAB_BENCH_SECONDS is a number of seconds above 0: got \"{}\"", text);
  return seconds;
}

std::vector<Device> devices() {
  std::vector<Device> all{Device::cpu()};
  if (cuda::device_count() > 0) all.push_back(Device::cuda());
  return all;
}

std::string name(Device device, const std::string& rest) {
  return (device.is_cuda() ? "cuda/" : "cpu/") + rest;
}

DType compute_dtype(Device device) {
  if (!device.is_cuda()) return DType::f32;
  return cuda::supports_bf16(device.index) ? DType::bf16 : DType::f16;
}

Tensor random(const Shape& shape, DType dtype, Device device, float scale) {
  constexpr int64_t period = 1000003;  // a prime: no two rows begin at the same value
  static const std::vector<float> distinct = [] {
    std::vector<float> values(period);
    std::mt19937 generator(1);
    std::normal_distribution<float> normal;
    for (float& value : values) value = normal(generator);
    return values;
  }();
  const int64_t n = shape.numel(), first = std::min(n, period);
  const Tensor x = Tensor::empty({n}, dtype, device);
  dispatch(CudaFloats{}, dtype, "random", [&]<class T>() {
    std::vector<T> values(static_cast<size_t>(first));
    for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<T>(distinct[i] * scale);
    copy(x.slice_rows(0, first), Tensor::from_vector(values, {first}, Device::cpu()));
    synchronize(device);
  });
  for (int64_t filled = first; filled < n;) {
    const int64_t part = std::min(filled, n - filled);
    copy(x.slice_rows(filled, filled + part), x.slice_rows(0, part));
    filled += part;
  }
  return x.view(shape);
}

Tensor random_integers(int64_t n, int32_t below, Device device) {
  std::mt19937 generator(2);
  std::vector<int32_t> values(static_cast<size_t>(n));
  for (int32_t& value : values)
    value = static_cast<int32_t>(generator() % static_cast<uint32_t>(below));
  const Tensor x = Tensor::from_vector(values, {n}, Device::cpu()).to(device);
  synchronize(device);
  return x;
}

void poison(const Tensor& x) {
  const int64_t n = x.bytes(), first = std::min<int64_t>(n, 1 << 20);
  const std::vector<uint8_t> ones(static_cast<size_t>(first), 0xff);
  char* const begin = static_cast<char*>(x.raw());
  const auto move = [&](char* to, const void* from, int64_t bytes) {
    on_device(
        x.device(), [&] { std::memcpy(to, from, static_cast<size_t>(bytes)); },
        [&] { cuda::copy_async(to, from, static_cast<size_t>(bytes)); });
  };
  move(begin, ones.data(), first);
  for (int64_t filled = first; filled < n; filled *= 2)
    move(begin + filled, begin, std::min(filled, n - filled));
  synchronize(x.device());
}

int copies(Device device, double bytes) {
  const double cache = device.is_cuda() ? 128e6 : 64e6;  // bytes: L2s have up to 126e6
  return static_cast<int>(std::clamp(std::ceil(cache / std::max(bytes, 1.0)), 1.0, most_copies));
}

Tensor on_host(const Tensor& x) {
  const Tensor host = Tensor::empty(x.shape(), x.dtype(), Device::cpu());
  copy(host, x);
  synchronize(x.device());
  return cast(host, DType::f32);
}

namespace {

template <class Do>
Nf4Tensor with_each_tensor(const Nf4Tensor& x, const Do& make) {
  Nf4Tensor y = x;
  for (Tensor* part : {&y.codes, &y.absmax, &y.absmax_code, &y.absmax2, &y.offset, &y.map})
    if (part->defined()) *part = make(*part);
  synchronize(x.codes.device());
  return y;
}

}  // namespace

Nf4Tensor on_host(const Nf4Tensor& x) {
  return with_each_tensor(x, [](const Tensor& part) { return part.to(Device::cpu()); });
}

Nf4Tensor copy_of(const Nf4Tensor& x) {
  Nf4Tensor y = with_each_tensor(x, [](const Tensor& part) { return part.clone(); });
  y.map = x.map;
  return y;
}

std::string difference(const std::string& what, const Tensor& got, const Tensor& want,
                       double tolerance, double scale) {
  if (!(got.shape() == want.shape()))
    return fmt::format("{} has shape {} instead of {}", what, got.shape(), want.shape());
  const float* const a = got.data<float>();
  const float* const b = want.data<float>();
  const double n = static_cast<double>(std::max<int64_t>(1, want.numel()));
  double squares = 0, deviations = 0;
  for (int64_t i = 0; i < want.numel(); ++i) {
    squares += static_cast<double>(b[i]) * b[i];
    deviations += (static_cast<double>(a[i]) - b[i]) * (static_cast<double>(a[i]) - b[i]);
  }
  const double rms = std::sqrt(squares / n), deviation = std::sqrt(deviations / n);
  int64_t wrong = 0, first = 0;
  for (int64_t i = want.numel() - 1; i >= 0; --i) {
    const double bound =
        tolerance * (std::abs(static_cast<double>(b[i])) + (scale > 0 ? scale : rms));
    // NaN is within no bound.
    if (!(std::abs(static_cast<double>(a[i]) - b[i]) <= bound)) ++wrong, first = i;
  }
  if (wrong == 0 && deviation <= tolerance / 3 * rms) return "";
  if (wrong == 0)
    return fmt::format("{} is off by {:.3g} % of its values' rms, more than {:.3g} %", what,
                       100 * deviation / rms, 100 * tolerance / 3);
  return fmt::format("{}: {} of {} elements differ, the first is number {}: {} instead of {}", what,
                     wrong, want.numel(), first, a[first], b[first]);
}

// Half a unit in the last place, relative to the value and, where the weights were rounded to the
// dtype as well, to the sum: 2^-9 for bf16, at four and a half standard deviations.
double tolerance(DType dtype) { return dtype == DType::f32 ? 2e-5 : 0.015; }

double Timing::median() const { return median_of(seconds); }

double Timing::noise_percent() const { return deviation_percent(seconds, median()); }

namespace {

/// Checks a case and takes samples of its calls, one after another.
class Sampler {
 public:
  explicit Sampler(const Case& c) : case_(c), caller_(c) {
    caller_.check();
    if (by_host()) {
      once();
      return;
    }
    double one = std::numeric_limits<double>::infinity();
    for (int i = 0; i < 3; ++i) one = std::min(one, on_device([&] { caller_.run(1); }));
    calls_ = calls_per_sample(c, one);
    if (c.clock == Clock::stream) return;
    graph_.emplace([&] { caller_.run(calls_); });
    for (int i = 0; i < 2; ++i) next();
  }

  /// Seconds of a call.
  double next() {
    if (by_host()) return once();
    return on_device([&] {
             if (graph_)
               graph_->launch();
             else
               caller_.run(calls_);
           }) /
           calls_;
  }

 private:
  bool by_host() const { return case_.clock == Clock::host || case_.device.is_cpu(); }
  double once() {
    return host_seconds(case_.device, [&] { caller_.run(1); });
  }
  double on_device(const std::function<void()>& work) {
    if (!stopwatch_) stopwatch_.emplace();
    stopwatch_->start();
    work();
    return stopwatch_->seconds();
  }

  const Case& case_;
  Caller caller_;
  int calls_ = 1;
  std::optional<cuda::Stopwatch> stopwatch_;
  std::optional<cuda::Graph> graph_;
};

}  // namespace

Timing time_calls(const Case& c, const std::function<bool()>& more,
                  const std::function<void(double)>& sample) {
  Sampler own(c);
  std::optional<Sampler> beside;
  if (c.beside) beside.emplace(*c.beside);
  Timing timing;
  while (more()) {
    if (beside) timing.beside_seconds.push_back(beside->next());
    timing.seconds.push_back(own.next());
    sample(timing.seconds.back());
  }
  return timing;
}

void add(Device device, const std::string& name, std::function<Case()> make) {
  benchmark::RegisterBenchmark(
      bench::name(device, name).c_str(),
      [device, make = std::move(make)](benchmark::State& state) { run(state, device, make); })
      ->UseManualTime()
      ->Iterations(device.is_cuda() ? 11 : 5);
}

bool any_failed() { return failed; }

Register::Register(int order, std::function<void()> function) {
  registrations().emplace(order, std::move(function));
}

void run_registered() {
  for (const auto& [order, function] : registrations()) function();
}

}  // namespace qlab::bench
