// Walks the protocol buffer of onnx.proto where it can hold tensors, without a library.
#include "external_data.hpp"

#include <cstdint>

#include "coatrt/error.hpp"

namespace coatrt::detail {
namespace {

constexpr int kMaxMessageDepth = 100;  // as deep as protobuf's own reader goes

enum Message { kModel, kGraph, kFunction, kTraining, kNode, kAttribute, kSparseTensor, kTensor, kEntry };

/// Fields that lead to tensors, by onnx.proto.
constexpr struct {
  Message of;
  std::uint64_t field;
  Message to;
} kFields[] = {
    {kModel, 7, kGraph},        {kModel, 20, kTraining},     {kModel, 25, kFunction},         {kTraining, 1, kGraph},
    {kTraining, 2, kGraph},     {kGraph, 1, kNode},          {kGraph, 5, kTensor},            {kGraph, 15, kSparseTensor},
    {kFunction, 7, kNode},      {kFunction, 11, kAttribute}, {kNode, 5, kAttribute},          {kAttribute, 5, kTensor},
    {kAttribute, 6, kGraph},    {kAttribute, 10, kTensor},   {kAttribute, 11, kGraph},        {kAttribute, 22, kSparseTensor},
    {kAttribute, 23, kSparseTensor}, {kSparseTensor, 1, kTensor}, {kSparseTensor, 2, kTensor}, {kTensor, 13, kEntry},
};

struct Walk {
  std::set<std::string> locations;

  void message(Message kind, std::string_view bytes, int depth) {
    if (depth > kMaxMessageDepth) throw Error("its messages are nested too deeply");
    std::string_view key, value;  // of an entry
    while (!bytes.empty()) {
      const std::uint64_t tag = number(bytes);
      if (tag >> 32 != 0) throw Error("it has a field of an unknown kind");
      const std::uint64_t field = tag >> 3;
      switch (tag & 7) {
        case 0: number(bytes); continue;
        case 1: take(bytes, 8); continue;
        case 5: take(bytes, 4); continue;
        case 2: break;
        default: throw Error("it has a field of an unknown kind");
      }
      const std::string_view inside = take(bytes, number(bytes));
      if (kind == kEntry) {
        if (field == 1) key = inside;
        if (field == 2) value = inside;
        continue;
      }
      for (const auto& known : kFields)
        if (known.of == kind && known.field == field) message(known.to, inside, depth + 1);
    }
    if (kind == kEntry && key == "location") locations.emplace(value);
  }

  static std::string_view take(std::string_view& bytes, std::uint64_t count) {
    if (count > bytes.size()) throw Error("it ends too early");
    const std::string_view taken = bytes.substr(0, static_cast<std::size_t>(count));
    bytes.remove_prefix(static_cast<std::size_t>(count));
    return taken;
  }

  static std::uint64_t number(std::string_view& bytes) {
    std::uint64_t value = 0;
    for (unsigned shift = 0; shift < 64; shift += 7) {
      const auto byte = static_cast<unsigned char>(take(bytes, 1).front());
      value |= static_cast<std::uint64_t>(byte & 127) << shift;
      if (byte < 128) return value;
    }
    throw Error("it has a number of more than 64 bits");
  }
};

}  // namespace

std::set<std::string> external_data(std::string_view model) {
  Walk walk;
  walk.message(kModel, model, 0);
  return walk.locations;
}

}  // namespace coatrt::detail
