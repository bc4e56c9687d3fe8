#include "ort/runtime.hpp"

#include <dlfcn.h>
#include <sched.h>

#include <algorithm>
#include <cstdlib>
#include <thread>

#include "coatrt/error.hpp"
#include "ort/cuda_provider.hpp"

namespace coatrt::detail {
namespace {

std::vector<std::string> candidates(const std::string& given) {
  if (!given.empty()) return {given};
  if (const char* named = std::getenv("COATRT_ONNXRUNTIME"); named != nullptr && *named != '\0') return {named};
  std::vector<std::string> found;
#ifdef COATRT_ONNXRUNTIME_LIBRARY
  found.emplace_back(COATRT_ONNXRUNTIME_LIBRARY);
#endif
  found.insert(found.end(), {"libonnxruntime.so.1", "libonnxruntime.so"});
  return found;
}

int usable_cores() {
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof set, &set) == 0) return CPU_COUNT(&set);
  return static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
}

std::string first_line(const std::string& text) { return text.substr(0, text.find('\n')); }

}  // namespace

OrtRuntime::OrtRuntime(const std::string& library) {
  // ONNX Runtime 1.31 reads this as it loads: without it, it writes a device id to the user's cache directory. A value of
  // the user's own stays.
  ::setenv("ORT_DISABLE_TELEMETRY", "1", 0);
  std::string problem;
  for (const std::string& name : candidates(library)) {
    // NODELETE: ONNX Runtime leaves threads' destructors behind, so its code must stay.
    library_ = ::dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    if (library_ != nullptr) break;
    if (problem.empty()) problem = first_line(::dlerror());
  }
  if (library_ == nullptr)
    throw Error("ONNX Runtime does not load (" + problem +
                "); name its libonnxruntime.so in COATRT_ONNXRUNTIME, as coatrt cmake-dir --onnxruntime prints it");
  using GetBase = const OrtApiBase* (*)();
  const auto get = reinterpret_cast<GetBase>(::dlsym(library_, "OrtGetApiBase"));
  const OrtApiBase* base = get == nullptr ? nullptr : get();
  api_ = base == nullptr ? nullptr : base->GetApi(ORT_API_VERSION);
  if (api_ == nullptr)
    throw Error("ONNX Runtime " + std::string(base == nullptr ? "unknown" : base->GetVersionString()) +
                " is loaded, this was compiled for API " + std::to_string(ORT_API_VERSION) + "; use 1." +
                std::to_string(ORT_API_VERSION) + " or later");
  version_ = base->GetVersionString();
  check(api_->CreateEnv(ORT_LOGGING_LEVEL_FATAL, "coatrt", &env_), "ONNX Runtime does not start");
  check(api_->CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &cpu_), "ONNX Runtime does not start");
}

OrtRuntime::~OrtRuntime() {
  if (api_ != nullptr) {
    if (cpu_ != nullptr) api_->ReleaseMemoryInfo(cpu_);
    if (env_ != nullptr) api_->ReleaseEnv(env_);
  }
  if (library_ != nullptr) ::dlclose(library_);
}

std::filesystem::path OrtRuntime::library() const {
  Dl_info found{};
  if (::dladdr(::dlsym(library_, "OrtGetApiBase"), &found) == 0 || found.dli_fname == nullptr) return {};
  return found.dli_fname;
}

bool OrtRuntime::has(const std::string& provider) const {
  char** names = nullptr;
  int count = 0;
  check(api_->GetAvailableProviders(&names, &count), "ONNX Runtime does not name its providers");
  const bool found = std::find(names, names + count, provider) != names + count;
  check(api_->ReleaseAvailableProviders(names, count), "ONNX Runtime does not name its providers");
  return found;
}

void OrtRuntime::check(OrtStatus* status, const std::string& what, const std::string& then) const {
  if (status == nullptr) return;
  const std::string said = first_line(api_->GetErrorMessage(status));
  api_->ReleaseStatus(status);
  throw Error(what + " (" + said + ")" + then);
}

