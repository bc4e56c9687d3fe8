// Checks detached signatures of `coatrt build --sign` (coatrt/system/signature.py).
#include <openssl/evp.h>
#include <openssl/pem.h>

#include <cstdio>
#include <memory>
#include <optional>

#include "coatrt/error.hpp"
#include "file.hpp"
#include "json.hpp"
#include "sha256.hpp"
#include "signature.hpp"

namespace coatrt::detail {
namespace {

constexpr std::string_view kPayloadType = "application/vnd.in-toto+json";

struct Free {
  void operator()(std::FILE* file) const { std::fclose(file); }
  void operator()(EVP_PKEY* key) const { EVP_PKEY_free(key); }
  void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
};
using Key = std::unique_ptr<EVP_PKEY, Free>;

Key read_key(const std::string& path) {
  const std::unique_ptr<std::FILE, Free> file(std::fopen(path.c_str(), "rb"));
  Key key(file ? PEM_read_PUBKEY(file.get(), nullptr, nullptr, nullptr) : nullptr);
  if (!key || EVP_PKEY_base_id(key.get()) != EVP_PKEY_EC || EVP_PKEY_bits(key.get()) != 256)
    throw Error("not a usable public key: " + path + "; give a PEM file with a public key on P-256 (docs/concepts/security.md)");
  return key;
}

std::optional<std::string> decoded(const std::string& base64) {
  if (base64.empty() || base64.size() % 4 != 0 || base64.size() > (1u << 24)) return std::nullopt;
  std::string bytes(base64.size() / 4 * 3, '\0');
  const int size = EVP_DecodeBlock(reinterpret_cast<unsigned char*>(bytes.data()),
                                   reinterpret_cast<const unsigned char*>(base64.data()), static_cast<int>(base64.size()));
  if (size < 0) return std::nullopt;
  const std::size_t last = base64.find_last_not_of('=');
  const std::size_t padding = base64.size() - 1 - (last == base64.npos ? 0 : last);
  if (padding > 2) return std::nullopt;
  bytes.resize(static_cast<std::size_t>(size) - padding);
  return bytes;
}

bool is_text(const Json& value, const char* key, std::string_view expected) {
  const std::string* found = find_text(value, key);
  return found != nullptr && *found == expected;
}

/// Whether the statement is about this file and no other.
bool states(const Json& statement, std::string_view data, const std::string& name) {
  const Json* predicate = find(statement, "predicate");
  const Json* files = predicate == nullptr ? nullptr : find(*predicate, "resources");
  if (files == nullptr || !files->is_array() || files->size() != 1) return false;
  const Json& file = files->front();
  return is_text(statement, "_type", "https://in-toto.io/Statement/v1") &&
         is_text(statement, "predicateType", "https://model_signing/signature/v1.0") && is_text(file, "name", name) &&
         is_text(file, "algorithm", "sha256") && is_text(file, "digest", sha256(data.data(), data.size()));
}

}  // namespace

std::string check_signature(std::string_view data, const std::string& name, const std::filesystem::path& signature,
                            const std::string& key) {
  const Key public_key = read_key(key);
  std::error_code unknown;
  if (!std::filesystem::is_regular_file(signature, unknown)) return "no model.sig";
  try {
    const Json bundle = parse_json(MappedFile(signature).text(), "signature", signature.string());
    const Json* envelope = find(bundle, "dsseEnvelope");
    const Json* signatures = envelope == nullptr ? nullptr : find(*envelope, "signatures");
    const std::string* encoded = envelope == nullptr ? nullptr : find_text(*envelope, "payload");
    if (encoded == nullptr || signatures == nullptr || !signatures->is_array() || signatures->empty())
      return "malformed signature";
    const std::string* sig = find_text(signatures->front(), "sig");
    const auto payload = decoded(*encoded), bytes = sig == nullptr ? std::nullopt : decoded(*sig);
    if (!payload || !bytes) return "malformed signature";
    const std::string signed_text = "DSSEv1 " + std::to_string(kPayloadType.size()) + " " + std::string(kPayloadType) + " " +
                                    std::to_string(payload->size()) + " " + *payload;
    const std::unique_ptr<EVP_MD_CTX, Free> context(EVP_MD_CTX_new());
    if (!context || EVP_DigestVerifyInit(context.get(), nullptr, EVP_sha256(), nullptr, public_key.get()) != 1)
      throw Error("OpenSSL cannot check a signature; install it again");
    if (EVP_DigestVerify(context.get(), reinterpret_cast<const unsigned char*>(bytes->data()), bytes->size(),
                         reinterpret_cast<const unsigned char*>(signed_text.data()), signed_text.size()) != 1)
      return "signed by another key, or altered";
    const Json statement = parse_json(*payload, "signature", signature.string());
    return is_text(*envelope, "payloadType", kPayloadType) && states(statement, data, name) ? "" : "signature of another file";
  } catch (const Error&) {
    return "malformed signature";
  }
}

}  // namespace coatrt::detail
