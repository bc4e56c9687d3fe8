#include "packed_lora.hpp"

#include "activations.hpp"

namespace coatrt::detail {

LoraLayout::LoraLayout(const Contract& contract, const std::string& activations, std::size_t itemsize)
    : activations_(activations) {
  for (const auto& tensor : contract.tensors) {
    offsets_.push_back(bytes_);
    bytes_ += aligned(static_cast<std::size_t>(tensor.rows * tensor.columns) * itemsize);
  }
}

void LoraLayout::fill(const Lora& lora, unsigned char* buffer) const {
  for (std::size_t i = 0; i < offsets_.size(); ++i) {
    const LoraTensor& tensor = lora.tensors()[i];
    from_float32(activations_, tensor.data, static_cast<std::size_t>(tensor.rows * tensor.columns), buffer + offsets_[i]);
  }
}

}  // namespace coatrt::detail
