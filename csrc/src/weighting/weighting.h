/* weighting.h - what a loss weighting gets, and what several of them share. Private. */
#ifndef FM_WEIGHTING_H
#define FM_WEIGHTING_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

/* One call. The checks are done: losses are finite and of the sign that the method needs, norms are there, finite and
 * >= 0 if it needs them. */
typedef struct fm_weighting_call {
  int32_t num_tasks;
  const double *losses;  /* [K] */
  const double *norms;   /* [K], or NULL */
  const double *after;   /* [K], the losses after the update; for fm_observe_* alone */
  const double *options; /* complete */
  double *state;         /* vectors of K, one after another; changed in place */
  double *work;          /* fm_weighting_work(K) doubles */
} fm_weighting_call;

typedef void (*fm_weighting_fn)(const fm_weighting_call *call, double *weights);

size_t fm_weighting_work(int32_t num_tasks);

/* Weights beyond the range of doubles are cut to it afterwards. */
void fm_weigh_fixed(const fm_weighting_call *call, double *weights);
void fm_weigh_uw(const fm_weighting_call *call, double *weights);
void fm_weigh_dwa(const fm_weighting_call *call, double *weights);
void fm_weigh_rlw(const fm_weighting_call *call, double *weights);
void fm_weigh_si(const fm_weighting_call *call, double *weights);
void fm_weigh_gls(const fm_weighting_call *call, double *weights);
void fm_weigh_stch(const fm_weighting_call *call, double *weights);
void fm_weigh_imtl_l(const fm_weighting_call *call, double *weights);
void fm_weigh_famo(const fm_weighting_call *call, double *weights);
void fm_weigh_gradnorm(const fm_weighting_call *call, double *weights);
void fm_weigh_go4align(const fm_weighting_call *call, double *weights);
void fm_weigh_slaw(const fm_weighting_call *call, double *weights);
void fm_weigh_bmtl(const fm_weighting_call *call, double *weights);
void fm_weigh_emtl(const fm_weighting_call *call, double *weights);

/* weights is NULL. */
void fm_observe_famo(const fm_weighting_call *call, double *weights);

/* out = total softmax(x); out may be x. Entries may be -INFINITY, but not all of them. */
void fm_softmax(int32_t n, const double *x, double total, double *out);

/* x within [-limit, limit]. */
static inline double fm_clamp(double x, double limit) {
  return x > limit ? limit : x < -limit ? -limit : x;
}

/* The root of a^2 + b^2 for finite a and b, in units of the larger one's power of two: squares neither over- nor
 * underflow. The bits of hypot depend on the C library, and its newest version binds to glibc 2.35. */
static inline double fm_hypot(double a, double b) {
  int exponent;
  frexp(fmax(fabs(a), fabs(b)), &exponent);
  a = ldexp(a, -exponent);
  b = ldexp(b, -exponent);
  return ldexp(sqrt(a * a + b * b), exponent);
}

/* The step of Adam (1412.6980; beta 0.9 and 0.999) to subtract, for the count-th gradient, count >= 1. root is the root
 * of the second moment, so that nothing over- or underflows; there is no epsilon, as |step| is bounded without one.
 * gradient may be infinite. */
double fm_adam(double gradient, double lr, double count, double *moment, double *root);

#endif
