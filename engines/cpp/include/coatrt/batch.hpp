#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "coatrt/bundle.hpp"
#include "coatrt/sampling.hpp"
#include "coatrt/session.hpp"

namespace coatrt {

/// Several sequences of one bundle, each in a row with a LoRA and positions of its own. A step decodes all rows that have
/// a token, those of one LoRA in one run of the graph where the backend can (ort on the CPU); else one after the other.
///
/// With `SessionOptions::threads` 1 the logits of a row do not depend on the other rows, bit for bit. ONNX Runtime's
/// kernels compute rows in pairs and round the last of an odd number differently, so runs have an even number of rows;
/// with more threads it divides the LoRA's products by the number of rows, which rounds differently too. For one thread
/// at a time.
class Batch {
 public:
  Batch(const Bundle& bundle, std::size_t rows, const SessionOptions& options = {});
  ~Batch();
  Batch(Batch&&) noexcept;
  Batch& operator=(Batch&&) noexcept;

  std::size_t rows() const;
  std::int64_t capacity() const;  ///< most positions of a row
  Limit limit() const;            ///< what sets the capacity
  std::int64_t vocabulary() const;
  std::int64_t length(std::size_t row) const;  ///< positions filled so far

  /// Change the LoRA of a row and empty it. Rows whose LoRAs share their tensors run together.
  void set_lora(std::size_t row, const Lora& lora);
  /// The same with the quantized base alone.
  void drop_lora(std::size_t row);
  /// Keep the first positions of a row.
  void truncate(std::size_t row, std::int64_t length);
  /// Begin a row with another one's LoRA and first positions; false, and nothing done, where the backend keeps rows apart.
  bool copy(std::size_t from, std::size_t to, std::int64_t length);

  /// Add tokens of a prompt; returns the logits after the last one.
  Logits prefill(std::size_t row, const std::int64_t* tokens, std::size_t count);
  struct Step {
    std::size_t row;
    std::int64_t token;
  };
  /// Add a token to each of some rows; returns the logits after each, in that order.
  std::vector<Logits> decode(const std::vector<Step>& steps);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace coatrt
