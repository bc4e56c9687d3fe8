// What the Python tests and benchmarks ask of the library; answers are JSON on stdout, a refusal is one line and exit 2.
#include <chrono>
#include <coatrt/coatrt.hpp>
#include <fstream>
#include <iostream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <thread>

#include "cuda/weights.hpp"
#include "glob.hpp"
#include "state.hpp"
#include "tokenizer/pattern.hpp"
#include "tokenizer/unicode.hpp"

using nlohmann::json;

namespace {

std::string read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// The session that a request asks for.
coatrt::SessionOptions options_of(const json& request) {
  coatrt::SessionOptions options;
  options.threads = request.value("threads", 1);
  options.context = request.value("context", 2048);
  options.backend = request.value("backend", "ort");
  options.accuracy_level = request.value("accuracy_level", options.accuracy_level);
  options.strict_lora = request.value("strict_lora", false);
  options.provider = request.value("provider", "");
  options.provider_options = request.value("provider_options", options.provider_options);
  return options;
}

// {"prompt": [ids], "tokens": n, "threads": n, "context": n, "accuracy_level": n, "lora": true, "lora_file": path,
// "configuration": {…}, "strict_lora": false, "backend", "provider", "provider_options"} → tokens, and the logits of every
// step
json run(const coatrt::Bundle& bundle, const json& request) {
  coatrt::Session session(bundle, options_of(request));
  if (!request.value("lora", true)) session.drop_lora();
  if (request.contains("lora_file")) session.swap(bundle.lora(std::filesystem::path(request.at("lora_file").get<std::string>())));
  if (request.contains("configuration")) session.swap(bundle.configuration(request.at("configuration").dump()));
  const auto prompt = request.at("prompt").get<std::vector<std::int64_t>>();
  json answer{{"capacity", session.capacity()}, {"logits", json::array()}};
  coatrt::Logits logits = session.prefill(prompt);
  for (int i = 0; i < request.value("steps", 0); ++i) {
    answer["logits"].push_back(std::vector<float>(logits.data, logits.data + logits.size));
    logits = session.decode(session.decode());  // twice, so that both forms are used
  }
  const auto made = session.generate(prompt, request.value("tokens", 16));
  answer["tokens"] = made.tokens;
  answer["reason"] = made.reason;
  return answer;
}

// {…, "configurations": [{…}]}: a session for each, on a thread of its own → their tokens, those of sessions that take the
// places of the first ones, and pages of memory before, with one and with all of them
json share(const coatrt::Bundle& bundle, const json& request) {
  const auto options = options_of(request);
  const auto prompt = request.at("prompt").get<std::vector<std::int64_t>>();
  const auto& configurations = request.at("configurations");
  std::vector<std::vector<std::int64_t>> tokens(configurations.size()), again(configurations.size());
  const auto pages = [] {
    std::ifstream file("/proc/self/statm");
    long size = 0, resident = 0;
    file >> size >> resident;
    return resident;
  };
  json memory{pages()};
  std::vector<coatrt::Session> sessions;
  for (const json& configuration : configurations) {
    sessions.emplace_back(bundle, options).swap(bundle.configuration(configuration.dump()));
    memory.push_back(pages());
  }
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < sessions.size(); ++i)
    threads.emplace_back([&, i] {
      for (int turn = 0; turn < 3; ++turn) tokens[i] = sessions[i].generate(prompt, request.value("tokens", 16)).tokens;
    });
  for (auto& thread : threads) thread.join();
  coatrt::Session last = std::move(sessions.back());  // keeps the weights loaded
  sessions.clear();
  for (std::size_t i = 0; i + 1 < tokens.size(); ++i) {
    coatrt::Session session(bundle, options);
    session.swap(bundle.configuration(configurations[i].dump()));
    again[i] = session.generate(prompt, request.value("tokens", 16)).tokens;
  }
  again.back() = last.generate(prompt, request.value("tokens", 16)).tokens;
  return {{"tokens", tokens}, {"again", again}, {"pages", memory}};
}

int answer(int argc, char** argv) {
  const std::string command = argc > 1 ? argv[1] : "";
  if (command == "encode" && argc == 4) {  // tokenizer.json, [texts] → [[ids, text of ids]]
    const coatrt::Tokenizer tokenizer(read(argv[2]));
    json all = json::array();
    for (const json& text : json::parse(read(argv[3]))) {
      const auto ids = tokenizer.encode(text.get<std::string>());
      coatrt::TextStream stream(tokenizer);
      std::string streamed;
      for (const auto id : ids) streamed += stream.add(id);
      all.push_back({ids, tokenizer.decode(ids), streamed + stream.finish()});
    }
    std::cout << all << "\n";
    return 0;
  }
  if (command == "globs" && argc == 3) {  // [[pattern, name]] → [whether it matches]
    json all = json::array();
    for (const json& pair : json::parse(read(argv[2])))
      all.push_back(coatrt::detail::Glob(pair.at(0).get<std::string>()).matches(pair.at(1).get<std::string>()));
    std::cout << all << "\n";
    return 0;
  }
  if (command == "split" && argc == 4) {  // pattern, [texts] → [[length of each match]]
    const coatrt::detail::Pattern pattern(argv[2]);
    json all = json::array();
    for (const json& text : json::parse(read(argv[3]))) {
      const auto points = coatrt::detail::decode_utf8(text.get<std::string>());
      std::size_t steps = coatrt::detail::Pattern::steps_for(points.size());
      json lengths = json::array();
      for (std::size_t at = 0; at < points.size();) {
        lengths.push_back(pattern.match(points, at, points.size(), steps));
        at += std::max<std::size_t>(1, lengths.back().get<std::size_t>());
      }
      all.push_back(lengths);
    }
    std::cout << all << "\n";
    return 0;
  }
  if (argc < 3) throw coatrt::Error("usage: probe COMMAND BUNDLE …");
  const auto bundle = coatrt::Bundle::open(argv[2]);
  if (command == "check") {
    std::cout << json{{"files", bundle.check_all()}, {"configuration", bundle.configuration().hash()}} << "\n";
  } else if (command == "lora" && argc == 4) {
    const auto lora = bundle.lora(std::filesystem::path(argv[3]));
    std::cout << json{{"tensors", lora.tensors().size()}, {"configuration", lora.configuration()}} << "\n";
  } else if (command == "adapt" && argc == 5) {  // configuration, output
    const auto configuration = bundle.configuration(read(argv[3]), argv[3]);
    bundle.adapt(configuration).save(argv[4]);
    std::cout << json{{"hash", configuration.hash()}, {"formats", configuration.formats}} << "\n";
  } else if (command == "run" && argc == 4) {
    std::cout << run(bundle, json::parse(argv[3])) << "\n";
  } else if (command == "weights" && argc == 4) {  // configuration → what its weights take on a GPU
    const auto found = coatrt::detail::device_weights(bundle.configuration(read(argv[3]), argv[3]),
                                                      bundle.state()->manifest.at("matrices"));
    std::cout << json{{"bytes", found.bytes}, {"note", found.note}} << "\n";
  } else if (command == "share" && argc == 4) {
    std::cout << share(bundle, json::parse(argv[3])) << "\n";
  } else {
    throw coatrt::Error("no command " + command);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return answer(argc, argv);
  } catch (const coatrt::Error& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
}
