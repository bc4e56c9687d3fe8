// An engine in TensorRT or TensorRT-RTX: caches, LoRA, inputs and logits at fixed device addresses, the caches written in
// place. Compiled against the user's SDK; it has run against a stub of these calls only, never on a GPU.

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "activations.hpp"
#include "backend.hpp"
#include "coatrt/error.hpp"
#include "state.hpp"

namespace coatrt::detail {
namespace {

#ifdef TRT_MAJOR_RTX
constexpr const char* kBuilder = "tensorrt-rtx";
#else
constexpr const char* kBuilder = "tensorrt";
#endif

void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Error(std::string("CUDA fails to ") + what + " (" + cudaGetErrorString(status) + ")");
}

class Logger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) last = message;
  }
  std::string last;
};

/// Device memory, zeroed.
class Buffer {
 public:
  explicit Buffer(std::size_t bytes) {
    check(cudaMalloc(&data_, bytes), "reserve device memory");
    if (const cudaError_t status = cudaMemset(data_, 0, bytes); status != cudaSuccess) {
      cudaFree(data_);
      check(status, "clear device memory");
    }
  }
  ~Buffer() { cudaFree(data_); }
  Buffer(Buffer&& other) noexcept : data_(other.data_) { other.data_ = nullptr; }
  Buffer& operator=(Buffer&&) = delete;
  void* data() const { return data_; }

 private:
  void* data_ = nullptr;
};

/// What the manifest says of the engine for this GPU.
const Json& engine_for(const BundleState& bundle) {
  int count = 0, major = 0, minor = 0;
  // CUDA is asked first: without a device TensorRT's runtime may be a pointer to nothing.
  if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0)
    throw Error("no NVIDIA GPU here; run the bundle with --backend ort");
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "name the device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "name the device");
  const std::int64_t here = 10 * major + minor;
  std::string have;
  if (const Json& engines = bundle.manifest.at("engines"); engines.is_array())
    for (const Json& engine : engines)
      if (const Json* sms = find(engine, "sms"); sms != nullptr && sms->is_array())
        for (const Json& sm : *sms) {
          if (sm == here) return engine;
          have += (have.empty() ? "SM" : ", SM") + sm.dump();
        }
  throw Error("the bundle has engines for " + (have.empty() ? "none" : have) + ", this GPU is SM" + std::to_string(here) +
              "; build one for it");
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

struct Loaded {
  Logger logger;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
  DecoderIO io;
  Contract contract;
  std::int64_t prefill = 1;
};

std::shared_ptr<Loaded> load(BundleState& bundle) {
  const Json& facts = engine_for(bundle);
  check_versions(facts);
  auto loaded = std::make_shared<Loaded>();
  const Json* shapes = find(facts, "shapes");
  const std::string* file = find_text(facts, "file");
  if (file == nullptr || shapes == nullptr || !whole(find(*shapes, "prefill"), 1, loaded->prefill))
    throw Error("the manifest garbles engines; build the bundle again");
  loaded->io = bundle.decoder("engine").second;
  if (loaded->io.cache_length < 1) throw Error("the engine's caches have no fixed length; build the bundle again");
  loaded->contract = bundle.contract();
  const auto plan = bundle.read(*file);  // an engine is code: these bytes were hashed
  loaded->runtime.reset(nvinfer1::createInferRuntime(loaded->logger));
  if (!loaded->runtime) throw Error("TensorRT does not start (" + loaded->logger.last + "); check the driver");
  loaded->engine.reset(loaded->runtime->deserializeCudaEngine(plan->data(), plan->size()));
  if (!loaded->engine)
    throw Error("the engine does not load: another TensorRT version or another GPU; build the bundle again");
  return loaded;
}

nvinfer1::Dims dims(const std::vector<std::int64_t>& shape) {
  nvinfer1::Dims made{};
  made.nbDims = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), made.d);
  return made;
}

