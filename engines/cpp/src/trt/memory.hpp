#pragma once
#include <cuda_runtime_api.h>

#include <cstring>
#include <string>

#include "coatrt/error.hpp"
#include "cuda/memory.hpp"

namespace coatrt::detail {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw Error(std::string("CUDA fails to ") + what + " (" + cudaGetErrorString(status) + ")");
}

/// Buffers on the GPU through CUDA's runtime, copied on a stream of their own.
class TrtMemory final : public Memory {
 public:
  TrtMemory() { check_cuda(cudaStreamCreate(&stream_), "make a stream"); }
  ~TrtMemory() override { cudaStreamDestroy(stream_); }
  TrtMemory(const TrtMemory&) = delete;
  TrtMemory& operator=(const TrtMemory&) = delete;

  cudaStream_t cuda_stream() const { return stream_; }
  bool on_gpu() const override { return true; }
  void* stream() const override { return stream_; }
  void* allocate(std::size_t bytes) override {
    void* data = nullptr;
    check_cuda(cudaMalloc(&data, bytes), "reserve device memory");
    if (const cudaError_t status = cudaMemsetAsync(data, 0, bytes, stream_); status != cudaSuccess) {
      cudaFree(data);
      check_cuda(status, "clear device memory");
    }
    return data;
  }
  void* allocate_host(std::size_t bytes) override {
    void* data = nullptr;
    check_cuda(cudaMallocHost(&data, bytes), "reserve page-locked memory");
    return std::memset(data, 0, bytes);
  }
  void free(void* data) noexcept override { cudaFree(data); }
  void free_host(void* data) noexcept override { cudaFreeHost(data); }
  void write(void* to, const void* from, std::size_t bytes) override {
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream_), "copy to the device");
  }
  void read(void* to, const void* from, std::size_t bytes) override {
    check_cuda(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_), "copy from the device");
  }
  void clear(void* data, std::size_t bytes) override {
    check_cuda(cudaMemsetAsync(data, 0, bytes, stream_), "clear device memory");
  }
  void synchronize() override { check_cuda(cudaStreamSynchronize(stream_), "run the engine"); }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace coatrt::detail
