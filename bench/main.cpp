// qlab-bench: Google Benchmark with its standard flags, such as --benchmark_filter=REGEX,
// --benchmark_list_tests and --benchmark_out=FILE. Ends with 1 when a result was wrong, with 2 when
// a filter finds nothing. Where QLAB_BENCH_SECONDS is set, benchmarks that would begin later are
// left out.
#include <cstdio>
#include <string>

#include "bench/support.h"
#include "core/parallel.h"
#include "generated/version.h"

int main(int argc, char** argv) {
  using namespace qlab;
  wait_without_spinning(argv);
  std::string flags;
  for (int i = 1; i < argc; ++i) flags += (i > 1 ? " " : "") + std::string(argv[i]);
  try {
    bench::seconds_allowed();
    for (const Device device : bench::devices())
      benchmark::AddCustomContext(bench::name(device, "device"), device_description(device));
    benchmark::AddCustomContext("qlab_commit", std::string(git_commit));
    benchmark::AddCustomContext("cuda", std::string(cuda_version));
    benchmark::AddCustomContext("flags", flags);
    bench::run_registered();
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
    const size_t found = benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
    if (found == 0) return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "qlab-bench: %s\n", error.what());
    return 2;
  }
  return bench::any_failed() ? 1 : 0;
}
