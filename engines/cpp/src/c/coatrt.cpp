#include "coatrt/coatrt.h"

#include "coatrt/coatrt.hpp"

struct coatrt_bundle {
  coatrt::Bundle bundle;
};
struct coatrt_session {
  coatrt::Bundle bundle;
  coatrt::Session session;
};

namespace {

thread_local std::string last_error;  // the message of coatrt_error()

template <typename Call>
int guarded(const Call& call) noexcept {
  try {
    call();
    return 0;
  } catch (const std::exception& error) {
    try {
      last_error = error.what();
    } catch (...) {
      last_error.clear();
    }
  } catch (...) {
    last_error.clear();
  }
  return -1;
}

void give(coatrt::Logits made, const float** logits, size_t* size) {
  if (logits != nullptr) *logits = made.data;
  if (size != nullptr) *size = made.size;
}

}  // namespace

const char* coatrt_error(void) { return last_error.c_str(); }

int coatrt_bundle_open(const char* directory, const char* onnxruntime, coatrt_bundle** bundle) {
  return guarded([&] {
    coatrt::BundleOptions options;
    if (onnxruntime != nullptr) options.onnxruntime = onnxruntime;
    *bundle = new coatrt_bundle{coatrt::Bundle::open(directory, options)};
  });
}
void coatrt_bundle_free(coatrt_bundle* bundle) { delete bundle; }

int coatrt_session_open(const coatrt_bundle* bundle, const char* backend, int threads, int64_t context,
                        coatrt_session** session) {
  return guarded([&] {
    coatrt::SessionOptions options;
    options.backend = backend;
    options.threads = threads;
    options.context = context;
    *session = new coatrt_session{bundle->bundle, coatrt::Session(bundle->bundle, options)};
  });
}
void coatrt_session_free(coatrt_session* session) { delete session; }

int coatrt_session_swap(coatrt_session* session, const char* configuration) {
  return guarded([&] {
    if (configuration == nullptr) session->session.drop_lora();
    else session->session.swap(session->bundle.configuration(configuration));
  });
}

int coatrt_session_prefill(coatrt_session* session, const int64_t* tokens, size_t count, const float** logits,
                           size_t* size) {
  return guarded([&] { give(session->session.prefill({tokens, tokens + count}), logits, size); });
}

int coatrt_session_decode(coatrt_session* session, int64_t token, const float** logits, size_t* size) {
  return guarded([&] { give(session->session.decode(token), logits, size); });
}

int coatrt_session_generate(coatrt_session* session, const int64_t* prompt, size_t count, size_t max_tokens,
                            double temperature, int64_t top_k, double top_p, uint64_t seed,
                            int (*on_token)(int64_t token, void* user), void* user) {
  return guarded([&] {
    coatrt::Sampling sampling;
    sampling.temperature = temperature;
    sampling.top_k = top_k;
    sampling.top_p = top_p;
    sampling.seed = seed;
    session->session.generate({prompt, prompt + count}, max_tokens, sampling,
                              [&](std::int64_t token) { return on_token == nullptr || on_token(token, user) == 0; });
  });
}
