// JSON from files that others wrote: errors name the place, duplicate keys are refused.
#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace qlab {

/// `where` opens every error message: a path, or "path:line".
nlohmann::json parse_json(std::string_view text, const std::string& where);
nlohmann::json read_json_file(const std::string& path);

}  // namespace qlab