class TrtDecoder final : public Decoder {
 public:
  TrtDecoder(std::shared_ptr<Loaded> loaded, bool cuda_graph)
      : loaded_(std::move(loaded)), io_(loaded_->io), cuda_graph_(cuda_graph) {
    check(cudaStreamCreate(&stream_), "make a stream");
    try {
      context_.reset(loaded_->engine->createExecutionContext());
      if (!context_) throw Error("TensorRT makes no context (" + loaded_->logger.last + "); free device memory");
      bind_all();
    } catch (...) {
      release();
      throw;
    }
  }
  ~TrtDecoder() override { release(); }

  std::int64_t capacity() const override { return std::min(io_.cache_length, io_.max_positions); }
  std::int64_t prefill_limit() const override { return loaded_->prefill; }
  std::int64_t vocabulary() const override { return io_.vocabulary; }

  void set_lora(const Lora* lora) override {
    std::vector<unsigned char> cast;
    for (std::size_t i = 0; i < loaded_->contract.tensors.size(); ++i) {
      const auto& said = loaded_->contract.tensors[i];
      const auto count = static_cast<std::size_t>(said.rows * said.columns);
      cast.assign(count * static_cast<std::size_t>(io_.itemsize()), 0);
      if (lora != nullptr) from_float32(io_.activations, lora->tensors()[i].data, count, cast.data());
      write(lora_[i], cast.data(), cast.size());
      check(cudaStreamSynchronize(stream_), "copy the LoRA");  // before `cast` changes
    }
  }

  const float* run(const std::int64_t* tokens, std::size_t count, std::int64_t start) override {
    const auto length = static_cast<std::int64_t>(count);
    std::vector<std::int64_t> positions(count);
    for (std::size_t i = 0; i < count; ++i) positions[i] = start + static_cast<std::int64_t>(i);
    const std::int64_t last = length - 1;
    write(buffers_[0], tokens, 8 * count);
    write(buffers_[1], positions.data(), 8 * count);
    write(buffers_[2], &start, 8);
    write(buffers_[3], &last, 8);
    if (shaped_ != length) {
      shape("input_ids", {1, length});
      shape("position_ids", {1, length});
      shaped_ = length;
    }
    if (count == 1 && cuda_graph_) launch();
    else enqueue();
    check(cudaMemcpyAsync(raw_.data(), buffers_[4].data(), raw_.size(), cudaMemcpyDeviceToHost, stream_), "copy logits");
    check(cudaStreamSynchronize(stream_), "run the engine");
    if (io_.itemsize() == 4) std::memcpy(logits_.data(), raw_.data(), raw_.size());
    else to_float32(io_.activations, raw_.data(), logits_.size(), logits_.data());
    return logits_.data();
  }

