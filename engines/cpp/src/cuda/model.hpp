#pragma once
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "coatrt/session.hpp"
#include "contract.hpp"
#include "cuda/lane.hpp"
#include "cuda/memory.hpp"
#include "cuda/seat.hpp"
#include "ort/runtime.hpp"
#include "packed_lora.hpp"
#include "state.hpp"

namespace coatrt::detail {

/// The cuda form of a bundle, loaded once for all sessions of equal options, and the places they sit on. Everything but
/// the constructor, `take`, `give` and `on_lane` runs on its lane.
class CudaModel {
 public:
  /// Load the graph. The context is that of the first session, for the look at the GPU's memory.
  CudaModel(BundleState& bundle, const SessionOptions& options);
  ~CudaModel();
  CudaModel(const CudaModel&) = delete;
  CudaModel& operator=(const CudaModel&) = delete;

  /// A place with caches of so many slots: one that a session left, or a new one.
  std::unique_ptr<Seat> take(std::int64_t slots);
  void give(std::unique_ptr<Seat> seat) noexcept;
  void on_lane(const std::function<void()>& task) { lane_.run(task); }

  const DecoderIO& io() const { return io_; }
  const Contract& contract() const { return contract_; }
  const LoraLayout& layout() const { return layout_; }
  Memory& memory() const { return *memory_; }
  const OrtRuntime& runtime() const { return *runtime_; }
  OrtSession* session() const { return model_->session(); }
  bool has_input(const std::string& name) const { return inputs_.count(name) != 0; }
  /// Where ONNX Runtime is to look for what lies in `memory`.
  const OrtMemoryInfo* place() const { return place_.get() != nullptr ? place_.get() : runtime_->cpu(); }
  /// Whether decode steps are replayed as CUDA graphs.
  bool replays() const { return replays_; }

 private:
  using Form = std::pair<std::filesystem::path, DecoderIO>;
  CudaModel(BundleState& bundle, const SessionOptions& options, const Form& form);
  void load(BundleState& bundle, const SessionOptions& options, const std::filesystem::path& graph);
  void load_on_gpu(BundleState& bundle, const SessionOptions& options, const std::filesystem::path& graph);
  Needs needs(std::int64_t slots, std::size_t weights) const;

  DecoderIO io_;
  Contract contract_;
  LoraLayout layout_;
  std::shared_ptr<OrtRuntime> runtime_;
  std::unique_ptr<Memory> memory_;
  std::unique_ptr<OrtMemoryInfo, void (*)(OrtMemoryInfo*)> place_;
  std::unique_ptr<OrtModel> model_;
  std::set<std::string> inputs_;
  bool replays_ = false;
  std::vector<std::string> notes_;  // for whoever loads it
  std::vector<std::unique_ptr<Seat>> left_;  // by closed sessions: their graphs stay captured, so their places stay too
  int seats_ = 0;
  Lane lane_;
};

}  // namespace coatrt::detail
