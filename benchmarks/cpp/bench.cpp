// bench BUNDLE THREADS CONTEXT [BACKEND [PROVIDER]]: one JSON request a line on stdin, one answer a line on stdout.
//   {"prompt": ids, "steps": n}          prefill, then n likeliest tokens: {"tokens", "seconds" of each step, "logits" of the last}
//   {"emit": configuration, "to": path}  the LoRA: {"emit_s", "swap_s"}; it stays bound
//   {"load": configurations, "prompt": ids, "tokens": n, "workers": w, "turns": t}
//       every worker changes its configuration before every generation: {"wrong", "generations", "swap_s" of each}
#include <chrono>
#include <coatrt/coatrt.hpp>
#include <iostream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

using nlohmann::json;
using Clock = std::chrono::steady_clock;

namespace {

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

json decode(coatrt::Session& session, const json& request) {
  const auto prompt = request.at("prompt").get<std::vector<std::int64_t>>();
  coatrt::Logits logits = session.prefill(prompt);
  std::vector<std::int64_t> tokens;
  std::vector<double> seconds;
  for (int step = request.at("steps"); step > 0; --step) {
    const auto start = Clock::now();
    tokens.push_back(session.decode());
    seconds.push_back(since(start));
  }
  if (request.value("logits", false)) logits = session.prefill(prompt);
  return {{"tokens", tokens}, {"seconds", seconds}, {"logits", request.value("logits", false) ? json(std::vector<float>(logits.data, logits.data + logits.size)) : json()}};
}

json emit(const coatrt::Bundle& bundle, coatrt::Session& session, const json& request) {
  const auto configuration = bundle.configuration(request.at("emit").dump());
  const auto start = Clock::now();
  const auto lora = bundle.adapt(configuration);
  const double emitted = since(start);
  session.swap(lora);
  const double swapped = since(start) - emitted;
  if (request.contains("to")) lora.save(request.at("to").get<std::string>());
  return {{"emit_s", emitted}, {"swap_s", swapped}};
}

json load(const coatrt::Bundle& bundle, const coatrt::SessionOptions& options, const json& request) {
  const auto prompt = request.at("prompt").get<std::vector<std::int64_t>>();
  const std::size_t tokens = request.at("tokens"), workers = request.at("workers"), turns = request.at("turns");
  std::vector<coatrt::Configuration> configurations;
  // Tokens, and the prompt's logits to the bit: close configurations may say the same.
  using Answer = std::pair<std::vector<std::int64_t>, std::vector<float>>;
  const auto said = [&](coatrt::Session& session) {
    const auto logits = session.prefill(prompt);
    std::vector<float> first(logits.data, logits.data + logits.size);
    return Answer(session.generate(prompt, tokens).tokens, std::move(first));
  };
  std::vector<Answer> expected;
  coatrt::Session alone(bundle, options);
  for (const json& value : request.at("load")) {
    configurations.push_back(bundle.configuration(value.dump()));
    alone.swap(configurations.back());
    expected.push_back(said(alone));
  }
  std::mutex mutex;
  std::vector<double> seconds;
  std::size_t wrong = 0;
  std::vector<std::thread> threads;
  for (std::size_t worker = 0; worker < workers; ++worker)
    threads.emplace_back([&, worker] {
      coatrt::Session session(bundle, options);
      for (std::size_t turn = 0; turn < turns; ++turn) {
        const std::size_t which = (worker + turn) % configurations.size();
        const auto start = Clock::now();
        session.swap(configurations[which]);
        const double swapped = since(start);
        const bool right = said(session) == expected[which];
        const std::lock_guard lock(mutex);
        seconds.push_back(swapped);
        wrong += !right;
      }
    });
  for (auto& thread : threads) thread.join();
  bool differ = true;
  for (std::size_t i = 1; i < expected.size(); ++i) differ = differ && expected[i].second != expected[0].second;
  return {{"wrong", wrong}, {"generations", seconds.size()}, {"swap_s", seconds}, {"differ", differ}};
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 4) throw coatrt::Error("usage: bench BUNDLE THREADS CONTEXT [BACKEND [PROVIDER]]");
  coatrt::SessionOptions options;
  options.threads = std::stoi(argv[2]);
  options.context = std::stoll(argv[3]);
  if (argc > 4) options.backend = argv[4];
  if (argc > 5) options.provider = argv[5];
  coatrt::BundleOptions bundle_options;
  bundle_options.threads = options.threads;
  const auto start = Clock::now();
  const auto bundle = coatrt::Bundle::open(argv[1], bundle_options);
  coatrt::Session session(bundle, options);
  std::cout << json{{"load_s", since(start)}} << std::endl;
  for (std::string line; std::getline(std::cin, line);) {
    const json request = json::parse(line);
    if (request.contains("steps")) std::cout << decode(session, request) << std::endl;
    else if (request.contains("emit")) std::cout << emit(bundle, session, request) << std::endl;
    else std::cout << load(bundle, options, request) << std::endl;
  }
} catch (const std::exception& error) {
  std::cerr << "bench: " << error.what() << "\n";
  return 2;
}
