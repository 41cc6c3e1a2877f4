// Vectors of 32-bit elements: 16 with AVX512, 8 with AVX2. Each operation has one name for both, so a kernel is one
// source.

#pragma once

#include <immintrin.h>

#include <cstdint>

// Each source file has its own copy, so that nothing of it is visible outside.
namespace {

#ifdef __AVX512F__

constexpr int kLanes = 16;
using Floats = __m512;
using Ints = __m512i;

inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* x, Floats v) { _mm512_storeu_ps(x, v); }
inline Ints load_ints(const void* x) { return _mm512_loadu_si512(x); }
// Integers from -128 to 127.
inline void store_bytes(int8_t* x, Ints v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(x), _mm512_cvtepi32_epi8(v)); }

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats in_all(float x) { return _mm512_set1_ps(x); }
inline Ints in_all(int32_t x) { return _mm512_set1_epi32(x); }
inline Floats as_floats(Ints bits) { return _mm512_castsi512_ps(bits); }
inline Ints as_ints(Floats bits) { return _mm512_castps_si512(bits); }
inline Floats to_floats(Ints v) { return _mm512_cvtepi32_ps(v); }
inline Ints rounded(Floats v) { return _mm512_cvtps_epi32(v); }
inline Ints truncated(Floats v) { return _mm512_cvttps_epi32(v); }

inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }  // a b + c
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline Floats abs(Floats v) { return _mm512_abs_ps(v); }
inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }  // b, if one is not a number
inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Ints max_unsigned(Ints a, Ints b) { return _mm512_max_epu32(a, b); }
inline uint32_t largest_of(Ints v) { return _mm512_reduce_max_epu32(v); }

inline Floats where_positive(Floats x, Floats yes, Floats no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), no, yes);
}

// 32 rows of 4 numbers. Each lane looks up a row of its own.
class Table {
  public:
    void set(int row, int column, float value) { columns_[column][row] = value; }
    void look_up(Ints row, Floats values[4]) const {
        for (int k = 0; k < 4; k++)
            values[k] = _mm512_permutex2var_ps(_mm512_load_ps(columns_[k]), row, _mm512_load_ps(columns_[k] + 16));
    }

  private:
    alignas(64) float columns_[4][32];
};

// The sum of each of 16 vectors.
inline Floats sums(Floats v[kLanes]) {
    for (int i = 0; i < 8; i++)
        v[i] = _mm512_add_ps(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; i++) {  // each 128-bit part now has 4 partial sums, of vectors 4 i to 4 i + 3
        const __m512d a = _mm512_castps_pd(v[2 * i]), b = _mm512_castps_pd(v[2 * i + 1]);
        v[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    for (int i = 0; i < 2; i++)
        v[i] = _mm512_add_ps(_mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0x88),
                             _mm512_shuffle_f32x4(v[2 * i], v[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x88), _mm512_shuffle_f32x4(v[0], v[1], 0xdd));
}

#else

constexpr int kLanes = 8;
using Floats = __m256;
using Ints = __m256i;

inline Floats load(const float* x) { return _mm256_loadu_ps(x); }
inline void store(float* x, Floats v) { _mm256_storeu_ps(x, v); }
inline Ints load_ints(const void* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
inline void store_bytes(int8_t* x, Ints v) {
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(x), _mm_packs_epi16(words, words));
}

inline Floats zeros() { return _mm256_setzero_ps(); }
inline Floats in_all(float x) { return _mm256_set1_ps(x); }
inline Ints in_all(int32_t x) { return _mm256_set1_epi32(x); }
inline Floats as_floats(Ints bits) { return _mm256_castsi256_ps(bits); }
inline Ints as_ints(Floats bits) { return _mm256_castps_si256(bits); }
inline Floats to_floats(Ints v) { return _mm256_cvtepi32_ps(v); }
inline Ints rounded(Floats v) { return _mm256_cvtps_epi32(v); }
inline Ints truncated(Floats v) { return _mm256_cvttps_epi32(v); }

inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats fnma(Floats a, Floats b, Floats c) { return _mm256_fnmadd_ps(a, b, c); }
inline Floats abs(Floats v) { return _mm256_andnot_ps(_mm256_set1_ps(-0.f), v); }
inline Floats min(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats max(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Ints max_unsigned(Ints a, Ints b) { return _mm256_max_epu32(a, b); }
inline uint32_t largest_of(Ints v) {
    __m128i half = _mm_max_epu32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    half = _mm_max_epu32(half, _mm_shuffle_epi32(half, 0x4e));
    return uint32_t(_mm_cvtsi128_si32(_mm_max_epu32(half, _mm_shuffle_epi32(half, 0xb1))));
}

inline Floats where_positive(Floats x, Floats yes, Floats no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_GT_OQ));
}

class Table {  // AVX2 cannot permute 32 numbers, so whole rows are loaded and transposed: faster than gathering
  public:
    void set(int row, int column, float value) { rows_[row][column] = value; }
    void look_up(Ints row, Floats values[4]) const {
        alignas(32) int32_t at[8];  // in bytes, because addresses have no factor 16
        _mm256_store_si256(reinterpret_cast<__m256i*>(at), _mm256_slli_epi32(row, 4));
        const auto load_row = [&](int i) {
            return _mm_load_ps(reinterpret_cast<const float*>(reinterpret_cast<const char*>(rows_) + at[i]));
        };
        __m256 r[4], pairs[4];
        for (int i = 0; i < 4; i++) r[i] = _mm256_set_m128(load_row(i + 4), load_row(i));
        for (int i = 0; i < 2; i++) {
            pairs[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        for (int i = 0; i < 2; i++) {
            values[2 * i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
            values[2 * i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        }
    }

  private:
    alignas(64) float rows_[32][4];
};

// The sum of each of 8 vectors.
inline Floats sums(Floats v[kLanes]) {
    for (int i = 0; i < 4; i++) v[i] = _mm256_hadd_ps(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 2; i++) v[i] = _mm256_hadd_ps(v[2 * i], v[2 * i + 1]);
    return _mm256_add_ps(_mm256_permute2f128_ps(v[0], v[1], 0x20), _mm256_permute2f128_ps(v[0], v[1], 0x31));
}

#endif

}  // namespace
