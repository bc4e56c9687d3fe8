// Rows of a batch, over the bundle that the Python tests name in COATRT_TEST_BUNDLE.
#include <doctest/doctest.h>

#include <cstdlib>
#include <cstring>

#include "coatrt/coatrt.hpp"

namespace {

const char* bundle_path() { return std::getenv("COATRT_TEST_BUNDLE"); }

using Tokens = std::vector<std::int64_t>;
using Values = std::vector<float>;

Values values(const coatrt::Logits& logits) { return {logits.data, logits.data + logits.size}; }

Tokens prompt(std::int64_t seed, std::size_t length) {
  Tokens made;
  for (std::size_t i = 0; i < length; ++i) made.push_back(1 + (seed * 31 + static_cast<std::int64_t>(i) * 17) % 250);
  return made;
}

/// What a sequence has computed: the logits of its prompt and of `steps` tokens.
std::vector<Values> alone(coatrt::Batch& batch, std::size_t row, const Tokens& tokens, std::size_t steps) {
  std::vector<Values> made{values(batch.prefill(row, tokens.data(), tokens.size()))};
  for (std::size_t i = 0; i < steps; ++i) made.push_back(values(batch.decode({{row, static_cast<std::int64_t>(7 * i + 3)}})[0]));
  return made;
}

}  // namespace

TEST_CASE("rows that join and leave, of several LoRAs, get the logits that they get alone" * doctest::skip(bundle_path() == nullptr)) {
  const auto bundle = coatrt::Bundle::open(bundle_path());
  coatrt::SessionOptions options;
  options.threads = 1;
  options.context = 64;
  const std::size_t kRows = 5, kSteps = 12;
  const coatrt::Lora own = bundle.lora(), other = bundle.adapt(bundle.configuration(R"({"default": "int8"})"));
  const auto set = [&](coatrt::Batch& batch, std::size_t row) {
    if (row % 3 == 0) batch.set_lora(row, own);
    else if (row % 3 == 1) batch.set_lora(row, other);
    else batch.drop_lora(row);
  };
  std::vector<std::vector<Values>> expected;
  for (std::size_t row = 0; row < kRows; ++row) {
    coatrt::Batch batch(bundle, kRows, options);
    set(batch, row);
    expected.push_back(alone(batch, row, prompt(static_cast<std::int64_t>(row), 3 + 4 * row), kSteps));
  }
  CHECK(expected[0][0] != expected[1][0]);
  coatrt::Batch batch(bundle, kRows, options);
  CHECK(batch.rows() == kRows);
  CHECK(batch.capacity() == 64);
  for (int round = 0; round < 2; ++round) {  // in the second, rows are used again
    std::vector<std::size_t> done(kRows);
    for (std::size_t row = 0; row < kRows; ++row) set(batch, row);
    for (std::size_t time = 0; time < 3 * kRows + kSteps; ++time) {
      std::vector<coatrt::Batch::Step> steps;
      for (std::size_t i = 0; i < kRows; ++i) {
        const std::size_t row = (i * 2 + time) % kRows;  // in changing order
        if (time < 3 * row || done[row] > kSteps) continue;
        if (done[row] == 0) {
          const Tokens tokens = prompt(static_cast<std::int64_t>(row), 3 + 4 * row);
          CHECK(values(batch.prefill(row, tokens.data(), tokens.size())) == expected[row][0]);
        } else {
          steps.push_back({row, static_cast<std::int64_t>(7 * (done[row] - 1) + 3)});
        }
        ++done[row];
      }
      const auto logits = batch.decode(steps);
      REQUIRE(logits.size() == steps.size());
      for (std::size_t i = 0; i < steps.size(); ++i) CHECK(values(logits[i]) == expected[steps[i].row][done[steps[i].row] - 1]);
    }
    for (const std::size_t count : done) CHECK(count == kSteps + 1);
  }
}

TEST_CASE("a prefix that is kept or copied gives the logits of the whole prompt" * doctest::skip(bundle_path() == nullptr)) {
  const auto bundle = coatrt::Bundle::open(bundle_path());
  coatrt::SessionOptions options;
  options.threads = 1;
  options.context = 64;
  coatrt::Batch batch(bundle, 3, options);
  const Tokens tokens = prompt(5, 30);
  const auto whole = alone(batch, 0, tokens, 4);
  for (const std::size_t kept : {2, 16, 28}) {
    batch.truncate(0, static_cast<std::int64_t>(kept));
    CHECK(alone(batch, 0, {tokens.begin() + static_cast<std::ptrdiff_t>(kept), tokens.end()}, 4) == whole);
    batch.drop_lora(1);
    REQUIRE(batch.copy(0, 1, static_cast<std::int64_t>(kept)));
    CHECK(batch.length(1) == static_cast<std::int64_t>(kept));
    CHECK(alone(batch, 1, {tokens.begin() + static_cast<std::ptrdiff_t>(kept), tokens.end()}, 4) == whole);
  }
}

TEST_CASE("what a batch refuses" * doctest::skip(bundle_path() == nullptr)) {
  const auto bundle = coatrt::Bundle::open(bundle_path());
  coatrt::SessionOptions options;
  options.context = 7;
  CHECK_THROWS_AS(coatrt::Batch(bundle, 0, options), coatrt::Error);
  coatrt::Batch batch(bundle, 1, options);
  const Tokens tokens{1, 2, 3, 4, 5, 6, 7, 8};
  CHECK_THROWS_AS(batch.prefill(0, tokens.data(), 8), coatrt::Error);
  CHECK_THROWS_AS(batch.prefill(1, tokens.data(), 1), coatrt::Error);
  CHECK_THROWS_AS(batch.prefill(0, tokens.data(), 0), coatrt::Error);
  batch.prefill(0, tokens.data(), 7);  // an odd number of positions, all of them
  CHECK_THROWS_AS(batch.decode({{0, 1}}), coatrt::Error);
  batch.truncate(0, 5);
  CHECK_THROWS_AS(batch.truncate(0, 6), coatrt::Error);
  CHECK_THROWS_AS(batch.decode({{0, 1}, {0, 2}}), coatrt::Error);
  CHECK_THROWS_AS(batch.decode({{0, 1 << 30}}), coatrt::Error);
  CHECK_THROWS_AS(batch.copy(0, 0, 6), coatrt::Error);
  CHECK_THROWS_AS(batch.set_lora(0, coatrt::Lora()), coatrt::Error);
  CHECK(batch.decode({}).empty());
  CHECK(batch.decode({{0, 1}}).size() == 1);
}
