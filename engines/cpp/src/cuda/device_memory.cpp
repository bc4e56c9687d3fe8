#include "cuda/device_memory.hpp"

#include <cstdio>

#include "coatrt/error.hpp"

namespace coatrt::detail {
namespace {

constexpr std::size_t kWorkspace = std::size_t{256} << 20;  // libraries, and what a prefill takes beside the caches

std::string gigabytes(std::size_t bytes) {
  char text[32];
  std::snprintf(text, sizeof text, "%.2f", static_cast<double>(bytes) / 1e9);
  return text;
}

}  // namespace

void DeviceMemory::check_room(const Needs& needs) {
  const auto room = driver_->room();
  const std::size_t needed = needs.weights + needs.caches + needs.other + kWorkspace;
  if (needed > room.free)
    throw Error("not enough GPU memory: " + gigabytes(needed) + " GB needed (" + gigabytes(needs.weights) +
                " GB of weights, " + gigabytes(needs.caches) + " GB of caches for 1 × " + std::to_string(needs.slots) +
                " positions), " + gigabytes(room.free) + " of " + gigabytes(room.total) +
                " GB free; use a shorter --context or a smaller batch");
}

}  // namespace coatrt::detail
