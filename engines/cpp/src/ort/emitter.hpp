#pragma once
#include <memory>
#include <string>
#include <vector>

#include "coatrt/bundle.hpp"
#include "contract.hpp"
#include "ort/runtime.hpp"

namespace coatrt::detail {

struct BundleState;

/// A loaded hypernetwork: configuration → LoRA.
class Emitter {
 public:
  explicit Emitter(BundleState& bundle);
  Lora emit(const Configuration& configuration) const;

 private:
  std::vector<std::int64_t> ids(const Configuration& configuration) const;

  std::vector<std::string> matrices_, formats_;
  Contract contract_;
  std::shared_ptr<OrtModel> model_;
};

/// The bundle's, made on first use.
std::shared_ptr<Emitter> emitter_of(BundleState& bundle);

}  // namespace coatrt::detail
