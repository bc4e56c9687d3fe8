#pragma once
#include <cstddef>
#include <string>

#include "coatrt/bundle.hpp"
#include "json.hpp"

namespace coatrt::detail {

/// The weights of a configuration on the GPU.
struct DeviceWeights {
  std::size_t bytes = 0;
  std::string note;  ///< one line on those that are decoded to float16 when the graph loads; empty where none are
};

/// What the weights of a configuration take: ONNX Runtime has packed products for int4 and int8 alone. `model` is the
/// manifest's inventory of matrices.
DeviceWeights device_weights(const Configuration& configuration, const Json& model);

}  // namespace coatrt::detail
