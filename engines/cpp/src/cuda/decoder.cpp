// The cuda form of the graph in ONNX Runtime's CUDA provider: everything on the GPU at fixed addresses, decode steps
// replayed as a CUDA graph.

#include <algorithm>

#include "backend.hpp"
#include "coatrt/error.hpp"
#include "cuda/model.hpp"
#include "state.hpp"

namespace coatrt::detail {
namespace {

class CudaDecoder final : public Decoder {
 public:
  CudaDecoder(std::shared_ptr<CudaModel> model, std::int64_t slots) : model_(std::move(model)), seat_(model_->take(slots)) {}
  ~CudaDecoder() override { model_->give(std::move(seat_)); }

  std::int64_t capacity() const override { return seat_->slots(); }
  Limit limit() const override { return capacity() == model_->io().max_positions ? Limit::bundle : Limit::context; }
  std::int64_t prefill_limit() const override { return capacity(); }
  std::int64_t vocabulary() const override { return model_->io().vocabulary; }

  void set_lora(const Lora* lora) override {
    if (lora != nullptr) {
      unsigned char* staging = nullptr;
      model_->on_lane([&] { staging = seat_->lora_staging(); });
      model_->layout().fill(*lora, staging);  // here: the lane goes on with other sessions meanwhile
    }
    model_->on_lane([&] { seat_->bind_lora(lora != nullptr); });
  }

  const float* run(const std::int64_t* tokens, std::size_t count, std::int64_t start) override {
    const float* logits = nullptr;
    model_->on_lane([&] { logits = seat_->run(tokens, count, start); });
    return logits;
  }

 private:
  std::shared_ptr<CudaModel> model_;
  std::unique_ptr<Seat> seat_;
};

}  // namespace

std::unique_ptr<Decoder> make_cuda_decoder(const std::shared_ptr<BundleState>& bundle, const SessionOptions& options) {
  if (options.context < 1)
    throw Error("batch 1 and context " + std::to_string(options.context) + " are given; give at least 1");
  if (!options.provider.empty() && options.provider != "cpu")
    throw Error("provider " + repr(options.provider) + " is given for backend cuda; leave it empty");
  std::string key = "cuda " + options.provider + " " + std::to_string(options.threads);
  for (const auto& [name, value] : options.provider_options) key += " " + name + "=" + value;
  std::shared_ptr<CudaModel> model;
  const std::lock_guard one(bundle->loading);
  {
    const std::lock_guard lock(bundle->mutex);
    model = std::static_pointer_cast<CudaModel>(bundle->models[key].lock());
  }
  if (!model) {
    model = std::make_shared<CudaModel>(*bundle, options);
    const std::lock_guard lock(bundle->mutex);
    bundle->models[key] = model;
  }
  const std::int64_t slots = std::min(options.context, model->io().max_positions);
  return std::make_unique<CudaDecoder>(std::move(model), slots);
}

}  // namespace coatrt::detail
