#pragma once
#include <cstddef>
#include <string>

namespace coatrt::detail {

/// The NVIDIA driver on its first GPU, opened with dlopen: no toolkit is needed to compile or to run.
class Driver {
 public:
  /// Throws one line where there is no driver or no GPU.
  Driver();
  Driver(const Driver&) = delete;
  Driver& operator=(const Driver&) = delete;

  /// Compute capability: 89 for 8.9.
  int sm() const { return sm_; }

  /// Make the GPU's primary context, which ONNX Runtime shares, current in this thread.
  void enter();
  struct Room {
    std::size_t free, total;
  };
  /// Bytes of the GPU's memory.
  Room room() const;

  void* make_stream() const;
  void destroy_stream(void* stream) const noexcept;
  void* allocate(std::size_t bytes) const;
  void* allocate_host(std::size_t bytes) const;
  void free(void* data) const noexcept;
  void free_host(void* data) const noexcept;
  void write(void* to, const void* from, std::size_t bytes, void* stream) const;
  void read(void* to, const void* from, std::size_t bytes, void* stream) const;
  void clear(void* data, std::size_t bytes, void* stream) const;
  void synchronize(void* stream) const;

 private:
  /// What is called of libcuda.
  struct Calls {
    using Address = unsigned long long;  // CUdeviceptr
    int (*cuInit)(unsigned);
    int (*cuDeviceGetCount)(int*);
    int (*cuDeviceGet)(int*, int);
    int (*cuDeviceGetAttribute)(int*, int, int);
    int (*cuDevicePrimaryCtxRetain)(void**, int);
    int (*cuCtxSetCurrent)(void*);
    int (*cuThreadExchangeStreamCaptureMode)(int*);
    int (*cuMemGetInfo_v2)(std::size_t*, std::size_t*);
    int (*cuMemAlloc_v2)(Address*, std::size_t);
    int (*cuMemFree_v2)(Address);
    int (*cuMemHostAlloc)(void**, std::size_t, unsigned);
    int (*cuMemFreeHost)(void*);
    int (*cuMemsetD8Async)(Address, unsigned char, std::size_t, void*);
    int (*cuMemcpyHtoDAsync_v2)(Address, const void*, std::size_t, void*);
    int (*cuMemcpyDtoHAsync_v2)(void*, Address, std::size_t, void*);
    int (*cuStreamCreate)(void**, unsigned);
    int (*cuStreamDestroy_v2)(void*);
    int (*cuStreamSynchronize)(void*);
    int (*cuGetErrorString)(int, const char**);
  };
  template <class Function>
  void take(void* library, const char* name, Function& function) const;
  std::string reason(int status) const;
  void check(int status, const char* call) const;

  Calls calls_{};
  int device_ = 0, sm_ = 0;
  void* context_ = nullptr;
};

}  // namespace coatrt::detail
