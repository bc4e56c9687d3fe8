#pragma once
#include <memory>

#include "coatrt/session.hpp"

namespace coatrt::detail {

struct BundleState;

/// The decoders of the backends; `make_decoder` chooses by `options.backend`.
std::unique_ptr<Decoder> make_decoder(const std::shared_ptr<BundleState>& bundle, const SessionOptions& options);
std::unique_ptr<Decoder> make_ort_decoder(const std::shared_ptr<BundleState>& bundle, const SessionOptions& options);
std::unique_ptr<Decoder> make_cuda_decoder(const std::shared_ptr<BundleState>& bundle, const SessionOptions& options);
#ifdef COATRT_TRT
std::unique_ptr<Decoder> make_trt_decoder(const std::shared_ptr<BundleState>& bundle, const SessionOptions& options);
#endif

}  // namespace coatrt::detail
