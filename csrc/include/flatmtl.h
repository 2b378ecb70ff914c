/* flatmtl.h - flat-minima training for multi-task models, on raw buffers.
 *
 * One F-MTL step (arXiv 2211.13723, Algorithm 1) for K tasks that share parameters theta and own heads psi_i:
 *
 *   losses -> per-task gradients -> Gramian -> weights -> combined update -> parameters
 *
 *   1. (g_i, h_i)  gradient of loss i with respect to (theta, psi_i), computed by the caller
 *   2. theta + rho_shared g_i/||g_i||,  psi_i + rho_task h_i/||h_i||                     flatmtl_perturb
 *   3. (s_i, t_i)  the gradients there, computed by the caller; the parameters are then restored
 *   4. f_i = s_i - g_i, the flat gradient; both families' Gramians                       flatmtl_gramian_pair
 *   5. weights a of the loss family and b of the flat family, by an aggregator            flatmtl_step_weights
 *   6. update of theta: SUM a_i g_i + b_i f_i; update of psi_i: t_i                       flatmtl_combine_pair
 *
 * The pieces can be called one by one, or through the state machine flatmtl_step_*, which keeps their order.
 *
 * Rules that hold for every function here
 *  - Returns a flatmtl_status: 0 is success, > 0 success with a remark, < 0 an error. On an error nothing the caller
 *    passed has been written to, except *error. The last argument, error, may be NULL.
 *  - Every buffer belongs to the caller; nothing is kept after the call returns, except by flatmtl_step_init.
 *  - No allocation, no I/O, no threads, no global state but the table of kernels chosen once for this CPU
 *    (environment variable FLATMTL_ISA=base|avx2|avx512|neon overrides the choice).
 *  - Results are equal bit for bit whatever the instruction set, the number of threads, and the way a vector is cut
 *    into segments; the payload of a NaN is excepted.
 *  - Values of FLATMTL_F32, BF16 and F16 are widened exactly. Squared norms are summed in double precision, Gramians of
 *    few rows too; see flatmtl_accumulate for those of many.
 *  - Thread safety: calls on distinct buffers may run at the same time.
 */
#ifndef FLATMTL_H
#define FLATMTL_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define FLATMTL_VERSION_MAJOR 0
#define FLATMTL_VERSION_MINOR 1
#define FLATMTL_VERSION_PATCH 0

#if defined(FLATMTL_BUILD_SHARED) && defined(_WIN32)
#define FLATMTL_API __declspec(dllexport)
#elif defined(FLATMTL_BUILD_SHARED)
#define FLATMTL_API __attribute__((visibility("default")))
#else
#define FLATMTL_API
#endif

/* Largest number of tasks any function accepts. */
#define FLATMTL_MAX_TASKS 4096

/* ------------------------------------------------------------------------------------------------------------------
 * Status and errors
 */

typedef enum flatmtl_status {
  FLATMTL_OK = 0,
  /* No finite weights exist: a non-negative combination of the rows vanishes (Nash-MTL, FairGrad), 1'G^+ d = 0
   * (IMTL-G), C^+ 1 = 0 (ConFIG), or every row is zero (those and Aligned-MTL, NTKMTL). All weights are 0. */
  FLATMTL_PARETO_STATIONARY = 1,
  FLATMTL_ERROR_NULL = -1,      /* a required pointer is NULL */
  FLATMTL_ERROR_NUM_TASKS = -2, /* number of tasks or rows out of range */
  FLATMTL_ERROR_SIZE = -3,      /* negative length or count, or memory too small */
  FLATMTL_ERROR_DTYPE = -4,     /* unknown dtype, or two arguments of different dtypes */
  FLATMTL_ERROR_MISMATCH = -5,  /* two arguments with different segment tables or numbers of tasks */
  FLATMTL_ERROR_OVERLAP = -6,   /* an output overlaps an input or another output */
  FLATMTL_ERROR_NAME = -7,      /* unknown method, mode or instruction set */
  FLATMTL_ERROR_OPTION = -8,    /* wrong number of options, or an option out of range */
  FLATMTL_ERROR_NONFINITE = -9, /* Inf or NaN; error->row names the row (task) */
  FLATMTL_ERROR_ORDER = -10,    /* a function of flatmtl_step_* called out of order */
  FLATMTL_ERROR_INTERNAL = -11, /* a solve did not reach its tolerance: a bug, please report it */
  FLATMTL_ERROR_LOSS = -12      /* a loss outside the range that the method is defined for; error->row names the task */
} flatmtl_status;

/* What went wrong, and where. Fields that do not apply are -1 (row, segment) or NAN (value). */
typedef struct flatmtl_error {
  flatmtl_status status;
  const char *argument; /* name of the offending argument as in this header; a string literal */
  int64_t row;          /* task or row */
  int64_t segment;      /* index in the segment table */
  double value;         /* the offending value */
} flatmtl_error;

/* Writes a sentence about error to buffer (NUL-terminated, cut at size bytes). ERROR_NULL if an argument is NULL,
 * ERROR_SIZE if size is 0. */
FLATMTL_API flatmtl_status flatmtl_error_message(const flatmtl_error *error, char *buffer, size_t size);

/* "0.1.0" */
FLATMTL_API const char *flatmtl_version(void);

/* The instruction set in use: "base", "avx2", "avx512" or "neon". */
FLATMTL_API const char *flatmtl_isa(void);

/* Chooses the instruction set by name (for tests; no other call may run meanwhile). ERROR_NAME if the name is unknown,
 * or if this build or this CPU does not have it; the choice is then unchanged. */
FLATMTL_API flatmtl_status flatmtl_select_isa(const char *name, flatmtl_error *error);

