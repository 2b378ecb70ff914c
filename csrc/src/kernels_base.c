/* What every CPU of the architecture has: SSE2 on x86-64. */
#define FM_TABLE fm_kernels_base
#define FM_ISA "base"
#define FM_WIDTH 2
#define FM_TILE_ROWS 2
#define FM_FMA(a, b, c) ((a) * (b) + (c))
#define FM_WIDEN(v) __builtin_convertvector(v, fm_vd)
#define FM_NARROW(v) __builtin_convertvector(v, fm_vf)
#include "kernels_body.h"
