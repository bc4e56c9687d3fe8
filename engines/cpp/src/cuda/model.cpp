#include "cuda/model.hpp"

#include <algorithm>

#include "coatrt/error.hpp"
#include "cuda/device_memory.hpp"
#include "cuda/weights.hpp"
#include "notice.hpp"
#include "ort/cuda_provider.hpp"

namespace coatrt::detail {
namespace {

/// As the Python package sets them; what a session was given comes over them.
std::map<std::string, std::string> provider_options(const std::map<std::string, std::string>& given) {
  std::map<std::string, std::string> made = given;
  made.insert({{"device_id", "0"},
               {"enable_cuda_graph", "1"},
               {"use_tf32", "0"},
               {"arena_extend_strategy", "kSameAsRequested"},
               {"enable_skip_layer_norm_strict_mode", "1"}});  // else squares are summed in float16
  return made;
}

}  // namespace

CudaModel::CudaModel(BundleState& bundle, const SessionOptions& options)
    : CudaModel(bundle, options, bundle.decoder("cuda")) {}

CudaModel::CudaModel(BundleState& bundle, const SessionOptions& options, const Form& form)
    : io_(form.second),
      contract_(bundle.contract()),
      layout_(contract_, io_.activations, static_cast<std::size_t>(io_.itemsize())),
      runtime_(bundle.ort()),
      place_(nullptr, runtime_->api().ReleaseMemoryInfo) {
  try {
    lane_.run([&] { load(bundle, options, form.first); });
  } catch (...) {
    lane_.run([&] { model_.reset(), memory_.reset(); });
    throw;
  }
  for (const std::string& note : notes_) notify(options, note);
}

CudaModel::~CudaModel() {
  lane_.run([&] { left_.clear(), model_.reset(), memory_.reset(); });
}

void CudaModel::load(BundleState& bundle, const SessionOptions& options, const std::filesystem::path& graph) {
  if (options.provider == "cpu") {
    OrtOptions wanted;
    wanted.threads = options.threads;
    wanted.decode_weights = false;
    memory_ = std::make_unique<HostMemory>();
    model_ = std::make_unique<OrtModel>(runtime_, graph, wanted);
  } else {
    load_on_gpu(bundle, options, graph);
  }
  inputs_ = model_->inputs();
  std::vector<std::string> names;
  for (const auto& cache : io_.caches()) names.push_back(cache.first);
  for (const auto& input : contract_.inputs) names.push_back(input.name);
  for (const std::string& name : names)
    if (!has_input(name))
      throw Error(graph.filename().string() + " has no input " + name + ", which its bundle names; build the bundle again");
}

void CudaModel::load_on_gpu(BundleState& bundle, const SessionOptions& options, const std::filesystem::path& graph) {
  auto driver = std::make_unique<Driver>();
  check_cuda_provider(*runtime_, driver->sm());
  memory_ = std::make_unique<DeviceMemory>(std::move(driver));
  const DeviceWeights weights = device_weights(bundle.configuration(), bundle.manifest.at("matrices"));
  memory_->check_room(needs(std::min(options.context, io_.max_positions), weights.bytes));
  OrtMemoryInfo* place = nullptr;
  runtime_->check(runtime_->api().CreateMemoryInfo("Cuda", OrtDeviceAllocator, 0, OrtMemTypeDefault, &place),
                  "ONNX Runtime fails");
  place_.reset(place);
  OrtOptions wanted;
  wanted.threads = options.threads;
  wanted.decode_weights = false;
  wanted.provider = kCudaProvider;
  wanted.provider_options = provider_options(options.provider_options);
  wanted.stream = memory_->stream();
  std::string& graphs = wanted.provider_options.at("enable_cuda_graph");
  try {
    model_ = std::make_unique<OrtModel>(runtime_, graph, wanted);
  } catch (const Error& error) {
    const std::string said = error.what();
    if (said.find("raph capture") == said.npos || graphs == "0") throw;
    notes_.push_back("decoding is slower: " + graph.filename().string() +
                     " cannot be captured as a CUDA graph (" + said + ")");
    graphs = "0";
    model_ = std::make_unique<OrtModel>(runtime_, graph, wanted);
  }
  replays_ = graphs != "0";
  if (!weights.note.empty()) notes_.push_back(weights.note);
}

Needs CudaModel::needs(std::int64_t slots, std::size_t weights) const {
  const std::size_t cache = aligned(static_cast<std::size_t>(io_.kv_heads * slots * io_.head_dim * io_.itemsize()));
  return {weights, cache * io_.caches().size(), layout_.bytes() + static_cast<std::size_t>(io_.vocabulary) * sizeof(float),
          slots};
}

std::unique_ptr<Seat> CudaModel::take(std::int64_t slots) {
  std::unique_ptr<Seat> seat;
  lane_.run([&] {
    const auto same = std::find_if(left_.begin(), left_.end(), [&](const auto& one) { return one->slots() == slots; });
    if (same != left_.end()) {
      seat = std::move(*same);
      left_.erase(same);
      seat->clear();
      return;
    }
    left_.clear();  // of other sizes: their memory is worth more than their graphs
    memory_->check_room(needs(slots, 0));
    seat = std::make_unique<Seat>(*this, slots, ++seats_);
  });
  return seat;
}

void CudaModel::give(std::unique_ptr<Seat> seat) noexcept {
  lane_.run([&] { left_.push_back(std::move(seat)); });
}

}  // namespace coatrt::detail
