// Who may share work among OpenMP's threads, and what becomes of an exception inside a parallel loop.
#ifndef UNET_THREADS_H
#define UNET_THREADS_H

#include "unet_native.h"

#include <new>

#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
#include <unistd.h>
#endif

namespace unet {

// A fork copies no threads, and OpenMP would wait for those that its child has lost: whoever was forked after this
// library was loaded works alone.
#if defined(_OPENMP) && (defined(__unix__) || defined(__APPLE__))
inline const pid_t kLoadedBy = getpid();
inline bool may_share_work() { return getpid() == kLoadedBy; }
#else
inline bool may_share_work() { return true; }
#endif

// Runs `work(task, scratch)` for each task of a parallel loop; every thread has a Scratch of its own. An exception must
// not leave a parallel region: the one that can be thrown, for want of memory, becomes the status.
template <class Scratch, class Work> int32_t for_each_task(int64_t tasks, Work work) {
  bool short_of_memory = false;
#pragma omp parallel if (may_share_work() && tasks > 1)
  {
    Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      try {
        work(task, scratch);
      } catch (const std::bad_alloc &) {
#pragma omp atomic write
        short_of_memory = true;
      }
    }
  }
  return short_of_memory ? UNET_OUT_OF_MEMORY : UNET_OK;
}

} // namespace unet

#endif
