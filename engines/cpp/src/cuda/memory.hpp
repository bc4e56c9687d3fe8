#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>

#include "packed_lora.hpp"

namespace coatrt::detail {

/// Bytes that a session takes on the device.
struct Needs {
  std::size_t weights = 0;  ///< 0 where they are loaded already
  std::size_t caches = 0;
  std::size_t other = 0;  ///< LoRA and logits
  std::int64_t slots = 0;
};

/// Buffers of one device, all on one stream: of the CPU here, of a GPU in device_memory.hpp. For one thread.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual bool on_gpu() const { return false; }
  virtual void* stream() const { return nullptr; }
  /// A new buffer on the device, full of zeros once `synchronize` returned.
  virtual void* allocate(std::size_t bytes) = 0;
  /// Memory of the host from which copies are fast, full of zeros.
  virtual void* allocate_host(std::size_t bytes) = 0;
  virtual void free(void* data) noexcept = 0;
  virtual void free_host(void* data) noexcept = 0;
  /// Start a copy to the device; `from` may change after `synchronize`.
  virtual void write(void* to, const void* from, std::size_t bytes) = 0;
  /// Start a copy from the device.
  virtual void read(void* to, const void* from, std::size_t bytes) = 0;
  /// Start to fill a buffer with zeros.
  virtual void clear(void* data, std::size_t bytes) = 0;
  /// Wait for everything that was started.
  virtual void synchronize() = 0;
  /// Refuse what cannot fit.
  virtual void check_room(const Needs&) {}
};

class HostMemory final : public Memory {
 public:
  void* allocate(std::size_t bytes) override;
  void* allocate_host(std::size_t bytes) override { return allocate(bytes); }
  void free(void* data) noexcept override;
  void free_host(void* data) noexcept override { free(data); }
  void write(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void read(void* to, const void* from, std::size_t bytes) override { std::memcpy(to, from, bytes); }
  void clear(void* data, std::size_t bytes) override { std::memset(data, 0, bytes); }
  void synchronize() override {}
};

/// Owns a buffer of a memory, which outlives it.
class Buffer {
 public:
  enum class Where { device, host };
  Buffer(Memory& memory, std::size_t bytes, Where where = Where::device);
  ~Buffer();
  Buffer(Buffer&& other) noexcept
      : memory_(other.memory_), where_(other.where_), bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
  Buffer& operator=(Buffer&&) = delete;

  unsigned char* data() const { return static_cast<unsigned char*>(data_); }
  std::size_t bytes() const { return bytes_; }

 private:
  Memory* memory_;
  Where where_;
  std::size_t bytes_;
  void* data_;
};

}  // namespace coatrt::detail
