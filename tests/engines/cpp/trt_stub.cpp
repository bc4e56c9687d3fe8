// The TensorRT backend over a stub: an "engine" that says the token after t is t + 1 + the LoRA's first element.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <NvInferRuntime.h>
#include <doctest/doctest.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>

#include "backend.hpp"
#include "coatrt/coatrt.hpp"
#include "half.hpp"
#include "state.hpp"

namespace {

struct World {
  int devices = 1, launches = 0, plain = 0, writes = 0, reads = 0, waits = 0;
  bool capturing = false, pageable = false;
  enum class Capture { works, refused, invalid, fails } capture = Capture::works;
  std::int32_t version = NV_TENSORRT_VERSION;
  std::set<void*> memory;               // of the device
  std::map<void*, std::size_t> locked;  // of the host, page-locked
  std::map<std::string, void*> addresses;
  std::map<std::string, nvinfer1::Dims> shapes;
  std::map<std::string, nvinfer1::Dims> engine;  // what the engine says of each tensor
  std::string first_lora;
} world;

void execute() {
  const auto* ids = static_cast<const std::int64_t*>(world.addresses.at("input_ids"));
  const auto* index = static_cast<const std::int64_t*>(world.addresses.at("logits_index"));
  const auto vocabulary = static_cast<std::size_t>(world.engine.at("logits").d[2]);
  auto* logits = static_cast<std::uint16_t*>(world.addresses.at("logits"));
  const auto* lora = static_cast<const std::uint16_t*>(world.addresses.at(world.first_lora));
  std::memset(logits, 0, 2 * vocabulary);
  const auto shift = static_cast<std::int64_t>(coatrt::detail::from_float16(lora[0]));
  logits[static_cast<std::size_t>(ids[*index] + 1 + shift) % vocabulary] = coatrt::detail::to_float16(1);
}

struct Context final : nvinfer1::IExecutionContext {
  bool setTensorAddress(const char* name, void* data) override { return world.addresses[name] = data, true; }
  bool setInputShape(const char* name, const nvinfer1::Dims& dims) override { return world.shapes[name] = dims, true; }
  bool enqueueV3(cudaStream_t) override {
    if (!world.capturing) ++world.plain, execute();
    return !world.capturing || world.capture != World::Capture::refused;
  }
};
struct Engine final : nvinfer1::ICudaEngine {
  nvinfer1::IExecutionContext* createExecutionContext() override { return new Context; }
  nvinfer1::Dims getTensorShape(const char* name) const override { return world.engine.count(name) ? world.engine[name] : nvinfer1::Dims{-1, {}}; }
  nvinfer1::DataType getTensorDataType(const char* name) const override {
    const std::string text = name;
    const bool integer = text == "input_ids" || text == "position_ids" || text == "write_index" || text == "logits_index";
    return integer ? nvinfer1::DataType::kINT64 : nvinfer1::DataType::kHALF;
  }
};
struct Runtime final : nvinfer1::IRuntime {
  nvinfer1::ICudaEngine* deserializeCudaEngine(const void* data, std::size_t size) override {
    return size == 6 && std::memcmp(data, "engine", 6) == 0 ? new Engine : nullptr;
  }
};

}  // namespace

