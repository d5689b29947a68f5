// Reading YAML strictly: where a node stands, what it holds, and what it should.
#pragma once
#include <yaml-cpp/yaml.h>

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace qlab {

/// Reads a file as one YAML map; Error with the line when it is not.
YAML::Node load_yaml(const std::string& file);
struct YamlItem {
  std::string key;
  YAML::Node value;
  std::string where;  // file:line of the key
};
/// The pairs of a map in the order of the file; Error when a key stands twice.
std::vector<YamlItem> map_items(const YAML::Node& map, const std::string& file);
/// "file:line" of a node; the text `file` alone when the node has no line or file is an option.
std::string place(const std::string& file, const YAML::Node& node);
/// What a node holds, for errors: `"abc"`, "a list", "a block", "nothing".
std::string describe(const YAML::Node& node);

/// All of `text` as a finite number, a whole number, or true / false.
std::optional<double> parse_number(const std::string& text);
std::optional<int64_t> parse_whole(const std::string& text);
std::optional<bool> parse_bool(const std::string& text);

/// "key=value" taken apart; Error when there is no "=".
std::pair<std::string, std::string> split_option(const std::string& option);
/// The value of an option: YAML where it reads as YAML, otherwise the text itself.
YAML::Node option_value(const std::string& text);

/// `text` as a YAML scalar, quoted where it could be read as something else.
std::string yaml_text(const std::string& text);

/// `path` itself when it is absolute or exists; otherwise the one beside `file` when that exists.
std::string beside(const std::string& path, const std::string& file);

}  // namespace qlab
