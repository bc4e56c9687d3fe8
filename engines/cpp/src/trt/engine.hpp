#pragma once
#include <NvInferRuntime.h>

#include <cstdint>
#include <memory>
#include <string>

#include "contract.hpp"
#include "packed_lora.hpp"
#include "state.hpp"

namespace coatrt::detail {

/// What TensorRT says goes here: its calls say only that they failed.
class TrtLogger final : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kERROR) last = message;
  }
  std::string last;
};

/// A bundle's engine, loaded once for all sessions.
struct TrtEngine {
  TrtLogger logger;
  std::unique_ptr<nvinfer1::IRuntime> runtime;
  std::unique_ptr<nvinfer1::ICudaEngine> engine;
  std::string file;
  DecoderIO io;
  Contract contract;
  std::int64_t prefill = 1;
};

/// Load the engine for this GPU, after everything was checked that TensorRT does not check.
std::shared_ptr<TrtEngine> load_engine(BundleState& bundle);

}  // namespace coatrt::detail
