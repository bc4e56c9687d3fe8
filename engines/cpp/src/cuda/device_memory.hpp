#pragma once
#include <cstring>
#include <memory>

#include "cuda/driver.hpp"
#include "cuda/memory.hpp"

namespace coatrt::detail {

/// Buffers on the GPU, copied on a stream of their own. The thread that makes it is the one that uses it.
class DeviceMemory final : public Memory {
 public:
  explicit DeviceMemory(std::unique_ptr<Driver> driver) : driver_(std::move(driver)) {
    driver_->enter();
    stream_ = driver_->make_stream();
  }
  ~DeviceMemory() override { driver_->destroy_stream(stream_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  bool on_gpu() const override { return true; }
  void* stream() const override { return stream_; }
  void* allocate(std::size_t bytes) override {
    void* made = driver_->allocate(bytes);
    try {
      driver_->clear(made, bytes, stream_);
    } catch (...) {
      driver_->free(made);
      throw;
    }
    return made;
  }
  void* allocate_host(std::size_t bytes) override {
    void* made = driver_->allocate_host(bytes);
    return std::memset(made, 0, bytes);
  }
  void free(void* data) noexcept override { driver_->free(data); }
  void free_host(void* data) noexcept override { driver_->free_host(data); }
  void write(void* to, const void* from, std::size_t bytes) override { driver_->write(to, from, bytes, stream_); }
  void read(void* to, const void* from, std::size_t bytes) override { driver_->read(to, from, bytes, stream_); }
  void clear(void* data, std::size_t bytes) override { driver_->clear(data, bytes, stream_); }
  void synchronize() override { driver_->synchronize(stream_); }
  void check_room(const Needs& needs) override;

 private:
  std::unique_ptr<Driver> driver_;
  void* stream_ = nullptr;
};

}  // namespace coatrt::detail
