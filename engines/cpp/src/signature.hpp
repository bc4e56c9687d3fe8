#pragma once
#include <filesystem>
#include <string>
#include <string_view>

namespace coatrt::detail {

/// Why a signature file is not one of this file by the public key in a PEM file; empty where it is. Component sign only.
std::string check_signature(std::string_view data, const std::string& name, const std::filesystem::path& signature,
                            const std::string& key);

}  // namespace coatrt::detail
