#include "formats.hpp"

#include <algorithm>
#include <cstdio>
#include <map>
#include <regex>
#include <vector>

#include "coatrt/error.hpp"
#include "json.hpp"

namespace coatrt::detail {
namespace {

const char* const kAllowed =
    "fp16, bf16, int8, int8-g32/64/128, int4-g32/64/128, fp8, nvfp4, "
    "nf2/3/4/8-g16/32/64[-dq2/3/4/8-bf16/fp16/fp32-16/64/256]";

/// Kind → block suffixes it may carry, as the text form writes them.
const std::map<std::string, std::vector<std::string>>& blocks() {
  static const std::vector<std::string> normal{"-g16", "-g32", "-g64"};
  static const std::map<std::string, std::vector<std::string>> known{
      {"fp16", {""}}, {"bf16", {""}}, {"int8", {"", "-g32", "-g64", "-g128"}}, {"int4", {"-g32", "-g64", "-g128"}},
      {"fp8", {""}},  {"nvfp4", {""}}, {"nf2", normal}, {"nf3", normal}, {"nf4", normal}, {"nf8", normal}};
  return known;
}

/// Whether `text` is empty or -dqB0-B1-BLOCK1.
bool is_doubling(const std::string& text) {
  if (text.empty()) return true;
  for (const char* bits : {"2", "3", "4", "8"})
    for (const char* dtype : {"bf16", "fp16", "fp32"})
      for (const char* block : {"16", "64", "256"})
        if (text == std::string("-dq") + bits + "-" + dtype + "-" + block) return true;
  return false;
}

}  // namespace

void check_format(const std::string& text) {
  const std::size_t dash = std::min(text.find('-'), text.size());
  const auto kind = blocks().find(text.substr(0, dash));
  if (kind != blocks().end()) {
    const std::size_t doubled = std::min(text.find("-dq"), text.size());
    const std::string block = text.substr(dash, doubled - dash), tail = text.substr(doubled);
    const auto& allowed = kind->second;
    const bool good = std::find(allowed.begin(), allowed.end(), block) != allowed.end();
    if (good && (tail.empty() || (kind->first.compare(0, 2, "nf") == 0 && is_doubling(tail)))) return;
  }
  // As Python: a text in the right form that names no format is not quoted.
  static const std::regex form(R"([a-z]+\d+(-g\d+)?(-dq\d-(bf16|fp16|fp32)-\d+)?)");
  const bool formed = text.size() < 64 && std::regex_match(text, form);
  throw Error("no weight format " + (formed ? text : repr(text)) + "; allowed: " + kAllowed);
}

std::int64_t format_bytes(const std::string& text, std::int64_t N, std::int64_t K) {
  const auto per = [](std::int64_t total, std::int64_t each) { return (total + each - 1) / each; };
  const std::size_t dash = std::min(text.find('-'), text.size());
  const std::string kind = text.substr(0, dash);
  if (kind == "fp16" || kind == "bf16") return 2 * N * K;
  const int bits = kind == "nvfp4" ? 4 : kind.back() - '0';  // int8, fp8, nf3, …
  int block = kind == "nvfp4" ? 16 : 0, scale_bits = 0, scale_block = 0;
  char scale_dtype[8] = "";
  const std::string rest = text.substr(dash);
  std::sscanf(rest.c_str(), "-g%d", &block);
  if (const std::size_t doubled = rest.find("-dq"); doubled != rest.npos)
    std::sscanf(rest.c_str() + doubled, "-dq%d-%4[a-z0-9]-%d", &scale_bits, scale_dtype, &scale_block);
  // The block is halved until it divides K; where none does, the last one of each row is padded.
  if (block != 0 && K % block != 0)
    for (int smaller = block / 2; smaller >= block / 8; smaller /= 2) {
      const auto& allowed = blocks().at(kind);
      if (std::find(allowed.begin(), allowed.end(), "-g" + std::to_string(smaller)) != allowed.end() && K % smaller == 0) {
        block = smaller;
        break;
      }
    }
  const std::int64_t width = block != 0 ? per(K, block) * block : K;
  const std::int64_t codes = per(N * width * bits, 8), scales = block != 0 ? N * width / block : N;
  if (kind == "nvfp4") return codes + scales + 4;
  if (scale_bits != 0)
    return codes + per(scales * scale_bits, 8) +
           per(scales, scale_block) * (std::string(scale_dtype) == "fp32" ? 4 : 2) + 4;
  return codes + scales * 2;
}

}  // namespace coatrt::detail
