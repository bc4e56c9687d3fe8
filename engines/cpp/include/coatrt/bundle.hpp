#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

namespace coatrt {

namespace detail {
struct BundleState;
}

/// Matrix → weight format for a whole model, resolved and checked: `Bundle::configuration` makes them.
struct Configuration {
  std::map<std::string, std::string> formats;

  /// First 16 hexadecimal digits of the SHA-256 of the canonical JSON, as Python's `QuantConfig.hash`.
  std::string hash() const;
};

/// One LoRA tensor, float32, row-major.
struct LoraTensor {
  std::string name;
  std::int64_t rows, columns;
  const float* data;
};

/// The LoRA of one configuration, in contract order. Copies share the tensors, which never change: any number of
/// sessions and threads may use one.
class Lora {
 public:
  Lora() = default;
  Lora(std::vector<LoraTensor> tensors, std::shared_ptr<const void> owner, std::string configuration = "")
      : tensors_(std::move(tensors)), owner_(std::move(owner)), configuration_(std::move(configuration)) {}
  const std::vector<LoraTensor>& tensors() const { return tensors_; }
  /// Hash of the configuration it was emitted for; empty where nobody knows.
  const std::string& configuration() const { return configuration_; }
  /// Write safetensors (what `coatrt run --lora` and `Bundle::lora` read) with that hash, atomically.
  void save(const std::filesystem::path& path) const;

 private:
  std::vector<LoraTensor> tensors_;
  std::shared_ptr<const void> owner_;
  std::string configuration_;
};

/// Where the runtime is and how the hypernetwork runs.
struct BundleOptions {
  /// libonnxruntime; empty: the environment's COATRT_ONNXRUNTIME, else the one beside the Python package this library
  /// was built from, else the loader's search path.
  std::string onnxruntime;
  int threads = 0;  ///< of the hypernetwork; 0: all usable cores
  /// PEM file of the public key that must have signed the bundle (component sign); empty: no signature is asked for.
  std::string public_key;
};

/// An opened bundle: a handle to shared, immutable state; copies are cheap, all calls may come from any thread.
class Bundle {
 public:
  /// Read and check the manifest and every file's presence and size; contents are hashed when first used.
  static Bundle open(const std::filesystem::path& directory, const BundleOptions& options = {});

  /// The path of a file of the bundle after its SHA-256 was checked (once per opened bundle).
  std::filesystem::path path(const std::string& name) const;
  /// Check the hash of every file and that no other file is there; return how many there are.
  std::size_t check_all() const;

  /// The configuration the graphs were built with.
  Configuration configuration() const;
  /// Another one from JSON text: {"matrices": {…}, "patterns": {glob: format}, "default": format}.
  Configuration configuration(const std::string& json, const std::string& source = "configuration") const;

  /// The LoRA of a configuration, emitted by the hypernetwork.
  Lora adapt(const Configuration& configuration) const;
  /// The LoRA that was emitted when the bundle was built.
  Lora lora() const;
  /// A LoRA file made for this bundle (coatrt adapt).
  Lora lora(const std::filesystem::path& file) const;

  const std::filesystem::path& directory() const;
  const std::vector<std::int64_t>& stop_tokens() const;

  const std::shared_ptr<detail::BundleState>& state() const { return state_; }

 private:
  explicit Bundle(std::shared_ptr<detail::BundleState> state) : state_(std::move(state)) {}
  std::shared_ptr<detail::BundleState> state_;
};

}  // namespace coatrt
