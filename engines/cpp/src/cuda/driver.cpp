#include "cuda/driver.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <cstdint>

#include "coatrt/error.hpp"

namespace coatrt::detail {
namespace {

constexpr const char* kLibrary = "libcuda.so.1";
constexpr const char* kOtherwise = "run the bundle with --backend ort";
constexpr int kNoDevice = 100, kOutOfMemory = 2;
constexpr int kMajor = 75, kMinor = 76;      // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_…
constexpr unsigned kNonBlocking = 1;         // the stream does not wait for the default stream
constexpr int kRelaxed = 2;                  // CU_STREAM_CAPTURE_MODE_RELAXED

unsigned long long address(const void* data) { return reinterpret_cast<std::uintptr_t>(data); }

}  // namespace

template <class Function>
void Driver::take(void* library, const char* name, Function& function) const {
  function = reinterpret_cast<Function>(::dlsym(library, name));
  if (function == nullptr)
    throw Error(std::string("the NVIDIA driver is too old (it has no ") + name + "); update it, or " + kOtherwise);
}

Driver::Driver() {
  // NODELETE: the driver has threads of its own.
  void* library = ::dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (library == nullptr) throw Error(std::string("no NVIDIA driver here (") + kLibrary + " is missing); " + kOtherwise);
#define COATRT_TAKE(name) take(library, #name, calls_.name)
  COATRT_TAKE(cuInit);
  COATRT_TAKE(cuDeviceGetCount);
  COATRT_TAKE(cuDeviceGet);
  COATRT_TAKE(cuDeviceGetAttribute);
  COATRT_TAKE(cuDevicePrimaryCtxRetain);
  COATRT_TAKE(cuCtxSetCurrent);
  COATRT_TAKE(cuThreadExchangeStreamCaptureMode);
  COATRT_TAKE(cuMemGetInfo_v2);
  COATRT_TAKE(cuMemAlloc_v2);
  COATRT_TAKE(cuMemFree_v2);
  COATRT_TAKE(cuMemHostAlloc);
  COATRT_TAKE(cuMemFreeHost);
  COATRT_TAKE(cuMemsetD8Async);
  COATRT_TAKE(cuMemcpyHtoDAsync_v2);
  COATRT_TAKE(cuMemcpyDtoHAsync_v2);
  COATRT_TAKE(cuStreamCreate);
  COATRT_TAKE(cuStreamDestroy_v2);
  COATRT_TAKE(cuStreamSynchronize);
  COATRT_TAKE(cuGetErrorString);
#undef COATRT_TAKE
  const int started = calls_.cuInit(0);
  if (started != 0 && started != kNoDevice)
    throw Error("the NVIDIA driver does not start (" + reason(started) + "); reinstall it, or " + kOtherwise);
  int count = 0, major = 0, minor = 0;
  if (started == 0) check(calls_.cuDeviceGetCount(&count), "cuDeviceGetCount");
  if (count == 0) throw Error(std::string("no NVIDIA GPU here; ") + kOtherwise);
  check(calls_.cuDeviceGet(&device_, 0), "cuDeviceGet");
  check(calls_.cuDeviceGetAttribute(&major, kMajor, device_), "cuDeviceGetAttribute");
  check(calls_.cuDeviceGetAttribute(&minor, kMinor, device_), "cuDeviceGetAttribute");
  sm_ = 10 * major + minor;
}

std::string Driver::reason(int status) const {
  const char* text = nullptr;
  calls_.cuGetErrorString(status, &text);
  return text != nullptr && *text != '\0' ? text : "error " + std::to_string(status);
}

void Driver::check(int status, const char* call) const {
  if (status == kOutOfMemory)
    throw Error(std::string("not enough GPU or host memory (") + call + "); use a shorter --context or a smaller batch");
  if (status != 0) throw Error(std::string("the NVIDIA driver fails (") + call + ": " + reason(status) + "); " + kOtherwise);
}

void Driver::enter() {
  // Held for good, as ONNX Runtime's own libraries hold it.
  if (context_ == nullptr) check(calls_.cuDevicePrimaryCtxRetain(&context_, device_), "cuDevicePrimaryCtxRetain");
  check(calls_.cuCtxSetCurrent(context_), "cuCtxSetCurrent");
  // ONNX Runtime captures in CUDA's global mode: without this, another model's capture forbids this thread to allocate,
  // and what it allocates spoils that capture.
  int mode = kRelaxed;
  check(calls_.cuThreadExchangeStreamCaptureMode(&mode), "cuThreadExchangeStreamCaptureMode");
}

Driver::Room Driver::room() const {
  Room room{};
  check(calls_.cuMemGetInfo_v2(&room.free, &room.total), "cuMemGetInfo_v2");
  return room;
}

void* Driver::make_stream() const {
  void* stream = nullptr;
  check(calls_.cuStreamCreate(&stream, kNonBlocking), "cuStreamCreate");
  return stream;
}

void Driver::destroy_stream(void* stream) const noexcept { calls_.cuStreamDestroy_v2(stream); }

void* Driver::allocate(std::size_t bytes) const {
  Calls::Address made = 0;
  check(calls_.cuMemAlloc_v2(&made, std::max<std::size_t>(bytes, 1)), "cuMemAlloc_v2");
  return reinterpret_cast<void*>(static_cast<std::uintptr_t>(made));
}

void* Driver::allocate_host(std::size_t bytes) const {
  void* made = nullptr;
  check(calls_.cuMemHostAlloc(&made, std::max<std::size_t>(bytes, 1), 0), "cuMemHostAlloc");
  return made;
}

void Driver::free(void* data) const noexcept { calls_.cuMemFree_v2(address(data)); }
void Driver::free_host(void* data) const noexcept { calls_.cuMemFreeHost(data); }

void Driver::write(void* to, const void* from, std::size_t bytes, void* stream) const {
  if (bytes != 0) check(calls_.cuMemcpyHtoDAsync_v2(address(to), from, bytes, stream), "cuMemcpyHtoDAsync_v2");
}

void Driver::read(void* to, const void* from, std::size_t bytes, void* stream) const {
  if (bytes != 0) check(calls_.cuMemcpyDtoHAsync_v2(to, address(from), bytes, stream), "cuMemcpyDtoHAsync_v2");
}

void Driver::clear(void* data, std::size_t bytes, void* stream) const {
  if (bytes != 0) check(calls_.cuMemsetD8Async(address(data), 0, bytes, stream), "cuMemsetD8Async");
}

void Driver::synchronize(void* stream) const { check(calls_.cuStreamSynchronize(stream), "cuStreamSynchronize"); }

}  // namespace coatrt::detail