/* ------------------------------------------------------------------------------------------------------------------
 * Vectors in pieces
 *
 * A vector of P numbers is a list of segments (a parameter tensor each, say), so that nothing has to be flattened.
 * Segments of length 0 are ordinary, and their pointers may be NULL.
 *
 * "Beside": rows of gradients beside a vector have its segment table, and its dtype or, where that is F32, also BF16 or
 * F16: half of the memory. They are widened exactly, so that a result is, bit for bit, that of the same values in F32.
 */

typedef enum flatmtl_dtype {
  FLATMTL_F32 = 0,
  FLATMTL_F64 = 1,
  FLATMTL_BF16 = 2, /* uint16_t: the upper half of an F32 */
  FLATMTL_F16 = 3   /* uint16_t: IEEE binary16 */
} flatmtl_dtype;

/* num_rows vectors with one segment table, read only. */
typedef struct flatmtl_rows {
  flatmtl_dtype dtype;
  int32_t num_rows;
  int64_t num_segments;    /* >= 0 */
  const int64_t *lengths;  /* [num_segments], in elements, each >= 0 */
  const void *const *data; /* [num_rows * num_segments], row-major */
} flatmtl_rows;

/* One vector, written to. */
typedef struct flatmtl_vector {
  flatmtl_dtype dtype;
  int64_t num_segments;
  const int64_t *lengths; /* [num_segments] */
  void *const *data;      /* [num_segments] */
} flatmtl_vector;

/* Runs fn(begin, end, context) over a partition of [begin, end), on as many threads as the host likes, and returns when
 * all is done. Ranges must not be smaller than grain, but for the last one. */
typedef void (*flatmtl_range_fn)(int64_t begin, int64_t end, void *context);
typedef void (*flatmtl_parallel_for)(int64_t begin, int64_t end, int64_t grain, flatmtl_range_fn fn, void *context,
                                     void *host);

/* How inner products are summed. auto: in F32 within blocks of 512 elements and in F64 across them, for 4 rows or more
 * of F32, 2 or more of BF16 and F16, of 98304 numbers or more; in F64 throughout otherwise, where a sum in F32 might
 * have over- or underflowed, and where the rows are nearly dependent (a part of a row that the rows before it do not
 * span is below sqrt(1e-5) of the row). The F32 sums are fused multiply-adds in 16 chains of 32: an entry of the
 * Gramian is off by at most 3e-6 |g_i||g_j|; for rows of random numbers by less than 1e-8 |g_i||g_j|, or 1e-7 where
 * they are BF16 or F16, the squares of which are rounded with a bias. In F64: by 1e-13 at most. */
typedef enum flatmtl_accumulate { FLATMTL_ACCUMULATE_AUTO = 0, FLATMTL_ACCUMULATE_F64 = 1 } flatmtl_accumulate;

/* What a call may use: threads and scratch memory. */
typedef struct flatmtl_context {
  flatmtl_parallel_for parallel_for; /* NULL: the calling thread alone */
  void *host;                        /* handed to parallel_for */
  void *workspace;                   /* aligned to 64 bytes */
  size_t workspace_size;             /* in bytes, at least flatmtl_workspace_size(num_tasks) */
  flatmtl_accumulate accumulate;     /* of the Gramians: 0 is auto */
} flatmtl_context;

/* Scratch bytes that are enough for every call with up to num_tasks tasks, whatever the length of the rows. */
FLATMTL_API flatmtl_status flatmtl_workspace_size(int32_t num_tasks, size_t *bytes, flatmtl_error *error);

/* ------------------------------------------------------------------------------------------------------------------
 * Kernels: one pass over memory each
 */

/* sq_norms[i] = SUM_p (t_p x_ip)^2, with t_p = 1 if params is NULL, else t_p = |params_p| + eta (ASAM, 2102.11600).
 *  rows      K rows; ERROR_NONFINITE names the first row whose result is Inf or NaN (sq_norms is written all the same)
 *  params    NULL, or one row that the rows may stand beside
 *  eta       >= 0; ignored if params is NULL
 *  sq_norms  [K], out */
FLATMTL_API flatmtl_status flatmtl_sq_norms(const flatmtl_context *context, const flatmtl_rows *rows,
                                            const flatmtl_rows *params, double eta, double *sq_norms,
                                            flatmtl_error *error);

/* G_ij = <x_i, x_j>, symmetric.
 *  gramian   [K * K], row-major, out. ERROR_NONFINITE names the first row with a non-finite G_ii (gramian is written
 *            all the same) */
FLATMTL_API flatmtl_status flatmtl_gramian(const flatmtl_context *context, const flatmtl_rows *rows, double *gramian,
                                           flatmtl_error *error);

/* Gramian of the 2K vectors (g_1 .. g_K, f_1 .. f_K), f_i = s_i - g_i, in one pass. f_i is formed element by element in
 * registers (rounded to F32 for rows of F32 and narrower, to F64 for F64), never by differences of inner products:
 * those cancel when ||f|| << ||g||.
 *  loss_rows, perturbed_rows  g and s: K rows each, same segment table and dtype
 *  cross     whether <g_i,f_j> are wanted, or stay 0: a third to a half of the work, for combine = SECOND and EACH
 *  gramian   [2K * 2K], row-major, out: ( <g_i,g_j>  <g_i,f_j> ; <f_i,g_j>  <f_i,f_j> ). ERROR_NONFINITE: row < K
 *            names g_row, row >= K names s_(row-K) (gramian is written all the same) */
FLATMTL_API flatmtl_status flatmtl_gramian_pair(const flatmtl_context *context, const flatmtl_rows *loss_rows,
                                                const flatmtl_rows *perturbed_rows, int cross, double *gramian,
                                                flatmtl_error *error);

/* out_p = SUM_i weights[i] x_ip, summed in double in the order of the rows, rounded once to out's dtype.
 *  weights   [K], finite
 *  out       a vector that the rows may stand beside; may not overlap them */
