// report.html, private to report.cpp; other pages share its style.
#pragma once
#include <string>

#include "experiments/report_data.h"

namespace qlab {

/// One page that opens offline. `chart_js` is the text of Chart.js 3 or 4; "" leaves out the charts
/// and says why.
std::string report_page(const Results& results, const std::string& chart_js);

// The page's own parts, in report_style.cpp, report_script.cpp and report_memory.cpp.
extern const char* const report_style;
extern const char* const report_body;
extern const char* const report_script;
extern const char* const report_memory_script;

}  // namespace qlab