extern "C" std::int32_t getInferLibVersion() noexcept { return world.version; }
nvinfer1::IRuntime* nvinfer1::createInferRuntime(ILogger&) { return new Runtime; }
const char* cudaGetErrorString(cudaError_t) { return "stub"; }
cudaError_t cudaGetDeviceCount(int* n) { return *n = world.devices, world.devices ? cudaSuccess : cudaErrorNoDevice; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = which == cudaDevAttrComputeCapabilityMajor ? 8 : 9, cudaSuccess;
}
cudaError_t cudaMalloc(void** data, std::size_t bytes) { return world.memory.insert(*data = std::malloc(bytes)), cudaSuccess; }
cudaError_t cudaFree(void* data) { return world.memory.erase(data), std::free(data), cudaSuccess; }
cudaError_t cudaMallocHost(void** data, std::size_t bytes) { return world.locked[*data = std::malloc(bytes)] = bytes, cudaSuccess; }
cudaError_t cudaFreeHost(void* data) { return world.locked.erase(data), std::free(data), cudaSuccess; }
cudaError_t cudaMemsetAsync(void* data, int value, std::size_t bytes, cudaStream_t) { return std::memset(data, value, bytes), cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  const bool in = kind == cudaMemcpyHostToDevice;
  ++(in ? world.writes : world.reads);
  if (world.locked.count(in ? const_cast<void*>(from) : to) == 0) world.pageable = true;
  return std::memcpy(to, from, bytes), cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = reinterpret_cast<cudaStream_t>(new int), cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { return delete reinterpret_cast<int*>(stream), cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return ++world.waits, cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return world.capturing = true, cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  world.capturing = false;
  if (world.capture == World::Capture::invalid) return *graph = nullptr, cudaErrorStreamCaptureUnsupported;
  return *graph = reinterpret_cast<cudaGraph_t>(new int), cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* graph, cudaGraph_t, unsigned long long) {
  if (world.capture == World::Capture::fails) return cudaErrorStreamCaptureUnsupported;
  return *graph = reinterpret_cast<cudaGraphExec_t>(new int), cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete reinterpret_cast<int*>(graph), cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete reinterpret_cast<int*>(graph), cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return ++world.launches, execute(), cudaSuccess; }

namespace {
const char* bundle_path() { return std::getenv("COATRT_TEST_ENGINE_BUNDLE"); }
}  // namespace

TEST_CASE("the TensorRT backend over the stub" * doctest::skip(bundle_path() == nullptr)) {
  using namespace coatrt;
  const auto bundle = Bundle::open(bundle_path());
  const auto io = bundle.state()->decoder("engine").second;
  const auto contract = bundle.state()->contract();
  world.first_lora = contract.inputs[0].name;
  for (const auto& [past, present] : io.caches())
    world.engine[past] = world.engine[present] = {4, {-1, io.kv_heads, io.cache_length, io.head_dim}};
  for (const auto& input : contract.inputs) world.engine[input.name] = {2, {input.rows, input.columns}};
  world.engine["input_ids"] = world.engine["position_ids"] = {2, {-1, -1}};
  world.engine["write_index"] = {1, {-1}};
  world.engine["logits_index"] = {2, {-1, 1}};
  world.engine["logits"] = {3, {-1, 1, io.vocabulary}};
  SessionOptions options;
  options.backend = "trt";
  const auto open = [&] { return Session(bundle, detail::make_trt_decoder(bundle.state(), options)); };

  world.devices = 0;
  CHECK_THROWS_WITH_AS(open(), "no NVIDIA GPU here; run the bundle with --backend ort", Error);
  world.devices = 1;
  world.version = 101400;
  CHECK_THROWS_WITH_AS(open(), "this was compiled with TensorRT headers 90900, the library is 101400; compile with the library's own headers", Error);
  world.version = NV_TENSORRT_VERSION;
  const auto logits = world.engine["logits"];
  world.engine["logits"].d[2] = 7;
  CHECK_THROWS_WITH_AS(open(), "the engine and the manifest differ in logits; build the bundle again", Error);
  world.engine["logits"] = logits;
  CHECK(world.memory.empty());  // whatever failed has given its memory back
  {
    Session session = open();
    session.drop_lora();
    const auto before = world.addresses;
    auto made = session.generate({1, 2, 3, 4, 5, 6, 7}, 5);  // the profile takes 4 tokens at once
    CHECK(made.tokens == std::vector<std::int64_t>{8, 9, 10, 11, 12});
    CHECK(world.plain == 3);  // two pieces and the first step, which was captured
    CHECK(world.launches == 3);
    made = session.generate({30}, 3);  // a prompt of one token is a step
    CHECK(made.tokens == std::vector<std::int64_t>{31, 32, 33});
    std::vector<std::vector<float>> memory;
    std::vector<LoraTensor> tensors;
    for (const auto& said : contract.tensors) {
      memory.emplace_back(static_cast<std::size_t>(said.rows * said.columns), 2.0f);
      tensors.push_back({said.name, said.rows, said.columns, memory.back().data()});
    }
    session.swap(Lora(tensors, nullptr));  // the captured graph reads the same addresses
    CHECK(session.generate({1}, 3).tokens == std::vector<std::int64_t>{4, 7, 10});
    CHECK(world.addresses == before);
    for (const auto& [past, present] : io.caches()) CHECK(before.at(past) == before.at(present));
    for (const auto& [name, address] : before) CHECK_MESSAGE(reinterpret_cast<std::uintptr_t>(address) % 16 == 0, name);

    session.prefill({1, 2});
    world.writes = world.reads = world.waits = world.launches = world.plain = 0;
    for (const std::int64_t token : {3, 4, 5}) session.decode(token);
    CHECK(world.writes == 3);  // one each a step
    CHECK(world.reads == 3);
    CHECK(world.waits == 3);
    CHECK(world.launches == 3);
    CHECK(world.plain == 0);
    session.swap(Lora(tensors, nullptr));
    CHECK(world.writes == 4);  // the whole LoRA
    CHECK(world.waits == 4);
    session.drop_lora();
    CHECK(world.writes == 4);
    CHECK(session.generate({1}, 3).tokens == std::vector<std::int64_t>{2, 3, 4});
    CHECK_FALSE(world.pageable);
  }
  CHECK(world.memory.empty());
  CHECK(world.locked.empty());

  std::vector<std::string> lines;
  options.notice = [&](const std::string& line) { lines.push_back(line); };
  for (const auto capture : {World::Capture::refused, World::Capture::invalid, World::Capture::fails}) {
    world.capture = capture;
    lines.clear();
    world.launches = world.plain = 0;
    Session session = open();
    session.drop_lora();
    CHECK(session.generate({1, 2}, 5).tokens == std::vector<std::int64_t>{3, 4, 5, 6, 7});
    CHECK(world.launches == 0);
    CHECK(world.plain == 5);  // the prompt and each step once
    REQUIRE(lines.size() == 1);
    CHECK(lines[0].find("decoding is slower: sm89.engine cannot be captured as a CUDA graph (") == 0);
  }
  world.capture = World::Capture::works;
  options.provider_options["cuda_graph"] = "0";
  lines.clear();
  world.launches = 0;
  {
    Session session = open();
    session.drop_lora();
    CHECK(session.generate({1, 2}, 5).tokens == std::vector<std::int64_t>{3, 4, 5, 6, 7});
  }
  CHECK(world.launches == 0);
  CHECK(lines.empty());
  CHECK(world.memory.empty());
  CHECK(world.locked.empty());
}
