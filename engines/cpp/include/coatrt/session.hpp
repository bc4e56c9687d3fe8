#pragma once
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "coatrt/bundle.hpp"
#include "coatrt/decoder.hpp"
#include "coatrt/sampling.hpp"

namespace coatrt {

struct SessionOptions {
  /// "ort": ONNX Runtime on the CPU; "cuda": its CUDA provider, everything on the GPU; "trt": the bundle's engine, where
  /// that was compiled in.
  std::string backend = "ort";
  /// ort: an execution provider's name, such as "NvTensorRTRTXExecutionProvider"; empty for the CPU. cuda: empty; "cpu"
  /// computes the same on the CPU, for tests.
  std::string provider;
  /// Options of that provider. cuda: "enable_cuda_graph", trt: "cuda_graph"; "0" runs decode steps without a CUDA graph.
  std::map<std::string, std::string> provider_options;
  int threads = 0;             ///< ort: of one operator; 0: all usable cores. Sessions of equal options share them.
  std::int64_t context = 2048;  ///< ort, cuda: slots of the cache where the graph leaves them open
  int accuracy_level = 4;      ///< ort: of int4 and int8 products; 4 keeps them packed and accumulates in int8, 1 decodes
                               ///< them in every call, 0 once, at load: both exact
  bool strict_lora = false;    ///< refuse a LoRA of another configuration than the weights'; else `notice` is told so
  std::function<void(const std::string&)> notice;  ///< gets each line once; empty: standard error
};

struct Generated {
  std::vector<std::int64_t> tokens;  ///< without the stop token
  std::string reason;                ///< "stop", "length", or "cancelled" where `on_token` returned false
};

/// One sequence being decoded, with the bundle's LoRA bound. For one thread at a time; sessions of one bundle with equal
/// options share the loaded weights, so one per thread is cheap; on a GPU their steps take turns.
class Session {
 public:
  explicit Session(const Bundle& bundle, const SessionOptions& options = {});
  /// Over a backend of one's own. `stop` as in the bundle's manifest.
  Session(const Bundle& bundle, std::unique_ptr<Decoder> decoder, const SessionOptions& options = {});
  ~Session();
  Session(Session&&) noexcept;
  Session& operator=(Session&&) noexcept;

  /// Start a new sequence.
  Logits prefill(const std::vector<std::int64_t>& tokens);
  /// Add a token.
  Logits decode(std::int64_t token);
  /// Add the likeliest token and return it.
  std::int64_t decode();
  /// Continue a prompt; `on_token` sees every token as soon as it exists and returns false to end the sequence.
  Generated generate(const std::vector<std::int64_t>& prompt, std::size_t max_tokens, const Sampling& sampling = {},
                     const std::function<bool(std::int64_t)>& on_token = {});

  /// Change the LoRA: to another configuration's, emitted now, or to one at hand. The next `prefill` should follow:
  /// cached keys and values keep the LoRA they were made with. Who names a configuration is not told that the weights
  /// have another; `strict_lora` refuses it all the same.
  void swap(const Configuration& configuration);
  void swap(const Lora& lora);
  /// The quantized base alone.
  void drop_lora();

  std::int64_t capacity() const;
  Limit limit() const;          ///< what sets the capacity
  std::int64_t length() const;  ///< positions filled so far

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace coatrt
