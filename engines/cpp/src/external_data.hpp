#pragma once
#include <set>
#include <string>
#include <string_view>

namespace coatrt::detail {

/// The files from which an ONNX model reads tensors, as it names them: ONNX Runtime opens whatever stands there.
/// Throws an Error for what is no protocol buffer.
std::set<std::string> external_data(std::string_view model);

}  // namespace coatrt::detail
