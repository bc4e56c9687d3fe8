#pragma once
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "coatrt/bundle.hpp"
#include "contract.hpp"
#include "file.hpp"
#include "json.hpp"

namespace coatrt::detail {

class OrtRuntime;
class Emitter;

/// An opened bundle. What `open` reads from the manifest never changes; the rest is created once, under the mutex.
struct BundleState {
  std::filesystem::path directory;
  BundleOptions options;
  Json manifest;
  std::vector<std::string> matrices;
  std::vector<std::int64_t> stop_tokens;

  std::mutex loading;  // one thread at a time loads a decoder; taken before `mutex`
  std::mutex mutex;
  std::set<std::string> checked;
  std::shared_ptr<OrtRuntime> runtime;
  std::shared_ptr<Emitter> emitter;
  std::map<std::string, std::weak_ptr<void>> models;  // loaded decoders by options, shared by sessions

  /// The manifest's entry of a file. Throws where there is none.
  const Json& facts(const std::string& name) const;
  /// The file's path, hash checked.
  std::filesystem::path path(const std::string& name);
  /// The file in memory; the bytes returned are the bytes that were hashed.
  std::unique_ptr<MappedFile> read(const std::string& name);
  /// An ONNX file's path, hash checked; refused where it reads weights from another file than `weights`.
  std::filesystem::path graph(const std::string& name, const std::string& weights);
  /// A JSON file of the bundle.
  Json json(const std::string& name, const std::string& what);
  /// ONNX file of a graph form, hashes checked with its weights, and its inputs and outputs.
  std::pair<std::filesystem::path, DecoderIO> decoder(const std::string& form);
  Contract contract();
  /// The configuration the graphs were built with.
  Configuration configuration();
  /// ONNX Runtime, loaded on first use.
  std::shared_ptr<OrtRuntime> ort();
};

}  // namespace coatrt::detail
