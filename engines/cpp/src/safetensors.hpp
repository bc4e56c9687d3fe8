#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace coatrt::detail {

/// One tensor of a safetensors file; `bytes` views the file.
struct StoredTensor {
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::string_view bytes;
};

/// Read a safetensors file from memory: the header is bounded, dtype·shape = bytes of every tensor, and the tensors
/// cover the data with no hole and no overlap. Throws `Error` with the reason alone.
std::map<std::string, StoredTensor> read_safetensors(std::string_view file);

}  // namespace coatrt::detail
