#pragma once
#include <onnxruntime_c_api.h>

#include <vector>

namespace coatrt::detail {

class OrtRuntime;

constexpr const char* kCudaProvider = "CUDAExecutionProvider";

/// Refuse a GPU that the CUDA provider does not serve, or an ONNX Runtime that lacks it.
void check_cuda_provider(const OrtRuntime& runtime, int sm);

/// Let a session run on the GPU, on `stream` where one is given.
void append_cuda(const OrtRuntime& runtime, OrtSessionOptions* options, const std::vector<const char*>& keys,
                 const std::vector<const char*>& values, void* stream);

}  // namespace coatrt::detail
