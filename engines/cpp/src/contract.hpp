#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "json.hpp"

namespace coatrt::detail {

/// Names and shapes of every LoRA tensor (`lora_io.json`), A then B of each matrix.
struct Contract {
  struct Tensor {
    std::string name;
    std::int64_t rows, columns;
    std::size_t bytes() const { return static_cast<std::size_t>(rows * columns) * sizeof(float); }
  };
  std::vector<Tensor> tensors;

  static Contract from_json(const Json& value);
};

/// What a runtime needs to bind a decoder graph.
struct DecoderIO {
  std::int64_t layers, kv_heads, head_dim, vocabulary;
  std::int64_t cache_length;  // 0 where the graph leaves it open
  std::string activations;
  std::int64_t max_positions;

  static DecoderIO from_json(const Json& value);
  std::int64_t itemsize() const { return activations == "float32" ? 4 : 2; }
  /// Cache names, (past, present), key then value of each layer.
  std::vector<std::pair<std::string, std::string>> caches() const;
};

}  // namespace coatrt::detail
