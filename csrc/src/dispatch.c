/* The choice of an instruction set, made on the first use. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "status.h"

static int always(void) { return 1; }

#if defined(__x86_64__)
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
static int has_avx512(void) {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#else
static int has_avx2(void) { return 0; }
static int has_avx512(void) { return 0; }
#endif

/* Best last. */
static const struct {
  const fm_kernels *const *kernels;
  int (*available)(void);
} tables[] = {{&fm_kernels_base, always},
              {&fm_kernels_neon, always},
              {&fm_kernels_avx2, has_avx2},
              {&fm_kernels_avx512, has_avx512}};
enum { NUM_TABLES = sizeof tables / sizeof tables[0] };

/* The table of that name, or the best if name is NULL; NULL if this build or this CPU does not have it. */
static const fm_kernels *find(const char *name) {
  for (int i = NUM_TABLES - 1; i >= 0; i--) {
    const fm_kernels *kernels = *tables[i].kernels;
    if (kernels && tables[i].available() && (!name || strcmp(name, kernels->name) == 0)) return kernels;
  }
  return NULL;
}

static _Atomic(const fm_kernels *) chosen;

const fm_kernels *fm_kernels_get(void) {
  const fm_kernels *kernels = atomic_load_explicit(&chosen, memory_order_acquire);
  if (kernels) return kernels;
  /* Threads that get here together find the same. A name that is not there is passed over: there is no one to tell. */
  const char *wanted = getenv("FLATMTL_ISA");
  kernels = wanted ? find(wanted) : NULL;
  if (!kernels) kernels = find(NULL);
  atomic_store_explicit(&chosen, kernels, memory_order_release);
  return kernels;
}

const char *flatmtl_isa(void) { return fm_kernels_get()->name; }

flatmtl_status flatmtl_select_isa(const char *name, flatmtl_error *error) {
  if (!name) return fm_fail(error, FLATMTL_ERROR_NULL, "name", -1, -1, NAN);
  const fm_kernels *kernels = find(name);
  if (!kernels) return fm_fail(error, FLATMTL_ERROR_NAME, "name", -1, -1, NAN);
  atomic_store_explicit(&chosen, kernels, memory_order_release);
  return FLATMTL_OK;
}
