/* c_api BUNDLE ID…: prints the tokens that continue the ids, through the C functions. */
#include <coatrt/coatrt.h>
#include <stdio.h>
#include <stdlib.h>

static int fail(void) {
  fprintf(stderr, "%s\n", coatrt_error());
  return 2;
}

static int print(int64_t token, void* user) {
  int* left = user;
  printf("%lld ", (long long)token);
  return --*left == 0;
}

int main(int argc, char** argv) {
  coatrt_bundle* bundle = NULL;
  coatrt_session* session = NULL;
  int64_t ids[64];
  size_t count = 0, size = 0;
  const float* logits = NULL;
  int left = 8;
  for (int i = 2; i < argc && count < 64; ++i) ids[count++] = atoll(argv[i]);
  if (argc < 3 || coatrt_bundle_open(argv[1], NULL, &bundle)) return fail();
  if (coatrt_session_open(bundle, "ort", 1, 64, &session)) return fail();
  coatrt_bundle_free(bundle); /* the session keeps what it needs */
  if (coatrt_session_prefill(session, ids, count, &logits, &size) || size == 0) return fail();
  if (coatrt_session_decode(session, -1, &logits, &size) == 0) return 3;
  if (coatrt_session_swap(session, "{") == 0) return 4;
  if (coatrt_session_generate(session, ids, count, 100, 0, 0, 1, 0, print, &left)) return fail();
  printf("\n");
  coatrt_session_free(session);
  return 0;
}
