#include "experiments/yaml_input.h"

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <string_view>

#include "core/error.h"

namespace qlab {
namespace fs = std::filesystem;

namespace {

/// What is wrong at the line where the parser stopped; its own words are of whatever that broke.
std::string mistake(const std::string& file, const YAML::Exception& e) {
  std::ifstream in(file);
  std::string line;
  for (int i = 0; i <= e.mark.line; ++i) std::getline(in, line);
  if (line.substr(0, line.find_first_not_of(" \t")).find('\t') != line.npos)
    return "a tab indents this line; YAML takes spaces alone there";
  if (e.msg == YAML::ErrorMsg::MAP_VALUE)
    return "not valid YAML: no key can stand here; see that the line begins below its neighbours, "
           "that the one above has its colon, and that each key has a line of its own";
  return "not valid YAML: " + e.msg;
}

}  // namespace

YAML::Node load_yaml(const std::string& file) {
  if (fs::is_directory(file)) fail("{}: is a directory, expected a YAML file", file);
  if (!fs::exists(file)) fail("{}: no such file", file);
  std::vector<YAML::Node> documents;
  try {
    documents = YAML::LoadAllFromFile(file);
  } catch (const YAML::BadFile&) {
    fail("{}: cannot be read", file);
  } catch (const YAML::Exception& e) {
    fail("{}:{}: {}", file, e.mark.line + 1, mistake(file, e));
  }
  if (documents.empty() || (documents.size() == 1 && documents[0].IsNull())) {
    fail("{}: the file is empty", file);
  }
  if (documents.size() > 1) {
    fail("{}: a second document begins after \"---\"; put each in a file of its own",
         place(file, documents[1]));
  }
  const YAML::Node document = documents[0];
  if (!document.IsMap()) fail("{}: expected keys and values, got {}", file, describe(document));
  return document;
}

std::vector<YamlItem> map_items(const YAML::Node& map, const std::string& file) {
  std::vector<YamlItem> items;
  for (const auto& pair : map) {
    const std::string where = place(file, pair.first);
    if (!pair.first.IsScalar()) {
      fail("{}: a key must be plain text, got {}", where, describe(pair.first));
    }
    const std::string key = pair.first.Scalar();
    for (const YamlItem& item : items) {
      if (item.key == key) fail("{}: \"{}\" stands twice, first at {}", where, key, item.where);
    }
    items.push_back({key, pair.second, where});
  }
  return items;
}

std::string place(const std::string& file, const YAML::Node& node) {
  const int line = node.Mark().line;
  if (line < 0 || file.starts_with("--")) return file;
  return fmt::format("{}:{}", file, line + 1);
}

std::string describe(const YAML::Node& node) {
  if (node.IsScalar()) return fmt::format("\"{}\"", node.Scalar());
  if (node.IsSequence()) return "a list";
  return node.IsMap() ? "a block" : "nothing";
}

std::optional<double> parse_number(const std::string& text) {
  double x = 0;
  const char* end = text.data() + text.size();
  const auto [stop, status] = std::from_chars(text.data(), end, x);
  if (status != std::errc() || stop != end || !std::isfinite(x)) return std::nullopt;
  return x;
}

std::optional<int64_t> parse_whole(const std::string& text) {
  int64_t n = 0;
  const char* end = text.data() + text.size();
  const auto [stop, status] = std::from_chars(text.data(), end, n);
  if (status == std::errc() && stop == end) return n;
  const std::optional<double> x = parse_number(text);  // 1e3
  if (!x || *x != std::trunc(*x) || std::abs(*x) > 0x1p53) return std::nullopt;
  return static_cast<int64_t>(*x);
}

std::optional<bool> parse_bool(const std::string& text) {
  if (text == "true" || text == "True" || text == "TRUE") return true;
  if (text == "false" || text == "False" || text == "FALSE") return false;
  return std::nullopt;
}

std::pair<std::string, std::string> split_option(const std::string& option) {
  const size_t equals = option.find('=');
  if (equals == std::string::npos || equals == 0) {
    fail("--set {}: expected key=value, for example --set lora.r=8", option);
  }
  return {option.substr(0, equals), option.substr(equals + 1)};
}

YAML::Node option_value(const std::string& text) {
  try {
    return YAML::Load(text);
  } catch (const YAML::Exception&) {
    return YAML::Node(text);
  }
}

std::string yaml_text(const std::string& text) {
  const bool plain = std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return std::isalnum(c) ||
           std::string_view("_./-()").find(static_cast<char>(c)) != std::string_view::npos;
  });
  if (plain && std::isalpha(static_cast<unsigned char>(text[0])) && text != "null") return text;
  YAML::Emitter out;
  out << YAML::DoubleQuoted << text;
  return out.c_str();
}

std::string beside(const std::string& path, const std::string& file) {
  if (path.empty() || fs::path(path).is_absolute() || fs::exists(path)) return path;
  const fs::path other = (fs::path(file).parent_path() / path).lexically_normal();
  return fs::exists(other) ? other.string() : path;
}

}  // namespace qlab
