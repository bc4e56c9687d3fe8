#include "ort/loaded.hpp"

#include "coatrt/error.hpp"
#include "ort/cuda_provider.hpp"
#include "state.hpp"

namespace coatrt::detail {

std::shared_ptr<Loaded> load_cpu_form(const std::shared_ptr<BundleState>& bundle, const SessionOptions& options) {
  if (options.context < 1)
    throw Error("batch 1 and context " + std::to_string(options.context) + " are given; give at least 1");
  if (options.provider == kCudaProvider)
    throw Error(std::string("provider ") + kCudaProvider + " is given for backend ort, whose caches stay in host memory; " +
                "use backend cuda");
  std::string key = "ort " + options.provider + " " + std::to_string(options.threads) + " " +
                    std::to_string(options.accuracy_level);
  for (const auto& [name, value] : options.provider_options) key += " " + name + "=" + value;
  std::shared_ptr<Loaded> loaded;
  const std::lock_guard one(bundle->loading);
  {
    const std::lock_guard lock(bundle->mutex);
    loaded = std::static_pointer_cast<Loaded>(bundle->models[key].lock());
  }
  if (!loaded) {
    const auto [graph, io] = bundle->decoder("cpu");
    OrtOptions wanted;
    wanted.provider = options.provider;
    wanted.provider_options = options.provider_options;
    wanted.threads = options.threads;
    wanted.accuracy_level = options.accuracy_level;
    loaded.reset(new Loaded{{bundle->ort(), graph, wanted}, io, bundle->contract()});
    const std::lock_guard lock(bundle->mutex);
    bundle->models[key] = loaded;
  }
  return loaded;
}

}  // namespace coatrt::detail
