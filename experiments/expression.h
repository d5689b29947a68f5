// Small arithmetic and conditions over configuration keys, for a sweep's derived and exclude:
//   2 * lora.r      round(0.03 * train.steps)      quant.type == bf16 && quant.double_quant
// Numbers, true, false, text (quoted, or a bare word, and only beside a key), keys and aliases;
// ( ) ! - * / % + < <= > >= == != && ||; min max sqrt round floor ceil.
#pragma once
#include <string>
#include <variant>

#include "experiments/config.h"

namespace qlab {

using Value = std::variant<double, bool, std::string>;

/// `config` is resolved; `origin` begins every error.
Value evaluate(const std::string& expression, const Config& config, const std::string& origin);
/// The same where a condition is expected.
bool evaluate_condition(const std::string& expression, const Config& config,
                        const std::string& origin);

}  // namespace qlab
