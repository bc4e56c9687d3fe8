#pragma once
#include <cstdint>
#include <string>

namespace coatrt::detail {

/// Throw unless `text` is a weight format in its canonical text form (nf3-g64-dq4-bf16-256).
void check_format(const std::string& text);

/// Bytes of an N × K matrix in a format that `check_format` let pass: codes, scales, paddings and constants.
std::int64_t format_bytes(const std::string& text, std::int64_t N, std::int64_t K);

}  // namespace coatrt::detail
