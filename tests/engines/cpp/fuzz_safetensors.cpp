// libFuzzer: a safetensors file, and the walk over a graph. Every tensor that is handed out can be read to its end.
#include <cstdint>
#include <string_view>

#include "coatrt/error.hpp"
#include "contract.hpp"
#include "external_data.hpp"
#include "json.hpp"
#include "safetensors.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view file(reinterpret_cast<const char*>(data), size);
  volatile unsigned sum = 0;
  try {
    const auto read = coatrt::detail::read_safetensors(file);
    for (const auto& [name, tensor] : read.tensors)
      for (const char byte : tensor.bytes) sum = sum + static_cast<unsigned char>(byte);
  } catch (const coatrt::Error&) {
  }
  try {
    coatrt::detail::external_data(file);
  } catch (const coatrt::Error&) {
  }
  try {  // the same bytes as the JSON of the other readers
    const auto value = coatrt::detail::parse_json(file, "file", "x");
    try {
      coatrt::detail::Contract::from_json(value);
    } catch (const coatrt::Error&) {
    }
    coatrt::detail::DecoderIO::from_json(value);
  } catch (const coatrt::Error&) {
  }
  return 0;
}
