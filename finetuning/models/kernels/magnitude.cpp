// Sums over rows for the gradient of DoRA's magnitude; bf16 rows, fp32 within.

#include <omp.h>

#include "packing.h"

static constexpr long kAhead = 1024;  // elements fetched ahead, 2 KB: both inputs are read once, from memory

extern "C" {

// y, grad: (rows, width), the width a multiple of 16; bias: (width), or null.
// sums: (threads, width), zeros, which get grad (y - bias), summed over each thread's rows.
void magnitude_sums(const bf16* y, const bf16* grad, const bf16* bias, long rows, long width, int threads, float* sums) {
#pragma omp parallel num_threads(threads)
    {
        float* own = sums + omp_get_thread_num() * width;
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++)
            for (long i = 0; i < width; i += 16) {
                const long at = row * width + i;
                _mm_prefetch(reinterpret_cast<const char*>(y + at + kAhead), _MM_HINT_T0);
                _mm_prefetch(reinterpret_cast<const char*>(grad + at + kAhead), _MM_HINT_T0);
                __m512 value = load_bf16(y + at);
                if (bias) value = _mm512_sub_ps(value, load_bf16(bias + i));
                _mm512_storeu_ps(own + i, _mm512_fmadd_ps(value, load_bf16(grad + at), _mm512_loadu_ps(own + i)));
            }
    }
}
}
