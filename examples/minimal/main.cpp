// minimal BUNDLE PROMPT [CONFIGURATION.json]: continue a prompt, with the LoRA of the bundle or of another configuration.
#include <coatrt/coatrt.hpp>
#include <fstream>
#include <iostream>
#include <iterator>

int main(int argc, char** argv) try {
  if (argc < 3) throw coatrt::Error("usage: minimal BUNDLE PROMPT [CONFIGURATION.json]");
  const auto bundle = coatrt::Bundle::open(argv[1]);
  const coatrt::Tokenizer tokenizer(bundle);
  coatrt::Session session(bundle);
  if (argc > 3) {
    std::ifstream file(argv[3]);
    session.swap(bundle.configuration({std::istreambuf_iterator<char>(file), {}}, argv[3]));
  }
  coatrt::TextStream text(tokenizer);
  session.generate(tokenizer.encode(argv[2]), 64, {}, [&](std::int64_t token) {
    std::cout << text.add(token) << std::flush;
    return true;
  });
  std::cout << text.finish() << "\n";
} catch (const coatrt::Error& error) {
  std::cerr << "minimal: " << error.what() << "\n";
  return 2;
}
