#pragma once
#include <set>
#include <string>
#include <string_view>

namespace coatrt::detail {

/// The files from which an ONNX model reads tensors, as the model names them: ONNX Runtime opens any path.
/// Throws where the bytes are not a protocol buffer.
std::set<std::string> external_data(std::string_view model);

}  // namespace coatrt::detail
