#pragma once
#include <cstddef>
#include <string>
#include <string_view>

namespace coatrt {

/// What a JSON text may hold.
struct JsonLimits {
  std::size_t depth = 64;
  std::size_t keys = static_cast<std::size_t>(-1);
};

/// Refuse a text that is not JSON, gives a key twice in one object or passes a limit, before anything is made of it. The
/// one line names `what` and the place, and ends with the remedy.
void check_json(std::string_view text, const std::string& what, const std::string& remedy, const JsonLimits& limits = {});

}  // namespace coatrt
