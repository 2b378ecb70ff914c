/* Any CPU: the compiler's baseline. */
#define FM_TABLE fm_kernels_base
#define FM_ISA "base"
#define FM_WIDTH 2
#define FM_WIDTH_F32 4
#define FM_TILE_ROWS 2
#define FM_TILE_ROWS_F32 1
#define FM_REGISTERS 4, 2, 1, 1, 1, 1, 1, 1
#define FM_REGISTERS_F32 1, 1, 1, 1, 1, 1, 1, 1
#define FM_FMA FM_MUL_ADD
#define FM_FMA_F32 fma_f32 /* in kernels_fma.h */
#define FM_EMULATE_FMA
#define FM_WIDEN(v) __builtin_convertvector(v, fm_vd)
#define FM_NARROW(v) __builtin_convertvector(v, fm_vh_any)
#include "kernels_body.h"
