#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "json.hpp"

namespace coatrt::detail {

/// Names and shapes of every LoRA tensor (`lora_io.json`), A then B of each matrix. In a graph, matrices that read one
/// input share one A, theirs side by side, and one B, theirs along its diagonal.
struct Contract {
  struct Tensor {
    std::string name;
    std::int64_t rows, columns;
    std::size_t bytes() const { return static_cast<std::size_t>(rows * columns) * sizeof(float); }
  };
  /// Where a tensor lies: which input of a graph, and its first row and column there.
  struct Place {
    std::size_t input;
    std::int64_t row, column;
  };
  std::vector<Tensor> tensors;
  std::vector<Tensor> inputs;  ///< of a graph
  std::vector<Place> places;   ///< of each tensor

  static Contract from_json(const Json& value);

 private:
  /// Place the last two tensors: beside those of the matrix before, where both are of one group.
  void join(const std::string& group, const std::string& last, const std::string& matrix);
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
