#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "coatrt/bundle.hpp"
#include "coatrt/decoder.hpp"
#include "coatrt/session.hpp"

namespace coatrt::detail {

struct BundleState;

/// A token for a row, and its position.
struct RowToken {
  std::size_t row;
  std::int64_t token, position;
};

/// What a backend offers a batch; `Batch` keeps count of positions and checks what is passed.
class Rows {
 public:
  virtual ~Rows() = default;
  virtual std::int64_t capacity() const = 0;
  virtual Limit limit() const = 0;
  virtual std::int64_t prefill_limit() const = 0;  ///< most tokens of one run
  virtual std::int64_t vocabulary() const = 0;
  virtual void set_lora(std::size_t row, const Lora* lora) = 0;  ///< nullptr: zeros
  virtual bool copy(std::size_t from, std::size_t to, std::int64_t length) = 0;
  /// Run a row's tokens from position `start`; the logits after the last one are valid until the next call.
  virtual const float* run(std::size_t row, const std::int64_t* tokens, std::size_t count, std::int64_t start) = 0;
  /// Run one token in each row; the logits of all are valid until the next call.
  virtual std::vector<const float*> step(const std::vector<RowToken>& tokens) = 0;
};

/// Rows in one ONNX Runtime session on the CPU.
std::unique_ptr<Rows> make_ort_rows(const std::shared_ptr<BundleState>& bundle, std::size_t rows, const SessionOptions& options);

}  // namespace coatrt::detail