FLATMTL_API flatmtl_status flatmtl_combine(const flatmtl_context *context, const flatmtl_rows *rows,
                                           const double *weights, const flatmtl_vector *out, flatmtl_error *error);

/* out_p = SUM_i loss_weights[i] g_ip + flat_weights[i] (s_ip - g_ip), as flatmtl_combine.
 *  out       may not overlap the rows */
FLATMTL_API flatmtl_status flatmtl_combine_pair(const flatmtl_context *context, const flatmtl_rows *loss_rows,
                                                const flatmtl_rows *perturbed_rows, const double *loss_weights,
                                                const double *flat_weights, const flatmtl_vector *out,
                                                flatmtl_error *error);

/* params_p = saved_p + scale[segment of p] * t_p^2 * gradient_p, with t_p = 1, or |saved_p| + eta if adaptive; computed
 * in double, rounded once. scale is rho / ||t gradient||, 0 where the norm is 0 (paper, Algorithm 1 step 2; ASAM).
 *  params    written to; dtype and segment table of saved
 *  saved     one row: the unperturbed values; may not overlap params
 *  gradient  one row, beside saved
 *  scale     [num_segments], finite */
FLATMTL_API flatmtl_status flatmtl_perturb(const flatmtl_context *context, const flatmtl_vector *params,
                                           const flatmtl_rows *saved, const flatmtl_rows *gradient, const double *scale,
                                           int adaptive, double eta, flatmtl_error *error);

/* to = from, bit for bit: saving and restoring. from is one row. */
FLATMTL_API flatmtl_status flatmtl_copy(const flatmtl_context *context, const flatmtl_vector *to,
                                        const flatmtl_rows *from, flatmtl_error *error);

/* ------------------------------------------------------------------------------------------------------------------
 * Aggregators: weights from the Gramian
 *
 * The update of an aggregator is SUM_i w_i g_i with w = w(G), G_ij = <g_i, g_j>, d_i = sqrt(G_ii). Solves are exact: by
 * active sets or Newton's method in double precision, with an optimality residual of at most 1e-10 relative to
 * (|G| |w|)_i, component by component, for G positive semidefinite up to rounding. "degree p": w(c^2 G) = c^(p-1) w(G).
 */

typedef enum flatmtl_method {
  FLATMTL_SUM = 0,      /* w = 1. Degree 1. */
  FLATMTL_MEAN = 1,     /* w = 1/K. Degree 1. */
  FLATMTL_FIXED = 2,    /* w = options[0 .. K-1], finite. Degree 1. */
  FLATMTL_MGDA = 3,     /* argmin w'Gw over the simplex (Desideri 2012, Sener and Koltun 1810.04650). Degree 1. */
  FLATMTL_PCGRAD = 4,   /* sum over tasks (2001.06782). options: seed, draw; both integers >= 0 below 2^53. Degree 1. */
  FLATMTL_CAGRAD = 5,   /* 2110.14048, divided by 1 + c^2. options: c in [0, 1), 0.4. Degree 1. */
  FLATMTL_IMTL_G = 6,   /* w = G^+ d / (1'G^+ d) (IMTL, ICLR 2021). Degree 1. */
  FLATMTL_NASH_MTL = 7, /* the root of G w = 1/w, w > 0 (2202.01017). Degree 0. */
  FLATMTL_FAIRGRAD = 8, /* the root of G w = w^(-1/alpha), w > 0 (2402.15638). options: alpha > 0, 2. Degree
                           (1-alpha)/(1+alpha). */
  FLATMTL_GRADVAC = 9,  /* 2010.05874, whole model, summed over tasks. Rows g_i' are turned towards the g_j, in random
                           order, up to the target cosine t_ij; t_ij += beta (observed cosine - t_ij). options: beta in
                           [0, 1], 0.01; seed; draw, as in pcgrad. state: one matrix K x K, t. Degree 1. */
  FLATMTL_ALIGNED_MTL = 10, /* w = s^(1/2) G^(+1/2) 1 (CVPR 2023). s is an eigenvalue of G: options: scale 0 the least,
                               1 the (lower) median, 2 the mean, 0; tolerance in [0, 1): eigenvalues up to tolerance K
                               times the largest count as 0 everywhere, 2^-23. Degree 1. */
  FLATMTL_UPGRAD = 11,      /* w = SUM_i argmin v'Gv, v >= p_i e_i (2406.16232). options: the preference p, K numbers
                               >= 0, 1/K. Degree 1. */
  FLATMTL_DUALPROJ = 12,    /* w = argmin v'Gv, v >= p (GEM, 1706.08840). options: as upgrad. Degree 1. */
  FLATMTL_CONFIG = 13,      /* w_i = l v_i / d_i, v = C^+ 1, C = D^-1 G D^-1, l = d'Cv / 1'v (2408.11104). Degree 1. */
  FLATMTL_NTKMTL = 14, /* w_i = (S / G_ii)^p, S the mean of G_ii over the rows that are not zero (NTKMTL, NeurIPS 2025,
                          with one batch, n = 1). options: p in [0, 1], 0.5. Degree 1. */
  FLATMTL_NUM_METHODS = 15
} flatmtl_method;

/* "sum", "mean", "fixed", "mgda", "pcgrad", "cagrad", "imtl_g", "nash_mtl", "fairgrad", "gradvac", "aligned_mtl",
 * "upgrad", "dualproj", "config", "ntkmtl". */
FLATMTL_API flatmtl_status flatmtl_method_by_name(const char *name, flatmtl_method *method, flatmtl_error *error);

/* The name of a method, or NULL if there is none with that number. */
FLATMTL_API const char *flatmtl_method_name(flatmtl_method method);

