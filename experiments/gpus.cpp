#include "experiments/gpus.h"

#include <algorithm>
#include <cctype>
#include <iterator>

#include "core/error.h"
#include "core/memory.h"

namespace qlab {
namespace {

struct Row {
  const char* name;
  int64_t mib;  // total memory in nvidia-smi
};
constexpr Row rows[] = {{"h100-80gb", 81559}, {"h200", 143771},   {"a100-40gb", 40960},
                        {"a100-80gb", 81920}, {"l40s", 46068},    {"l4", 23034},
                        {"a10g", 23028},      {"rtx3090", 24576}, {"rtx4090", 24564},
                        {"rtx5090", 32607},   {"t4", 15360}};

// What a CUDA context, the kernels' code and the libraries take has not been measured yet on any of
// them; this much is assumed.
constexpr int64_t assumed_context = int64_t{600} << 20;

}  // namespace

std::string known_gpus() {
  std::string names;
  for (const Row& row : rows) names += (names.empty() ? "" : ", ") + std::string(row.name);
  return names;
}

GpuSpec find_gpu(const std::string& text) {
  std::string name = text;
  std::transform(name.begin(), name.end(), name.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  const Row* row =
      std::find_if(std::begin(rows), std::end(rows), [&](const Row& r) { return name == r.name; });
  if (row != std::end(rows)) return {row->name, row->mib << 20, false, assumed_context};
  const auto bytes = parse_bytes(text);
  if (!bytes || *bytes == 0)
    fail("--gpu {}: unknown; known are {}, or give its memory, for example 24GiB", text,
         known_gpus());
  return {text, *bytes, false, assumed_context};
}

}  // namespace qlab
