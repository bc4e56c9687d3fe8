// tokenize TOKENIZER.json TEXTS.json ROUNDS: seconds to load, the ids and the decoded text of each text, and the
// seconds of each round over all of them, as JSON on stdout. A refusal is one line on stderr and exit code 2.
#include <chrono>
#include <coatrt/error.hpp>
#include <coatrt/tokenizer.hpp>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>

using nlohmann::json;
using Clock = std::chrono::steady_clock;

namespace {

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

std::string read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

int main(int, char** arguments) {
  const auto texts = json::parse(read(arguments[2])).get<std::vector<std::string>>();
  try {
    auto start = Clock::now();
    const coatrt::Tokenizer tokenizer(read(arguments[1]));
    json answer{{"load_s", since(start)}, {"ids", json::array()}, {"decoded", json::array()}, {"seconds", json::array()}};
    for (const auto& text : texts) {
      answer["ids"].push_back(tokenizer.encode(text));
      answer["decoded"].push_back(tokenizer.decode(tokenizer.encode(text)));
    }
    for (int round = std::stoi(arguments[3]); round > 0; --round) {
      start = Clock::now();
      for (const auto& text : texts) tokenizer.encode(text);
      answer["seconds"].push_back(since(start));
    }
    std::cout << answer << "\n";
  } catch (const coatrt::Error& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
  return 0;
}
