/* kernels_pairs.h - inner products of rows, part of kernels_body.h: in double precision, and in F32 with fused
 * multiply-adds.
 *
 * A tile is NX rows of x with 4 rows of y, or the lower triangle of NX rows of x with themselves. It sweeps over the
 * elements FM_LANES / (V W) times, with V registers of W lanes for every pair: what the registers hold decides V and
 * NX, and neither is seen in the result. On its way it asks memory for up to 4 rows of what comes next.
 */

#define FM_UNROLL _Pragma("GCC unroll 8")
#define FM_TWICE _Pragma("GCC unroll 2")

#define fm_load_double load_f64
#define fm_load_float load_fast

/* Arguments of a tile, and its sweeps. In a triangle (TRI, a constant), lanes above the diagonal are stored as zeros.
 */
#define FM_TILE_ARGUMENTS(TYPE, SUM)                                                              \
  const TYPE *const *x, const TYPE *const *y, int64_t n, int first, SUM *lanes, ptrdiff_t stride, \
      const char *const *ahead, int64_t size

#define FM_LANES_OF(i, j) (lanes + (i)*stride + (j)*FM_LANES + lane)

#define FM_DEFINE_TILE(NAME, TYPE, SUM, VEC, ANY, W, LOAD, MULADD, NX, V, TRI)                             \
  static void NAME(FM_TILE_ARGUMENTS(TYPE, SUM)) {                                                         \
    for (int lane = 0; lane < FM_LANES; lane += V * W) {                                                   \
      enum { ASKED = 4 * V * W > FM_LANES ? 4 * V * W / FM_LANES : 1 };                                    \
      const char *next[ASKED];                                                                             \
      FM_UNROLL for (int m = 0; m < ASKED; m++) next[m] = ahead[(lane / (V * W) * ASKED + m) % 4];         \
      VEC acc[NX][4][V];                                                                                   \
      FM_UNROLL for (int i = 0; i < NX; i++) FM_UNROLL for (int j = 0; j < 4; j++)                         \
          FM_UNROLL for (int v = 0; v < V; v++) acc[i][j][v] =                                             \
              first || (TRI && j > i) ? (VEC){0} : fm_load_##SUM(FM_LANES_OF(i, j) + v * W);               \
      FM_TWICE for (int64_t p = lane; p < n; p += FM_LANES) {                                              \
        FM_UNROLL for (int m = 0; m < ASKED; m++) __builtin_prefetch(next[m] + p * size);                  \
        FM_UNROLL for (int v = 0; v < V; v++) {                                                            \
          VEC a[NX];                                                                                       \
          FM_UNROLL for (int i = 0; i < NX; i++) a[i] = LOAD(x[i] + p + v * W);                            \
          FM_UNROLL for (int j = 0; j < (TRI ? NX : 4); j++) {                                             \
            const VEC b = TRI ? a[TRI ? j : 0] : LOAD(y[j] + p + v * W);                                   \
            FM_UNROLL for (int i = TRI ? j : 0; i < NX; i++) acc[i][j][v] = MULADD(a[i], b, acc[i][j][v]); \
          }                                                                                                \
        }                                                                                                  \
      }                                                                                                    \
      FM_UNROLL for (int i = 0; i < NX; i++) FM_UNROLL for (int j = 0; j < 4; j++)                         \
              FM_UNROLL for (int v = 0; v < V; v++) *                                                      \
          (ANY *)(FM_LANES_OF(i, j) + v * W) = acc[i][j][v];                                               \
    }                                                                                                      \
    (void)y;                                                                                               \
  }

typedef double fm_v4d __attribute__((vector_size(32)));
typedef double fm_v4d_any __attribute__((vector_size(32), aligned(8), may_alias));
typedef float fm_v4f_any __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define FM_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int64_t fm_v4i __attribute__((vector_size(32)));
#define FM_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (fm_v4i){i, j, k, l})
#endif

/* out[0 .. 3] += the sums of 4 pairs' lanes: l and l + 8, then l and l + 4, in F32; the rest in F64. */
FM_INLINE void close_f32(const float *lanes, double *out) {
  fm_v4d v[4];
  FM_UNROLL for (int j = 0; j < 4; j++) {
    const fm_v4f_any *q = (const fm_v4f_any *)(lanes + j * FM_LANES);
    v[j] = __builtin_convertvector((q[0] + q[2]) + (q[1] + q[3]), fm_v4d);
  }
  const fm_v4d low = FM_SHUFFLE(v[0], v[1], 0, 4, 2, 6) + FM_SHUFFLE(v[0], v[1], 1, 5, 3, 7);
  const fm_v4d high = FM_SHUFFLE(v[2], v[3], 0, 4, 2, 6) + FM_SHUFFLE(v[2], v[3], 1, 5, 3, 7);
  *(fm_v4d_any *)out += FM_SHUFFLE(low, high, 0, 1, 4, 5) + FM_SHUFFLE(low, high, 2, 3, 6, 7);
}

FM_INLINE void close_f64(const double *lanes, double *out, int count) {
  for (int j = 0; j < count; j++) {
    double v[FM_LANES / 2];
    for (int l = 0; l < 8; l++) v[l] = lanes[j * FM_LANES + l] + lanes[j * FM_LANES + 8 + l];
    for (int l = 0; l < 4; l++) v[l] = v[l] + v[l + 4];
    out[j] += (v[0] + v[2]) + (v[1] + v[3]);
  }
}

