#include <doctest/doctest.h>

#include <cmath>
#include <random>
#include <string>

#include "coatrt/error.hpp"
#include "coatrt/json_check.hpp"
#include "external_data.hpp"
#include "formats.hpp"
#include "half.hpp"
#include "json.hpp"
#include "safetensors.hpp"

using namespace coatrt::detail;

namespace {

std::string file(const std::string& header, std::size_t data, std::uint64_t claimed = 0) {
  std::string made;
  const std::uint64_t length = claimed != 0 ? claimed : header.size();
  for (int i = 0; i < 8; ++i) made += static_cast<char>(length >> (8 * i));
  return made + header + std::string(data, '\1');
}

std::string why(const std::string& bytes) {
  try {
    read_safetensors(bytes);
  } catch (const coatrt::Error& error) {
    return error.what();
  }
  return "";
}

}  // namespace

TEST_CASE("float16 and bfloat16 round to nearest, ties to even") {
  for (std::uint32_t half = 0; half < 0x10000; ++half) {
    const auto bits = static_cast<std::uint16_t>(half);
    if (const float value = from_float16(bits); !std::isnan(value)) CHECK(to_float16(value) == bits);
    else CHECK(std::isnan(from_float16(to_float16(value))));
    if (const float value = from_bfloat16(bits); !std::isnan(value)) CHECK(to_bfloat16(value) == bits);
  }
  CHECK(from_float16(to_float16(2049)) == 2048);  // halfway, to even
  CHECK(from_float16(to_float16(2051)) == 2052);
  CHECK(to_float16(65519.996f) == 0x7bff);
  CHECK(to_float16(65520) == 0x7c00);
  CHECK(to_float16(0x1p-25f) == 0);
  CHECK(to_float16(0x1.8p-25f) == 1);
  CHECK(from_bfloat16(to_bfloat16(257)) == 256);
  CHECK(from_bfloat16(to_bfloat16(259)) == 260);
}

TEST_CASE("a safetensors file is read, a lying one refused") {
  const std::string good = R"({"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"__metadata__":{"x":"y"},)"
                           R"("b":{"dtype":"I8","shape":[],"data_offsets":[16,17]}})";
  const std::string bytes = file(good, 17);
  const auto [tensors, metadata] = read_safetensors(bytes);
  CHECK(tensors.size() == 2);
  CHECK(metadata == std::map<std::string, std::string>{{"x", "y"}});
  for (const char* bad : {"[]", "1", R"({"x":1})", R"({"x":{"y":"z"}})", "null"})
    CHECK(why(file(std::string("{\"__metadata__\":") + bad + "}", 0)) == "its metadata is not an object of strings");
  CHECK(tensors.at("a").shape == std::vector<std::int64_t>{2, 2});
  CHECK(tensors.at("b").bytes == "\1");
  CHECK(why(file(good, 18)) == "bytes after the last tensor belong to none");
  CHECK(why(file(good, 16)) == "b lies outside the file");
  CHECK(why("") == "the file is too short for a header");
  CHECK(why(file(good, 17, 5000)) == "its header claims 5000 bytes, the file has " + std::to_string(bytes.size()));
  CHECK(why(file(good, 17, ~0ULL)).find("its header claims") == 0);
  CHECK(why(file("[]", 0)) == "its header is not an object");
  CHECK(why(file("{", 0)).find("is not JSON") != std::string::npos);
  CHECK(why(file(std::string(10000, '['), 0)).find("nested deeper than 64") != std::string::npos);
  const auto one = [](const std::string& facts, std::size_t size) { return why(file("{\"a\":{" + facts + "}}", size)); };
  CHECK(one(R"("dtype":"F32","shape":[3],"data_offsets":[0,16])", 16) == "a has 16 bytes, its dtype and shape say 12");
  CHECK(one(R"("dtype":"F99","shape":[4],"data_offsets":[0,16])", 16) == "unknown dtype 'F99'");
  CHECK(one(R"("dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16])", 16) == "a has an impossible shape");
  CHECK(one(R"("dtype":"F32","shape":[-4],"data_offsets":[0,16])", 16) == "a has an impossible shape");
  CHECK(one(R"("dtype":"F32","shape":[1.5],"data_offsets":[0,16])", 16) == "a has an impossible shape");
  CHECK(one(R"("dtype":"F32","shape":[4],"data_offsets":[16,0])", 16) == "a lies outside the file");
  CHECK(one(R"("dtype":"F32","shape":[4],"data_offsets":[0,18446744073709551615])", 16) ==
        "a has no dtype, shape and data_offsets");
  CHECK(one(R"("dtype":"F32","shape":[4])", 16) == "a has no dtype, shape and data_offsets");
  CHECK(one(R"("dtype":"F32","shape":[2],"data_offsets":[8,16])", 16) == "a follows a hole");
  CHECK(why(file(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}})",
                 12)) == "b overlaps another tensor");
}

