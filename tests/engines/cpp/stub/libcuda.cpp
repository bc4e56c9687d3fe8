// A libcuda over the host's memory, for machines without a GPU. The environment says what it shows: COATRT_STUB_START (what
// cuInit returns), _DEVICES, _SM, _FREE (bytes). It writes what it is asked to the file COATRT_STUB_LOG, one call a line.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

namespace {

using Address = unsigned long long;

std::mutex mutex;
std::map<void*, std::size_t> buffers;

long number(const char* name, long otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::atol(text);
}

void* data(Address address) { return reinterpret_cast<void*>(address); }

template <class... Values>
void log(const char* format, Values... values) {
  const char* path = std::getenv("COATRT_STUB_LOG");
  if (path == nullptr) return;
  const std::lock_guard lock(mutex);
  std::FILE* file = std::fopen(path, "a");
  std::fprintf(file, format, values...);
  std::fclose(file);
}

/// Memory full of what nobody wrote.
int reserve(void** made, std::size_t bytes) {
  if (static_cast<long>(bytes) > number("COATRT_STUB_FREE", 1L << 40)) return 2;
  *made = std::memset(std::aligned_alloc(256, (bytes + 255) / 256 * 256), 0xaa, bytes);
  const std::lock_guard lock(mutex);
  buffers[*made] = bytes;
  return 0;
}

int release(void* made) {
  {
    const std::lock_guard lock(mutex);
    if (buffers.erase(made) != 1) return 1;
  }
  std::free(made);
  return 0;
}

}  // namespace

extern "C" {

int cuInit(unsigned) { return static_cast<int>(number("COATRT_STUB_START", 0)); }
int cuDeviceGetCount(int* count) { return *count = static_cast<int>(number("COATRT_STUB_DEVICES", 1)), 0; }
int cuDeviceGet(int* device, int) { return *device = 0, 0; }
int cuDeviceGetAttribute(int* value, int which, int) {
  const long sm = number("COATRT_STUB_SM", 90);
  return *value = static_cast<int>(which == 75 ? sm / 10 : sm % 10), 0;
}
int cuDevicePrimaryCtxRetain(void** context, int) { return *context = &buffers, 0; }
int cuCtxSetCurrent(void* context) { return context == &buffers ? 0 : 201; }
int cuThreadExchangeStreamCaptureMode(int* mode) { return log("mode %d\n", *mode), *mode = 0, 0; }
int cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  return *free = static_cast<std::size_t>(number("COATRT_STUB_FREE", 1L << 40)), *total = std::size_t{80} << 30, 0;
}
int cuMemAlloc_v2(Address* made, std::size_t bytes) {
  void* buffer = nullptr;
  const int status = reserve(&buffer, bytes);
  *made = reinterpret_cast<Address>(buffer);
  log("allocate %llx %zu\n", *made, bytes);
  return status;
}
int cuMemFree_v2(Address made) { return log("free %llx\n", made), release(data(made)); }
int cuMemHostAlloc(void** made, std::size_t bytes, unsigned) { return reserve(made, bytes); }
int cuMemFreeHost(void* made) { return release(made); }
int cuMemsetD8Async(Address to, unsigned char value, std::size_t bytes, void*) {
  return log("clear %llx %zu\n", to, bytes), std::memset(data(to), value, bytes), 0;
}
int cuMemcpyHtoDAsync_v2(Address to, const void* from, std::size_t bytes, void*) {
  return log("write %llx %zu\n", to, bytes), std::memcpy(data(to), from, bytes), 0;
}
int cuMemcpyDtoHAsync_v2(void* to, Address from, std::size_t bytes, void*) {
  return log("read %llx %zu\n", from, bytes), std::memcpy(to, data(from), bytes), 0;
}
int cuStreamCreate(void** stream, unsigned) { return *stream = new int, log("stream %p\n", *stream), 0; }
int cuStreamDestroy_v2(void* stream) { return delete static_cast<int*>(stream), 0; }
int cuStreamSynchronize(void*) {
  log("synchronize\n");
  return 0;
}
int cuGetErrorString(int, const char** text) { return *text = nullptr, 1; }

}  // extern "C"
