// The normal distribution, for GELU: x Phi(x).

#pragma once

#include <immintrin.h>

// Each source file has its own copy, so that nothing of it is visible outside.
namespace {

constexpr float kLog2e = 1.4426950408889634f;

// 2^x for x <= 0 or slightly above; lanes outside `keep` are 0.
inline __m512 exp2(__m512 x, __mmask16 keep) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-126.f));  // also -inf, of keys that are padding
    const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 f = _mm512_sub_ps(x, n);  // [-1/2, 1/2]; relative error of the polynomial 2e-6
    __m512 p = _mm512_set1_ps(1.3333558e-3f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(9.6181291e-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(5.5504109e-2f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(2.4022651e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(6.9314718e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.f));
    return _mm512_maskz_scalef_ps(keep, p, n);
}

struct Normal {
    __m512 distribution, density;
};

// erfc is formula 7.1.26 of Abramowitz and Stegun, absolute error 1.5e-7. Its exponential is the normal density too.
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

inline __m512 gelu(__m512 x) { return _mm512_mul_ps(x, normal(x).distribution); }

}  // namespace
