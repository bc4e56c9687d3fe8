#pragma once
#include <algorithm>
#include <memory>

#include "coatrt/session.hpp"
#include "contract.hpp"
#include "ort/runtime.hpp"

namespace coatrt::detail {

struct BundleState;

/// The cpu form of a bundle's graph, loaded.
struct Loaded {
  OrtModel model;
  DecoderIO io;
  Contract contract;

  /// The positions of a sequence: the slots of its caches that are used, and what sets their number.
  std::int64_t capacity(std::int64_t context) const {
    return io.cache_length > 0 ? std::min(io.cache_length, io.max_positions) : std::min(context, io.max_positions);
  }
  Limit limit(std::int64_t context) const {
    return io.cache_length > 0 || capacity(context) == io.max_positions ? Limit::bundle : Limit::context;
  }
  ONNXTensorElementDataType type() const {
    return io.activations == "float32"   ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
           : io.activations == "float16" ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                         : ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
  }
};

/// Load it; equal options share one.
std::shared_ptr<Loaded> load_cpu_form(const std::shared_ptr<BundleState>& bundle, const SessionOptions& options);

}  // namespace coatrt::detail
