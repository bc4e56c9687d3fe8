#include "cuda/seat.hpp"

#include <algorithm>

#include "coatrt/error.hpp"
#include "cuda/model.hpp"

namespace coatrt::detail {
namespace {

constexpr const char* kNotCaptured = "-1";  // as the number of a CUDA graph in ONNX Runtime's run options

std::size_t cache_bytes(const DecoderIO& io, std::int64_t slots) {
  return static_cast<std::size_t>(io.kv_heads * slots * io.head_dim * io.itemsize());
}
std::size_t logits_bytes(const DecoderIO& io) { return static_cast<std::size_t>(io.vocabulary) * sizeof(float); }

}  // namespace

Seat::Seat(CudaModel& model, std::int64_t slots, int number)
    : model_(model),
      slots_(slots),
      lora_(model.memory(), model.layout().bytes()),
      steps_(model.memory(), step_bytes(slots)),
      steps_staging_(model.memory(), step_bytes(slots), Buffer::Where::host),
      logits_(model.memory(), logits_bytes(model.io())),
      logits_here_(model.memory(), logits_bytes(model.io()), Buffer::Where::host) {
  const OrtRuntime& runtime = model.runtime();
  for (std::size_t i = 0; i < model.io().caches().size(); ++i)
    caches_.emplace_back(model.memory(), cache_bytes(model.io(), slots));
  try {
    for (OrtIoBinding** binding : {&decode_, &prefill_}) {
      runtime.check(runtime.api().CreateIoBinding(model.session(), binding), "ONNX Runtime fails");
      bind_all(*binding);
    }
    bind_step(decode_, 1);
    captured_ = run_options(std::to_string(number));
    plain_ = run_options(kNotCaptured);
    model.memory().synchronize();
  } catch (...) {
    release();
    throw;
  }
}

Seat::~Seat() { release(); }

void Seat::release() noexcept {
  const OrtApi& api = model_.runtime().api();
  for (OrtIoBinding* binding : {decode_, prefill_})
    if (binding != nullptr) api.ReleaseIoBinding(binding);
  for (OrtRunOptions* options : {captured_, plain_})
    if (options != nullptr) api.ReleaseRunOptions(options);
}

OrtRunOptions* Seat::run_options(const std::string& graph) {
  const OrtRuntime& runtime = model_.runtime();
  OrtRunOptions* made = nullptr;
  runtime.check(runtime.api().CreateRunOptions(&made), "ONNX Runtime fails");
  if (!model_.memory().on_gpu()) return made;
  try {
    runtime.check(runtime.api().AddRunConfigEntry(made, "disable_synchronize_execution_providers", "1"), "ONNX Runtime fails");
    runtime.check(runtime.api().AddRunConfigEntry(made, "gpu_graph_id", graph.c_str()), "ONNX Runtime fails");
  } catch (...) {
    runtime.api().ReleaseRunOptions(made);
    throw;
  }
  return made;
}

std::vector<Seat::Piece> Seat::pieces(std::int64_t added) {
  constexpr auto kWide = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, kNarrow = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
  const std::size_t tokens = static_cast<std::size_t>(added) * 8, behind = 2 * kAlignment + aligned(tokens);
  return {{"logits_rows", 0, 8, {1, 1}, kWide},
          {"seqlens_k", kAlignment, 4, {1}, kNarrow},
          {"input_ids", 2 * kAlignment, tokens, {1, added}, kWide},
          {"position_ids", behind, tokens, {1, added}, kWide}};
}

std::size_t Seat::step_bytes(std::int64_t added) {
  const Piece last = pieces(added).back();
  return last.offset + aligned(last.bytes);
}

void Seat::bind(OrtIoBinding* binding, const std::string& name, void* data, std::size_t bytes,
                const std::vector<std::int64_t>& shape, ONNXTensorElementDataType type, bool output) {
  const OrtRuntime& runtime = model_.runtime();
  const OrtHeld value(runtime, runtime.tensor(data, bytes, shape, type, model_.place()));  // the binding copies the handle
  runtime.check(output ? runtime.api().BindOutput(binding, name.c_str(), value.get())
                       : runtime.api().BindInput(binding, name.c_str(), value.get()),
                "ONNX Runtime fails");
}

/// Bind everything that no call changes.
void Seat::bind_all(OrtIoBinding* binding) {
  const DecoderIO& io = model_.io();
  const OrtRuntime& runtime = model_.runtime();
  const auto type = io.activations == "float32"   ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT
                    : io.activations == "float16" ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
                                                  : ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16;
  const std::vector<std::int64_t> cache{1, io.kv_heads, slots_, io.head_dim};
  const auto names = io.caches();
  for (std::size_t i = 0; i < caches_.size(); ++i) {
    const auto& [past, present] = names[i];
    bind(binding, past, caches_[i].data(), caches_[i].bytes(), cache, type);
    bind(binding, present, caches_[i].data(), caches_[i].bytes(), cache, type, true);  // written in place
  }
  const auto& inputs = model_.contract().inputs;
  for (std::size_t i = 0; i < inputs.size(); ++i)
    bind(binding, inputs[i].name, lora_.data() + model_.layout().offset(i),
         static_cast<std::size_t>(inputs[i].rows * inputs[i].columns * io.itemsize()), {inputs[i].rows, inputs[i].columns},
         type);
  bind(binding, "logits", logits_.data(), logits_.bytes(), {1, 1, io.vocabulary}, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, true);
  const OrtHeld total(runtime, runtime.tensor(&total_, sizeof total_, {}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32));
  runtime.check(runtime.api().BindInput(binding, "total_sequence_length", total.get()), "ONNX Runtime fails");
}

/// Bind what changes with every call, for calls of so many tokens.
void Seat::bind_step(OrtIoBinding* binding, std::int64_t added) {
  for (const Piece& piece : pieces(added))
    if (model_.has_input(piece.name))
      bind(binding, piece.name, steps_.data() + piece.offset, piece.bytes, piece.shape, piece.type);
}

void Seat::clear() {
  Memory& memory = model_.memory();
  for (const Buffer& cache : caches_) memory.clear(cache.data(), cache.bytes());
  bind_lora(false);
}

unsigned char* Seat::lora_staging() {
  if (lora_staging_.empty()) lora_staging_.emplace_back(model_.memory(), lora_.bytes(), Buffer::Where::host);
  return lora_staging_.front().data();
}

void Seat::bind_lora(bool packed) {
  Memory& memory = model_.memory();
  if (packed) memory.write(lora_.data(), lora_staging(), lora_.bytes());
  else memory.clear(lora_.data(), lora_.bytes());
  memory.synchronize();
}

const float* Seat::run(const std::int64_t* tokens, std::size_t count, std::int64_t start) {
  const auto added = static_cast<std::int64_t>(count);
  const std::int64_t last = added - 1;
  const auto seqlens = static_cast<std::int32_t>(start + last);
  const bool replays = model_.replays() && added == 1 && start > 0;
  // A captured step is the same for every length: it is told of all slots, and `seqlens_k` says which are filled.
  total_ = replays ? static_cast<std::int32_t>(slots_) : seqlens + 1;
  const auto layout = pieces(added);
  unsigned char* staging = steps_staging_.data();
  std::memcpy(staging + layout[0].offset, &last, sizeof last);
  std::memcpy(staging + layout[1].offset, &seqlens, sizeof seqlens);
  std::memcpy(staging + layout[2].offset, tokens, layout[2].bytes);
  auto* positions = reinterpret_cast<std::int64_t*>(staging + layout[3].offset);
  for (std::int64_t i = 0; i < added; ++i) positions[i] = start + i;

  Memory& memory = model_.memory();
  const OrtRuntime& runtime = model_.runtime();
  memory.write(steps_.data(), staging, layout[3].offset + layout[3].bytes);
  if (added > 1) bind_step(prefill_, added);
  runtime.check(runtime.api().RunWithBinding(model_.session(), replays ? captured_ : plain_, added == 1 ? decode_ : prefill_),
                "ONNX Runtime fails in a step of " + std::to_string(added) + " tokens", "; use a shorter --context or a smaller batch");
  memory.read(logits_here_.data(), logits_.data(), logits_.bytes());
  memory.synchronize();
  return reinterpret_cast<const float*>(logits_here_.data());
}

}  // namespace coatrt::detail
