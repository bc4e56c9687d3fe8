// ONNX Runtime of the CPU that says it has the CUDA provider, and runs on the CPU what is sent there: with the stub of
// libcuda, "device" memory is the host's. COATRT_STUB_REAL names the real library. COATRT_STUB_PROVIDER "missing" lets the
// provider's library not load, "uncaptured" refuses CUDA graphs. What it is asked goes to COATRT_STUB_LOG.
#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

const OrtApi* real = nullptr;
std::mutex mutex;
std::map<const OrtRunOptions*, std::string> runs;
bool graphs = false;

void log(const std::string& line) {
  const char* path = std::getenv("COATRT_STUB_LOG");
  if (path == nullptr) return;
  std::FILE* file = std::fopen(path, "a");
  std::fprintf(file, "%s\n", line.c_str());
  std::fclose(file);
}

bool told(const char* what) {
  const char* text = std::getenv("COATRT_STUB_PROVIDER");
  return text != nullptr && std::strcmp(text, what) == 0;
}

OrtStatusPtr available(char*** names, int* count) noexcept {
  static char cuda[] = "CUDAExecutionProvider", cpu[] = "CPUExecutionProvider";
  static char* both[] = {cuda, cpu};
  return *names = both, *count = 2, nullptr;
}
OrtStatusPtr release_available(char**, int) noexcept { return nullptr; }

OrtStatusPtr create_options(OrtCUDAProviderOptionsV2** made) noexcept {
  return *made = reinterpret_cast<OrtCUDAProviderOptionsV2*>(new int), nullptr;
}
void release_options(OrtCUDAProviderOptionsV2* made) noexcept { delete reinterpret_cast<int*>(made); }
OrtStatusPtr update_options(OrtCUDAProviderOptionsV2*, const char* const* keys, const char* const* values, size_t count) noexcept {
  if (told("missing"))
    return real->CreateStatus(ORT_FAIL, "Failed to load library libonnxruntime_providers_cuda.so with error: "
                                        "libcublasLt.so.13: cannot open shared object file: No such file or directory");
  std::string line = "options";
  for (size_t i = 0; i < count; ++i) line += std::string(" ") + keys[i] + "=" + values[i];
  graphs = line.find("enable_cuda_graph=1") != line.npos;
  log(line);
  return nullptr;
}
OrtStatusPtr update_value(OrtCUDAProviderOptionsV2*, const char* key, void* value) noexcept {
  char text[64];
  std::snprintf(text, sizeof text, "option %s=%p", key, value);
  return log(text), nullptr;
}
OrtStatusPtr append(OrtSessionOptions*, const OrtCUDAProviderOptionsV2*) noexcept { return nullptr; }

OrtStatusPtr create_session(const OrtEnv* env, const char* path, const OrtSessionOptions* options, OrtSession** made) noexcept {
  const std::string file = path;
  const bool cuda = file.size() > 9 && file.compare(file.size() - 9, 9, "cuda.onnx") == 0;
  if (cuda && graphs && told("uncaptured"))
    return real->CreateStatus(ORT_FAIL, "This session cannot use the graph capture feature as requested by the user");
  log("session " + file.substr(file.rfind('/') + 1));
  return real->CreateSession(env, path, options, made);
}
OrtStatusPtr memory_info(const char* name, OrtAllocatorType type, int id, OrtMemType kind, OrtMemoryInfo** made) noexcept {
  return real->CreateMemoryInfo(std::strcmp(name, "Cuda") == 0 ? "Cpu" : name, type, id, kind, made);
}
OrtStatusPtr run_entry(OrtRunOptions* options, const char* key, const char* value) noexcept {
  const std::lock_guard lock(mutex);
  runs[options] += std::string(" ") + key + "=" + value;
  return nullptr;
}
OrtStatusPtr run(OrtSession* session, const OrtRunOptions* options, const OrtIoBinding* binding) noexcept {
  {
    const std::lock_guard lock(mutex);
    log("run" + (runs.count(options) != 0 ? runs[options] : ""));
  }
  return real->RunWithBinding(session, options, binding);
}

const OrtApi* api(uint32_t version) noexcept {
  static OrtApi altered;
  void* library = dlopen(std::getenv("COATRT_STUB_REAL"), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (library == nullptr) return nullptr;
  const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(library, "OrtGetApiBase"))();
  real = base->GetApi(version);
  if (real == nullptr) return nullptr;
  std::memcpy(static_cast<void*>(&altered), real, sizeof altered);
  altered.GetAvailableProviders = available;
  altered.ReleaseAvailableProviders = release_available;
  altered.CreateCUDAProviderOptions = create_options;
  altered.ReleaseCUDAProviderOptions = release_options;
  altered.UpdateCUDAProviderOptions = update_options;
  altered.UpdateCUDAProviderOptionsWithValue = update_value;
  altered.SessionOptionsAppendExecutionProvider_CUDA_V2 = append;
  altered.CreateSession = create_session;
  altered.CreateMemoryInfo = memory_info;
  altered.AddRunConfigEntry = run_entry;
  altered.RunWithBinding = run;
  return &altered;
}

const char* version() noexcept { return "stub"; }

}  // namespace

extern "C" const OrtApiBase* OrtGetApiBase() noexcept {
  static const OrtApiBase base{api, version};
  return &base;
}
