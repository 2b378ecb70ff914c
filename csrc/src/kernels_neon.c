#include <stddef.h>

#include "kernels.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#define FM_TABLE fm_kernels_neon
#define FM_ISA "neon"
#define FM_WIDTH 2
#define FM_WIDTH_F32 4
#define FM_TILE_ROWS 4
#define FM_TILE_ROWS_F32 4
#define FM_REGISTERS 8, 8, 4, 2, 4, 2, 2, 1
#define FM_REGISTERS_F32 4, 4, 4, 2, 4, 2, 2, 1
#define FM_FMA(a, b, c) ((fm_vd)vfmaq_f64((float64x2_t)(c), (float64x2_t)(a), (float64x2_t)(b)))
#define FM_FMA_F32(a, b, c) ((fm_vf)vfmaq_f32((float32x4_t)(c), (float32x4_t)(a), (float32x4_t)(b)))
#define FM_WIDEN(v) vcvt_f64_f32((float32x2_t)(v))
#define FM_NARROW(v) vcvt_f32_f64((float64x2_t)(v))
#include "kernels_body.h"
#else
const fm_kernels *const fm_kernels_neon = NULL;
#endif
