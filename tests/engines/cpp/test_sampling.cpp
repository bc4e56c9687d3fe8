// How a token is chosen, and where a text ends: against numbers computed by hand.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>
#include <random>

#include "coatrt/coatrt.hpp"
#include "sampling.hpp"

namespace {

const float kValues[] = {1, 3, 2, 0};
const coatrt::Logits kLogits{kValues, 4};

template <class Change>
coatrt::Sampling sampling(double temperature, const Change& change) {
  coatrt::Sampling made;
  made.temperature = temperature;
  change(made);
  return made;
}
coatrt::Sampling sampling(double temperature) {
  return sampling(temperature, [](auto&) {});
}

/// The greedy tokens of a sampler that sees the same logits every time.
std::vector<std::int64_t> greedy(const coatrt::Sampling& how, std::size_t count, const std::vector<std::int64_t>& prompt = {}) {
  coatrt::Sampler sampler(how, prompt);
  std::vector<std::int64_t> made;
  while (made.size() < count) made.push_back(sampler.next(kLogits));
  return made;
}

std::string shown(const std::vector<std::string>& stops, const std::vector<std::string>& pieces, bool& found) {
  coatrt::StopStrings strings(stops);
  std::string made;
  for (const std::string& piece : pieces) made += strings.add(piece);
  found = strings.found();
  return found ? made : made + strings.finish();
}

}  // namespace

TEST_CASE("temperature, then top-k, top-p and min-p") {
  CHECK(coatrt::detail::likeliest(kLogits) == 1);
  auto p = coatrt::detail::probabilities(kLogits, sampling(2));
  CHECK(p[1] / p[2] == doctest::Approx(std::exp(0.5)));
  p = coatrt::detail::probabilities(kLogits, sampling(1, [](auto& s) { s.top_k = 2; }));
  CHECK(p[0] == 0);
  CHECK(p[1] == doctest::Approx(1 / (1 + std::exp(-1.0))));
  p = coatrt::detail::probabilities(kLogits, sampling(1, [](auto& s) { s.top_p = 0.7; }));  // 0.64, 0.24, 0.09, 0.03
  CHECK(p[1] + p[2] == doctest::Approx(1));
  p = coatrt::detail::probabilities(kLogits, sampling(1, [](auto& s) { s.min_p = 0.3; }));  // 0.37 of the likeliest, 0.14
  CHECK(p[1] / p[2] == doctest::Approx(std::exp(1.0)));
  CHECK(p[0] == 0);
  CHECK(p[1] + p[2] == doctest::Approx(1));
  // Top-p counts what top-k left: 0.73 and 0.27.
  p = coatrt::detail::probabilities(kLogits, sampling(1, [](auto& s) { s.top_k = 2, s.top_p = 0.72; }));
  CHECK(p[1] == 1);
  for (const double tiny : {1e-300, 1e-308, 1e-320}) CHECK(coatrt::detail::probabilities(kLogits, sampling(tiny))[1] == 1);
  coatrt::Sampler sampler(sampling(1, [](auto& s) { s.top_k = 2; }));
  int hits = 0;
  for (int i = 0; i < 2000; ++i) hits += sampler.next(kLogits) == 1;
  CHECK(hits / 2000.0 == doctest::Approx(0.731).epsilon(0.05));
}

TEST_CASE("top-p of a large vocabulary is that of a full sort") {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(20000);
  for (float& value : values) value = normal(random);
  const coatrt::Logits logits{values.data(), values.size()};
  const auto all = coatrt::detail::probabilities(logits, sampling(1));
  for (const double top_p : {1e-9, 0.01, 0.3, 0.9, 0.9999}) {
    std::vector<double> sorted = all;
    std::sort(sorted.rbegin(), sorted.rend());
    std::size_t count = 0;
    for (double sum = 0; sum < top_p; ++count) sum += sorted[count];
    const auto p = coatrt::detail::probabilities(logits, sampling(1, [&](auto& s) { s.top_p = top_p; }));
    CHECK(static_cast<std::size_t>(std::count_if(p.begin(), p.end(), [](double x) { return x > 0; })) == count);
    for (std::size_t i = 0; i < p.size(); ++i)
      if ((p[i] > 0) != (all[i] >= sorted[count - 1])) FAIL("another token is kept");
  }
}

TEST_CASE("of equal logits the lower ids are kept") {
  const std::vector<float> equal(1000, 1.0F);
  const coatrt::Logits logits{equal.data(), equal.size()};
  CHECK(coatrt::detail::likeliest(logits) == 0);
  auto p = coatrt::detail::probabilities(logits, sampling(1, [](auto& s) { s.top_k = 3; }));
  CHECK(p[2] == doctest::Approx(1 / 3.0));
  CHECK(p[3] == 0);
  p = coatrt::detail::probabilities(logits, sampling(1, [](auto& s) { s.top_p = 0.0045; }));
  CHECK(p[4] == doctest::Approx(0.2));
  CHECK(p[5] == 0);
}

