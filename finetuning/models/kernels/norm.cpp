// Layer norm of a sum, y = n weight + bias with n = (a + b - mean) / deviation, and its gradient; bf16 rows, fp32 within.
// RMSNorm is the same with a mean of 0.
//
// Backward does not read the sum: it finds n in the output, as (y - bias) / weight, which is needed for the next product
// anyway, and carries bf16's rounding. So no weight may be 0, nor small beside its bias (takes_norm in cpu_kernels.py).

#include <omp.h>

#include <cmath>

#include "packing.h"

namespace {

// Calls work(row, scratch) for every row, on several threads; scratch holds `floats` numbers, and is the thread's own.
template <class Work> void for_each_row(long rows, int floats, int threads, const Work& work) {
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch(floats * sizeof(float));
        float* numbers = scratch.take<float>(floats);
#pragma omp for schedule(static)
        for (long row = 0; row < rows; row++) work(row, numbers);
    }
}

// 16 elements, 0 where there is no tensor
inline __m512 load_or_zero(const float* x, long at) { return x ? _mm512_loadu_ps(x + at) : _mm512_setzero_ps(); }
inline __m512 load_or_zero(const bf16* x, long at) { return x ? load_bf16(x + at) : _mm512_setzero_ps(); }

}  // namespace

extern "C" {

// a, b, y, rounded_sum: (rows, width), the width a multiple of 16; inverse_deviation: (rows). b, bias and rounded_sum may
// be null. The norm is of the sum before it is rounded.
void add_norm_forward(
    const bf16* a, const bf16* b, const float* weight, const float* bias, float eps, int rms, long rows, int width,
    int threads, bf16* y, float* inverse_deviation, bf16* rounded_sum
) {
    for_each_row(rows, width, threads, [=](long row, float* centred) {
        const long start = row * width;
        __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
        for (int i = 0; i < width; i += 16) {
            const __m512 value = _mm512_add_ps(load_bf16(a + start + i), load_or_zero(b, start + i));
            if (rounded_sum) store_bf16(rounded_sum + start + i, value);
            _mm512_store_ps(centred + i, value);
            sum = _mm512_add_ps(sum, value);
        }
        const __m512 mean = _mm512_set1_ps(rms ? 0.f : _mm512_reduce_add_ps(sum) / width);
        for (int i = 0; i < width; i += 16) {
            const __m512 value = _mm512_sub_ps(_mm512_load_ps(centred + i), mean);
            _mm512_store_ps(centred + i, value);
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        inverse_deviation[row] = 1.f / std::sqrt(_mm512_reduce_add_ps(squares) / width + eps);
        const __m512 scale = _mm512_set1_ps(inverse_deviation[row]);
        for (int i = 0; i < width; i += 16) {
            const __m512 n = _mm512_mul_ps(_mm512_load_ps(centred + i), scale);
            store_bf16(y + start + i, _mm512_fmadd_ps(n, _mm512_loadu_ps(weight + i), load_or_zero(bias, i)));
        }
    });
}

// grad_x, of a and of b alike: with g = grad weight, (g - mean(g) - n mean(g n)) / deviation, plus the gradient of the
// sum, if that is not null. RMSNorm has no mean(g).
// grad_weight, grad_bias: null, or (threads, width) that the sums over each thread's rows are added to.
void add_norm_backward(
    const bf16* y, const float* inverse_deviation, const float* weight, const float* bias, const bf16* grad,
    const bf16* grad_sum, int rms, long rows, int width, int threads, bf16* grad_x, float* grad_weight, float* grad_bias
) {
    for_each_row(rows, 2 * width, threads, [=](long row, float* g) {
        const long start = row * width;
        float* n = g + width;
        __m512 sum = _mm512_setzero_ps(), dot = _mm512_setzero_ps();
        for (int i = 0; i < width; i += 16) {
            const __m512 w = _mm512_loadu_ps(weight + i);
            const __m512 shifted = _mm512_sub_ps(load_bf16(y + start + i), load_or_zero(bias, i));
            const __m512 normal = _mm512_div_ps(shifted, w), weighted = _mm512_mul_ps(load_bf16(grad + start + i), w);
            _mm512_store_ps(n + i, normal);
            _mm512_store_ps(g + i, weighted);
            sum = _mm512_add_ps(sum, weighted);
            dot = _mm512_fmadd_ps(weighted, normal, dot);
        }
        const __m512 mean = _mm512_set1_ps(rms ? 0.f : _mm512_reduce_add_ps(sum) / width);
        const __m512 along = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / width), scale = _mm512_set1_ps(inverse_deviation[row]);
        for (int i = 0; i < width; i += 16) {
            const __m512 rest = _mm512_sub_ps(_mm512_load_ps(g + i), mean);
            const __m512 through_norm = _mm512_mul_ps(_mm512_fnmadd_ps(_mm512_load_ps(n + i), along, rest), scale);
            store_bf16(grad_x + start + i, _mm512_add_ps(through_norm, load_or_zero(grad_sum, start + i)));
        }
        if (grad_weight == nullptr) return;
        float* own_weight = grad_weight + (long)omp_get_thread_num() * width;
        float* own_bias = grad_bias + (long)omp_get_thread_num() * width;
        for (int i = 0; i < width; i += 16) {
            const __m512 given = load_bf16(grad + start + i);
            const __m512 slope = _mm512_fmadd_ps(given, _mm512_load_ps(n + i), _mm512_loadu_ps(own_weight + i));
            _mm512_storeu_ps(own_weight + i, slope);
            _mm512_storeu_ps(own_bias + i, _mm512_add_ps(given, _mm512_loadu_ps(own_bias + i)));
        }
    });
}
}
