#include "experiments/expression.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <string_view>
#include <vector>

#include "core/error.h"
#include "experiments/config_fields.h"

namespace qlab {
namespace {

/// A value and, for messages and checks, the key it was read from; of a whole side of a
/// comparison also how it is spelt: alpha/r is a number, and a value of lora.scaling.
struct Operand {
  Value value;
  const Field* field = nullptr;
  std::string_view spelt = {};
};

std::string show(const Value& value) {
  if (const auto* x = std::get_if<double>(&value)) return shortest(*x);
  if (const auto* b = std::get_if<bool>(&value)) return *b ? "true" : "false";
  return "\"" + std::get<std::string>(value) + "\"";
}

bool is_word(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

/// The one value of a key that is neither a plain word nor an expression.
constexpr std::string_view kAllLinear = "all-linear";

/// Recursive descent that evaluates as it reads.
class Evaluator {
 public:
  Evaluator(std::string_view text, const Config& config, const std::string& origin)
      : text_(text), config_(config), origin_(origin) {}

  Value run() {
    Operand result = any_of();
    skip_space();
    if (at_ < text_.size()) stop(fmt::format("unexpected \"{}\"", text_.substr(at_)));
    return result.value;
  }

 private:
  [[noreturn]] void stop(const std::string& what) const {
    fail("{}: in \"{}\": {}", origin_, text_, what);
  }

  void skip_space() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
  }

  bool take(std::string_view symbol) {
    skip_space();
    if (!text_.substr(at_).starts_with(symbol)) return false;
    at_ += symbol.size();
    return true;
  }

  double number(const Operand& operand) const {
    if (const auto* x = std::get_if<double>(&operand.value)) return *x;
    stop(fmt::format("{} is not a number", show(operand.value)));
  }

  bool truth(const Operand& operand) const {
    if (const auto* b = std::get_if<bool>(&operand.value)) return *b;
    stop(fmt::format("{} is neither true nor false", show(operand.value)));
  }

  Operand any_of() {
    Operand left = all_of();
    while (take("||")) {
      const Operand right = all_of();
      left = {truth(left) || truth(right)};
    }
    return left;
  }

  Operand all_of() {
    Operand left = comparison();
    while (take("&&")) {
      const Operand right = comparison();
      left = {truth(left) && truth(right)};
    }
    return left;
  }

  Operand comparison() {
    const Operand left = side();
    for (const std::string_view op : {"==", "!=", "<=", ">=", "<", ">"}) {
      if (!take(op)) continue;
      const Operand right = side();
      if (op == "==") return {equal(left, right)};
      if (op == "!=") return {!equal(left, right)};
      const double a = number(left), b = number(right);
      return {op == "<=" ? a <= b : op == ">=" ? a >= b : op == "<" ? a < b : a > b};
    }
    return left;
  }

  Operand side() {
    skip_space();
    const size_t begin = at_;
    Operand operand = sum();
    operand.spelt = text_.substr(begin, at_ - begin);
    while (std::isspace(static_cast<unsigned char>(operand.spelt.back())))
      operand.spelt.remove_suffix(1);
    return operand;
  }

  bool equal(const Operand& a, const Operand& b) const {
    const Value left = meant(a, b), right = meant(b, a);
    if (left.index() != right.index()) {
      stop(fmt::format("{} and {} cannot be compared", show(left), show(right)));
    }
    if (const auto* text = std::get_if<std::string>(&left); text && !a.field && !b.field) {
      const std::string hint = suggest_key(*text);
      stop(fmt::format("neither {} nor {} is a key{}", show(left), show(right),
                       hint.starts_with(";") ? hint : suggest_key(std::get<std::string>(right))));
    }
    return left == right;
  }

  /// The value of one side; a word beside a key is read as that key's value, so that
  /// quant.type == bf61 is an error, and does not silently never hold.
  Value meant(const Operand& word, const Operand& key) const {
    if (word.field || !key.field || !std::holds_alternative<std::string>(key.value)) {
      return word.value;
    }
    const auto& allowed = key.field->allowed;
    const auto* text = std::get_if<std::string>(&word.value);
    if (!text) {
      const bool is_word = std::find(allowed.begin(), allowed.end(), word.spelt) != allowed.end();
      return is_word ? Value(std::string(word.spelt)) : word.value;
    }
    if (key.field->is_path) {  // which may have been found beside its file
      const std::string& path = std::get<std::string>(key.value);
      return !text->empty() && path.ends_with("/" + *text) ? path : *text;
    }
    return value_text(key.field->key, *text, fmt::format("{}: in \"{}\"", origin_, text_));
  }

  Operand sum() {
    Operand left = product();
    for (;;) {
      if (take("+")) {
        left = {number(left) + number(product())};
      } else if (take("-")) {
        left = {number(left) - number(product())};
      } else {
        return left;
      }
    }
  }

  Operand product() {
    Operand left = unary();
    for (;;) {
      if (take("*")) {
        left = {number(left) * number(unary())};
      } else if (take("/")) {
        left = {number(left) / nonzero(unary())};
      } else if (take("%")) {
        left = {std::fmod(number(left), nonzero(unary()))};
      } else {
        return left;
      }
    }
  }

  double nonzero(const Operand& operand) const {
    const double x = number(operand);
    if (x == 0) stop("division by zero");
    return x;
  }

  Operand unary() {
    if (++depth_ > 200) stop("too deeply nested");
    Operand result;
    if (take("-")) {
      result = {-number(unary())};
    } else if (take("!")) {
      result = {!truth(unary())};
    } else {
      result = primary();
    }
    --depth_;
    return result;
  }

  Operand primary() {
    if (take("(")) {
      Operand inner = any_of();
      if (!take(")")) stop("a \")\" is missing");
      return inner;
    }
    skip_space();
    if (at_ == text_.size()) stop("a value is missing at the end");
    const char c = text_[at_];
    if (c == '\'' || c == '"') return quoted(c);
    if (std::isdigit(static_cast<unsigned char>(c)) || c == '.') return literal();
    if (is_word(c)) return word();
    stop(fmt::format("expected a value at \"{}\"", text_.substr(at_)));
  }

  Operand quoted(char quote) {
    const size_t end = text_.find(quote, at_ + 1);
    if (end == std::string_view::npos) stop("a quote is not closed");
    const std::string inside(text_.substr(at_ + 1, end - at_ - 1));
    at_ = end + 1;
    return {inside};
  }

  Operand literal() {
    double x = 0;
    const char* begin = text_.data() + at_;
    const auto [end, status] = std::from_chars(begin, text_.data() + text_.size(), x);
    if (status != std::errc()) stop(fmt::format("\"{}\" is no number", text_.substr(at_)));
    at_ += static_cast<size_t>(end - begin);
    return {x};
  }

  Operand word() {
    const size_t begin = at_, end = at_ + kAllLinear.size();
    if (text_.substr(at_).starts_with(kAllLinear) &&
        (end == text_.size() || !(is_word(text_[end]) || text_[end] == '.'))) {
      at_ = end;
      return {std::string(kAllLinear)};
    }
    while (at_ < text_.size() && (is_word(text_[at_]) || text_[at_] == '.')) ++at_;
    const std::string name(text_.substr(begin, at_ - begin));
    if (take("(")) return call(name);
    if (name == "true" || name == "false") return {name == "true"};
    if (find_alias(name) == nullptr && name.find('.') == std::string::npos) return {name};
    return key(canonical_key(name, fmt::format("{}: in \"{}\"", origin_, text_)));
  }

  Operand key(const std::string& name) const {
    const Field* field = find_field(name);
    const FieldSlot slot = field->slot(const_cast<Config&>(config_));
    if (const auto* b = std::get_if<bool*>(&slot)) return {**b, field};
    const std::string text = field_text(*field, config_);
    if (std::holds_alternative<std::string*>(slot) || std::holds_alternative<Targets*>(slot)) {
      return {text, field};
    }
    if (std::holds_alternative<std::array<double, 2>*>(slot) ||
        std::holds_alternative<MemoryBudget*>(slot) || std::holds_alternative<LayerCount*>(slot))
      return {text, field};
    if (text.empty()) stop(fmt::format("{} has no value here", name));
    double x = 0;
    std::from_chars(text.data(), text.data() + text.size(), x);
    return {x, field};
  }

  Operand call(const std::string& name) {
    std::vector<double> arguments;
    do {
      arguments.push_back(number(any_of()));
    } while (take(","));
    if (!take(")")) stop("a \")\" is missing");
    if (name == "min") return {*std::min_element(arguments.begin(), arguments.end())};
    if (name == "max") return {*std::max_element(arguments.begin(), arguments.end())};
    if (arguments.size() != 1) stop(fmt::format("{} takes one value", name));
    const double x = arguments[0];
    if (name == "round") return {std::round(x)};
    if (name == "floor") return {std::floor(x)};
    if (name == "ceil") return {std::ceil(x)};
    if (name != "sqrt") {
      stop(fmt::format("unknown function \"{}\" (min, max, sqrt, round, floor, ceil)", name));
    }
    if (x < 0) stop(fmt::format("the square root of {} does not exist", shortest(x)));
    return {std::sqrt(x)};
  }

  std::string_view text_;
  const Config& config_;
  const std::string& origin_;
  size_t at_ = 0;
  int depth_ = 0;
};

}  // namespace

Value evaluate(const std::string& expression, const Config& config, const std::string& origin) {
  const Value value = Evaluator(expression, config, origin).run();
  if (const auto* x = std::get_if<double>(&value); x && !std::isfinite(*x)) {
    fail("{}: \"{}\" is not a finite number", origin, expression);
  }
  return value;
}

bool evaluate_condition(const std::string& expression, const Config& config,
                        const std::string& origin) {
  const Value value = evaluate(expression, config, origin);
  if (const auto* b = std::get_if<bool>(&value)) return *b;
  fail("{}: \"{}\" is {}, expected a condition", origin, expression, show(value));
}

}  // namespace qlab
