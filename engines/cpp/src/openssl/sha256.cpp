// SHA-256 by OpenSSL, which uses the processor's instructions for it, on x86 and on Arm.
#include "sha256.hpp"

#include <openssl/evp.h>

#include "coatrt/error.hpp"

namespace coatrt::detail {

std::string sha256(const void* data, std::size_t size) {
  unsigned char digest[32];
  if (EVP_Digest(data, size, digest, nullptr, EVP_sha256(), nullptr) != 1)
    throw Error("OpenSSL cannot compute SHA-256; check its installation");
  std::string text;
  for (const unsigned char byte : digest) text += {"0123456789abcdef"[byte >> 4], "0123456789abcdef"[byte & 15]};
  return text;
}

}  // namespace coatrt::detail