/* The defaults of a method's options.
 *  options      [*num_options], out; NULL to ask for the number alone
 *  num_options  in: room in options; out: how many there are */
FLATMTL_API flatmtl_status flatmtl_method_defaults(flatmtl_method method, int32_t num_tasks, double *options,
                                                   int32_t *num_options, flatmtl_error *error);

/* Doubles of state that one call of A keeps from step to step: 0 for most methods, K * K for gradvac. State belongs to
 * the caller, who hands it to every call and may save it. It is an array of K x K matrices, row-major, one row and one
 * column a task, so that the rows and columns of the tasks present can be taken out and put back. All zeros is the
 * start. */
FLATMTL_API flatmtl_status flatmtl_state_size(flatmtl_method method, int32_t num_tasks, int64_t *count,
                                              flatmtl_error *error);

/* w = w(G).
 *  options   [num_options] as listed at flatmtl_method; num_options == 0 takes the defaults
 *  gramian   [K * K], row-major; the lower triangle is read. ERROR_NONFINITE names the row
 *  state     [flatmtl_state_size], in and out, each in [-1, 1]; NULL where that is 0. ERROR_OPTION names the row of a
 *            number out of range. Left alone on an error. May not overlap gramian
 *  weights   [K], out; may not overlap gramian or state
 * Returns PARETO_STATIONARY with all weights 0 where no finite solution exists. A zero row (G_ii = 0) gets weight 0 in
 * imtl_g, nash_mtl, fairgrad, config and ntkmtl, which have no finite weight for it, and in aligned_mtl; in mgda the
 * zero rows share weight 1 (the minimum-norm point is 0); pcgrad and gradvac give it 1, upgrad and dualproj its
 * preference, and gradvac leaves its targets alone. cagrad leaves its correction out where the minimum of w'Gw is 0. A
 * row 2^-500 times shorter than the longest counts as zero. fixed without options is 1 for every task. cagrad may
 * return ERROR_INTERNAL where the rows' lengths differ by a factor of 1e32 or more. */
FLATMTL_API flatmtl_status flatmtl_weights(const flatmtl_context *context, flatmtl_method method, const double *options,
                                           int32_t num_options, int32_t num_tasks, const double *gramian, double *state,
                                           double *weights, flatmtl_error *error);

/* ------------------------------------------------------------------------------------------------------------------
 * The step's weights: both families
 */

typedef enum flatmtl_combination {                         /* paper section 4.3; A is the aggregator */
                                   FLATMTL_DECOMPOSED = 0, /* A(g) + A(f): the paper's method */
                                   FLATMTL_DIRECT = 1,     /* A(s) */
                                   FLATMTL_SECOND = 2,     /* A(A(g), A(f)) */
                                   FLATMTL_EACH = 3        /* A(r_1 .. r_K), r_i = A(g_i, f_i) */
} flatmtl_combination;

typedef enum flatmtl_family_scale {
  FLATMTL_SCALE_NONE = 0, /* the raw method */
  FLATMTL_SCALE_RMS = 1   /* each call of A on G / s^2, s^2 = trace(G) / K: every method becomes of degree 1 */
} flatmtl_family_scale;

typedef enum flatmtl_norm {
  FLATMTL_NORM_SEPARATE = 0, /* shared and own parameters each on their own sphere: the paper */
  FLATMTL_NORM_JOINT = 1     /* one norm a task over both: the authors' Multi-MNIST code */
} flatmtl_norm;

typedef struct flatmtl_settings {
  flatmtl_method method;
  const double *options; /* [num_options], or NULL for the defaults; must outlive its use */
  int32_t num_options;
  flatmtl_combination combine;
  flatmtl_family_scale family_scale;
  flatmtl_norm norm;
  double rho_shared; /* radius >= 0 */
  double rho_task;   /* radius >= 0 */
  int adaptive;      /* ASAM */
  double eta;        /* >= 0 */
  double *state;     /* [flatmtl_step_state_size], the caller's, in and out; NULL where that is 0 */
} flatmtl_settings;

/* Doubles of state of a step: the blocks of flatmtl_state_size of its calls of A, in the order of the calls.
 * decomposed: loss family, flat family (K tasks each); direct: one block of K; second: loss, flat, then the call that
 * joins the two (2 tasks); each: K blocks of 2 tasks, then one of K. Only method and combine of settings are used. */
FLATMTL_API flatmtl_status flatmtl_step_state_size(const flatmtl_settings *settings, int32_t num_tasks, int64_t *count,
                                                   flatmtl_error *error);

/* cagrad, decomposed, rms, separate, rho 0.05 and 0.05, not adaptive, eta 0, no state: the Python optimizer's
 * defaults. */
FLATMTL_API flatmtl_status flatmtl_settings_default(flatmtl_settings *settings, flatmtl_error *error);

/* Coefficients of the update SUM loss_weights[i] g_i + flat_weights[i] f_i.
 *  gramian_pair  [2K * 2K] as flatmtl_gramian_pair gives it; with cross, or its result is meaningless, for
 *                 FLATMTL_SECOND and FLATMTL_EACH
 *  perturbed_gramian  [K * K], the Gramian of s; needed for FLATMTL_DIRECT, otherwise ignored and may be NULL
 *  loss_weights, flat_weights  [K] each, out
 *  family_status  [2], out, or NULL: FLATMTL_OK or FLATMTL_PARETO_STATIONARY of the loss and of the flat family. direct
 *                 has one call of A and gives both the same; second and each give the loss family the worst status of
 *                 all calls and the flat family the same
 * Randomised methods draw afresh for every call of A: the calls within a step are numbered. settings->state is left
 * alone on an error, and may overlap no other array. The calls that join two rows take the defaults of methods with an
 * option a task. Only method, options, combine, family_scale and state of settings are used. */
