// GELU, x Phi(x) with Phi the normal distribution function, and its gradient; bf16 in and out, fp32 within.
//
// erfc is formula 7.1.26 of Abramowitz and Stegun, absolute error 1.5e-7. Its exponential is the normal density too,
// so one pass gives the function and its derivative.

#include <algorithm>

#include "packing.h"

namespace {

constexpr long kChunk = 1 << 14;  // elements that a thread takes at once

// Masked stores are slow on some processors, so only the last few elements are stored with one.
struct All {
    static __m512 load(const bf16* x) { return load_bf16(x); }
    static void store(bf16* x, __m512 value) { store_bf16(x, value); }
};

struct Some {
    __mmask16 lanes;
    __m512 load(const bf16* x) const { return from_bf16(_mm256_maskz_loadu_epi16(lanes, x)); }
    void store(bf16* x, __m512 value) const {
        _mm256_mask_storeu_epi16(x, lanes, (__m256i)_mm512_cvtneps_pbh(value));
    }
};

struct Normal {
    __m512 distribution, density;
};

inline Normal normal(__m512 x) {
    const __m512 half_square = _mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(0.5f));
    const __m512 e = exp2(_mm512_mul_ps(half_square, _mm512_set1_ps(-kLog2e)), 0xffff);  // exp(-x^2 / 2)
    const __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.70710678f));
    const __m512 one = _mm512_set1_ps(1.f);
    const __m512 d = _mm512_fmadd_ps(z, _mm512_set1_ps(0.3275911f), one);
    __m512 t = _mm512_rcp14_ps(d);  // 1 / d, to 14 bits, and to all after a Newton step
    t = _mm512_mul_ps(t, _mm512_fnmadd_ps(d, t, _mm512_set1_ps(2.f)));
    __m512 p = _mm512_set1_ps(1.061405429f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
    const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), _mm512_mul_ps(e, _mm512_set1_ps(0.5f)));  // Phi(-|x|)
    const __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return {_mm512_mask_blend_ps(negative, _mm512_sub_ps(one, tail), tail), _mm512_mul_ps(e, _mm512_set1_ps(0.39894228f))};
}

// Calls work(at, lanes) for every 16 of `count` elements, on several threads.
template <class Work> void for_each_sixteen(long count, int threads, const Work& work) {
    const long whole = count / 16 * 16;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long start = 0; start < whole; start += kChunk)
        for (long at = start, end = std::min(whole, start + kChunk); at < end; at += 16) work(at, All());
    if (whole < count) work(whole, Some{(__mmask16)((1 << (count - whole)) - 1)});
}

}  // namespace

extern "C" {

// y = gelu(x), `count` elements each
void gelu_forward(const bf16* x, long count, int threads, bf16* y) {
    for_each_sixteen(count, threads, [=](long at, auto lanes) {
        const __m512 value = lanes.load(x + at);
        lanes.store(y + at, _mm512_mul_ps(value, normal(value).distribution));
    });
}

// grad_x = grad gelu'(x)
void gelu_backward(const bf16* x, const bf16* grad, long count, int threads, bf16* grad_x) {
    for_each_sixteen(count, threads, [=](long at, auto lanes) {
        const __m512 value = lanes.load(x + at);
        const Normal n = normal(value);
        const __m512 slope = _mm512_fmadd_ps(value, n.density, n.distribution);
        lanes.store(grad_x + at, _mm512_mul_ps(lanes.load(grad + at), slope));
    });
}
}
