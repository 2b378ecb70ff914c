// The tests, or: flatmtl_cpp_tests --trajectory IN OUT (see trajectory.cpp).
#define CATCH_CONFIG_RUNNER
#include <string>

#include "support.h"

int trajectory_main(const char *in, const char *out);

int main(int argc, char **argv) {
  if (argc == 4 && std::string(argv[1]) == "--trajectory") return trajectory_main(argv[2], argv[3]);
  return Catch::Session().run(argc, argv);
}
