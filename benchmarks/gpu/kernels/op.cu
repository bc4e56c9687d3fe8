// coatrt::Linear, a custom operator of ONNX Runtime: the matrices that read one input, packed, with their LoRA.
//
// Inputs: x [.., K] float16, then for each matrix codes, scales, for nf3 the plane of top bits, for NormalFloat the
// levels, and with LoRA A [K, 16] and B [16, N]. Bytes are uint8 and everything else float16. Codes and scales are
// padded to whole blocks along K. Attributes: K, mode, lora, and for each matrix formats, widths (N), blocks, factors.
// More than 8 rows of x run in pieces of 8.
#define ORT_API_MANUAL_INIT
#include <cuda_runtime.h>
#include <onnxruntime_cxx_api.h>

#include <exception>
#include <functional>
#include <mutex>
#include <type_traits>
#include <utility>

#include "plan.cuh"

namespace coatrt {
namespace {

constexpr int64_t kScratchFloats = int64_t{1} << 23;
constexpr int kMaxSharedBytes = 200 * 1024;

void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

/// Partial sums of all nodes of the process: they follow each other in one stream of one device. The buffer never
/// moves, as captured CUDA graphs hold its address.
float* scratch() {
  static float* const buffer = [] {
    float* made = nullptr;
    check_cuda(cudaMalloc(&made, kScratchFloats * sizeof(float)));
    return made;
  }();
  return buffer;
}

Spec read_spec(const Ort::ConstKernelInfo& info) {
  const auto formats = info.GetAttributes<int64_t>("formats"), widths = info.GetAttributes<int64_t>("widths"),
             blocks = info.GetAttributes<int64_t>("blocks");
  const auto factors = info.GetAttributes<float>("factors");
  if (widths.size() != formats.size() || blocks.size() != formats.size() || factors.size() != formats.size())
    throw std::invalid_argument("formats, widths, blocks and factors must have one entry for each matrix");
  Spec spec{info.GetAttribute<int64_t>("K"), info.GetAttribute<int64_t>("mode"),
            info.GetAttribute<int64_t>("lora") != 0, {}};
  for (size_t i = 0; i < formats.size(); ++i)
    spec.matrices.push_back({formats[i], widths[i], blocks[i], factors[i]});
  check(spec);
  return spec;
}

/// Throw where a tensor is not what the kernels read.
void check_tensor(const Ort::ConstValue& value, const TensorSpec& expected) {
  if (value == nullptr) throw std::invalid_argument(expected.name + " is missing");
  const auto info = value.GetTensorTypeAndShapeInfo();
  const bool is_half = expected.type == TensorSpec::kFloat16;
  if (info.GetElementType() != (is_half ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8))
    throw std::invalid_argument(expected.name + " must be " + (is_half ? "float16" : "uint8"));
  const auto elements = static_cast<int64_t>(info.GetElementCount());
  if (elements != expected.elements)
    throw std::invalid_argument(expected.name + " must have " + std::to_string(expected.elements) + " elements, got " +
                                std::to_string(elements));
  if (!expected.shape.empty() && info.GetShape() != expected.shape)
    throw std::invalid_argument(expected.name + " must be [" + std::to_string(expected.shape[0]) + ", " +
                                std::to_string(expected.shape[1]) + "]");
}

/// The device a session runs on.
struct Device {
  int multiprocessors = 0, shared_bytes = 0;
  bool starts_early = false;  // programmatic dependent launch

