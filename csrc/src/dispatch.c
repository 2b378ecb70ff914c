/* dispatch.c - the table of kernels for this CPU, chosen once. The only state of the library. */
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "flatmtl.h"
#include "kernels.h"
#include "status.h"

static _Atomic(const fm_kernels *) chosen;

static int cpu_has_avx2(void) {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 0;
#endif
}

static int cpu_has_avx512(void) {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
#else
  return 0;
#endif
}

/* The kernels called name, or, if it is NULL, the best that build and CPU have. */
static const fm_kernels *find(const char *name) {
  const fm_kernels *const candidates[] = {
      cpu_has_avx512() ? fm_kernels_avx512 : NULL,
      cpu_has_avx2() ? fm_kernels_avx2 : NULL,
      fm_kernels_neon,
      fm_kernels_base,
  };
  for (size_t i = 0; i < sizeof candidates / sizeof *candidates; i++)
    if (candidates[i] && (!name || strcmp(candidates[i]->name, name) == 0)) return candidates[i];
  return NULL;
}

const fm_kernels *fm_kernels_get(void) {
  const fm_kernels *kernels = atomic_load_explicit(&chosen, memory_order_acquire);
  if (kernels) return kernels;
  const char *wanted = getenv("FLATMTL_ISA");
  if (wanted) kernels = find(wanted);
  if (!kernels) kernels = find(NULL); /* a name that this machine lacks falls back to its best */
  atomic_store_explicit(&chosen, kernels, memory_order_release);
  return kernels;
}

const char *flatmtl_isa(void) {
  return fm_kernels_get()->name;
}

flatmtl_status flatmtl_select_isa(const char *name, flatmtl_error *error) {
  if (!name) return fm_fail(error, FLATMTL_ERROR_NULL, "name", -1, -1, NAN);
  const fm_kernels *kernels = find(name);
  if (!kernels) return fm_fail(error, FLATMTL_ERROR_NAME, "name", -1, -1, NAN);
  atomic_store_explicit(&chosen, kernels, memory_order_release);
  return FLATMTL_OK;
}