FLATMTL_API flatmtl_status flatmtl_step_weights(const flatmtl_context *context, const flatmtl_settings *settings,
                                                int32_t num_tasks, const double *gramian_pair,
                                                const double *perturbed_gramian, double *loss_weights,
                                                double *flat_weights, flatmtl_status *family_status,
                                                flatmtl_error *error);

/* ------------------------------------------------------------------------------------------------------------------
 * Buffer methods
 *
 * Aggregators that are no function of the Gramian: they look at single elements, or remember a vector a task. Their
 * rows are
 *
 *   x_i = a_i g_i + b_i (s_i - g_i)
 *
 * in double, so that neither a flat gradient f_i = s_i - g_i nor a scaled row has to be written to memory. The update
 * is SUM_i w_i y_i with the buffers y_i (moco, db_mtl), SUM_i w_i x_i (excess_mtl, sdmgrad), or element-wise
 * (graddrop). A step of one of them is flatmtl_buffer_update; or piece by piece, where a vector lies on several
 * devices:
 *
 *   flatmtl_buffer_factors -> one of the passes over memory -> flatmtl_buffer_weights -> the sum
 *
 * The loss family and the flat family have buffers and state of their own. Buffers are of F32 for rows of F32 and
 * narrower, of F64 for F64; all zero is fresh. State is laid out as that of the weightings. exp and pow are the C
 * library's.
 */

/* x_i. perturbed_rows NULL: x_i = a_i g_i. loss_factors NULL: a_i = 1, or 0 where there are perturbed_rows;
 * flat_factors NULL: b_i = 1. So {g, s, NULL, NULL} are the flat gradients. */
typedef struct flatmtl_mixed_rows {
  const flatmtl_rows *loss_rows;      /* g */
  const flatmtl_rows *perturbed_rows; /* s, or NULL */
  const double *loss_factors;         /* [K] a, or NULL */
  const double *flat_factors;         /* [K] b, or NULL */
} flatmtl_mixed_rows;

/* One vector a row, with one segment table, read and written. */
typedef struct flatmtl_buffers {
  flatmtl_dtype dtype;
  int32_t num_rows;
  int64_t num_segments;
  const int64_t *lengths; /* [num_segments] */
  void *const *data;      /* [num_rows * num_segments], row-major */
} flatmtl_buffers;

typedef enum flatmtl_buffer_method {
  /* 2010.06808: in each element one sign is kept, of all rows alike, positive with probability (1 + SUM x_i / SUM
   * |x_i|) / 2; summed. options: seed, draw; leak_1 .. leak_K in [0, 1], 0. No buffers, no state. */
  FLATMTL_BUFFER_GRADDROP = 0,
  /* 2210.12624: y_i += beta_t (l_i x_i / ||x_i|| - y_i), lambda = softmax(lambda - gamma_t (Y Y' + rho I) lambda), w =
   * lambda; beta_t = beta t^-beta_decay, t the count of the task's steps. losses >= 0. options: beta in (0, 1], 0.5;
   * beta_decay >= 0, 0.5; gamma >= 0, 0.1; gamma_decay >= 0, 0.5; rho >= 0, 0; normalize, 1, or 0: x_i itself. Buffers.
   * state: count, lambda. */
  FLATMTL_BUFFER_MOCO = 1,
  /* 2308.12029: y_i = x_i / l_i + beta_t (y_i - x_i / l_i), w_i = max_j ||y_j|| / ||y_i||; beta_t = beta t^-decay.
   * losses > 0. options: beta in [0, 1), 0.9; decay >= 0, 0. Buffers. state: count. */
  FLATMTL_BUFFER_DB_MTL = 2,
  /* 2402.02009: r_ip = sqrt(SUM over steps of x_ip^2) (the buffers), e_i = SUM_p x_ip^2 / r_ip, divided by its first
   * value; w = K softmax(SUM over steps of eta e). options: eta >= 0, 0.01. Buffers. state: count, first e, log w. */
  FLATMTL_BUFFER_EXCESS_MTL = 3,
  /* 2305.18409: x, y, z of three batches, A_ij = <y_i, z_j> / mean |<y_k, z_k>|; `iterations` times v = momentum v +
   * A (u + lambda / K), u = u - lr v projected on the simplex, v = 0 at first and u that of the last step; w =
   * (u + lambda / K) / (1 + lambda), of the x_i. options: lambda >= 0, 0.3; lr > 0, 10; momentum in [0, 1), 0.5;
   * iterations >= 1, 20. No buffers. state: count, u. */
  FLATMTL_BUFFER_SDMGRAD = 4,
  FLATMTL_NUM_BUFFER_METHODS = 5
} flatmtl_buffer_method;

/* "graddrop", "moco", "db_mtl", "excess_mtl", "sdmgrad". */
FLATMTL_API flatmtl_status flatmtl_buffer_method_by_name(const char *name, flatmtl_buffer_method *method,
                                                         flatmtl_error *error);

/* The name of a buffer method, or NULL if there is none with that number. */
FLATMTL_API const char *flatmtl_buffer_method_name(flatmtl_buffer_method method);

/* The defaults of a buffer method's options, as flatmtl_method_defaults. */
FLATMTL_API flatmtl_status flatmtl_buffer_method_defaults(flatmtl_buffer_method method, int32_t num_tasks,
                                                          double *options, int32_t *num_options, flatmtl_error *error);

/* Doubles of state, v K, and whether the method has buffers (1 or 0).
 *  count, has_buffers  out; NULL where not wanted */
FLATMTL_API flatmtl_status flatmtl_buffer_state_size(flatmtl_buffer_method method, int32_t num_tasks, int64_t *count,
                                                     int32_t *has_buffers, flatmtl_error *error);

