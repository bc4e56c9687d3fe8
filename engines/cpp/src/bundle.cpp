#include "coatrt/bundle.hpp"

#include <algorithm>

#include "coatrt/error.hpp"
#include "configuration.hpp"
#include "external_data.hpp"
#include "ort/emitter.hpp"
#include "safetensors.hpp"
#include "sha256.hpp"
#include "signature.hpp"
#include "state.hpp"

namespace fs = std::filesystem;

namespace coatrt {
namespace detail {
namespace {

constexpr const char* kManifest = "manifest.json";
constexpr const char* kSignature = "model.sig";
constexpr const char* kVersion = "0.1.0";
constexpr std::int64_t kFormat = 3;
constexpr std::uintmax_t kMostManifest = 64 << 20;

bool leaves(const std::string& name) {
  if (name.find('\0') != name.npos || name.find('\\') != name.npos || fs::path(name).is_absolute()) return true;
  const fs::path path(name);
  return std::any_of(path.begin(), path.end(), [](const fs::path& part) { return part == ".."; });
}

bool is_file(const fs::path& path) {
  std::error_code error;
  return fs::is_regular_file(path, error);
}

/// Whether `path` is inside `directory` once links are followed.
bool within(const fs::path& path, const fs::path& directory) {
  std::error_code error;
  const fs::path whole = fs::canonical(path, error), root = fs::canonical(directory, error);
  return !error && std::mismatch(root.begin(), root.end(), whole.begin(), whole.end()).first == root.end();
}

void check_hash(const std::string& where, const Json& facts, const std::string& found) {
  const std::string said = facts["sha256"].get<std::string>();
  if (found != said)
    throw Error(where + " was altered: sha256 " + found.substr(0, 12) + "…, the manifest says " + said.substr(0, 12) +
                "…; copy the bundle again or build it again");
}

/// A sealed file begins with the SHA-256 of all bytes after that line, so that a change shows before anything is parsed.
void check_seal(const std::string_view text, const std::string& file) {
  constexpr std::string_view before = "{\n \"seal\": \"", after = "\",\n";
  constexpr std::size_t digits = 64, start = before.size() + digits + after.size();
  if (text.size() < start || text.substr(0, before.size()) != before ||
      text.substr(before.size() + digits, after.size()) != after)
    throw Error("bundle manifest " + file +
                " has no seal: it was altered, or another coatrt wrote it; build the bundle again");
  if (sha256(text.data() + start, text.size() - start) != text.substr(before.size(), digits))
    throw Error("bundle manifest " + file + " was altered or is damaged; build the bundle again");
}

/// Refuse a manifest that the user's key has not signed.
void require_signature([[maybe_unused]] const std::string_view manifest, [[maybe_unused]] const fs::path& directory,
                       [[maybe_unused]] const std::string& key) {
#ifdef COATRT_OPENSSL
  const std::string wrong = check_signature(manifest, kManifest, directory / kSignature, key);
  if (!wrong.empty())
    throw Error(directory.string() + " has no signature by " + key + " (" + wrong +
                "); download the bundle again from its publisher");
#else
  throw Error("a signature is required and the library was built without OpenSSL; add component sign to find_package(coatrt)");
#endif
}

/// Presence, place and size of one file that the manifest names.
void check_file(const fs::path& directory, const std::string& name, const Json& facts) {
  const std::string manifest = (directory / kManifest).string();
  if (leaves(name)) throw Error(manifest + " names " + repr(name) + ", which leaves the bundle; do not use it");
  const fs::path path = directory / name;
  if (!is_file(path)) throw Error(directory.string() + " lacks " + name + "; copy the bundle again or build it again");
  if (!within(path, directory))
    throw Error(manifest + " names " + repr(name) + ", a link that leaves the bundle; do not use it");
  std::int64_t bytes = 0;
  if (find_text(facts, "sha256") == nullptr || !whole(find(facts, "bytes"), 0, bytes))
    throw Error(manifest + " has no sha256 and bytes for " + name + "; build the bundle again");
  std::error_code error;
  const std::uintmax_t size = fs::file_size(path, error);
  if (error || size != static_cast<std::uintmax_t>(bytes))
    throw Error(name + " has " + std::to_string(size) + " bytes, the manifest says " + std::to_string(bytes) +
                "; copy the bundle again");
}

/// Names of the model's matrices and its stop tokens, as the manifest gives them.
void read_model(BundleState& state) {
  const std::string where = (state.directory / kManifest).string();
  const Json *inventory = find(state.manifest["matrices"], "matrices"), *stops = find(state.manifest["model"], "stop_tokens");
  if (inventory == nullptr || !inventory->is_array() || inventory->empty())
    throw Error(where + " is garbled (matrices); build the bundle again");
  for (const Json& row : *inventory) {
    if (!row.is_array() || row.empty() || !row[0].is_string())
      throw Error(where + " is garbled (matrices); build the bundle again");
    state.matrices.push_back(row[0].get<std::string>());
  }
  if (stops == nullptr || !stops->is_array()) throw Error(where + " is garbled (stop_tokens); build the bundle again");
  for (const Json& stop : *stops) {
    std::int64_t token = 0;
    if (!whole(&stop, 0, token)) throw Error(where + " is garbled (stop_tokens); build the bundle again");
    state.stop_tokens.push_back(token);
  }
}

}  // namespace

/// Parse and check a manifest, and the presence and size of its files.
std::shared_ptr<BundleState> open_state(const fs::path& directory, const BundleOptions& options) {
  const fs::path file = directory / kManifest;
  if (!is_file(file))
    throw Error("not a bundle: " + directory.string() + " (no manifest.json); create one with coatrt build");
  std::error_code error;
  if (fs::file_size(file, error) > kMostManifest)
    throw Error(file.string() + " has more than 64 MiB; build the bundle again");
  auto state = std::make_shared<BundleState>();
  state->directory = directory;
  state->options = options;
  const MappedFile mapped(file);
  check_seal(mapped.text(), file.string());
  if (!options.public_key.empty()) require_signature(mapped.text(), directory, options.public_key);
  try {
    state->manifest = parse_json(mapped.text(), "bundle manifest", file.string());
  } catch (const Error& problem) {
    throw Error(std::string(problem.what()) + "; build the bundle again");
  }
  const Json& manifest = state->manifest;
  const Json* format = find(manifest, "format");
  std::int64_t number = 0;
  if (!whole(format, 0, number) || number != kFormat)
    throw Error(directory.string() + " has bundle format " + (format == nullptr ? "None" : format->dump()) +
                ", coatrt " + kVersion + " reads " + std::to_string(kFormat) + "; build it again");
  std::vector<std::string> missing;
  for (const char* key : {"format", "coatrt", "model", "configuration", "matrices", "decoders", "engines", "versions", "files"})
    if (find(manifest, key) == nullptr) missing.emplace_back(key);
  if (!missing.empty() || !manifest["files"].is_object())
    throw Error(file.string() + " lacks " + (missing.empty() ? "files" : join(missing)) + "; build the bundle again");
  for (const auto& [name, facts] : manifest["files"].items()) check_file(directory, name, facts);
  read_model(*state);
  return state;
}

const Json& BundleState::facts(const std::string& name) const {
  const Json& files = manifest.at("files");
  const auto found = files.find(name);
  if (found != files.end()) return *found;
  std::vector<std::string> have;
  for (const auto& [known, _] : files.items()) have.push_back(known);
  throw Error(directory.string() + " has no file " + name + "; it has " + join(have));
}

std::unique_ptr<MappedFile> BundleState::read(const std::string& name) {
  const Json& said = facts(name);
  auto file = std::make_unique<MappedFile>(directory / name);
  check_hash((directory / name).string(), said, sha256(file->data(), file->size()));
  const std::lock_guard lock(mutex);
  checked.insert(name);
  return file;
}

fs::path BundleState::path(const std::string& name) {
  facts(name);
  {
    const std::lock_guard lock(mutex);
    if (checked.count(name) != 0) return directory / name;
  }
  read(name);
  return directory / name;
}

fs::path BundleState::graph(const std::string& name, const std::string& weights) {
  if (!weights.empty()) path(weights);
  // By the suffix ONNX Runtime picks another file format, and what that would read is not known here.
  if (fs::path(name).extension() != ".onnx")
    throw Error("not an ONNX graph: " + (directory / name).string() + " (its name does not end in .onnx); build the bundle again");
  const auto file = read(name);
  std::set<std::string> locations;
  try {
    locations = external_data(file->text());
  } catch (const Error& error) {
    throw Error("not an ONNX graph: " + (directory / name).string() + " (" + error.what() + "); build the bundle again");
  }
  for (const std::string& location : locations)
    if ((fs::path(name).parent_path() / location).lexically_normal() != fs::path(weights))
      throw Error((directory / name).string() + " reads weights from " + repr(location) + ", the manifest allows " +
                  (weights.empty() ? "none" : weights) + "; do not use this bundle");
  return directory / name;
}

Json BundleState::json(const std::string& name, const std::string& what) {
  return parse_json(read(name)->text(), what, (directory / name).string());
}

std::pair<fs::path, DecoderIO> BundleState::decoder(const std::string& form) {
  const Json& decoders = manifest.at("decoders");
  const Json* facts = find(decoders, form.c_str());
  if (facts == nullptr) {
    std::vector<std::string> have;
    if (decoders.is_object())
      for (const auto& [known, _] : decoders.items()) have.push_back(known);
    throw Error(directory.string() + " has no " + form + " graph, only " + join(have) + "; build it again");
  }
  const std::string *weights = find_text(*facts, "weights"), *graph = find_text(*facts, "file");
  const Json* io = find(*facts, "io");
  if (weights == nullptr || graph == nullptr || io == nullptr)
    throw Error((directory / kManifest).string() + " is garbled (decoders); build the bundle again");
  return {this->graph(*graph, *weights), DecoderIO::from_json(*io)};
}

Contract BundleState::contract() { return Contract::from_json(json("lora_io.json", "LoRA contract")); }

Configuration BundleState::configuration() {
  const std::string* name = find_text(manifest.at("configuration"), "file");
  if (name == nullptr) throw Error((directory / kManifest).string() + " is garbled (configuration); build the bundle again");
  const auto file = read(*name);
  return resolve(file->text(), (directory / *name).string(), matrices);
}

namespace {

/// The tensors of a LoRA file, checked against the contract; `file` stays mapped as long as the LoRA lives.
Lora lora_of(std::shared_ptr<MappedFile> file, const std::string& where, const Contract& contract) {
  SafetensorsFile read;
  try {
    read = read_safetensors(file->text());
  } catch (const Error& error) {
    throw Error("LoRA " + where + " is damaged (" + error.what() + "); emit it again with coatrt adapt");
  }
  const auto& stored = read.tensors;
  std::vector<std::string> wrong;
  std::set<std::string> known;
  for (const auto& tensor : contract.tensors) {
    known.insert(tensor.name);
    if (stored.count(tensor.name) == 0) wrong.push_back(tensor.name);
  }
  for (const auto& [name, _] : stored)
    if (known.count(name) == 0) wrong.push_back(name);
  if (!wrong.empty())
    throw Error("the LoRA and its contract differ in " + *std::min_element(wrong.begin(), wrong.end()) +
                (wrong.size() == 1 ? "" : " and " + std::to_string(wrong.size() - 1) + " more tensors") +
                "; emit it again");
  std::vector<LoraTensor> tensors;
  for (const auto& [name, rows, columns] : contract.tensors) {
    const StoredTensor& found = stored.at(name);
    if (found.shape != std::vector<std::int64_t>{rows, columns}) {
      std::vector<std::string> shape;
      for (const std::int64_t extent : found.shape) shape.push_back(std::to_string(extent));
      throw Error(name + " has shape (" + join(shape) + (shape.size() == 1 ? ",)" : ")") + ", the contract says (" +
                  std::to_string(rows) + ", " + std::to_string(columns) + "); emit it again");
    }
    if (found.dtype != "F32") throw Error(name + " is " + found.dtype + ", the contract says F32; emit it again");
    if (reinterpret_cast<std::uintptr_t>(found.bytes.data()) % alignof(float) != 0)
      throw Error("LoRA " + where + " is damaged (its tensors are not aligned); emit it again with coatrt adapt");
    tensors.push_back({name, rows, columns, reinterpret_cast<const float*>(found.bytes.data())});
  }
  return {std::move(tensors), std::move(file), read.metadata[kConfiguration]};
}

}  // namespace
}  // namespace detail

Bundle Bundle::open(const fs::path& directory, const BundleOptions& options) {
  return Bundle(detail::open_state(directory, options));
}

fs::path Bundle::path(const std::string& name) const { return state_->path(name); }

std::size_t Bundle::check_all() const {
  std::vector<std::string> extra, links;
  const detail::Json& files = state_->manifest.at("files");
  std::error_code error;
  for (fs::recursive_directory_iterator at(state_->directory, error), end; !error && at != end; at.increment(error)) {
    const std::string name = at->path().lexically_relative(state_->directory).generic_string();
    std::error_code unknown;
    if (at->is_symlink(unknown)) links.push_back(name);
    else if (!at->is_directory(unknown) && name != detail::kManifest && name != detail::kSignature && !files.contains(name)) extra.push_back(name);
  }
  std::sort(links.begin(), links.end());
  std::sort(extra.begin(), extra.end());
  if (!links.empty())
    throw Error(state_->directory.string() + " contains links (" + detail::join(links) + "); copy the bundle with the linked files");
  if (!extra.empty())
    throw Error(state_->directory.string() + " contains " + detail::join(extra) +
                ", not in the manifest; remove it");
  for (const auto& [name, _] : files.items()) state_->read(name);
  return files.size();
}

Configuration Bundle::configuration() const { return state_->configuration(); }

Configuration Bundle::configuration(const std::string& json, const std::string& source) const {
  return detail::resolve(json, source, state_->matrices);
}

Lora Bundle::adapt(const Configuration& configuration) const {
  return detail::emitter_of(*state_)->emit(configuration);
}

Lora Bundle::lora() const {
  const std::string* name = detail::find_text(state_->manifest, "lora");
  if (name == nullptr)
    throw Error((state_->directory / detail::kManifest).string() + " names no lora; build the bundle again");
  return detail::lora_of(state_->read(*name), (state_->directory / *name).string(), state_->contract());
}

Lora Bundle::lora(const fs::path& file) const {
  if (!detail::is_file(file))
    throw Error("LoRA " + file.string() + " does not exist; emit one with coatrt adapt");
  return detail::lora_of(std::make_shared<detail::MappedFile>(file), file.string(), state_->contract());
}

const fs::path& Bundle::directory() const { return state_->directory; }
const std::vector<std::int64_t>& Bundle::stop_tokens() const { return state_->stop_tokens; }

}  // namespace coatrt
