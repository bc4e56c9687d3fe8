#pragma once
#include <iostream>
#include <string>

#include "coatrt/session.hpp"

namespace coatrt::detail {

/// Report one line to `SessionOptions::notice`, or on standard error.
inline void notify(const SessionOptions& options, const std::string& line) {
  if (options.notice) options.notice(line);
  else std::cerr << "coatrt: " << line << std::endl;
}

}  // namespace coatrt::detail
