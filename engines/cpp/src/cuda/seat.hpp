#pragma once
#include <onnxruntime_c_api.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cuda/memory.hpp"

namespace coatrt::detail {

class CudaModel;

/// What one session has on the device: caches, LoRA, step inputs and logits at fixed addresses, bound once, and the number
/// of its captured CUDA graph, which reads and writes these addresses. Used on the model's lane.
class Seat {
 public:
  Seat(CudaModel& model, std::int64_t slots, int number);
  ~Seat();
  Seat(const Seat&) = delete;
  Seat& operator=(const Seat&) = delete;

  std::int64_t slots() const { return slots_; }
  /// Forget a sequence and a LoRA.
  void clear();
  /// Page-locked memory that a LoRA is packed in.
  unsigned char* lora_staging();
  /// Copy what was packed there, or zeros.
  void bind_lora(bool packed);
  /// Run tokens from position `start`; the logits after the last one are valid until the next call.
  const float* run(const std::int64_t* tokens, std::size_t count, std::int64_t start);

 private:
  struct Piece {
    const char* name;
    std::size_t offset, bytes;
    std::vector<std::int64_t> shape;
    ONNXTensorElementDataType type;
  };
  /// What changes with every call of `added` tokens, and where it lies in the buffer.
  static std::vector<Piece> pieces(std::int64_t added);
  static std::size_t step_bytes(std::int64_t added);

  void bind_all(OrtIoBinding* binding);
  void bind_step(OrtIoBinding* binding, std::int64_t added);
  void bind(OrtIoBinding* binding, const std::string& name, void* data, std::size_t bytes,
            const std::vector<std::int64_t>& shape, ONNXTensorElementDataType type, bool output = false);
  OrtRunOptions* run_options(const std::string& graph);
  void release() noexcept;

  CudaModel& model_;
  std::int64_t slots_;
  std::vector<Buffer> caches_;
  Buffer lora_, steps_, steps_staging_, logits_, logits_here_;
  std::vector<Buffer> lora_staging_;  // none before the first LoRA
  std::int32_t total_ = 0;            // read on the host
  // What decode binds stays as it is, a prefill binds its own number of tokens.
  OrtIoBinding *decode_ = nullptr, *prefill_ = nullptr;
  OrtRunOptions *captured_ = nullptr, *plain_ = nullptr;
};

}  // namespace coatrt::detail
