#include "trt/engine.hpp"

#include "coatrt/error.hpp"
#include "trt/memory.hpp"

namespace coatrt::detail {
namespace {

#ifdef TRT_MAJOR_RTX
constexpr const char* kBuilder = "tensorrt-rtx";
#else
constexpr const char* kBuilder = "tensorrt";
#endif

/// What the manifest says of the engine for this GPU.
const Json& engine_for(const BundleState& bundle) {
  int count = 0, major = 0, minor = 0;
  // CUDA is asked first: without a device TensorRT's runtime may be a pointer to nothing.
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0)
    throw Error("no NVIDIA GPU here; run the bundle with --backend ort");
  check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "name the device");
  check_cuda(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "name the device");
  const std::int64_t here = 10 * major + minor;
  std::string have;
  if (const Json& engines = bundle.manifest.at("engines"); engines.is_array())
    for (const Json& engine : engines)
      if (const Json* sms = find(engine, "sms"); sms != nullptr && sms->is_array())
        for (const Json& sm : *sms) {
          if (sm == here) return engine;
          have += (have.empty() ? "SM" : ", SM") + sm.dump();
        }
  throw Error("the bundle has engines for " + (have.empty() ? "no GPU" : have) + ", this GPU is SM" +
              std::to_string(here) + "; build a bundle for it");
}

/// Refuse a library other than the headers', and an engine of another version: neither shows otherwise until it crashes.
void check_versions(const Json& engine) {
  if (getInferLibVersion() != NV_TENSORRT_VERSION)
    throw Error("this was compiled with TensorRT headers " + std::to_string(NV_TENSORRT_VERSION) + ", the library is " +
                std::to_string(getInferLibVersion()) + "; compile with the library's own headers");
  const std::string here = std::to_string(NV_TENSORRT_MAJOR) + "." + std::to_string(NV_TENSORRT_MINOR) + "." +
                           std::to_string(NV_TENSORRT_PATCH);
  const std::string *builder = find_text(engine, "builder"), *version = find_text(engine, "version");
  if (builder == nullptr || version == nullptr || *builder != kBuilder ||
      (*version + ".").compare(0, here.size() + 1, here + ".") != 0)
    throw Error("the engine needs " + (builder == nullptr ? "?" : *builder) + " " + (version == nullptr ? "?" : *version) +
                ", here is " + kBuilder + " " + here + "; engines do not load across versions: build the bundle again");
}

}  // namespace

std::shared_ptr<TrtEngine> load_engine(BundleState& bundle) {
  const Json& facts = engine_for(bundle);
  check_versions(facts);
  auto loaded = std::make_shared<TrtEngine>();
  const Json* shapes = find(facts, "shapes");
  const std::string* file = find_text(facts, "file");
  if (file == nullptr || shapes == nullptr || !whole(find(*shapes, "prefill"), 1, loaded->prefill))
    throw Error("the manifest is garbled (engines); build the bundle again");
  loaded->file = *file;
  loaded->io = bundle.decoder("engine").second;
  if (loaded->io.cache_length < 1) throw Error("the engine's caches have no fixed length; build the bundle again");
  loaded->contract = bundle.contract();
  const auto plan = bundle.read(*file);  // an engine is code: these bytes were hashed
  loaded->runtime.reset(nvinfer1::createInferRuntime(loaded->logger));
  if (!loaded->runtime) throw Error("TensorRT does not start (" + loaded->logger.last + "); check the driver");
  loaded->engine.reset(loaded->runtime->deserializeCudaEngine(plan->data(), plan->size()));
  if (!loaded->engine)
    throw Error("the engine does not load: it was built for another TensorRT version or another GPU; build the bundle again");
  return loaded;
}

}  // namespace coatrt::detail
