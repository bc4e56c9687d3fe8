// libFuzzer: a tokenizer.json up to a NUL, then a text for it; and the text alone for a pattern.
#include <cstdint>
#include <string_view>

#include "coatrt/error.hpp"
#include "coatrt/tokenizer.hpp"
#include "tokenizer/pattern.hpp"
#include "tokenizer/unicode.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view all(reinterpret_cast<const char*>(data), size);
  const std::string_view json = all.substr(0, all.find('\0'));
  const std::string_view text = json.size() == size ? "" : all.substr(json.size() + 1);
  try {
    const coatrt::Tokenizer tokenizer(json);
    tokenizer.decode(tokenizer.encode(text));
  } catch (const coatrt::Error&) {
  }
  try {
    coatrt::detail::to_nfc(coatrt::detail::decode_utf8(text));
    const coatrt::detail::Pattern pattern(text.substr(0, 64));
    const auto points = coatrt::detail::decode_utf8(text.substr(0, 256));
    std::size_t steps = coatrt::detail::Pattern::steps_for(points.size());
    pattern.match(points, 0, points.size(), steps);
  } catch (const coatrt::Error&) {
  }
  return 0;
}
