/* Runs the fuzz target on files, and on COUNT inputs of a fixed pseudo-random sequence: replay COUNT [FILE ...] */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int main(int argc, char **argv) {
  uint8_t data[4096];
  for (int i = 2; i < argc; i++) {
    FILE *file = fopen(argv[i], "rb");
    if (!file) {
      fprintf(stderr, "cannot read %s\n", argv[i]);
      return 1;
    }
    const size_t size = fread(data, 1, sizeof data, file);
    fclose(file);
    LLVMFuzzerTestOneInput(data, size);
  }
  uint64_t x = 88172645463325252u; /* xorshift64 (Marsaglia 2003) */
  for (long n = argc > 1 ? atol(argv[1]) : 0; n > 0; n--) {
    const size_t size = 300;
    for (size_t i = 0; i < size; i++) {
      x ^= x << 13;
      x ^= x >> 7;
      x ^= x << 17;
      data[i] = (uint8_t)(x >> 32);
    }
    /* Small and repeated entries make dependent rows. */
    if (n % 3 == 0)
      for (size_t i = 2; i < size; i++) data[i] = (uint8_t)((int)(data[i] % 5) - 2);
    if (n % 4) data[1] &= 0xfe;
    LLVMFuzzerTestOneInput(data, size);
  }
  return 0;
}
