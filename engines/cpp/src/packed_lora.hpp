#pragma once
#include <cstddef>
#include <string>
#include <vector>

#include "coatrt/bundle.hpp"
#include "contract.hpp"

namespace coatrt::detail {

/// Bytes that every piece of a buffer is aligned to, as CUDA's own allocations are.
constexpr std::size_t kAlignment = 256;
/// A size that whole pieces fill.
constexpr std::size_t aligned(std::size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

/// Where each tensor of a contract lies in one buffer, every piece aligned: switching a LoRA is one copy.
class LoraLayout {
 public:
  LoraLayout(const Contract& contract, const std::string& activations, std::size_t itemsize);

  std::size_t bytes() const { return bytes_; }
  std::size_t offset(std::size_t tensor) const { return offsets_[tensor]; }
  /// Cast the tensors of a LoRA, in contract order, into their places.
  void fill(const Lora& lora, unsigned char* buffer) const;

 private:
  std::string activations_;
  std::vector<std::size_t> offsets_;
  std::size_t bytes_ = 0;
};

}  // namespace coatrt::detail
