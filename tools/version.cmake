# Writes OUTPUT (version.h) when its content changes. Arguments: SOURCE, VERSION, COMPILER, CUDA.
set(commit "unknown")
execute_process(COMMAND git -C ${SOURCE} describe --always --abbrev=12 --dirty --exclude *
                OUTPUT_VARIABLE described ERROR_QUIET RESULT_VARIABLE failed
                OUTPUT_STRIP_TRAILING_WHITESPACE)
if(failed EQUAL 0)
  set(commit ${described})
endif()
set(text "#pragma once
#include <string_view>

namespace qlab {

inline constexpr std::string_view version = \"${VERSION}\";
inline constexpr std::string_view git_commit = \"${commit}\";
inline constexpr std::string_view compiler = \"${COMPILER}\";
inline constexpr std::string_view cuda_version = \"${CUDA}\";  // \"\" when built without

}  // namespace qlab
")
if(EXISTS ${OUTPUT})
  file(READ ${OUTPUT} present)
endif()
if(NOT "${present}" STREQUAL "${text}")
  file(WRITE ${OUTPUT} "${text}")
endif()
