// An engine in TensorRT or TensorRT-RTX: caches, LoRA, inputs and logits at fixed device addresses, bound once, the caches
// written in place; a decode step is one copy in, a captured CUDA graph, one copy out. Compiled against the user's SDK; it
// has run against a stub of these calls only, never on a GPU.

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <algorithm>

#include "activations.hpp"
#include "backend.hpp"
#include "coatrt/error.hpp"
#include "notice.hpp"
#include "trt/engine.hpp"
#include "trt/memory.hpp"

namespace coatrt::detail {
namespace {

nvinfer1::Dims dims(const std::vector<std::int64_t>& shape) {
  nvinfer1::Dims made{};
  made.nbDims = static_cast<int>(shape.size());
  std::copy(shape.begin(), shape.end(), made.d);
  return made;
}

/// Where the inputs of a call lie in one buffer, for `most` tokens at once: a call of fewer copies a shorter piece of it.
struct StepLayout {
  static constexpr std::size_t kWriteIndex = 0, kLogitsIndex = kAlignment, kTokens = 2 * kAlignment;
  explicit StepLayout(std::int64_t most) : positions(kTokens + aligned(static_cast<std::size_t>(most) * 8)) {}
  std::size_t bytes(std::int64_t tokens) const { return positions + static_cast<std::size_t>(tokens) * 8; }
  std::size_t positions;
};

class TrtDecoder final : public Decoder {
 public:
  TrtDecoder(std::shared_ptr<TrtEngine> loaded, const SessionOptions& options)
      : loaded_(std::move(loaded)),
        io_(loaded_->io),
        options_(options),
        layout_(loaded_->contract, io_.activations, static_cast<std::size_t>(io_.itemsize())),
        step_layout_(loaded_->prefill),
        lora_(memory_, layout_.bytes()),
        lora_staging_(memory_, layout_.bytes(), Buffer::Where::host),
        steps_(memory_, step_layout_.bytes(loaded_->prefill)),
        steps_staging_(memory_, steps_.bytes(), Buffer::Where::host),
        logits_(memory_, static_cast<std::size_t>(io_.vocabulary * io_.itemsize())),
        logits_here_(memory_, logits_.bytes(), Buffer::Where::host) {
    if (const auto given = options.provider_options.find("cuda_graph"); given != options.provider_options.end())
      replays_ = given->second != "0";
    if (io_.itemsize() != 4) wide_logits_.resize(static_cast<std::size_t>(io_.vocabulary));
    context_.reset(loaded_->engine->createExecutionContext());
    if (!context_) throw Error("TensorRT cannot create an execution context (" + loaded_->logger.last + "); free memory on the GPU");
    bind_all();
    memory_.synchronize();
  }
  ~TrtDecoder() override {
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  }

  std::int64_t capacity() const override { return std::min(io_.cache_length, io_.max_positions); }
  std::int64_t prefill_limit() const override { return loaded_->prefill; }
  std::int64_t vocabulary() const override { return io_.vocabulary; }

  void set_lora(const Lora* lora) override {
    if (lora != nullptr) {
      layout_.fill(*lora, lora_staging_.data());
      memory_.write(lora_.data(), lora_staging_.data(), lora_.bytes());
    } else {
      memory_.clear(lora_.data(), lora_.bytes());
    }
    memory_.synchronize();
  }

  const float* run(const std::int64_t* tokens, std::size_t count, std::int64_t start) override {
    const auto length = static_cast<std::int64_t>(count);
    const std::int64_t last = length - 1;
    unsigned char* staging = steps_staging_.data();
    std::memcpy(staging + StepLayout::kWriteIndex, &start, 8);
    std::memcpy(staging + StepLayout::kLogitsIndex, &last, 8);
    std::memcpy(staging + StepLayout::kTokens, tokens, 8 * count);
    auto* positions = reinterpret_cast<std::int64_t*>(staging + step_layout_.positions);
    for (std::int64_t i = 0; i < length; ++i) positions[i] = start + i;
    memory_.write(steps_.data(), staging, step_layout_.bytes(length));
    if (shaped_ != length) {
      shape("input_ids", {1, length});
      shape("position_ids", {1, length});
      shaped_ = length;
    }
    if (count == 1 && replays_) replay();
    else enqueue();
    memory_.read(logits_here_.data(), logits_.data(), logits_.bytes());
    memory_.synchronize();
    if (io_.itemsize() == 4) return reinterpret_cast<const float*>(logits_here_.data());
    to_float32(io_.activations, logits_here_.data(), wide_logits_.size(), wide_logits_.data());
    return wide_logits_.data();
  }

