#include <stddef.h>

#include "kernels.h"
#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>
#define FM_TABLE fm_kernels_avx2
#define FM_ISA "avx2"
#define FM_WIDTH 4
#define FM_WIDTH_F32 8
#define FM_TILE_ROWS 3
#define FM_TILE_ROWS_F32 3
#define FM_REGISTERS 4, 4, 2, 1, 2, 1, 1, 1
#define FM_REGISTERS_F32 2, 2, 2, 1, 2, 1, 1, 1
#define FM_FMA(a, b, c) ((fm_vd)_mm256_fmadd_pd((__m256d)(a), (__m256d)(b), (__m256d)(c)))
#define FM_FMA_F32(a, b, c) ((fm_vf)_mm256_fmadd_ps((__m256)(a), (__m256)(b), (__m256)(c)))
#define FM_WIDEN(v) _mm256_cvtps_pd((__m128)(v))
#define FM_NARROW(v) _mm256_cvtpd_ps((__m256d)(v))
#define FM_LOAD_BF16(p) \
  _mm256_cvtps_pd(      \
      _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i *)(const void *)(p))), 16)))
#define FM_LOAD_BF16_F32(p) \
  _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p))), 16))
#define FM_ALL(mask) (_mm256_movemask_pd((__m256d)(mask)) == 15)
#define FM_STORE_HIGH16(p, v) \
  _mm_storel_epi64((__m128i *)(void *)(p), _mm_shuffle_epi8((__m128i)(v), _mm_set_epi64x(0, 0x0f0e0b0a07060302)))
#include "kernels_body.h"
#else
const fm_kernels *const fm_kernels_avx2 = NULL;
#endif
