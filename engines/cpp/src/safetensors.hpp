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

/// Key of the configuration's hash in the metadata of a LoRA file, as Python writes it.
constexpr const char* kConfiguration = "configuration";

struct SafetensorsFile {
  std::map<std::string, StoredTensor> tensors;
  std::map<std::string, std::string> metadata;
};

/// Read a safetensors file from memory: the header is bounded, dtype·shape = bytes of every tensor, and the tensors
/// cover the data with no hole and no overlap. Throws `Error` with the reason alone.
SafetensorsFile read_safetensors(std::string_view file);

}  // namespace coatrt::detail
