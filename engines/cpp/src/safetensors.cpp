#include "safetensors.hpp"

#include <algorithm>

#include "coatrt/bundle.hpp"
#include "coatrt/error.hpp"
#include "file.hpp"
#include "json.hpp"

namespace coatrt {
namespace detail {
namespace {

constexpr std::uint64_t kMostHeader = 100'000'000;  // as the Rust implementation
constexpr const char* kMetadata = "__metadata__";

std::int64_t itemsize(const std::string& dtype) {
  static const std::map<std::string, std::int64_t> sizes{
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"U16", 2}, {"I16", 2},
      {"F16", 2},  {"BF16", 2}, {"U32", 4}, {"I32", 4},     {"F32", 4},     {"U64", 8}, {"I64", 8}, {"F64", 8}};
  const auto found = sizes.find(dtype);
  if (found == sizes.end()) throw Error("unknown dtype " + repr(dtype));
  return found->second;
}

StoredTensor read_tensor(const std::string& name, const Json& facts, std::string_view data) {
  const std::string* dtype = find_text(facts, "dtype");
  const Json *shape = find(facts, "shape"), *offsets = find(facts, "data_offsets");
  std::int64_t begin = 0, end = 0;
  if (dtype == nullptr || shape == nullptr || !shape->is_array() || offsets == nullptr || !offsets->is_array() ||
      offsets->size() != 2 || !whole(&(*offsets)[0], 0, begin) || !whole(&(*offsets)[1], 0, end))
    throw Error(name + " has no dtype, shape and data_offsets");
  StoredTensor tensor{*dtype, {}, {}};
  std::int64_t bytes = itemsize(*dtype);
  for (const Json& extent : *shape) {
    std::int64_t size = 0;
    if (!whole(&extent, 0, size) || (bytes = product(bytes, size)) < 0) throw Error(name + " has an impossible shape");
    tensor.shape.push_back(size);
  }
  if (begin > end || static_cast<std::uint64_t>(end) > data.size())
    throw Error(name + " lies outside the file");
  if (end - begin != bytes)
    throw Error(name + " has " + std::to_string(end - begin) + " bytes, its dtype and shape say " +
                std::to_string(bytes));
  tensor.bytes = data.substr(static_cast<std::size_t>(begin), static_cast<std::size_t>(bytes));
  return tensor;
}

std::map<std::string, std::string> read_metadata(const Json& facts) {
  std::map<std::string, std::string> metadata;
  if (!facts.is_object()) throw Error("its metadata is not an object of strings");
  for (const auto& [key, value] : facts.items()) {
    if (!value.is_string()) throw Error("its metadata is not an object of strings");
    metadata.emplace(key, value.get<std::string>());
  }
  return metadata;
}

}  // namespace

SafetensorsFile read_safetensors(std::string_view file) {
  if (file.size() < 8) throw Error("the file is too short for a header");
  std::uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(file[static_cast<std::size_t>(i)]);
  if (length > kMostHeader || length > file.size() - 8)
    throw Error("its header claims " + std::to_string(length) + " bytes, the file has " + std::to_string(file.size()));
  const Json header = parse_json(file.substr(8, static_cast<std::size_t>(length)), "header", "of the file");
  if (!header.is_object()) throw Error("its header is not an object");
  const std::string_view data = file.substr(8 + static_cast<std::size_t>(length));
  SafetensorsFile read;
  auto& tensors = read.tensors;
  for (const auto& [name, facts] : header.items())
    if (name == kMetadata) read.metadata = read_metadata(facts);
    else tensors.emplace(name, read_tensor(name, facts, data));

  std::vector<std::pair<const char*, std::string>> order;
  for (const auto& [name, tensor] : tensors) order.emplace_back(tensor.bytes.data(), name);
  std::sort(order.begin(), order.end(), [&](const auto& a, const auto& b) {
    return std::make_pair(a.first, tensors.at(a.second).bytes.size()) <
           std::make_pair(b.first, tensors.at(b.second).bytes.size());  // an empty one before its neighbour
  });
  const char* expected = data.data();
  for (const auto& [begin, name] : order) {
    if (begin != expected) throw Error(name + (begin < expected ? " overlaps another tensor" : " follows a hole"));
    expected = begin + tensors.at(name).bytes.size();
  }
  if (expected != data.data() + data.size()) throw Error("bytes after the last tensor belong to none");
  return read;
}

}  // namespace detail

void Lora::save(const std::filesystem::path& path) const {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!configuration_.empty()) header["__metadata__"][detail::kConfiguration] = configuration_;
  std::vector<std::string_view> parts;
  std::size_t at = 0;
  for (const LoraTensor& tensor : tensors_) {
    const std::size_t bytes = static_cast<std::size_t>(tensor.rows * tensor.columns) * sizeof(float);
    header[tensor.name] = {{"dtype", "F32"}, {"shape", {tensor.rows, tensor.columns}}, {"data_offsets", {at, at + bytes}}};
    parts.emplace_back(reinterpret_cast<const char*>(tensor.data), bytes);
    at += bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  std::string head;
  for (int i = 0; i < 8; ++i) head += static_cast<char>(std::uint64_t{text.size()} >> (8 * i));
  detail::write_atomically(path, head + text, parts.data(), parts.size());
}

}  // namespace coatrt
