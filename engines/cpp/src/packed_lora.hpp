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

/// Refuse a LoRA whose tensors are not those of the contract.
void check_lora(const Contract& contract, const Lora& lora);

/// Where each LoRA input of a graph lies in one buffer, every piece aligned: switching a LoRA is one copy.
class LoraLayout {
 public:
  LoraLayout(const Contract& contract, const std::string& activations, std::size_t itemsize);

  std::size_t bytes() const { return bytes_; }
  std::size_t offset(std::size_t input) const { return offsets_[input]; }
  /// Cast the tensors of a LoRA, in contract order, into their places; zeros elsewhere.
  void fill(const Lora& lora, unsigned char* buffer) const;

 private:
  std::string activations_;
  std::size_t itemsize_;
  std::vector<std::int64_t> widths_;  // columns of each input
  std::vector<Contract::Place> places_;
  std::vector<std::size_t> offsets_;
  std::size_t bytes_ = 0;
};

}  // namespace coatrt::detail
