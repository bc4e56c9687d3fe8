// fuzz_TARGET SEEDS RUNS [FIRST]: what libFuzzer does, without clang and without coverage: every seed as it is, then RUNS
// mutations of them, numbered from FIRST. The same number is the same input, so a finding can be run again alone.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

constexpr std::size_t kMost = 4096;
constexpr std::chrono::seconds kSlowest{10};

using Random = std::mt19937_64;

std::size_t below(Random& random, std::size_t end) { return end == 0 ? 0 : random() % end; }

/// A piece of text that readers of JSON, HTTP or patterns care about, or bytes at the edge of a number.
std::string token(Random& random) {
  static const std::vector<std::string> known{
      "\r\n", "\r\n\r\n", "\n", " ", ":", ",", "{", "}", "[", "]", "\"", "\\", "\\ud800", "\\u0000", "null", "true", "-1", "0", "1e999",
      "18446744073709551616", "9223372036854775807", "Content-Length: ", "Expect: 100-continue", "GET /health HTTP/1.1\r\n\r\n",
      "\"prompt\":", "\"tokens\":", "\"stream\":", "\"configuration\":", "(?i:", "(?!", "\\p{L}", "{1,3}", "*", "+", "..", "../",
      std::string(1, '\0'), std::string(8, '\0'), "\xff", "\xff\xff\xff\xff", "\x80", "\x7f", "\xe2\x80", "e\xcc\x81", std::string(70, '['), "\x3a\x7f"};
  return known[below(random, known.size())];
}

std::string mutated(const std::vector<std::string>& seeds, Random& random) {
  std::string made = seeds[below(random, seeds.size())];
  for (std::size_t left = 1 + below(random, 6); left > 0; --left) {
    const std::size_t at = below(random, made.size() + 1), length = 1 + below(random, 16);
    switch (below(random, 7)) {
      case 0: if (at < made.size()) made[at] = static_cast<char>(made[at] ^ (1 << below(random, 8))); break;
      case 1: if (at < made.size()) made[at] = static_cast<char>(random()); break;
      case 2: made.erase(at, length); break;
      case 3: made.insert(at, made.substr(below(random, made.size() + 1), length)); break;
      case 4: made.insert(at, token(random)); break;
      case 5: made.replace(at, std::min(length, made.size() - at), token(random)); break;
      default: {  // the head of one and the tail of another
        const std::string& other = seeds[below(random, seeds.size())];
        made = made.substr(0, at) + other.substr(below(random, other.size() + 1));
      }
    }
  }
  return made.substr(0, kMost);
}

/// The input that runs, on disk: what is left there after a crash is what crashed.
void run(const std::string& input, const std::string& name, const std::filesystem::path& current) {
  std::ofstream(current, std::ios::binary) << input;
  const auto start = std::chrono::steady_clock::now();
  const std::vector<std::uint8_t> bytes(input.begin(), input.end());  // of that size exactly: one byte on is not its own
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  if (std::chrono::steady_clock::now() - start < kSlowest) return;
  std::cerr << name << " takes more than 10 s; it is in " << current << "\n";
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 3) {
    std::cerr << "usage: " << argv[0] << " SEEDS RUNS [FIRST]\n";
    return 2;
  }
  const std::uint64_t runs = std::stoull(argv[2]), first = argc > 3 ? std::stoull(argv[3]) : 0;
  std::vector<std::string> seeds;
  for (const auto& entry : std::filesystem::directory_iterator(argv[1])) {
    std::ifstream file(entry.path(), std::ios::binary);
    seeds.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  }
  if (seeds.empty()) {
    std::cerr << argv[1] << " holds no seed\n";
    return 2;
  }
  std::sort(seeds.begin(), seeds.end());  // a directory has no order of its own
  const std::filesystem::path current = std::string(argv[0]) + ".input";
  for (const std::string& seed : seeds) run(seed, "a seed", current);
  for (std::uint64_t i = first; i < first + runs; ++i) {
    Random random(i);
    run(mutated(seeds, random), "run " + std::to_string(i), current);
  }
  std::filesystem::remove(current);
  std::cout << seeds.size() << " seeds, " << runs << " runs\n";
  return 0;
}
