// The cpu form of the graph in ONNX Runtime: caches, LoRA, logits and the inputs of a decode step are bound once, and the
// caches are written in place.

#include <algorithm>

#include "activations.hpp"
#include "backend.hpp"
#include "ort/loaded.hpp"
#include "packed_lora.hpp"

namespace coatrt::detail {
namespace {

class OrtDecoder final : public Decoder {
 public:
  OrtDecoder(std::shared_ptr<Loaded> loaded, std::int64_t context)
      : loaded_(std::move(loaded)),
        io_(loaded_->io),
        runtime_(loaded_->model.runtime()),
        layout_(loaded_->contract, io_.activations, static_cast<std::size_t>(io_.itemsize())),
        lora_(layout_.bytes()) {
    const std::int64_t slots = io_.cache_length > 0 ? io_.cache_length : loaded_->capacity(context);
    capacity_ = loaded_->capacity(context);
    limit_ = loaded_->limit(context);
    check(runtime_.api().CreateIoBinding(loaded_->model.session(), &binding_));
    try {
      bind_all(slots);
    } catch (...) {
      runtime_.api().ReleaseIoBinding(binding_);
      throw;
    }
  }
  ~OrtDecoder() override { runtime_.api().ReleaseIoBinding(binding_); }

  std::int64_t capacity() const override { return capacity_; }
  Limit limit() const override { return limit_; }
  std::int64_t prefill_limit() const override { return capacity_; }
  std::int64_t vocabulary() const override { return io_.vocabulary; }

  void set_lora(const Lora* lora) override {
    if (lora == nullptr)
      std::fill(lora_.begin(), lora_.end(), static_cast<unsigned char>(0));
    else
      layout_.fill(*lora, lora_.data());
  }

  const float* run(const std::int64_t* tokens, std::size_t count, std::int64_t start) override {
    if (count == 1) {
      step_[0] = tokens[0];
      step_[1] = step_[2] = start;
      step_[3] = 0;
      return execute();
    }
    const auto length = static_cast<std::int64_t>(count);
    std::vector<std::int64_t> ids(tokens, tokens + count), positions(count);
    for (std::size_t i = 0; i < count; ++i) positions[i] = start + static_cast<std::int64_t>(i);
    step_[2] = start;
    step_[3] = length - 1;
    const struct Rebind {  // the memory above goes away, whatever happens
      OrtDecoder& decoder;
      ~Rebind() { decoder.bind_step(); }
    } rebind{*this};
    bind_input("input_ids", tensor(ids.data(), 8 * count, {1, length}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64));
    bind_input("position_ids", tensor(positions.data(), 8 * count, {1, length}, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64));
    return execute();
  }

 private:
  void check(OrtStatus* status) const { runtime_.check(status, "ONNX Runtime fails"); }

  OrtHeld tensor(void* data, std::size_t bytes, const std::vector<std::int64_t>& shape,
                 ONNXTensorElementDataType type) const {
    return {runtime_, runtime_.tensor(data, bytes, shape, type)};
  }
  // A binding copies the handle, so `value` may go; the memory may not.
  void bind_input(const std::string& name, const OrtHeld& value) {
    check(runtime_.api().BindInput(binding_, name.c_str(), value.get()));
  }

  void bind_all(std::int64_t slots) {
    type_ = loaded_->type();
    const auto item = static_cast<std::size_t>(io_.itemsize());
    const std::size_t bytes = static_cast<std::size_t>(io_.kv_heads * slots * io_.head_dim) * item;
    for (const auto& [past, present] : io_.caches()) {
      caches_.emplace_back(bytes);
      const OrtHeld value = tensor(caches_.back().data(), bytes, {1, io_.kv_heads, slots, io_.head_dim}, type_);
      bind_input(past, value);
      check(runtime_.api().BindOutput(binding_, present.c_str(), value.get()));
    }
    const auto width = static_cast<std::size_t>(io_.vocabulary);
    logits_.resize(width);
    if (item != sizeof(float)) raw_logits_.resize(width);
    void* out = item == sizeof(float) ? static_cast<void*>(logits_.data()) : raw_logits_.data();
    const OrtHeld value = tensor(out, width * item, {1, 1, io_.vocabulary}, type_);
    check(runtime_.api().BindOutput(binding_, "logits", value.get()));
    bind_step();
    const auto& inputs = loaded_->contract.inputs;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      const std::vector<std::int64_t> shape{inputs[i].rows, inputs[i].columns};
      const std::size_t size = static_cast<std::size_t>(shape[0] * shape[1]) * item;
      bind_input(inputs[i].name, tensor(lora_.data() + layout_.offset(i), size, shape, type_));
    }
  }

  void bind_step() {
    const char* names[] = {"input_ids", "position_ids", "write_index", "logits_index"};
    for (int i = 0; i < 4; ++i) {
      const std::vector<std::int64_t> shape = i == 2 ? std::vector<std::int64_t>{1} : std::vector<std::int64_t>{1, 1};
      bind_input(names[i], tensor(&step_[i], 8, shape, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64));
    }
  }

  const float* execute() {
    check(runtime_.api().RunWithBinding(loaded_->model.session(), nullptr, binding_));
    if (!raw_logits_.empty()) to_float32(io_.activations, raw_logits_.data(), raw_logits_.size(), logits_.data());
    return logits_.data();
  }

  std::shared_ptr<Loaded> loaded_;
  const DecoderIO& io_;
  const OrtRuntime& runtime_;
  OrtIoBinding* binding_ = nullptr;
  ONNXTensorElementDataType type_{};
  std::int64_t capacity_ = 0;
  Limit limit_ = Limit::bundle;
  std::int64_t step_[4] = {};  // token, position, write index, logits index: the inputs of a decode step
  std::vector<std::vector<unsigned char>> caches_;
  LoraLayout layout_;
  std::vector<unsigned char> lora_;
  std::vector<float> logits_;
  std::vector<std::uint16_t> raw_logits_;
};

}  // namespace

std::unique_ptr<Decoder> make_ort_decoder(const std::shared_ptr<BundleState>& bundle, const SessionOptions& options) {
  return std::make_unique<OrtDecoder>(load_cpu_form(bundle, options), options.context);
}

}  // namespace coatrt::detail
