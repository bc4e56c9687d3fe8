/* The library for C and everything that calls C. Functions return 0, or -1 with a message in coatrt_error(). Handles are
 * freed by their own function; a session is for one thread at a time, a bundle for any. */
#ifndef COATRT_H
#define COATRT_H
#include <stddef.h>
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

typedef struct coatrt_bundle coatrt_bundle;
typedef struct coatrt_session coatrt_session;

/* The last error of this thread; valid until its next failing call. */
const char* coatrt_error(void);

/* onnxruntime may be NULL: see coatrt::BundleOptions. */
int coatrt_bundle_open(const char* directory, const char* onnxruntime, coatrt_bundle** bundle);
void coatrt_bundle_free(coatrt_bundle* bundle);

/* backend "ort", "cuda" or "trt"; threads 0: all usable cores; context: slots of the cache. */
int coatrt_session_open(const coatrt_bundle* bundle, const char* backend, int threads, int64_t context,
                        coatrt_session** session);
void coatrt_session_free(coatrt_session* session);

/* LoRA of another configuration, given as JSON; NULL: none, the quantized base alone. */
int coatrt_session_swap(coatrt_session* session, const char* configuration);

/* Start a sequence, or add a token; *logits has *size values and is valid until the session's next call. */
int coatrt_session_prefill(coatrt_session* session, const int64_t* tokens, size_t count, const float** logits,
                           size_t* size);
int coatrt_session_decode(coatrt_session* session, int64_t token, const float** logits, size_t* size);

/* Continue a prompt; on_token returns 0 to go on. temperature 0 takes the likeliest token. */
int coatrt_session_generate(coatrt_session* session, const int64_t* prompt, size_t count, size_t max_tokens,
                            double temperature, int64_t top_k, double top_p, uint64_t seed,
                            int (*on_token)(int64_t token, void* user), void* user);

#ifdef __cplusplus
}
#endif
#endif