OrtValue* OrtRuntime::tensor(void* data, std::size_t bytes, const std::vector<std::int64_t>& shape,
                             ONNXTensorElementDataType type, const OrtMemoryInfo* place) const {
  OrtValue* value = nullptr;
  check(api_->CreateTensorWithDataAsOrtValue(place != nullptr ? place : cpu_, data, bytes, shape.data(), shape.size(), type, &value),
        "ONNX Runtime refuses a tensor");
  return value;
}

OrtModel::OrtModel(std::shared_ptr<OrtRuntime> runtime, const std::filesystem::path& graph, const OrtOptions& options)
    : runtime_(std::move(runtime)) {
  const OrtApi& api = runtime_->api();
  const std::string refusal = "ONNX Runtime refuses " + graph.filename().string();
  OrtSessionOptions* raw = nullptr;
  runtime_->check(api.CreateSessionOptions(&raw), refusal);
  const std::unique_ptr<OrtSessionOptions, void (*)(OrtSessionOptions*)> held(raw, api.ReleaseSessionOptions);
  runtime_->check(api.SetSessionLogSeverityLevel(raw, ORT_LOGGING_LEVEL_FATAL), refusal);  // errors come back as a status
  runtime_->check(api.SetIntraOpNumThreads(raw, options.threads > 0 ? options.threads : usable_cores()), refusal);
  if (options.accuracy_level == 0 && options.decode_weights)  // exact: weights are decoded once, when the graph loads
    runtime_->check(api.AddSessionConfigEntry(raw, "session.disable_quant_qdq", "1"), refusal);
  runtime_->check(api.AddSessionConfigEntry(raw, "session.qdq_matmulnbits_accuracy_level",
                                            std::to_string(options.accuracy_level).c_str()),
                  refusal);
  append_provider(raw, options);
  runtime_->check(api.CreateSession(runtime_->env_, graph.c_str(), raw, &session_), refusal, "; export it again");
}

OrtModel::~OrtModel() {
  if (session_ != nullptr) runtime_->api().ReleaseSession(session_);
}

std::set<std::string> OrtModel::inputs() const {
  const OrtApi& api = runtime_->api();
  const std::string refusal = "ONNX Runtime names no inputs";
  OrtAllocator* allocator = nullptr;
  std::size_t count = 0;
  runtime_->check(api.GetAllocatorWithDefaultOptions(&allocator), refusal);
  runtime_->check(api.SessionGetInputCount(session_, &count), refusal);
  std::set<std::string> names;
  for (std::size_t i = 0; i < count; ++i) {
    char* name = nullptr;
    runtime_->check(api.SessionGetInputName(session_, i, allocator, &name), refusal);
    names.insert(name);
    runtime_->check(api.AllocatorFree(allocator, name), refusal);
  }
  return names;
}

void OrtModel::append_provider(OrtSessionOptions* options, const OrtOptions& wanted) const {
  if (wanted.provider.empty() || wanted.provider == "cpu" || wanted.provider == "CPUExecutionProvider") return;
  const OrtApi& api = runtime_->api();
  const std::string refusal = "ONNX Runtime has no provider " + wanted.provider + " here";
  std::vector<const char*> keys, values;
  for (const auto& [key, value] : wanted.provider_options) keys.push_back(key.c_str()), values.push_back(value.c_str());
  if (wanted.provider == kCudaProvider) {
    append_cuda(*runtime_, options, keys, values, wanted.stream);
  } else if (wanted.provider == "TensorrtExecutionProvider") {
    OrtTensorRTProviderOptionsV2* raw = nullptr;
    runtime_->check(api.CreateTensorRTProviderOptions(&raw), refusal);
    const std::unique_ptr<OrtTensorRTProviderOptionsV2, void (*)(OrtTensorRTProviderOptionsV2*)> held(
        raw, api.ReleaseTensorRTProviderOptions);
    runtime_->check(api.UpdateTensorRTProviderOptions(raw, keys.data(), values.data(), keys.size()), refusal);
    runtime_->check(api.SessionOptionsAppendExecutionProvider_TensorRT_V2(options, raw), refusal);
  } else {  // NvTensorRTRTXExecutionProvider and whatever registers by name
    runtime_->check(api.SessionOptionsAppendExecutionProvider(options, wanted.provider.c_str(), keys.data(),
                                                              values.data(), keys.size()),
                    refusal);
  }
}

}  // namespace coatrt::detail
