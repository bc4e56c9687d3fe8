#pragma once
#include <string>

namespace coatrt::detail {

/// Throw unless `text` is a weight format in its canonical text form (nf3-g64-dq4-bf16-256).
void check_format(const std::string& text);

}  // namespace coatrt::detail
