#include "unet_native.h"

#ifdef _OPENMP
#include <omp.h>
#endif

#define UNET_TEXT_OF(x) #x
#define UNET_TEXT(x) UNET_TEXT_OF(x)

#if defined(__clang__)
#define UNET_COMPILER "clang " __clang_version__
#elif defined(__GNUC__)
#define UNET_COMPILER "gcc " __VERSION__
#else
#define UNET_COMPILER "C++"
#endif

#ifdef _OPENMP
#define UNET_OPENMP ", OpenMP " UNET_TEXT(_OPENMP)
#else
#define UNET_OPENMP ", no OpenMP"
#endif

int32_t unet_abi_version(void) { return UNET_ABI_VERSION; }

const char *unet_build_info(void) { return UNET_COMPILER UNET_OPENMP; }

int32_t unet_thread_count(void) {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}
