#pragma once
#include <stdexcept>

namespace coatrt {

/// Every error a caller can cause: one line saying what was given, what is allowed and what to do, in the words of the
/// Python package.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace coatrt
