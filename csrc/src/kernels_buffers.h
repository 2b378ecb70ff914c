/* kernels_buffers.h - the element-wise part of the buffer methods; included by kernels_body.h. Plain loops. */

#define FM_DEFINE_BUFFERS(T, TYPE)                                                                           \
  static void ema_##T(TYPE *restrict y, const double *restrict x, double keep, int64_t n) {                  \
    for (int64_t p = 0; p < n; p++) y[p] = (TYPE)(x[p] + keep * ((double)y[p] - x[p]));                      \
  }                                                                                                          \
  static void excess_##T(TYPE *restrict root, const double *restrict x, int64_t n, double *restrict terms) { \
    for (int64_t p = 0; p < n; p++) {                                                                        \
      const double old = (double)root[p], square = x[p] * x[p], now = sqrt(old * old + square);              \
      root[p] = (TYPE)now;                                                                                   \
      terms[p] = square / (now > 0.0 ? now : 1.0);                                                           \
    }                                                                                                        \
  }

FM_DEFINE_BUFFERS(f32, float)
FM_DEFINE_BUFFERS(f64, double)

static void dot(const double *x, const double *y, int64_t n, double *restrict lanes) {
  double acc[FM_LANES];
  memcpy(acc, lanes, sizeof acc);
  for (int64_t p = 0; p < n; p += FM_LANES)
    for (int lane = 0; lane < FM_LANES; lane++) acc[lane] += x[p + lane] * y[p + lane];
  memcpy(lanes, acc, sizeof acc);
}

static void drop_sums(const double *restrict x, int64_t n, double *restrict sum, double *restrict mass) {
  for (int64_t p = 0; p < n; p++) {
    sum[p] += x[p];
    mass[p] += fabs(x[p]);
  }
}

/* P = (1 + sum / mass) / 2 > U is sum > (2U - 1) mass: no division, and nothing to guard. */
static void drop_signs(uint64_t start, int64_t position, const double *restrict sum, const double *restrict mass,
                       int64_t n, double *restrict sign) {
  for (int64_t p = 0; p < n; p++) {
    const double bound = fm_signed_unit(fm_mix(start + (uint64_t)(position + p + 1) * FM_GOLDEN)) * mass[p];
    sign[p] = sum[p] > bound ? 1.0 : sum[p] < bound ? -1.0 : 0.0;
  }
}

static void drop_add(const double *restrict x, const double *restrict sign, double leak, int64_t n,
                     double *restrict out) {
  for (int64_t p = 0; p < n; p++) out[p] += x[p] * sign[p] > 0.0 ? x[p] : leak * x[p];
}
