#include "file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "coatrt/error.hpp"

namespace coatrt::detail {
namespace {

[[noreturn]] void fail(const std::filesystem::path& path, const char* what) {
  throw Error(path.string() + " cannot be " + what + ": " + std::strerror(errno));
}

bool write_all(int file, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t done = ::write(file, bytes.data(), bytes.size());
    if (done < 0 && errno == EINTR) continue;
    if (done < 0) return false;
    bytes.remove_prefix(static_cast<std::size_t>(done));
  }
  return true;
}

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  const int file = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) fail(path, "read");
  struct stat facts {};
  if (::fstat(file, &facts) != 0 || !S_ISREG(facts.st_mode)) {
    ::close(file);
    throw Error(path.string() + " is no regular file; give one");
  }
  size_ = static_cast<std::size_t>(facts.st_size);
  void* mapped = size_ == 0 ? nullptr : ::mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, file, 0);
  ::close(file);
  if (mapped == MAP_FAILED) fail(path, "mapped");
  data_ = static_cast<const unsigned char*>(mapped);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<unsigned char*>(data_), size_);
}

void write_atomically(const std::filesystem::path& path, std::string_view head, const std::string_view* parts,
                      std::size_t count) {
  std::string name = path.string() + ".XXXXXX";
  const int file = ::mkstemp(name.data());
  if (file < 0) fail(path, "written");
  bool good = write_all(file, head);
  for (std::size_t i = 0; good && i < count; ++i) good = write_all(file, parts[i]);
  good = good && ::fchmod(file, 0644) == 0 && ::fsync(file) == 0;
  good = ::close(file) == 0 && good && ::rename(name.c_str(), path.c_str()) == 0;
  if (!good) {
    const int reason = errno;
    ::unlink(name.c_str());
    errno = reason;
    fail(path, "written");
  }
}

}  // namespace coatrt::detail
