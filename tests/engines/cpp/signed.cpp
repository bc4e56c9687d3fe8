// signed BUNDLE KEY: open a bundle that the key must have signed; one line and exit code 2 where it has not.
#include <iostream>

#include "coatrt/bundle.hpp"
#include "coatrt/error.hpp"

int main(int, char** arguments) {
  try {
    coatrt::BundleOptions options;
    options.public_key = arguments[2];
    coatrt::Bundle::open(arguments[1], options);
  } catch (const coatrt::Error& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
  return 0;
}
