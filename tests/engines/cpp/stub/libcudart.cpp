// A library that only says in COATRT_STUB_LOG that it was loaded.
#include <cstdio>
#include <cstdlib>

namespace {

struct Loaded {
  Loaded() {
    const char* path = std::getenv("COATRT_STUB_LOG");
    if (path == nullptr) return;
    std::FILE* file = std::fopen(path, "a");
    std::fputs("cudart\n", file);
    std::fclose(file);
  }
} loaded;

}  // namespace
