/* Any bytes -> a Gramian -> every method: no crash, no NaN, the same twice and on every instruction set.
 *
 * byte 0       K - 1, up to 16
 * byte 1       bit 0: the entries themselves, 8 bytes each (a symmetric matrix, not always a Gramian); else rows. bits
 * 1-4: rank - 1 of the rows. bits 5-7: how far the rows' lengths lie apart rows         one byte of exponent a row,
 * then one signed byte an entry Bytes that are missing are 0. Clang's libFuzzer runs it (FLATMTL_BUILD_FUZZERS);
 * replay.c runs it on files. */
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "flatmtl.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

enum { MOST = 16 };

typedef struct reader {
  const uint8_t *data;
  size_t size, at;
} reader;

static uint8_t next_byte(reader *r) {
  return r->at < r->size ? r->data[r->at++] : 0;
}

static double next_double(reader *r) {
  uint64_t bits = 0;
  for (int i = 0; i < 8; i++) bits = bits << 8 | next_byte(r);
  double value;
  memcpy(&value, &bits, sizeof value);
  return isfinite(value) ? value : 0.0;
}

/* Returns whether the matrix is the Gramian of rows, up to rounding, of lengths within a factor of 2^100 (or zero). */
static int read_gramian(reader *r, int32_t k, double *gramian) {
  const uint8_t kind = next_byte(r);
  if (kind & 1) {
    for (int32_t i = 0; i < k; i++)
      for (int32_t j = 0; j <= i; j++) gramian[i * k + j] = gramian[j * k + i] = next_double(r);
    return 0;
  }
  const int32_t rank = 1 + (kind >> 1 & 15);
  static const int spread[] = {0, 0, 1, 1, 2, 3, 4, 4}; /* up to 2^(128 * 4): squares from 1e-308 to 1e308 */
  double rows[MOST][MOST];
  for (int32_t i = 0; i < k; i++) {
    const int exponent = ((int)next_byte(r) - 128) * spread[kind >> 5];
    for (int32_t p = 0; p < rank; p++) rows[i][p] = ldexp((int8_t)next_byte(r), exponent);
  }
  for (int32_t i = 0; i < k; i++)
    for (int32_t j = 0; j < k; j++) {
      double sum = 0.0;
      for (int32_t p = 0; p < rank; p++) sum += rows[i][p] * rows[j][p];
      gramian[i * k + j] = isfinite(sum) ? sum : 0.0;
    }
  double shortest = INFINITY, longest = 0.0;
  for (int32_t i = 0; i < k; i++)
    for (int32_t p = 0; p < rank; p++) {
      const double size = fabs(rows[i][p]);
      if (!isfinite(size * size * rank)) return 0; /* cut above: no Gramian any more */
      if (size > 0.0 && size < 0x1p-480) return 0; /* products underflow */
      longest = fmax(longest, size);
      if (size > 0.0) shortest = fmin(shortest, size);
    }
  return longest * 0x1p-100 <= shortest;
}

static void stop(const char *what, flatmtl_method method, flatmtl_status status) {
  fprintf(stderr, "%s: %s (status %d)\n", flatmtl_method_name(method), what, (int)status);
  abort();
}

static void check(const flatmtl_context *context, int32_t k, const double *gramian, int is_gramian,
                  flatmtl_method method, const double *options, int32_t num_options) {
  static const char *const isas[] = {"base", "avx2", "avx512", "neon"};
  double weights[MOST], state[MOST * MOST], first[MOST], first_state[MOST * MOST];
  flatmtl_status first_status = FLATMTL_OK;
  int64_t count = 0;
  flatmtl_state_size(method, k, &count, NULL);
  int runs = 0;
  for (int i = 0; i < 4; i++) {
    if (flatmtl_select_isa(isas[i], NULL) != FLATMTL_OK) continue;
    for (int repeat = 0; repeat < 2; repeat++) {
      for (int32_t j = 0; j < k * k; j++) state[j] = cos(j); /* targets of all kinds */
      memset(weights, 0x7f, sizeof weights);
      const flatmtl_status status =
          flatmtl_weights(context, method, options, num_options, k, gramian, state, weights, NULL);
      if (status < 0 && (is_gramian || status != FLATMTL_ERROR_INTERNAL)) stop("an error", method, status);
      for (int32_t j = 0; status >= 0 && j < k; j++)
        if (!isfinite(weights[j])) stop("a weight that is not finite", method, status);
      for (int64_t j = 0; j < count; j++)
        if (!(fabs(state[j]) <= 1.0)) stop("a state out of range", method, status);
      if (runs++ == 0) {
        first_status = status;
        memcpy(first, weights, sizeof first);
        memcpy(first_state, state, sizeof first_state);
      }
      if (status != first_status || memcmp(first, weights, (size_t)k * sizeof *first) != 0 ||
          memcmp(first_state, state, (size_t)count * sizeof *state) != 0)
        stop("another result", method, status);
    }
  }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static void *memory;
  static size_t bytes;
  if (!memory) { /* the largest number of tasks is enough for all */
    if (flatmtl_workspace_size(MOST, &bytes, NULL) != FLATMTL_OK || !(memory = aligned_alloc(64, bytes))) abort();
  }
  const flatmtl_context context = {.workspace = memory, .workspace_size = bytes};
  reader r = {data, size, 0};
  const int32_t k = 1 + next_byte(&r) % MOST;
  double gramian[MOST * MOST];
  const int is_gramian = read_gramian(&r, k, gramian);
  for (int i = 0; i < FLATMTL_NUM_METHODS; i++) check(&context, k, gramian, is_gramian, (flatmtl_method)i, NULL, 0);
  const double fair[] = {0.5, 1.0, 5.0}, c[] = {0.0, 0.99}, aligned[2][2] = {{1.0, 0.0}, {2.0, 0x1p-52}}, power = 1.0;
  for (int i = 0; i < 3; i++) check(&context, k, gramian, is_gramian, FLATMTL_FAIRGRAD, &fair[i], 1);
  for (int i = 0; i < 2; i++) check(&context, k, gramian, is_gramian, FLATMTL_CAGRAD, &c[i], 1);
  for (int i = 0; i < 2; i++) check(&context, k, gramian, is_gramian, FLATMTL_ALIGNED_MTL, aligned[i], 2);
  check(&context, k, gramian, is_gramian, FLATMTL_NTKMTL, &power, 1);
  return 0;
}
