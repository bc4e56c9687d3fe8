// Sessions over a made-up backend, and over the bundle that the Python tests name in COATRT_TEST_BUNDLE.
#include <doctest/doctest.h>

#include <cstdlib>
#include <mutex>
#include <thread>

#include "coatrt/coatrt.hpp"

namespace {

const char* bundle_path() { return std::getenv("COATRT_TEST_BUNDLE"); }

coatrt::Sampling sampling(double temperature, std::int64_t top_k = 0, double top_p = 1) {
  coatrt::Sampling made;
  made.temperature = temperature;
  made.top_k = top_k;
  made.top_p = top_p;
  return made;
}

/// Says after token t that t + 1 is likeliest; notes what it was asked.
struct Counting final : coatrt::Decoder {
  struct Call {
    std::vector<std::int64_t> tokens;
    std::int64_t start;
  };
  std::vector<Call>& calls;
  int& loras;
  std::vector<float> logits = std::vector<float>(32);
  Counting(std::vector<Call>& all, int& count) : calls(all), loras(count) {}
  std::int64_t capacity() const override { return 10; }
  std::int64_t prefill_limit() const override { return 4; }
  std::int64_t vocabulary() const override { return 32; }
  void set_lora(const coatrt::Lora* lora) override { loras += lora == nullptr ? 100 : 1; }
  const float* run(const std::int64_t* tokens, std::size_t count, std::int64_t start) override {
    calls.push_back({{tokens, tokens + count}, start});
    logits.assign(32, 0);
    logits[static_cast<std::size_t>(tokens[count - 1] + 1) % 32] = 1;
    return logits.data();
  }
};

}  // namespace

TEST_CASE("a session splits prompts, counts positions and refuses what does not fit" * doctest::skip(bundle_path() == nullptr)) {
  const auto bundle = coatrt::Bundle::open(bundle_path());
  std::vector<Counting::Call> calls;
  int loras = 0;
  coatrt::Session session(bundle, std::make_unique<Counting>(calls, loras));
  CHECK(loras == 1);  // the bundle's own
  CHECK_THROWS_WITH_AS(session.decode(), "no sequence is begun; call prefill first", coatrt::Error);
  session.prefill({1, 2, 3, 4, 5, 6});
  REQUIRE(calls.size() == 2);
  CHECK(calls[0].tokens == std::vector<std::int64_t>{1, 2, 3, 4});
  CHECK(calls[1].start == 4);
  CHECK(session.decode() == 7);
  CHECK(session.decode() == 8);
  CHECK(session.length() == 8);
  CHECK_THROWS_WITH_AS(session.decode(32), "token id 32 is outside the vocabulary of 32; use the bundle's tokenizer", coatrt::Error);
  CHECK_THROWS_AS(session.decode(-1), coatrt::Error);
  session.decode(1);
  session.decode(1);
  CHECK_THROWS_WITH_AS(session.decode(1), "11 positions needed, the decoder has 10: the bundle was built for that context; shorten the prompt, or build with a longer --context", coatrt::Error);
  CHECK_THROWS_WITH_AS(session.prefill({}), "empty prompt; give at least one token per sequence", coatrt::Error);
  CHECK_THROWS_AS(session.prefill(std::vector<std::int64_t>(11, 1)), coatrt::Error);
  CHECK(session.length() == 10);  // a refused prompt leaves the sequence as it was

  auto made = session.generate({1, 2}, 3);
  CHECK(made.tokens == std::vector<std::int64_t>{3, 4, 5});
  CHECK(made.reason == "length");
  made = session.generate({1, 2}, 100);  // as many as there is room for: the last token is not fed
  CHECK(made.tokens.size() == 9);
  made = session.generate({1}, 100, {}, [](std::int64_t token) { return token < 4; });
  CHECK(made.tokens == std::vector<std::int64_t>{2, 3, 4});
  CHECK(made.reason == "cancelled");
  CHECK_THROWS_WITH_AS(session.generate({1}, 0), "max_tokens must be at least 1, got 0", coatrt::Error);
  CHECK_THROWS_AS(session.generate({1}, 1, sampling(-1.0)), coatrt::Error);
  CHECK_THROWS_AS(session.generate({1}, 1, sampling(1.0, -1)), coatrt::Error);
  CHECK_THROWS_AS(session.generate({1}, 1, sampling(1.0, 0, 0.0)), coatrt::Error);
  CHECK_THROWS_AS(session.swap(coatrt::Lora()), coatrt::Error);
  session.drop_lora();
  CHECK(loras == 101);
}

TEST_CASE("configurations change under load and no token is wrong" * doctest::skip(bundle_path() == nullptr)) {
  const auto bundle = coatrt::Bundle::open(bundle_path());
  coatrt::SessionOptions options;
  options.threads = 1;
  std::vector<coatrt::Configuration> configurations;
  for (const char* format : {"int8", "int4-g32", "nf3-g32"})
    configurations.push_back(bundle.configuration(std::string("{\"default\": \"") + format + "\"}"));
  std::vector<std::int64_t> prompt;
  std::vector<std::vector<std::int64_t>> expected(3);
  for (std::int64_t first = 1; first <= 40 && expected[0] == expected[2]; ++first) {  // a prompt that tells them apart
    prompt = {first, 2 * first, 3 * first, 4 * first};
    for (std::size_t i = 0; i < 3; ++i) {
      coatrt::Session session(bundle, options);
      session.swap(configurations[i]);
      expected[i] = session.generate(prompt, 24).tokens;
    }
  }
  CHECK(expected[0] != expected[2]);
  std::mutex mutex;
  int wrong = 0, runs = 0;
  std::vector<std::thread> threads;
  for (unsigned worker = 0; worker < 4; ++worker)
    threads.emplace_back([&, worker] {
      coatrt::Session session(bundle, options);
      for (std::size_t turn = 0; turn < 12; ++turn) {
        const std::size_t which = (turn * (worker + 1) + worker) % 3;
        session.swap(configurations[which]);
        const auto tokens = session.generate(prompt, 24).tokens;
        const std::lock_guard lock(mutex);
        ++runs;
        wrong += tokens != expected[which];
      }
    });
  for (auto& thread : threads) thread.join();
  CHECK(runs == 48);
  CHECK(wrong == 0);
}