TEST_CASE("bias and penalties, in their order") {
  CHECK(greedy(sampling(0), 3) == std::vector<std::int64_t>{1, 1, 1});
  CHECK(greedy(sampling(0, [](auto& s) { s.logit_bias = {{3, 4.0}}; }), 1)[0] == 3);
  // 3 → 3 - 1 - 0.6 = 1.4 < 2, then 2 → 0.4; 1.4 → 3 - 1 - 1.2 = 0.8 < 1.
  const auto both = sampling(0, [](auto& s) { s.presence_penalty = 1, s.frequency_penalty = 0.6; });
  CHECK(greedy(both, 5) == std::vector<std::int64_t>{1, 2, 1, 0, 1});
  const auto repeated = sampling(0, [](auto& s) { s.repetition_penalty = 2; });
  CHECK(greedy(repeated, 3) == std::vector<std::int64_t>{1, 2, 1});    // 3/2 < 2; 2/2 < 3/2
  CHECK(greedy(repeated, 1, {1, 1}) == std::vector<std::int64_t>{2});  // once, however often it occurs
  // A bias first: 3 - 4 is negative, so the penalty multiplies; the presence penalty does not count the prompt.
  auto order = sampling(0, [](auto& s) { s.repetition_penalty = 3, s.presence_penalty = 1, s.logit_bias = {{1, -4.0}, {2, -4.5}, {0, -20.0}, {3, -20.0}}; });
  CHECK(greedy(order, 1, {1}) == std::vector<std::int64_t>{2});  // -1·3 < -2.5
  order.repetition_penalty = 2;
  CHECK(greedy(order, 1, {1}) == std::vector<std::int64_t>{1});  // -1·2 > -2.5; less 1, if the prompt counted, it would not be
}

TEST_CASE("log probabilities are those of the logits") {
  const auto found = coatrt::logprobs(kLogits, 2, 2);
  const double sum = std::exp(1) + std::exp(3) + std::exp(2) + 1;
  CHECK(found.token == doctest::Approx(2 - std::log(sum)));
  REQUIRE(found.likeliest.size() == 2);
  CHECK(found.likeliest[0].first == 1);
  CHECK(found.likeliest[1].second == doctest::Approx(2 - std::log(sum)));
  CHECK(coatrt::logprobs(kLogits, 0, 20).likeliest.size() == 4);
}

TEST_CASE("what is out of range, and logits that are no numbers") {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  for (const double wrong : {-0.1, 1.1, kNan}) CHECK_THROWS_AS(coatrt::Sampler(sampling(1, [&](auto& s) { s.min_p = wrong; })), coatrt::Error);
  for (const double wrong : {-2.1, 2.1, kNan}) {
    CHECK_THROWS_AS(coatrt::Sampler(sampling(1, [&](auto& s) { s.presence_penalty = wrong; })), coatrt::Error);
    CHECK_THROWS_AS(coatrt::Sampler(sampling(1, [&](auto& s) { s.frequency_penalty = wrong; })), coatrt::Error);
  }
  for (const double wrong : {0.0, -1.0, kNan, HUGE_VAL}) CHECK_THROWS_AS(coatrt::Sampler(sampling(1, [&](auto& s) { s.repetition_penalty = wrong; })), coatrt::Error);
  CHECK_THROWS_AS(coatrt::Sampler(sampling(1, [](auto& s) { s.logit_bias = {{-1, 1.0}}; })), coatrt::Error);
  CHECK_THROWS_AS(coatrt::Sampler(sampling(1, [](auto& s) { s.logit_bias = {{4, 1.0}}; })).next(kLogits), coatrt::Error);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), HUGE_VALF}) {
    const float values[] = {1, bad, 2};
    CHECK_THROWS_WITH_AS(coatrt::Sampler(sampling(0)).next({values, 3}), doctest::Contains("not finite"), coatrt::Error);
  }
}

TEST_CASE("a text ends before a stop string, however it is divided") {
  const std::string text = "one two three two";
  bool found = false;
  for (std::size_t size = 1; size <= text.size(); ++size) {
    std::vector<std::string> pieces;
    for (std::size_t at = 0; at < text.size(); at += size) pieces.push_back(text.substr(at, size));
    CHECK(shown({"two"}, pieces, found) == "one ");
    CHECK(found);
    CHECK(shown({"three", "o th"}, pieces, found) == "one tw");  // complete before the other
    CHECK(shown({"wo", "two"}, pieces, found) == "one ");        // they end together: the longer
    CHECK(shown({"two four", "three twos"}, pieces, found) == text);
    CHECK(!found);
    CHECK(shown({"e"}, pieces, found) == "on");
  }
  CHECK(shown({"aab"}, {"a", "a", "a", "b", "c"}, found) == "a");
  CHECK(found);
  CHECK_THROWS_AS(coatrt::StopStrings({""}), coatrt::Error);
  coatrt::StopStrings held({"\nUser:"});
  CHECK(held.add("hi\nUs") == "hi");
  CHECK(held.add("ed") == "\nUsed");
  CHECK(held.add(" \nUser: x") == " ");
  CHECK(held.add("more") == "");
}
