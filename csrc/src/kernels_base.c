/* Any CPU: the compiler's baseline. */
#define FM_TABLE fm_kernels_base
#define FM_ISA "base"
#define FM_WIDTH 2
#define FM_TILE_ROWS 2
#define FM_FMA FM_MUL_ADD
#define FM_WIDEN(v) __builtin_convertvector(v, fm_vd)
#define FM_NARROW(v) __builtin_convertvector(v, fm_vf_any)
#include "kernels_body.h"