TEST_CASE("what is not JSON is one line with the place, in words of our own") {
  const auto why_not = [](const std::string& text, const coatrt::JsonLimits& limits = {}) -> std::string {
    try {
      coatrt::check_json(text, "it", "send JSON", limits);
    } catch (const coatrt::Error& error) {
      return error.what();
    }
    return "";
  };
  for (const char* good : {"1", " null ", "\"\xc3\xa9\"", R"({"a":[1,2.5e3,{"a":"\u00e9\ud83d\ude00"}]})", "\xef\xbb\xbf{}"})
    CHECK(why_not(good) == "");
  CHECK(why_not("") == "it is not JSON (line 1, byte 1: it ends too early); send JSON");
  CHECK(why_not("{\n \"a\": [1,\n") == "it is not JSON (line 3, byte 13: it ends too early); send JSON");
  CHECK(why_not("{\"a\":\n 1 2}") == "it is not JSON (line 2, byte 10: unexpected '2' after '{\"a\":? 1 '); send JSON");
  CHECK(why_not("x") == "it is not JSON (line 1, byte 1: unexpected 'x'); send JSON");
  CHECK(why_not("[1,]") == "it is not JSON (line 1, byte 4: unexpected ']' after '[1,'); send JSON");
  CHECK(why_not("[01]") == "it is not JSON (line 1, byte 3: unexpected '1' after '[0'); send JSON");
  CHECK(why_not("[1e400]") == "it is not JSON (line 1, byte 6: the number '1e400' is outside the range of float64); send JSON");
  CHECK(why_not("\"\xff\"") == "it is not JSON (line 1, byte 2: text that is not UTF-8, or not within quotes); send JSON");
  CHECK(why_not("\"" + std::string(100, 'a') + "\n\"")==
        "it is not JSON (line 1, byte 102: unexpected '?' after '" + std::string(20, 'a') + "'); send JSON");
  for (const std::string& bad : {std::string("{]"), std::string("nul"), std::string("'a'"), std::string("1 1"), std::string("\0", 1), std::string("{\"a\":1,\"b\"}"),
                                 std::string("\"\\x\""), std::string("\"\\ud800\""), std::string("-"), std::string("[1\"")}) {
    CHECK(why_not(bad).find("it is not JSON (line 1, byte ") == 0);
    CHECK(why_not(bad).find("exception") == std::string::npos);
  }
  CHECK(why_not("[[[]]]", {3}) == "");
  CHECK(why_not("[[[[]]]]", {3}) == "it is nested deeper than 3 levels; give fewer");
  CHECK(why_not(std::string(1 << 20, '[')) == "it is nested deeper than 64 levels; give fewer");
  CHECK(why_not(R"({"a":1,"b":{"c":2}})", {64, 3}) == "");
  CHECK(why_not(R"({"a":1,"b":{"c":2}})", {64, 2}) == "it has more than 2 keys; give fewer");
  CHECK(why_not(R"({"a":{"a":1},"b":{"a":1}})", {64, 100}) == "");
  CHECK(why_not(R"({"b":{"a":1,"c":[{}],"\u0061":2}})") == "it gives the key 'a' twice in one object; give it once");
}

TEST_CASE("texts of weight formats") {
  for (const char* good : {"fp16", "int8", "int8-g128", "int4-g64", "nvfp4", "nf3-g64", "nf2-g16-dq8-fp32-256"})
    CHECK_NOTHROW(check_format(good));
  for (const char* bad : {"", "int4", "int4-g16", "fp8-g64", "nvfp4-g16", "nf3", "int8-g64-dq4-bf16-256", "nf3-g64-dq5-bf16-256",
                          "nf3-g64-dq4-bf16-256x", "nf3-g128", "INT8"})
    CHECK_THROWS_AS(check_format(bad), coatrt::Error);
}

TEST_CASE("texts are quoted as Python quotes them") {
  CHECK(repr("a") == "'a'");
  CHECK(repr("it's") == "\"it's\"");
  CHECK(repr("a\n\x01\\") == "'a\\n\\x01\\\\'");
  CHECK(product(1LL << 40, 1LL << 30) == -1);
  CHECK(product(-1, 2) == -1);
  CHECK(product(1LL << 40, 1LL << 22) == 1LL << 62);
}

TEST_CASE("the walk over a graph finds what tensors name, and refuses what is no graph") {
  const auto field = [](int number, const std::string& inside) {  // of less than 128 bytes
    std::string made(1, static_cast<char>(number << 3 | 2));
    if (number > 15) made = {static_cast<char>(((number << 3 | 2) & 127) | 128), static_cast<char>(number >> 4)};
    return made + static_cast<char>(inside.size()) + inside;
  };
  const auto tensor = [&](const std::string& file) { return field(13, field(1, "location") + field(2, file)); };
  const std::string graph = field(5, tensor("a")) + field(15, field(2, tensor("b"))) +
                            field(1, field(5, field(6, field(5, tensor("c")))));
  CHECK(external_data(field(7, graph) + field(7, field(5, tensor("d")))) == std::set<std::string>{"a", "b", "c", "d"});
  CHECK(external_data(field(25, field(7, field(5, field(10, tensor("e")))))) == std::set<std::string>{"e"});
  CHECK(external_data(field(14, tensor("f"))).empty());  // metadata
  CHECK(external_data("").empty());
  const auto length = [](std::size_t size) {
    std::string made;
    for (; size > 127; size >>= 7) made += static_cast<char>((size & 127) | 128);
    return made + static_cast<char>(size);
  };
  std::string deep;  // graphs within attributes within nodes within graphs
  for (int i = 0; i < 200; ++i)
    for (const char* tag : {"\x32", "\x2a", "\x0a"}) deep = tag + length(deep.size()) + deep;
  deep = "\x3a" + length(deep.size()) + deep;
  for (const std::string& bad : {std::string("\x3a\x7f"), std::string("\x3a"), std::string(11, '\xff'), std::string("\x0b"), deep})
    CHECK_THROWS_AS(external_data(bad), coatrt::Error);
}