 private:
  void release() {
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
    context_.reset();
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  void shape(const std::string& name, const std::vector<std::int64_t>& value) {
    if (!context_->setInputShape(name.c_str(), dims(value)))
      throw Error("the engine refuses the shape of " + name + " (" + loaded_->logger.last + "); build the bundle again");
  }

  /// Give a tensor its place, after the engine agreed on its rank, its fixed extents and its type.
  void place(const std::string& name, const std::vector<std::int64_t>& expected, nvinfer1::DataType type, void* data) {
    const nvinfer1::Dims found = loaded_->engine->getTensorShape(name.c_str());
    bool same = found.nbDims == static_cast<int>(expected.size()) &&
                loaded_->engine->getTensorDataType(name.c_str()) == type;
    for (std::size_t i = 0; same && i < expected.size(); ++i) same = found.d[i] < 0 || found.d[i] == expected[i];
    if (!same || !context_->setTensorAddress(name.c_str(), data))
      throw Error("the engine and the manifest differ in " + name + "; build the bundle again");
  }

  void bind_all() {
    const nvinfer1::DataType type = io_.activations == "float32"   ? nvinfer1::DataType::kFLOAT
                                    : io_.activations == "float16" ? nvinfer1::DataType::kHALF
                                                                   : nvinfer1::DataType::kBF16;
    const auto item = static_cast<std::size_t>(io_.itemsize());
    const std::vector<std::int64_t> cache{1, io_.kv_heads, io_.cache_length, io_.head_dim};
    const std::size_t bytes = static_cast<std::size_t>(io_.kv_heads * io_.cache_length * io_.head_dim) * item;
    for (const auto& [past, present] : io_.caches()) {
      caches_.emplace_back(bytes);
      place(past, cache, type, caches_.back().data());
      place(present, cache, type, caches_.back().data());  // written in place
      shape(past, cache);
    }
    for (const auto& said : loaded_->contract.tensors) {
      lora_.emplace_back(static_cast<std::size_t>(said.rows * said.columns) * item);
      place(said.name, {said.rows, said.columns}, type, lora_.back().data());
    }
    const std::int64_t most = loaded_->prefill;
    const struct {
      const char* name;
      std::vector<std::int64_t> shape;
      std::int64_t elements;
    } inputs[] = {{"input_ids", {1, most}, most}, {"position_ids", {1, most}, most}, {"write_index", {1}, 1}, {"logits_index", {1, 1}, 1}};
    for (const auto& input : inputs) {
      buffers_.emplace_back(static_cast<std::size_t>(input.elements) * 8);
      place(input.name, input.shape, nvinfer1::DataType::kINT64, buffers_.back().data());
      shape(input.name, input.shape);
    }
    shaped_ = most;
    logits_.resize(static_cast<std::size_t>(io_.vocabulary));
    raw_.resize(logits_.size() * item);
    buffers_.emplace_back(raw_.size());
    place("logits", {1, 1, io_.vocabulary}, type, buffers_.back().data());
  }

  void write(const Buffer& buffer, const void* data, std::size_t bytes) {
    check(cudaMemcpyAsync(buffer.data(), data, bytes, cudaMemcpyHostToDevice, stream_), "copy to the device");
  }

  void enqueue() {
    if (!context_->enqueueV3(stream_)) throw Error("the engine failed to run (" + loaded_->logger.last + ")");
  }

  /// A decode step as a CUDA graph: captured after a plain run has settled the context for its shapes.
  void launch() {
    if (graph_ == nullptr) {
      enqueue();
      check(cudaStreamSynchronize(stream_), "run the engine");
      cudaGraph_t graph = nullptr;
      check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture a step");
      const bool captured = context_->enqueueV3(stream_);
      check(cudaStreamEndCapture(stream_, &graph), "capture a step");
      const cudaError_t made = captured ? cudaGraphInstantiate(&graph_, graph, 0) : cudaSuccess;
      cudaGraphDestroy(graph);
      if (!captured) throw Error("the engine cannot be captured as a CUDA graph; leave cuda_graph out");
      check(made, "instantiate a graph");
      return;  // the plain run above was this step
    }
    check(cudaGraphLaunch(graph_, stream_), "launch a step");
  }

  std::shared_ptr<Loaded> loaded_;
  const DecoderIO& io_;
  bool cuda_graph_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  std::vector<Buffer> caches_, lora_, buffers_;  // buffers: the four inputs, then logits
  std::int64_t shaped_ = 0;                      // tokens the context's shapes are set for
  std::vector<unsigned char> raw_;
  std::vector<float> logits_;
};

}  // namespace

std::unique_ptr<Decoder> make_trt_decoder(const std::shared_ptr<BundleState>& bundle, const SessionOptions& options) {
  const std::lock_guard one(bundle->loading);
  std::shared_ptr<Loaded> loaded;
  {
    const std::lock_guard lock(bundle->mutex);
    loaded = std::static_pointer_cast<Loaded>(bundle->models["trt"].lock());
  }
  if (!loaded) {
    loaded = load(*bundle);
    const std::lock_guard lock(bundle->mutex);
    bundle->models["trt"] = loaded;
  }
  return std::make_unique<TrtDecoder>(std::move(loaded), options.provider_options.count("cuda_graph") != 0);
}

}  // namespace coatrt::detail
