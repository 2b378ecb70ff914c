// The tests, or: flatmtl_cpp_tests --trajectory IN OUT (see trajectory.cpp), --refusals (see refusals.cpp).
#define CATCH_CONFIG_RUNNER
#include <string>

#include "support.h"

int trajectory_main(const char *in, const char *out);
int refusals_main();

int main(int argc, char **argv) {
  if (argc == 4 && std::string(argv[1]) == "--trajectory") return trajectory_main(argv[2], argv[3]);
  if (argc == 2 && std::string(argv[1]) == "--refusals") return refusals_main();
  return Catch::Session().run(argc, argv);
}
