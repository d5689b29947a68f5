// What qlab memory says about rates, limits and settings that no run has.
#include "experiments/cost_model.h"
#include "experiments/forecast.h"
#include "experiments/gpus.h"
#include "tests/support/command.h"

namespace qlab::test {
namespace {

using Json = nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

class MemoryAnswersTest : public CommandTest {
 protected:
  /// Of `target`, by default with LoRA.
  std::string text(const std::string& target, const Arguments& more) const {
    Arguments arguments = {"memory", target, "--set", "lora.r=4", "--set", "data.train=synthetic"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Ended ended = run(arguments);
    EXPECT_EQ(ended.code, 0) << ended.err;
    return ended.out;
  }
  Json json(const std::string& target, Arguments more) const {
    more.emplace_back("--json");
    return Json::parse(text(target, more));
  }
};

TEST_F(MemoryAnswersTest, BytesWithoutTheirUnitAreRefused) {
  const std::string hint = "did you mean 24GiB?";
  for (const char* option : {"--gpu", "--device-memory", "--host-memory"})
    expect_refused({"memory", "synthetic:tiny", option, "24"}, {option, "24", hint});
  expect_refused({"train", run_file(), "--device-memory", "24"}, {"--device-memory 24", hint});
  for (const char* key : {"train.memory_budget", "quant.resident"})
    expect_refused({"memory", "synthetic:tiny", "--set", std::string(key) + "=24"}, {key, hint});
  text("synthetic:tiny", {"--gpu", "25769803776", "--set", "quant.resident=0", "--host-memory", "0",
                          "--set", "train.memory_budget=24kB"});
}

}  // namespace
}  // namespace qlab::test