/* Before the pass: the factor of each row, which the caller multiplies a and b by, and what moco and db_mtl keep of
 * their buffers (1 for the others).
 *  losses    [K], finite; needed for moco and db_mtl, otherwise ignored. ERROR_LOSS names the task
 *  sq_norms  [K] ||x_i||^2, finite; needed for moco, otherwise ignored
 *  state     [flatmtl_buffer_state_size], read; may be NULL where it is not needed
 *  factors, keep  [K] each, out */
FLATMTL_API flatmtl_status flatmtl_buffer_factors(flatmtl_buffer_method method, const double *options,
                                                  int32_t num_options, int32_t num_tasks, const double *losses,
                                                  const double *sq_norms, const double *state, double *factors,
                                                  double *keep, flatmtl_error *error);

/* After the pass: w.
 *  sums     moco: [K * K] the Gramian of the buffers. db_mtl: [K] their squared norms. excess_mtl: [K] from
 *           flatmtl_excess. sdmgrad: [K * K] from flatmtl_cross_gramian. Finite; ERROR_NONFINITE names the row
 *  state    in and out; written on success alone
 *  weights  [K], out. ERROR_NAME for graddrop, which has none */
FLATMTL_API flatmtl_status flatmtl_buffer_weights(const flatmtl_context *context, flatmtl_buffer_method method,
                                                  const double *options, int32_t num_options, int32_t num_tasks,
                                                  const double *sums, double *state, double *weights,
                                                  flatmtl_error *error);

/* y_i = x_i + keep_i (y_i - x_i), in double, rounded once to the buffers' dtype.
 *  keep     [K], finite
 *  buffers  as many rows as x has, with its table; overlapping nothing */
FLATMTL_API flatmtl_status flatmtl_moving_average(const flatmtl_context *context, const flatmtl_mixed_rows *rows,
                                                  const double *keep, const flatmtl_buffers *buffers,
                                                  flatmtl_error *error);

/* r_ip = sqrt(r_ip^2 + x_ip^2) and excess[i] = SUM_p x_ip^2 / r_ip (0 / 0 = 0). Squares must neither over- nor
 * underflow in double.
 *  buffers  r, as above
 *  excess   [K], out */
FLATMTL_API flatmtl_status flatmtl_excess(const flatmtl_context *context, const flatmtl_mixed_rows *rows,
                                          const flatmtl_buffers *buffers, double *excess, flatmtl_error *error);

/* gramian[i * K + j] = <x_i, y_j>, not symmetric.
 *  rows, others  x and y, with one segment table
 *  gramian       [K * K], out; Inf and NaN in the rows show in it */
FLATMTL_API flatmtl_status flatmtl_cross_gramian(const flatmtl_context *context, const flatmtl_mixed_rows *rows,
                                                 const flatmtl_mixed_rows *others, double *gramian,
                                                 flatmtl_error *error);

/* The update of graddrop: out_p = SUM_i (x_ip if it has the sign that is kept in p, else leak_i x_ip).
 *  leak      [K], or NULL for zeros
 *  seed, draw, call  >= 0: which random numbers; call tells the calls within a step apart (0 the loss family, 1 the
 *            flat family)
 *  position  >= 0: the place of the first element in the whole vector, where the rows are a part of one
 *  out       a vector that the rows may stand beside; may not overlap them */
FLATMTL_API flatmtl_status flatmtl_graddrop(const flatmtl_context *context, const flatmtl_mixed_rows *rows,
                                            const double *leak, int64_t seed, int64_t draw, int64_t call,
                                            int64_t position, const flatmtl_vector *out, flatmtl_error *error);

/* out_p = SUM_i weights[i] y_ip, as flatmtl_combine; out may be narrower than the buffers (BF16, F16).
 *  out  the buffers' segment table */
FLATMTL_API flatmtl_status flatmtl_combine_buffers(const flatmtl_context *context, const flatmtl_buffers *buffers,
                                                   const double *weights, const flatmtl_vector *out,
                                                   flatmtl_error *error);

/* One step of graddrop, moco, db_mtl or excess_mtl, of up to 64 tasks; ERROR_NAME for sdmgrad (three batches).
 *  rows     x. ERROR_NONFINITE names a row that is not finite, or too long for the buffers; nothing has changed then
 *  losses   [K]; needed for moco and db_mtl, otherwise ignored
 *  call     of graddrop's random numbers
 *  buffers  in and out, finite; NULL for graddrop
 *  state    in and out, NULL where its size is 0
 *  weights  [K], out, or NULL; NAN for graddrop
 *  out      the update: a vector that the rows may stand beside; may overlap nothing */
FLATMTL_API flatmtl_status flatmtl_buffer_update(const flatmtl_context *context, flatmtl_buffer_method method,
                                                 const double *options, int32_t num_options,
                                                 const flatmtl_mixed_rows *rows, const double *losses, int64_t call,
                                                 const flatmtl_buffers *buffers, double *state, double *weights,
                                                 const flatmtl_vector *out, flatmtl_error *error);

/* ------------------------------------------------------------------------------------------------------------------
 * Loss weightings
 *
 * Weights c_i of the losses l_i: a step with a weighting is the step of the losses c_i l_i with c held constant. That
 * is, the rows c_i g_i go to the aggregator (scale the Gramian by c c' and its weights by c), and the updates of the
 * heads are scaled by c_i.
 *
 * State is v vectors of K doubles, one after another; all zero is fresh. Every entry belongs to one task, so that a
 * host whose tasks come and go gathers the entries of those present, calls, and scatters them back: the state of an
 * absent task stays as it is. Learned parameters take one step of Adam (beta 0.9 and 0.999, no epsilon) a call. exp,
 * log and pow are the C library's: another C library may differ in the last bit; instruction sets do not.
 *
 * p: the losses must be > 0 (ERROR_LOSS names the first that is not). "an epoch" is a number of steps of the task.
 */

