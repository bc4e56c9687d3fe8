#include "packed_lora.hpp"

#include <algorithm>
#include <cstring>

#include "activations.hpp"
#include "coatrt/error.hpp"

namespace coatrt::detail {

void check_lora(const Contract& contract, const Lora& lora) {
  const auto& given = lora.tensors();
  const auto same = [](const LoraTensor& a, const Contract::Tensor& b) {
    return a.name == b.name && a.rows == b.rows && a.columns == b.columns;
  };
  if (!std::equal(given.begin(), given.end(), contract.tensors.begin(), contract.tensors.end(), same))
    throw Error("the LoRA and its contract differ: it belongs to another bundle's model; emit it again");
}

LoraLayout::LoraLayout(const Contract& contract, const std::string& activations, std::size_t itemsize)
    : activations_(activations), itemsize_(itemsize), places_(contract.places) {
  for (const auto& input : contract.inputs) {
    offsets_.push_back(bytes_);
    widths_.push_back(input.columns);
    bytes_ += aligned(static_cast<std::size_t>(input.rows * input.columns) * itemsize);
  }
}

void LoraLayout::fill(const Lora& lora, unsigned char* buffer) const {
  std::memset(buffer, 0, bytes_);
  for (std::size_t i = 0; i < places_.size(); ++i) {
    const LoraTensor& tensor = lora.tensors()[i];
    const Contract::Place& place = places_[i];
    const std::int64_t width = widths_[place.input];
    unsigned char* start = buffer + offsets_[place.input];
    if (tensor.columns == width) {  // the rows lie together
      start += static_cast<std::size_t>(place.row * width) * itemsize_;
      from_float32(activations_, tensor.data, static_cast<std::size_t>(tensor.rows * tensor.columns), start);
      continue;
    }
    for (std::int64_t row = 0; row < tensor.rows; ++row) {
      const auto at = static_cast<std::size_t>((place.row + row) * width + place.column);
      from_float32(activations_, tensor.data + row * tensor.columns, static_cast<std::size_t>(tensor.columns),
                   start + at * itemsize_);
    }
  }
}

}  // namespace coatrt::detail
