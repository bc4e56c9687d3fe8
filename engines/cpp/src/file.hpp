#pragma once
#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

namespace coatrt::detail {

/// A file mapped for reading; unmapped at the end of its life. An empty file is an empty view.
class MappedFile {
 public:
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const unsigned char* data() const { return data_; }
  std::size_t size() const { return size_; }
  std::string_view text() const { return {reinterpret_cast<const char*>(data_), size_}; }

 private:
  const unsigned char* data_ = nullptr;
  std::size_t size_ = 0;
};

/// Write bytes under a temporary name beside `path`, sync, rename.
void write_atomically(const std::filesystem::path& path, std::string_view head, const std::string_view* parts,
                      std::size_t count);

}  // namespace coatrt::detail
