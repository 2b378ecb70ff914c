/* random.h - counter-based random numbers, so that every rank and every resumption draws the same. Private.
 *
 * A hash of (seed, draw, call, row) starts a SplitMix64 sequence, whose n-th number is mix(start + n GOLDEN), n >= 1.
 */
#ifndef FM_RANDOM_H
#define FM_RANDOM_H

#include <stdint.h>

#define FM_GOLDEN 0x9E3779B97F4A7C15u

static inline uint64_t fm_mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

static inline uint64_t fm_start_sequence(uint64_t seed, uint64_t draw, uint64_t call, uint64_t row) {
  uint64_t h = fm_mix(seed + FM_GOLDEN);
  h = fm_mix(h ^ (draw + FM_GOLDEN));
  h = fm_mix(h ^ (call + FM_GOLDEN));
  return fm_mix(h ^ (row + FM_GOLDEN));
}

/* 2U - 1 for U uniform on the midpoints of 2^53 equal parts of (0, 1): exact, and neither 0 nor +-1. */
static inline double fm_signed_unit(uint64_t bits) {
  return (double)((int64_t)(bits >> 11) * 2 + 1 - ((int64_t)1 << 53)) * 0x1p-53;
}

#endif
