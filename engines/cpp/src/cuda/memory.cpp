#include "cuda/memory.hpp"

#include <cstdlib>
#include <new>

namespace coatrt::detail {

void* HostMemory::allocate(std::size_t bytes) {
  void* data = std::aligned_alloc(kAlignment, aligned(bytes + 1));
  if (data == nullptr) throw std::bad_alloc();
  return std::memset(data, 0, aligned(bytes + 1));
}

void HostMemory::free(void* data) noexcept { std::free(data); }

Buffer::Buffer(Memory& memory, std::size_t bytes, Where where)
    : memory_(&memory),
      where_(where),
      bytes_(bytes),
      data_(where == Where::device ? memory.allocate(bytes) : memory.allocate_host(bytes)) {}

Buffer::~Buffer() {
  if (data_ == nullptr) return;
  if (where_ == Where::device) memory_->free(data_);
  else memory_->free_host(data_);
}

}  // namespace coatrt::detail
