// A stand-in for the part of TensorRT-RTX that the backend uses.
#pragma once
#include <cstdint>

#include "cuda_runtime_api.h"

#define TRT_MAJOR_RTX 9
#define NV_TENSORRT_MAJOR 9
#define NV_TENSORRT_MINOR 9
#define NV_TENSORRT_PATCH 0
#define NV_TENSORRT_VERSION 90900

extern "C" std::int32_t getInferLibVersion() noexcept;

namespace nvinfer1 {

struct Dims {
  std::int32_t nbDims;
  std::int64_t d[8];
};
enum class DataType : std::int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kBF16 = 7, kINT64 = 8 };

class ILogger {
 public:
  enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2 };
  virtual void log(Severity severity, const char* message) noexcept = 0;
  virtual ~ILogger() = default;
};
class IExecutionContext {
 public:
  virtual ~IExecutionContext() = default;
  virtual bool setTensorAddress(const char* name, void* data) = 0;
  virtual bool setInputShape(const char* name, const Dims& dims) = 0;
  virtual bool enqueueV3(cudaStream_t stream) = 0;
};
class ICudaEngine {
 public:
  virtual ~ICudaEngine() = default;
  virtual IExecutionContext* createExecutionContext() = 0;
  virtual Dims getTensorShape(const char* name) const = 0;
  virtual DataType getTensorDataType(const char* name) const = 0;
};
class IRuntime {
 public:
  virtual ~IRuntime() = default;
  virtual ICudaEngine* deserializeCudaEngine(const void* data, std::size_t size) = 0;
};
IRuntime* createInferRuntime(ILogger& logger);

}  // namespace nvinfer1