typedef enum flatmtl_weighting {
  FLATMTL_WEIGHTING_FIXED = 0, /* c = options[0 .. K-1], finite and >= 0, 1. No state. */
  FLATMTL_WEIGHTING_UW = 1,    /* 1705.07115: minimise SUM exp(-s_i) l_i / 2 + s_i / 2 over s too; c = exp(-s) / 2.
                                  options: lr > 0, 0.025; initial s, -0.5. state: count, s, Adam's moment, root of Adam's
                                  second moment. */
  FLATMTL_WEIGHTING_DWA = 2,   /* 1803.10704: c = K softmax(r / T), r_i the ratio of the mean losses in the last two
                                  epochs, 1 before there are two. losses >= 0. options: T > 0, 2; steps in an epoch, 25.
                                  state: count, mean, last, previous, epochs. */
  FLATMTL_WEIGHTING_RLW = 3,   /* 2111.10603: c = softmax of standard normal numbers. options: seed, draw; both integers
                                  >= 0 below 2^53. No state. */
  FLATMTL_WEIGHTING_SI = 4,    /* minimise SUM log l_i: c = 1 / l. p. No options, no state. */
  FLATMTL_WEIGHTING_GLS = 5,   /* 1904.08492: minimise (PROD l_i)^(1/K): c_i = (PROD l)^(1/K) / (K l_i). p. No options,
                                  no state. */
  FLATMTL_WEIGHTING_STCH = 6,  /* 2402.19078: c_i = K softmax(log(l_i / z_i) / mu) / l_i; 1 / l_i in the first `warmup`
                                  epochs and in the one after, whose mean loss is the nadir z_i. p. options: mu > 0, 1;
                                  steps in an epoch, 25; warmup, 4. state: count, nadir. */
  FLATMTL_WEIGHTING_IMTL_L = 7, /* IMTL, ICLR 2021: minimise SUM exp(s_i) l_i - s_i over s too; c = exp(s), s = 0 at
                                   first. p. options: lr > 0, 0.001. state: as UW's. */
  FLATMTL_WEIGHTING_FAMO = 8,   /* 2306.03792: c_i proportional to softmax(xi)_i / (l_i - m_i), SUM c = 1; xi is learned
                                   by flatmtl_loss_observe. losses > m. options: lr > 0, 0.025; gamma >= 0 (weight decay
                                   of xi), 0.01; m_1 .. m_K, lower bounds of the losses, 0. state: count, xi, Adam's
                                   moment, root of its second. */
  FLATMTL_WEIGHTING_GRADNORM =
      9, /* 1711.02257: c_i ||g_i|| is driven towards mean(c ||g||) r_i^alpha, r_i the relative
            l_i / l_i(first); SUM c = K, c >= 1e-6 of their mean. p. norms. options: alpha >= 0,
            1.5; lr > 0, 0.025. state: count, first loss, c, Adam's moment, root of its second. */
  FLATMTL_WEIGHTING_GO4ALIGN = 10, /* 2404.06486: q_i <- q_i exp(-eta l_i), risks q_i SUM_j l_j / l_i (q of sum 1),
                                      clustered exactly into groups; c is the mean of the task's group. p. options: eta
                                      >= 0, 1e-4; groups, an integer >= 1, 1. state: log q. */
  FLATMTL_WEIGHTING_SLAW = 11, /* 2109.08218: c_i = K (1 / s_i) / SUM_j 1 / s_j, s_i the moving standard deviation of
                                  the loss, at least 1e-6 of its mean; 1 at a task's first step. options: beta in [0,
                                  1), 0.99. state: count, mean, deviation. */
  FLATMTL_WEIGHTING_BMTL = 12, /* 2002.04792: minimise SUM exp(l_i / T), divided by the mean weight: c = K softmax(l /
                                  T). options: T > 0, 50. No state. The paper's abstract was read alone; exp and T = 50
                                  are taken from memory. */
  FLATMTL_WEIGHTING_EMTL = 13, /* 2306.09373, reconstructed from its abstract: contributions l_i / ||g_i||, divided by
                                  their mean: r_i; c = argmin ||w - 1||^2 + lambda Var(w r) subject to SUM w = K. p.
                                  norms. options: lambda >= 0, 1. No state. */
  FLATMTL_NUM_WEIGHTINGS = 14
} flatmtl_weighting;

/* "fixed", "uw", "dwa", "rlw", "si", "gls", "stch", "imtl_l", "famo", "gradnorm", "go4align", "slaw", "bmtl", "emtl".
 */
FLATMTL_API flatmtl_status flatmtl_weighting_by_name(const char *name, flatmtl_weighting *weighting,
                                                     flatmtl_error *error);

/* The name of a weighting, or NULL if there is none with that number. */
FLATMTL_API const char *flatmtl_weighting_name(flatmtl_weighting weighting);

/* The defaults of a weighting's options, as flatmtl_method_defaults. */
FLATMTL_API flatmtl_status flatmtl_weighting_defaults(flatmtl_weighting weighting, int32_t num_tasks, double *options,
                                                      int32_t *num_options, flatmtl_error *error);

/* Doubles of state, v K.
 *  count  out */
FLATMTL_API flatmtl_status flatmtl_weighting_state_size(flatmtl_weighting weighting, int32_t num_tasks, int64_t *count,
                                                        flatmtl_error *error);

/* c from the losses of this step, and the state of the next.
 *  options   [num_options] as listed at flatmtl_weighting; num_options == 0 takes the defaults
 *  losses    [K], finite
 *  norms     [K] ||g_i||, the norms of the gradients, finite and >= 0, where the method needs them (`norms` above);
 *            otherwise ignored and may be NULL. GradNorm's paper takes the last shared layer, a caller may take all
 *            shared parameters
 *  state     [flatmtl_weighting_state_size], in and out; NULL if that is 0
 *  weights   [K], out, each in [0, DBL_MAX]
 * state and weights are written on success alone; they may overlap nothing. */
