#include <stddef.h>

#include "kernels.h"
#if defined(__AVX512F__) && defined(__AVX512DQ__)
#include <immintrin.h>
#define FM_TABLE fm_kernels_avx512
#define FM_ISA "avx512"
#define FM_WIDTH 8
#define FM_WIDTH_F32 16
#define FM_TILE_ROWS 4
#define FM_TILE_ROWS_F32 4
#define FM_REGISTERS 2, 2, 2, 2, 2, 2, 2, 1
#define FM_REGISTERS_F32 1, 1, 1, 1, 1, 1, 1, 1
#define FM_FMA(a, b, c) ((fm_vd)_mm512_fmadd_pd((__m512d)(a), (__m512d)(b), (__m512d)(c)))
#define FM_FMA_F32(a, b, c) ((fm_vf)_mm512_fmadd_ps((__m512)(a), (__m512)(b), (__m512)(c)))
#define FM_WIDEN(v) _mm512_cvtps_pd((__m256)(v))
#define FM_NARROW(v) _mm512_cvtpd_ps((__m512d)(v))
#define FM_LOAD_BF16(p)                \
  _mm512_cvtps_pd(_mm256_castsi256_ps( \
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)(const void *)(p))), 16)))
#define FM_LOAD_BF16_F32(p) \
  _mm512_castsi512_ps(      \
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(const void *)(p))), 16))
#define FM_ALL(mask) (_mm512_movepi64_mask((__m512i)(mask)) == 255)
#define FM_STORE_HIGH16(p, v) \
  _mm_storeu_si128((__m128i *)(void *)(p), _mm256_cvtepi32_epi16(_mm256_srli_epi32((__m256i)(v), 16)))
#include "kernels_body.h"
#else
const fm_kernels *const fm_kernels_avx512 = NULL;
#endif
