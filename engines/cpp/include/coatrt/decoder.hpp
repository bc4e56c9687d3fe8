#pragma once
#include <cstddef>
#include <cstdint>

#include "coatrt/bundle.hpp"

namespace coatrt {

/// What sets how many positions a sequence has: the session's options, or what the bundle was built for.
enum class Limit { context, bundle };

/// What a backend offers a session: one sequence with caches and LoRA at fixed addresses. Not for several threads at
/// once; `Session` keeps count of positions and splits prompts, so that a backend only runs the graph.
class Decoder {
 public:
  virtual ~Decoder() = default;
  virtual std::int64_t capacity() const = 0;       ///< most positions of a sequence
  virtual Limit limit() const { return Limit::bundle; }  ///< what sets the capacity, for messages
  virtual std::int64_t prefill_limit() const = 0;  ///< most tokens of one run
  virtual std::int64_t vocabulary() const = 0;
  /// Bind the tensors of the contract, cast to the activations; nullptr: zeros, which equal the base bit for bit.
  virtual void set_lora(const Lora* lora) = 0;
  /// Run `count` tokens from position `start`; return the logits after the last one, [vocabulary], valid until the
  /// next call.
  virtual const float* run(const std::int64_t* tokens, std::size_t count, std::int64_t start) = 0;
};

}  // namespace coatrt
