/* Weights of two conflicting gradients, and the version that the build system promised: main VERSION */
#include <flatmtl.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv) {
  if (argc != 2 || strcmp(argv[1], flatmtl_version()) != 0) {
    fprintf(stderr, "version %s, expected %s\n", flatmtl_version(), argc == 2 ? argv[1] : "an argument");
    return 1;
  }
  /* g_1 = (1, 0), g_2 = (-1, 2): the shortest convex combination is 3/4 g_1 + 1/4 g_2 = (1/2, 1/2). */
  const double gramian[4] = {1.0, -1.0, -1.0, 5.0};
  double weights[2] = {0.0, 0.0};
  static _Alignas(64) unsigned char workspace[1 << 16];
  flatmtl_context context = {0};
  flatmtl_error error;
  size_t needed = 0;
  if (flatmtl_workspace_size(2, &needed, &error) != FLATMTL_OK || needed > sizeof workspace) {
    fprintf(stderr, "workspace of %zu bytes wanted\n", needed);
    return 1;
  }
  context.workspace = workspace;
  context.workspace_size = sizeof workspace;
  const flatmtl_status status = flatmtl_weights(&context, FLATMTL_MGDA, NULL, 0, 2, gramian, NULL, weights, &error);
  if (status != FLATMTL_OK) {
    char message[256];
    flatmtl_error_message(&error, message, sizeof message);
    fprintf(stderr, "%s\n", message);
    return 1;
  }
  printf("flatmtl %s (%s): weights %g %g\n", flatmtl_version(), flatmtl_isa(), weights[0], weights[1]);
  return fabs(weights[0] - 0.75) < 1e-12 && fabs(weights[1] - 0.25) < 1e-12 ? 0 : 1;
}
