#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace coatrt {

/// Ends a text at the first of several strings. None of them is shown, in whole or in part: what may be the beginning of
/// one is held back until the next text decides. The result does not depend on how the text is divided.
class StopStrings {
 public:
  explicit StopStrings(std::vector<std::string> strings = {});
  /// Add text; returns what may be shown. Nothing is shown after the end.
  std::string add(std::string_view text);
  /// The text held back, where no string ended it.
  std::string finish();
  bool found() const { return found_; }

 private:
  std::vector<std::string> strings_;
  std::string held_;
  bool found_ = false;
};

}  // namespace coatrt