FLATMTL_API flatmtl_status flatmtl_loss_weights(const flatmtl_context *context, flatmtl_weighting weighting,
                                                const double *options, int32_t num_options, int32_t num_tasks,
                                                const double *losses, const double *norms, double *state,
                                                double *weights, flatmtl_error *error);

/* Whether a weighting learns from the losses after the update: 1 (FAMO) or 0. */
FLATMTL_API int flatmtl_weighting_observes(flatmtl_weighting weighting);

/* FAMO's step on xi, along J_softmax' (log(l - m) - log(l_after - m)) + gamma xi; nothing for the others.
 *  losses        [K], those that flatmtl_loss_weights had
 *  losses_after  [K], of the same batch after the update. One that is not finite leaves its task out; one that is not
 *                above m_i counts as 2^-52 of the distance before
 *  state         in and out, as above */
FLATMTL_API flatmtl_status flatmtl_loss_observe(const flatmtl_context *context, flatmtl_weighting weighting,
                                                const double *options, int32_t num_options, int32_t num_tasks,
                                                const double *losses, const double *losses_after, double *state,
                                                flatmtl_error *error);

/* ------------------------------------------------------------------------------------------------------------------
 * The step as a state machine
 *
 *   init -> begin -> (perturb i -> restore) for every task i -> finish -> update
 *
 * begin also starts the next step. If both radii are 0: begin -> finish -> update, and `perturbed` is not read; the one
 * call of A uses the loss family's block of settings->state (each: the last one), the others are left alone.
 */

/* The caller's buffers, K = num_tasks. Arrays and structs must outlive the step; the pointers in them may change
 * between steps, the shapes may not. Tasks without parameters of their own have num_segments 0. The gradients g, s, h,
 * t stand beside their parameters. */
typedef struct flatmtl_problem {
  int32_t num_tasks;
  flatmtl_vector shared;             /* theta */
  flatmtl_vector shared_saved;       /* room for a copy of theta */
  flatmtl_rows shared_loss;          /* g: K rows, filled before begin */
  flatmtl_rows shared_perturbed;     /* s: K rows, row i filled after perturb i */
  const flatmtl_vector *own;         /* [K] psi_i */
  const flatmtl_vector *own_saved;   /* [K] room for copies */
  const flatmtl_rows *own_loss;      /* [K] h_i, one row each */
  const flatmtl_rows *own_perturbed; /* [K] t_i, one row each: the update of psi_i */
} flatmtl_problem;

typedef struct flatmtl_step flatmtl_step; /* lives in the caller's memory */

/* What a step did; [K] or [K * K] arrays inside the step's memory, valid until the next begin. NAN where undefined. */
typedef struct flatmtl_record {
  int32_t num_tasks;
  const double *norms_loss;   /* [K] ||g_i|| */
  const double *norms_flat;   /* [K] ||f_i|| */
  const double *cosine_loss;  /* [K * K] */
  const double *cosine_flat;  /* [K * K] */
  const double *weights_loss; /* [K] */
  const double *weights_flat; /* [K] */
  flatmtl_status status_loss; /* OK or PARETO_STATIONARY */
  flatmtl_status status_flat;
} flatmtl_record;

/* Bytes for a step of num_tasks tasks, its workspace not included. */
FLATMTL_API flatmtl_status flatmtl_step_size(int32_t num_tasks, size_t *bytes, flatmtl_error *error);

/* Lays a step into memory (aligned to 64 bytes, at least flatmtl_step_size bytes). Keeps problem and settings by
 * pointer and checks both: shapes, dtypes, overlap, ranges. */
FLATMTL_API flatmtl_status flatmtl_step_init(void *memory, size_t bytes, const flatmtl_problem *problem,
                                             const flatmtl_settings *settings, flatmtl_step **step,
                                             flatmtl_error *error);

/* Reads g and h, saves the parameters. ERROR_NONFINITE names the task whose gradient is not finite; nothing changed. */
FLATMTL_API flatmtl_status flatmtl_step_begin(flatmtl_step *step, const flatmtl_context *context, flatmtl_error *error);

/* Moves theta and psi_task to the perturbed point of that task; the other heads stand at their saved values. */
FLATMTL_API flatmtl_status flatmtl_step_perturb(flatmtl_step *step, const flatmtl_context *context, int32_t task,
                                                flatmtl_error *error);

/* Puts every parameter back, bit for bit. May be called at any time after begin, also to give a step up. */
FLATMTL_API flatmtl_status flatmtl_step_restore(flatmtl_step *step, const flatmtl_context *context,
                                                flatmtl_error *error);

/* Reads g, s and t: Gramians and weights. Parameters must be restored and every task perturbed once. Returns
 * PARETO_STATIONARY if a family is. ERROR_NONFINITE names the task; the step can then only begin again. */
FLATMTL_API flatmtl_status flatmtl_step_finish(flatmtl_step *step, const flatmtl_context *context,
                                               flatmtl_error *error);

/* Writes the combined update of theta to out (a vector that the rows may stand beside; may be shared_saved, not the
 * rows). The update of psi_i is own_perturbed[i] (own_loss[i] if both radii are 0). */
FLATMTL_API flatmtl_status flatmtl_step_update(flatmtl_step *step, const flatmtl_context *context,
                                               const flatmtl_vector *out, flatmtl_error *error);

/* The record of the last finish. */
FLATMTL_API flatmtl_status flatmtl_step_record(const flatmtl_step *step, flatmtl_record *record, flatmtl_error *error);

#ifdef __cplusplus
}
#endif

#endif /* FLATMTL_H */
