#pragma once
#include <onnxruntime_c_api.h>

#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace coatrt::detail {

/// ONNX Runtime, loaded with dlopen: one binary runs on every version from the headers' on, and nothing is linked.
class OrtRuntime {
 public:
  explicit OrtRuntime(const std::string& library);
  ~OrtRuntime();
  OrtRuntime(const OrtRuntime&) = delete;
  OrtRuntime& operator=(const OrtRuntime&) = delete;

  const OrtApi& api() const { return *api_; }
  const OrtMemoryInfo* cpu() const { return cpu_; }
  const std::string& version() const { return version_; }
  /// The library's own file; empty where the loader does not say.
  std::filesystem::path library() const;
  /// Whether the library was built with an execution provider.
  bool has(const std::string& provider) const;
  /// Throw what a call reports, if anything, as "`what` (first line)`then`".
  void check(OrtStatus* status, const std::string& what, const std::string& then = "") const;
  /// A tensor over memory that must outlive it; `place` is the CPU where none is given.
  OrtValue* tensor(void* data, std::size_t bytes, const std::vector<std::int64_t>& shape,
                   ONNXTensorElementDataType type, const OrtMemoryInfo* place = nullptr) const;

 private:
  friend class OrtModel;
  void* library_ = nullptr;
  const OrtApi* api_ = nullptr;
  OrtEnv* env_ = nullptr;
  OrtMemoryInfo* cpu_ = nullptr;
  std::string version_;
};

/// How a graph runs.
struct OrtOptions {
  std::string provider = "cpu";
  std::map<std::string, std::string> provider_options;
  int threads = 0;
  int accuracy_level = 0;
  bool decode_weights = true;  ///< at accuracy level 0: once, when the graph loads
  void* stream = nullptr;      ///< of CUDA; runs are ordered on it
};

/// A loaded graph; `run` may be called from several threads through bindings of their own.
class OrtModel {
 public:
  OrtModel(std::shared_ptr<OrtRuntime> runtime, const std::filesystem::path& graph, const OrtOptions& options);
  ~OrtModel();
  OrtModel(const OrtModel&) = delete;
  OrtModel& operator=(const OrtModel&) = delete;

  const OrtRuntime& runtime() const { return *runtime_; }
  OrtSession* session() const { return session_; }
  std::set<std::string> inputs() const;

 private:
  void append_provider(OrtSessionOptions* options, const OrtOptions& wanted) const;
  std::shared_ptr<OrtRuntime> runtime_;
  OrtSession* session_ = nullptr;
};

/// Owns an OrtValue.
class OrtHeld {
 public:
  OrtHeld(const OrtRuntime& runtime, OrtValue* value) : runtime_(&runtime), value_(value) {}
  ~OrtHeld() { runtime_->api().ReleaseValue(value_); }
  OrtHeld(OrtHeld&& other) noexcept : runtime_(other.runtime_), value_(other.value_) { other.value_ = nullptr; }
  OrtHeld& operator=(OrtHeld&& other) noexcept {
    std::swap(runtime_, other.runtime_);
    std::swap(value_, other.value_);
    return *this;
  }
  OrtValue* get() const { return value_; }

 private:
  const OrtRuntime* runtime_;
  OrtValue* value_;
};

}  // namespace coatrt::detail