 private:
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
    const std::vector<std::int64_t> cache{1, io_.kv_heads, io_.cache_length, io_.head_dim};
    for (const auto& [past, present] : io_.caches()) {
      caches_.emplace_back(memory_, static_cast<std::size_t>(io_.kv_heads * io_.cache_length * io_.head_dim * io_.itemsize()));
      place(past, cache, type, caches_.back().data());
      place(present, cache, type, caches_.back().data());  // written in place
      shape(past, cache);
    }
    const auto& lora = loaded_->contract.inputs;
    for (std::size_t i = 0; i < lora.size(); ++i)
      place(lora[i].name, {lora[i].rows, lora[i].columns}, type, lora_.data() + layout_.offset(i));
    const std::int64_t most = loaded_->prefill;
    const struct {
      const char* name;
      std::vector<std::int64_t> shape;
      std::size_t offset;
    } inputs[] = {{"input_ids", {1, most}, StepLayout::kTokens},
                  {"position_ids", {1, most}, step_layout_.positions},
                  {"write_index", {1}, StepLayout::kWriteIndex},
                  {"logits_index", {1, 1}, StepLayout::kLogitsIndex}};
    for (const auto& input : inputs) {
      place(input.name, input.shape, nvinfer1::DataType::kINT64, steps_.data() + input.offset);
      shape(input.name, input.shape);
    }
    shaped_ = most;
    place("logits", {1, 1, io_.vocabulary}, type, logits_.data());
  }

  void enqueue() {
    if (!context_->enqueueV3(memory_.cuda_stream()))
      throw Error("the engine failed to run (" + loaded_->logger.last + ")");
  }

  /// A decode step as a CUDA graph: captured after a plain run has settled the context for its shapes.
  void replay() {
    if (graph_ != nullptr) return check_cuda(cudaGraphLaunch(graph_, memory_.cuda_stream()), "launch a step");
    enqueue();  // this is the step; what follows is for the next ones
    memory_.synchronize();
    if (const std::string problem = capture(); !problem.empty()) {
      replays_ = false;
      notify(options_, "decoding is slower: " + loaded_->file + " cannot be captured as a CUDA graph (" + problem + ")");
    }
  }

  /// Capture a step; return what stands against it.
  std::string capture() {
    const auto said = [](cudaError_t status) {
      cudaGetLastError();  // the next call does not report it again
      return std::string(cudaGetErrorString(status));
    };
    cudaStream_t stream = memory_.cuda_stream();
    cudaGraph_t graph = nullptr;
    if (const cudaError_t status = cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal); status != cudaSuccess)
      return said(status);
    const bool ran = context_->enqueueV3(stream);
    const cudaError_t ended = cudaStreamEndCapture(stream, &graph);
    if (!ran || ended != cudaSuccess) {
      if (graph != nullptr) cudaGraphDestroy(graph);
      const std::string status = said(ended);
      return ran || loaded_->logger.last.empty() ? status : loaded_->logger.last;
    }
    const cudaError_t made = cudaGraphInstantiate(&graph_, graph, 0);
    cudaGraphDestroy(graph);
    if (made == cudaSuccess) return "";
    graph_ = nullptr;
    return said(made);
  }

  std::shared_ptr<TrtEngine> loaded_;
  const DecoderIO& io_;
  SessionOptions options_;
  LoraLayout layout_;
  StepLayout step_layout_;
  TrtMemory memory_;
  std::vector<Buffer> caches_;
  Buffer lora_, lora_staging_, steps_, steps_staging_, logits_, logits_here_;
  std::vector<float> wide_logits_;  // of 16-bit logits
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
  cudaGraphExec_t graph_ = nullptr;
  bool replays_ = true;
  std::int64_t shaped_ = 0;  // tokens the context's shapes are set for
};

}  // namespace

std::unique_ptr<Decoder> make_trt_decoder(const std::shared_ptr<BundleState>& bundle, const SessionOptions& options) {
  const std::lock_guard one(bundle->loading);
  std::shared_ptr<TrtEngine> loaded;
  {
    const std::lock_guard lock(bundle->mutex);
    loaded = std::static_pointer_cast<TrtEngine>(bundle->models["trt"].lock());
  }
  if (!loaded) {
    loaded = load_engine(*bundle);
    const std::lock_guard lock(bundle->mutex);
    bundle->models["trt"] = loaded;
  }
  return std::make_unique<TrtDecoder>(std::move(loaded), options);
}

}  // namespace coatrt::detail