/* All pairs. Columns 4 at a time; below a column's triangle, strips of nearly equal numbers of rows. */
FM_INLINE int32_t strips(int32_t rows, int32_t longest) {
  return (rows + longest - 1) / longest;
}

#define FM_DEFINE_GRAM(...) FM_DEFINE_GRAM_OF(__VA_ARGS__)
#define FM_DEFINE_GRAM_OF(T, TYPE, SUM, VEC, ANY, W, LOAD, MULADD, ROWS, V1, V2, V3, V4, T1, T2, T3, T4)             \
  FM_DEFINE_TILE(triangle1_##T, TYPE, SUM, VEC, ANY, W, LOAD, MULADD, 1, V1, 1)                                      \
  FM_DEFINE_TILE(triangle2_##T, TYPE, SUM, VEC, ANY, W, LOAD, MULADD, 2, V2, 1)                                      \
  FM_DEFINE_TILE(triangle3_##T, TYPE, SUM, VEC, ANY, W, LOAD, MULADD, 3, V3, 1)                                      \
  FM_DEFINE_TILE(triangle4_##T, TYPE, SUM, VEC, ANY, W, LOAD, MULADD, 4, V4, 1)                                      \
  FM_DEFINE_TILE(tile1_##T, TYPE, SUM, VEC, ANY, W, LOAD, MULADD, 1, T1, 0)                                          \
  FM_DEFINE_TILE(tile2_##T, TYPE, SUM, VEC, ANY, W, LOAD, MULADD, 2, T2, 0)                                          \
  FM_DEFINE_TILE(tile3_##T, TYPE, SUM, VEC, ANY, W, LOAD, MULADD, 3, T3, 0)                                          \
  FM_DEFINE_TILE(tile4_##T, TYPE, SUM, VEC, ANY, W, LOAD, MULADD, 4, T4, 0)                                          \
  static void gram_##T(const TYPE *const *x, int32_t nx, const TYPE *const *y, int32_t ny, int64_t n, int first,     \
                       int last, SUM *lanes, double *const *out, const fm_ahead *ahead) {                            \
    static void (*const tiles[2][4])(FM_TILE_ARGUMENTS(TYPE, SUM)) = {                                               \
        {tile1_##T, tile2_##T, tile3_##T, tile4_##T}, {triangle1_##T, triangle2_##T, triangle3_##T, triangle4_##T}}; \
    SUM local[4 * 4 * FM_LANES];                                                                                     \
    const int whole = first && last;                                                                                 \
    const ptrdiff_t stride = (whole ? 4 : FM_GROUP) * FM_LANES;                                                      \
    const int32_t columns = y ? ny : nx;                                                                             \
    int32_t calls = 0, asked = 0;                                                                                    \
    for (int32_t j = 0; j < columns; j += 4)                                                                         \
      calls += y ? strips(nx, ROWS) : 1 + (nx > j + 4 ? strips(nx - j - 4, ROWS) : 0);                               \
    for (int32_t j = 0; j < columns; j += 4) {                                                                       \
      for (int32_t i = y ? 0 : j, step; i < nx; i += step) {                                                         \
        SUM *at = whole ? local : lanes + i * stride + j * FM_LANES;                                                 \
        const int triangle = !y && i == j;                                                                           \
        const int32_t few = strips(nx - i, ROWS);                                                                    \
        step = triangle ? (nx - i < 4 ? nx - i : 4) : strips(nx - i, few);                                           \
        const char *next[4];                                                                                         \
        const int32_t end = asked + strips(ahead->count - asked, calls--);                                           \
        for (int m = 0; m < 4; m++)                                                                                  \
          next[(2 * m + m / 2) % 4] = asked < end ? ahead->rows[asked++] : (const char *)x[i];                       \
        tiles[triangle][step - 1](x + i, (y ? y : x) + j, n, first, at, stride, next, ahead->size);                  \
        if (last)                                                                                                    \
          for (int32_t r = 0; r < step; r++) close_##SUM(at + r * stride, out[i + r] + j);                           \
      }                                                                                                              \
    }                                                                                                                \
  }

#define close_float close_f32
#define close_double(lanes, out) close_f64(lanes, out, 4)

FM_DEFINE_GRAM(f32, float, double, fm_vd, fm_vd_any, FM_WIDTH, load_f32, FM_FMA, FM_TILE_ROWS, FM_REGISTERS)
FM_DEFINE_GRAM(f64, double, double, fm_vd, fm_vd_any, FM_WIDTH, load_f64, FM_MUL_ADD, FM_TILE_ROWS, FM_REGISTERS)
FM_DEFINE_GRAM(fast, float, float, fm_vf, fm_vf_any, FM_WIDTH_F32, load_fast, FM_FMA_F32, FM_TILE_ROWS_F32,
               FM_REGISTERS_F32)
FM_DEFINE_GRAM(bf16, uint16_t, double, fm_vd, fm_vd_any, FM_WIDTH, load_bf16, FM_FMA, FM_TILE_ROWS, FM_REGISTERS)
FM_DEFINE_GRAM(fast_bf16, uint16_t, float, fm_vf, fm_vf_any, FM_WIDTH_F32, load_fast_bf16, FM_FMA_F32, FM_TILE_ROWS_F32,
               FM_REGISTERS_F32)
