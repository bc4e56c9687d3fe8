#include "cuda/weights.hpp"

#include <algorithm>
#include <cstdio>
#include <utility>
#include <vector>

#include "coatrt/error.hpp"
#include "formats.hpp"

namespace coatrt::detail {

DeviceWeights device_weights(const Configuration& configuration, const Json& model) {
  const auto garbled = [] { return Error("the manifest is garbled (matrices); build the bundle again"); };
  std::int64_t total = 0, decoded = 0, count = 0;
  if (!whole(find(model, "other_bytes"), 0, total)) throw garbled();
  const Json* tied = find(model, "tied");
  std::vector<std::pair<std::string, std::int64_t>> kinds;  // that are decoded, in order of appearance
  const auto add = [&total](std::int64_t bytes) { total += bytes; };
  bool first = true;
  for (const Json& row : model.at("matrices")) {
    std::int64_t N = 0, K = 0;
    if (row.size() != 3 || !whole(&row[1], 1, N) || !whole(&row[2], 1, K) || product(product(N, K), 8) < 0) throw garbled();
    const std::string& format = configuration.formats.at(row[0].get<std::string>());
    const std::string kind = format.substr(0, format.find('-'));
    const std::int64_t wide = 2 * N * K, bytes = format_bytes(format, N, K);
    const bool sixteen = kind == "fp16" || kind == "bf16", packed = kind == "int4" || kind == "int8";
    const bool is_tied = tied != nullptr && tied->is_boolean() && tied->get<bool>();
    const bool multiplied = is_tied || !first;
    add(bytes);
    if (first && multiplied) add(packed ? bytes : wide);  // the tied head is a second reader
    else if (multiplied && !packed && !sixteen) add(wide - bytes);
    if (multiplied && !packed && !sixteen) {
      const auto known = std::find_if(kinds.begin(), kinds.end(), [&](const auto& one) { return one.first == kind; });
      if (known == kinds.end()) kinds.emplace_back(kind, 1);
      else ++known->second;
      ++count;
      decoded += wide;
    }
    first = false;
    if (total < 0 || total > std::int64_t{1} << 60) throw garbled();
  }
  DeviceWeights found{static_cast<std::size_t>(total), ""};
  if (kinds.empty()) return found;
  std::stable_sort(kinds.begin(), kinds.end(), [](const auto& a, const auto& b) { return a.second > b.second; });
  std::vector<std::string> listed;
  for (const auto& [kind, number] : kinds) listed.push_back(std::to_string(number) + " " + kind);
  char size[32];
  std::snprintf(size, sizeof size, "%.2f", static_cast<double>(decoded) / 1e9);
  found.note = "ONNX Runtime keeps only int4 and int8 packed on the GPU: " + std::to_string(count) + " matrices (" +
               join(listed) + ") are decoded to float16 and take " + size + " GB";
  return found;
}

}  // namespace coatrt::detail
