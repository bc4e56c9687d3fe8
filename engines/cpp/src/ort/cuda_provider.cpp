// ONNX Runtime's CUDA provider: which GPUs it serves, where pip puts the libraries it needs, what it says when one is missing.
#include "ort/cuda_provider.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <memory>
#include <regex>

#include "coatrt/error.hpp"
#include "json.hpp"
#include "ort/runtime.hpp"

namespace coatrt::detail {
namespace {

namespace fs = std::filesystem;

/// Compute capabilities that onnxruntime-gpu 1.31 has machine code for; it has none that a driver could translate.
constexpr int kServed[] = {75, 80, 86, 89, 90, 120};
/// In an order in which each finds what it needs.
constexpr const char* kLibraries[] = {"cudart", "nvrtc", "nvJitLink", "cublasLt", "cublas", "curand", "cufft", "cudnn"};

/// Whether a GPU runs that machine code: of its own compute capability, or of a lower minor version.
bool serves(int sm) {
  return std::any_of(std::begin(kServed), std::end(kServed),
                     [sm](int served) { return sm / 10 == served / 10 && sm >= served; });
}

/// Folders of CUDA's libraries in pip's packages beside ONNX Runtime's, sorted.
std::vector<fs::path> library_folders(const fs::path& onnxruntime) {
  const fs::path packages = onnxruntime.parent_path().parent_path().parent_path();  // …/onnxruntime/capi/libonnxruntime.so.1
  std::vector<fs::path> found;
  std::error_code error;
  for (fs::directory_iterator at(packages / "nvidia", error), end; !error && at != end; at.increment(error))
    found.push_back(at->path() / "lib");
  std::sort(found.begin(), found.end());
  return found;
}

/// Load CUDA's libraries where pip has put them: ONNX Runtime finds only what is loaded or on the loader's path.
void load_libraries(const fs::path& onnxruntime) {
  const auto folders = library_folders(onnxruntime);
  for (const std::string name : kLibraries)
    for (const fs::path& folder : folders) {
      std::error_code error;
      for (fs::directory_iterator at(folder, error), end; !error && at != end; at.increment(error))
        if (const std::string file = at->path().filename(); file.rfind("lib" + name + ".so.", 0) == 0)
          ::dlopen(at->path().c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
    }
}

/// Why the provider's library does not load, from what ONNX Runtime says.
std::string why(const std::string& said) {
  static const std::regex missing(R"((\S+): cannot open shared object file)");
  std::smatch found;
  return std::regex_search(said, found, missing) ? found[1].str() + " is missing" : said;
}

}  // namespace

void check_cuda_provider(const OrtRuntime& runtime, int sm) {
  if (!serves(sm)) {
    std::vector<std::string> have;
    for (const int served : kServed) have.push_back("SM" + std::to_string(served));
    throw Error("this GPU is SM" + std::to_string(sm) + ", onnxruntime-gpu has code for " + join(have) +
                "; run with --backend ort");
  }
  if (!runtime.has(kCudaProvider))
    throw Error("onnxruntime " + runtime.version() + " here is built without CUDA; install onnxruntime-gpu in its place, " +
                "or run the bundle with --backend ort");
}

void append_cuda(const OrtRuntime& runtime, OrtSessionOptions* options, const std::vector<const char*>& keys,
                 const std::vector<const char*>& values, void* stream) {
  const OrtApi& api = runtime.api();
  load_libraries(runtime.library());
  const auto check = [&](OrtStatus* status) {
    if (status == nullptr) return;
    const std::string said = why(api.GetErrorMessage(status));
    api.ReleaseStatus(status);
    throw Error("the CUDA provider of ONNX Runtime does not load (" + said.substr(0, said.find('\n')) +
                "); install it, or run the bundle with --backend ort");
  };
  OrtCUDAProviderOptionsV2* raw = nullptr;
  check(api.CreateCUDAProviderOptions(&raw));
  const std::unique_ptr<OrtCUDAProviderOptionsV2, void (*)(OrtCUDAProviderOptionsV2*)> held(
      raw, api.ReleaseCUDAProviderOptions);
  check(api.UpdateCUDAProviderOptions(raw, keys.data(), values.data(), keys.size()));
  // By value: the text form of a stream is not taken over from the options above.
  if (stream != nullptr) check(api.UpdateCUDAProviderOptionsWithValue(raw, "user_compute_stream", stream));
  check(api.SessionOptionsAppendExecutionProvider_CUDA_V2(options, raw));
}

}  // namespace coatrt::detail
