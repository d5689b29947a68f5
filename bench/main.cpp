// qlab-bench: Google Benchmark with its standard flags, such as --benchmark_filter=REGEX,
// --benchmark_list_tests and --benchmark_out=FILE. Ends with 1 when a result was wrong. Where
// QLAB_BENCH_SECONDS is set, benchmarks that would begin later are left out.
#include <cstdio>

#include "bench/support.h"
#include "generated/version.h"

int main(int argc, char** argv) {
  using namespace qlab;
  std::string flags;
  for (int i = 1; i < argc; ++i) flags += (i > 1 ? " " : "") + std::string(argv[i]);
  try {
    for (const Device device : bench::devices())
      benchmark::AddCustomContext(bench::name(device, "device"), device_description(device));
    benchmark::AddCustomContext("qlab_commit", std::string(git_commit));
    benchmark::AddCustomContext("cuda", std::string(cuda_version));
    benchmark::AddCustomContext("flags", flags);
    bench::run_registered();
    benchmark::Initialize(&argc, argv);
    if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
    benchmark::RunSpecifiedBenchmarks();
    benchmark::Shutdown();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "qlab-bench: %s\n", error.what());
    return 2;
  }
  return bench::any_failed() ? 1 : 0;
}
