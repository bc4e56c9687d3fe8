#pragma once
#include <filesystem>
#include <string>
#include <string_view>

namespace coatrt::detail {

/// Why a signature file is not a signature of `data` by the public key in a PEM file; empty where it is. Needs OpenSSL.
std::string check_signature(std::string_view data, const std::string& name, const std::filesystem::path& signature,
                            const std::string& key);

}  // namespace coatrt::detail
