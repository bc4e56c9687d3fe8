#include <doctest/doctest.h>

#include "coatrt/error.hpp"
#include "coatrt/tokenizer.hpp"
#include "tokenizer/pattern.hpp"
#include "tokenizer/unicode.hpp"

using namespace coatrt::detail;

namespace {
std::size_t match(const char* pattern, const char* text) {
  const auto points = decode_utf8(text);
  std::size_t steps = Pattern::steps_for(points.size());
  return Pattern(pattern).match(points, 0, points.size(), steps);
}
}  // namespace

TEST_CASE("patterns match as regular expressions do") {
  CHECK(match(R"(\s+(?!\S)|\s+)", "   x") == 2);
  CHECK(match(R"(\s+(?!\S)|\s+)", "   ") == 3);
  CHECK(match(R"((?i:'s|'ll))", "'LL") == 3);
  CHECK(match(R"((?i:'s|'ll))", "'\u017f") == 2);  // the long s folds to s
  CHECK(match(R"([^\r\n\p{L}\p{N}]?\p{L}+)", " été!") == 4);
  CHECK(match(R"(\p{N}{1,3})", "12345") == 3);
  CHECK(match(R"(a{2,}b)", "ab") == 0);
  CHECK(match(R"(a{2,}b)", "aaab") == 4);
  CHECK(match(R"(x(?:ab|a)?c)", "xac") == 3);
  CHECK(match(R"(x(?:ab|a)?c)", "xc") == 2);
  CHECK(match(R"(a++a)", "aaa") == 0);
  CHECK(match(R"(ab(?=c)[c-e])", "abc") == 3);
  CHECK(match(R"([a\-z]+)", "-za") == 3);
  for (const char* bad : {"(?:ab)+", "a+?", "(?<=a)b", "(a", "a)", "[a", "\\b", "^a", "\\p{Lu}", "a{3,2}", "[a-\\s]", "\\", "*"})
    CHECK_THROWS_AS(Pattern{bad}, coatrt::Error);
  CHECK_THROWS_AS(Pattern{std::string(1000, '(')}, coatrt::Error);
}

TEST_CASE("a long text does not deepen the stack") {
  const std::vector<char32_t> text(1 << 21, U' ');
  std::size_t steps = Pattern::steps_for(text.size());
  CHECK(Pattern(R"(\s*[\r\n]+|\s+(?!\S)|\s+)").match(text, 0, text.size(), steps) == text.size());
  CHECK_THROWS_AS(Pattern{std::string(2000, 'a')}, coatrt::Error);
  CHECK_THROWS_AS(Pattern::literal(std::string(2000, 'a')), coatrt::Error);
}

TEST_CASE("backtracking takes polynomial time, and what it finds stays the same") {
  const std::string many(600, 'a');
  CHECK(match("a*a*a*a*a*a*a*a*b", many.c_str()) == 0);
  CHECK(match("a*a*a*a*a*a*a*a*b", (many + "b").c_str()) == 601);
  CHECK(match("a*(?:a*|b)(?!c)a*a*(?:x|a*b)|a+", many.c_str()) == 600);
  CHECK(match("a*(?=a*b)a*a*a*b", (many + "b").c_str()) == 601);
}

TEST_CASE("a text that takes too many steps is refused in one line") {
  const std::vector<char32_t> text(1000, U'a');
  std::size_t steps = 10'000;
  CHECK_THROWS_WITH_AS(Pattern("a*a*b").match(text, 0, text.size(), steps),
                       "the tokenizer's pattern takes too many steps on this text; shorten it or pass token ids", coatrt::Error);
}

TEST_CASE("UTF-8 and normal form") {
  CHECK(replace_invalid("a\xff" "b\xe2\x82" "c\xed\xa0\x80") == "a\ufffd" "b\ufffd" "c\ufffd\ufffd\ufffd");
  CHECK_THROWS_WITH_AS(decode_utf8("ab\xc0\x80"), "the text is not UTF-8 at byte 2; give UTF-8", coatrt::Error);
  CHECK(to_nfc(decode_utf8("e\u0301\u212b x")) == decode_utf8("\u00e9\u00c5 x"));
  CHECK(to_nfc(decode_utf8("a\u0323\u0302 a\u0302\u0323")) == decode_utf8("\u1ead \u1ead"));
  CHECK(to_nfc(decode_utf8("\u1112\u1161\u11ab")) == decode_utf8("\ud55c"));
}

TEST_CASE("a tokenizer of another kind is refused") {
  for (const char* json : {"{}", "[]", "null", R"({"model":{"type":"Unigram"}})", R"({"model":{"type":"BPE","vocab":{},"merges":[]}})",
                           R"({"model":{"type":"BPE","vocab":{"a":-1},"merges":[]}})",
                           R"({"model":{"type":"BPE","vocab":{"a":0},"merges":[["a","b"]]}})",
                           R"({"model":{"type":"BPE","vocab":[],"merges":[]},"normalizer":{"type":"Lowercase"}})"})
    CHECK_THROWS_AS(coatrt::Tokenizer{std::string_view(json)}, coatrt::Error);
}
