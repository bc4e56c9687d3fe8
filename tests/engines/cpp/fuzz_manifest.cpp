// libFuzzer: a manifest behind its opening brace and a seal that holds, beside a file that it may name. Whatever it holds, opening is refused or the bundle is readable.
#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "coatrt/bundle.hpp"
#include "coatrt/error.hpp"
#include "sha256.hpp"
#include "state.hpp"

namespace {

struct Directory {
  std::filesystem::path path;
  Directory() {
    char name[] = "/tmp/coatrt-fuzz-XXXXXX";
    path = ::mkdtemp(name);
    std::ofstream(path / "a") << "{}";
  }
  ~Directory() { std::filesystem::remove_all(path); }
};

const std::filesystem::path& directory() {
  static const Directory made;
  return made.path;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  (std::ofstream(directory() / "manifest.json", std::ios::binary) << "{\n \"seal\": \"" << coatrt::detail::sha256(data, size) << "\",\n")
      .write(reinterpret_cast<const char*>(data), static_cast<std::streamsize>(size));
  try {
    const auto bundle = coatrt::Bundle::open(directory());
    for (const char* form : {"cpu", "engine"}) try {
        bundle.state()->decoder(form);
      } catch (const coatrt::Error&) {
      }
    try {
      bundle.configuration();
    } catch (const coatrt::Error&) {
    }
    try {
      bundle.lora();
    } catch (const coatrt::Error&) {
    }
    bundle.check_all();
  } catch (const coatrt::Error&) {
  }
  return 0;
}
