#include "contract.hpp"

#include <cmath>
#include <set>

#include "coatrt/error.hpp"

namespace coatrt::detail {
namespace {

const char* const kScaleRule = "alpha/rank is folded into B";
const char* const kActivations[] = {"float32", "float16", "bfloat16"};
constexpr std::int64_t kMostWidth = std::int64_t{1} << 31;
constexpr std::int64_t kMostLayers = 4096;

bool is_activation(const std::string& dtype) {
  for (const char* allowed : kActivations)
    if (dtype == allowed) return true;
  return false;
}

[[noreturn]] void garbled(const std::string& why) {
  throw Error("the LoRA contract lacks or garbles a field (" + why + "); it needs alpha, dtype and tensors of matrix, A, "
              "B, K, N, rank; export again");
}

}  // namespace

Contract Contract::from_json(const Json& value) {
  const Json* rows = find(value, "tensors");
  const Json* alpha = find(value, "alpha");
  const std::string* dtype = find_text(value, "dtype");
  if (rows == nullptr || !rows->is_array()) garbled("'tensors'");
  if (alpha == nullptr || !alpha->is_number()) garbled("'alpha'");
  if (dtype == nullptr) garbled("'dtype'");
  if (const Json* rule = find(value, "scale_rule"); rule != nullptr && *rule != kScaleRule)
    throw Error("the LoRA scale rule must be " + repr(kScaleRule) + ", got " +
                (rule->is_string() ? repr(rule->get<std::string>()) : rule->dump()) + "; export again");
  if (const double number = alpha->get<double>(); !(number > 0 && std::isfinite(number)))
    throw Error("LoRA alpha must be above 0, got " + alpha->dump());
  if (!is_activation(*dtype))
    throw Error("the LoRA dtype must be one of float32, float16, bfloat16, got " + repr(*dtype));
  if (*dtype != "float32") throw Error("the LoRA dtype must be float32 for C++, got " + repr(*dtype) + "; export again");

  Contract contract;
  std::set<std::string> names, inputs;
  std::string last;  // group of the matrix before
  for (const Json& row : *rows) {
    const std::string *matrix = find_text(row, "matrix"), *A = find_text(row, "A"), *B = find_text(row, "B");
    std::int64_t K = 0, N = 0, rank = 0;
    if (matrix == nullptr || A == nullptr || B == nullptr) garbled("a name");
    if (!whole(find(row, "K"), 0, K) || !whole(find(row, "N"), 0, N) || !whole(find(row, "rank"), 0, rank))
      garbled("a width of " + *matrix);
    if (rank < 1 || rank % 16 != 0)
      throw Error("the LoRA rank must be a multiple of 16, got " + std::to_string(rank));
    if (K < 1 || N < 1 || K > kMostWidth || N > kMostWidth || rank > kMostWidth)
      throw Error("K and N of " + *matrix + " must be at least 1, got " + std::to_string(K) + " and " + std::to_string(N));
    names.insert(*A);
    names.insert(*B);
    contract.tensors.push_back({*A, K, rank});
    contract.tensors.push_back({*B, rank, N});
    const std::string* group = find_text(row, "group");
    contract.join(group == nullptr ? "" : *group, last, *matrix);
    last = group == nullptr ? "" : *group;
  }
  for (const Tensor& input : contract.inputs) inputs.insert(input.name);
  if (inputs.size() != contract.inputs.size())
    throw Error("two groups of the LoRA contract have the same name; list the matrices of a group together");
  if (names.empty() || names.size() != contract.tensors.size())
    throw Error("the LoRA contract has " + std::to_string(contract.tensors.size() / 2) + " matrices and " +
                std::to_string(names.size()) + " distinct tensor names; each matrix, at least one, needs two names of its own");
  return contract;
}

void Contract::join(const std::string& group, const std::string& last, const std::string& matrix) {
  const Tensor &A = tensors[tensors.size() - 2], &B = tensors.back();
  if (group.empty() || group != last) {
    places.push_back({inputs.size(), 0, 0});
    places.push_back({inputs.size() + 1, 0, 0});
    inputs.push_back(A);
    inputs.push_back(B);
    return;
  }
  Tensor &low = inputs[inputs.size() - 2], &high = inputs.back();
  if (low.rows != A.rows)
    throw Error("the matrices of " + group + " differ in K (" + matrix + "); a group reads one input of one width");
  places.push_back({inputs.size() - 2, 0, low.columns});
  places.push_back({inputs.size() - 1, high.rows, high.columns});
  low = {"lora_A." + group, low.rows, low.columns + A.columns};
  high = {"lora_B." + group, high.rows + B.rows, high.columns + B.columns};
}

DecoderIO DecoderIO::from_json(const Json& value) {
  DecoderIO io{};
  const auto count = [&](const char* name, std::int64_t& field) {
    const Json* found = find(value, name);
    if (found == nullptr)
      throw Error("the decoder's inputs and outputs are garbled (" + repr(name) + " is missing); export again");
    if (!whole(found, 1, field))
      throw Error(std::string("decoder ") + name + " must be a whole number of at least 1, got " + found->dump());
  };
  count("layers", io.layers);
  count("kv_heads", io.kv_heads);
  count("head_dim", io.head_dim);
  count("vocabulary", io.vocabulary);
  count("max_positions", io.max_positions);
  const Json* slots = find(value, "cache_length");
  if (slots != nullptr && !slots->is_null()) count("cache_length", io.cache_length);
  const std::string* dtype = find_text(value, "activations");
  if (dtype == nullptr || !is_activation(*dtype))
    throw Error("decoder activations must be one of float32, float16, bfloat16, got " +
                (dtype == nullptr ? "None" : repr(*dtype)));
  io.activations = *dtype;
  const std::int64_t most = std::max(io.max_positions, io.cache_length);
  const std::int64_t cache = product(product(product(io.kv_heads, io.head_dim), most), 4);
  if (io.layers > kMostLayers || io.vocabulary > kMostWidth || cache < 0 || product(cache, 2 * io.layers) < 0)
    throw Error("the decoder's inputs and outputs are garbled (" + value.dump() + "); export again");
  return io;
}

std::vector<std::pair<std::string, std::string>> DecoderIO::caches() const {
  std::vector<std::pair<std::string, std::string>> names;
  for (std::int64_t layer = 0; layer < layers; ++layer)
    for (const char* part : {".key", ".value"}) {
      const std::string tail = std::to_string(layer) + part;
      names.emplace_back("past_key_values." + tail, "present." + tail);
    }
  return names;
}

}  // namespace coatrt::detail
