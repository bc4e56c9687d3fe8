#pragma once
#include <string>
#include <vector>

#include "coatrt/bundle.hpp"
#include "json.hpp"

namespace coatrt::detail {

/// Resolve {"matrices": …, "patterns": …, "default": …} for the matrices of a model: exact name beats first matching
/// pattern, in the file's order, beats default.
Configuration resolve(std::string_view text, const std::string& source, const std::vector<std::string>& matrices);

}  // namespace coatrt::detail