  Device() {
    int device = 0, major = 0;
    check_cuda(cudaGetDevice(&device));
    check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
    check_cuda(cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    check_cuda(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    shared_bytes = std::min(shared_bytes, kMaxSharedBytes);
    starts_early = major >= 9;
    check_cuda(cudaFuncSetAttribute(coatrt_partial, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
};

/// A node on any device: its attributes and inputs, checked.
class Node {
 public:
  explicit Node(const OrtKernelInfo* raw) : spec_(read_spec(Ort::ConstKernelInfo(raw))), inputs_(inputs(spec_)) {
    for (const MatrixSpec& m : spec_.matrices) width_ += m.N;
    if (spec_.mode == kGated) width_ = spec_.matrices[0].N;
  }

 protected:
  Spec spec_;
  std::vector<TensorSpec> inputs_;
  int64_t width_ = 0;  // of the output

  /// The shape of x and the data of the inputs behind it.
  std::pair<std::vector<int64_t>, std::vector<const void*>> checked(const Ort::KernelContext& context) const {
    if (context.GetInputCount() != inputs_.size() + 1)
      throw std::invalid_argument("the matrices take " + std::to_string(inputs_.size()) + " inputs behind x, got " +
                                  std::to_string(context.GetInputCount() - 1));
    const auto info = context.GetInput(0).GetTensorTypeAndShapeInfo();
    auto shape = info.GetShape();
    if (info.GetElementType() != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 || shape.empty() || shape.back() != spec_.K)
      throw std::invalid_argument("x must be float16 [.., " + std::to_string(spec_.K) + "]");
    std::vector<const void*> data;
    for (size_t i = 0; i < inputs_.size(); ++i) {
      const auto value = context.GetInput(i + 1);
      check_tensor(value, inputs_[i]);
      data.push_back(value.GetTensorRawData());
    }
    return {shape, data};
  }
};

class GpuNode : public Node {
 public:
  explicit GpuNode(const OrtKernelInfo* raw) : Node(raw) { scratch(); }

  void compute(Ort::KernelContext context) const {
    auto [shape, data] = checked(context);
    for (size_t i = 0; i < data.size(); ++i)
      if (reinterpret_cast<uintptr_t>(data[i]) % 16)
        throw std::invalid_argument(inputs_[i].name + " must lie at a multiple of 16 bytes");
    const int64_t total = std::accumulate(shape.begin(), shape.end() - 1, int64_t{1}, std::multiplies<>());
    shape.back() = width_;
    auto y = context.GetOutput(0, shape);
    const half* from = static_cast<const half*>(context.GetInput(0).GetTensorRawData());
    half* to = static_cast<half*>(y.GetTensorMutableRawData());
    const auto stream = static_cast<cudaStream_t>(context.GetGPUComputeStream());
    for (int64_t done = 0; done < total; done += kMaxRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kMaxRows, total - done));
      run(data, from + done * spec_.K, to + done * width_, rows, stream);
    }
  }

 private:
  Device device_;

  void run(const std::vector<const void*>& data, const half* x, half* y, int rows, cudaStream_t stream) const {
    Plan plan = divide(spec_, rows, device_.multiprocessors);
    if (plan.floats > kScratchFloats) throw std::invalid_argument("the matrices of the node are too wide together");
    if (plan.shared_bytes > static_cast<size_t>(device_.shared_bytes))
      throw std::invalid_argument("the format needs " + std::to_string(plan.shared_bytes) +
                                  " bytes of shared memory, the GPU has " + std::to_string(device_.shared_bytes));
    point(plan.group, data);
    float* partial = scratch();
    int mode = static_cast<int>(spec_.mode), width = static_cast<int>(width_);
    void* first[] = {&plan.group, &x, &rows, &partial};
    void* second[] = {&plan.group, &partial, &y, &mode, &width};
    launch(reinterpret_cast<const void*>(coatrt_partial), dim3(plan.blocks), kThreads, plan.shared_bytes, stream,
           first);
    launch(reinterpret_cast<const void*>(coatrt_sum), dim3(plan.sum_blocks, rows), kSumThreads, 0, stream, second);
  }

  /// Set the group's pointers, in the order of `inputs`.
  void point(Group& g, const std::vector<const void*>& data) const {
    size_t at = 0;
    for (int i = 0; i < g.count; ++i) {
      Matrix& m = g.m[i];
      m.codes = data[at++];
      m.scales = data[at++];
      if (m.format == kNf3) m.plane = data[at++];
      if (segments(m.format) > 1) m.levels = static_cast<const half*>(data[at++]);
      if (!spec_.lora) continue;
      m.A = static_cast<const half*>(data[at++]);
      m.B = static_cast<const half*>(data[at++]);
    }
  }

  void launch(const void* kernel, dim3 grid, int threads, size_t shared, cudaStream_t stream, void** arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.attrs = &attribute, config.numAttrs = device_.starts_early ? 1 : 0;
    check_cuda(cudaLaunchKernelExC(&config, kernel, arguments));
  }
};

/// Stands in where there is no GPU, so that graphs and checks can be tried; it computes nothing.
class CheckedNode : public Node {
 public:
  using Node::Node;

  void compute(Ort::KernelContext context) const {
    checked(context);
    throw std::runtime_error("the inputs are right; the products need a GPU");
  }
};

OrtStatusPtr failure(const std::exception& error) {
  return Ort::Status(("coatrt::Linear: " + std::string(error.what())).c_str(), ORT_INVALID_ARGUMENT).release();
}

template <class T>
struct Kernel : T {
  using T::T;

  OrtStatusPtr ComputeV2(OrtKernelContext* context) noexcept {
    try {
      T::compute(Ort::KernelContext(context));
      return nullptr;
    } catch (const std::exception& error) {
      return failure(error);
    }
  }
};

template <class T>
struct Linear : Ort::CustomOpBase<Linear<T>, Kernel<T>, true> {
  OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const noexcept {
    try {
      *kernel = new Kernel<T>(info);
      return nullptr;
    } catch (const std::exception& error) {
      return failure(error);
    }
  }
  const char* GetName() const { return "Linear"; }
  const char* GetExecutionProviderType() const {
    return std::is_same_v<T, GpuNode> ? "CUDAExecutionProvider" : "CPUExecutionProvider";
  }
  size_t GetInputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetInputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED; }
  OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t) const { return INPUT_OUTPUT_VARIADIC; }
  int GetVariadicInputMinArity() const { return 3; }
  bool GetVariadicInputHomogeneity() const { return false; }
  size_t GetOutputTypeCount() const { return 1; }
  ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16; }
};

}  // namespace
}  // namespace coatrt

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  Ort::InitApi(base->GetApi(ORT_API_VERSION));
  static const coatrt::Linear<coatrt::GpuNode> on_gpu;
  static const coatrt::Linear<coatrt::CheckedNode> without_gpu;
  static Ort::CustomOpDomain domain{"coatrt"};
  static std::once_flag once;
  std::call_once(once, [] {
    int devices = 0;
    if (cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0)
      domain.Add(&on_gpu);
    else
      domain.Add(&without_gpu);
  });
  Ort::UnownedSessionOptions(options).Add(domain);
  return nullptr;
}
