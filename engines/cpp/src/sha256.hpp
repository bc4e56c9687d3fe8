#pragma once
#include <cstddef>
#include <string>

namespace coatrt::detail {

/// SHA-256 (FIPS 180-4) as 64 hexadecimal digits: by OpenSSL where the build has it (openssl/), else portable/.
std::string sha256(const void* data, std::size_t size);

}  // namespace coatrt::detail
