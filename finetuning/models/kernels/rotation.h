// Rotary positions (RoPE, Su et al. 2021): elements i and i + D / 2 of a query or key are turned by an angle that
// depends on i and on the row's position.

#pragma once

#include "packing.h"

namespace {

// (length, D / 2) each, or null if positions do not turn rows.
struct Angles {
    const float *cosines, *sines;
};

// Turns 16 pairs of elements by the angles with these cosines and sines.
inline void turn(__m512& a, __m512& b, __m512 cosine, __m512 sine) {
    const __m512 turned = _mm512_fmsub_ps(a, cosine, _mm512_mul_ps(b, sine));
    b = _mm512_fmadd_ps(b, cosine, _mm512_mul_ps(a, sine));
    a = turned;
}

inline void turn_back(float* low, float* high, __m512 cosine, __m512 sine) {
    __m512 a = _mm512_load_ps(low), b = _mm512_load_ps(high);
    turn(a, b, cosine, _mm512_sub_ps(_mm512_setzero_ps(), sine));
    _mm512_store_ps(low, a);
    _mm512_store_ps(high, b);
}

// pack_rows of rows that start at position 0, turned.
template <int D>
void pack_turned(const bf16* x, long stride, int length, int padded, const Angles& angles, bf16* tiles) {
    pack_rows<D>(x, stride, length, padded, tiles);
    if (!angles.cosines) return;
    const auto at = [=](int row, int column) {
        return tiles + ((row / 16) * (D / 32) + column / 32) * kTile + row % 16 * 32 + column % 32;
    };
    for (int i = 0; i < length; i++)
        for (int c = 0; c < D / 2; c += 16) {
            const long angle = (long)i * (D / 2) + c;
            __m512 a = load_bf16(at(i, c)), b = load_bf16(at(i, c + D / 2));
            turn(a, b, _mm512_loadu_ps(angles.cosines + angle), _mm512_loadu_ps(angles.sines + angle));
            store_bf16(at(i, c), a);
            store_bf16(at(i, c + D / 2), b);
        }
}

// Turns gradients of rows back: C (16 x D), of the row at position `first` and those after it.
template <int D> void turn_back(float* C, int first, int count, const Angles& angles) {
    for (int i = 0; i < count; i++)
        for (int c = 0; c < D / 2; c += 16) {
            float *low = C + c * 16 + 16 * i, *high = low + D / 2 * 16;
            const long angle = (long)(first + i) * (D / 2) + c;
            turn_back(low, high, _mm512_loadu_ps(angles.cosines + angle), _mm512_loadu_ps(angles.sines + angle));
        }
}

// The same of columns: tiles low and high of 16 columns of D x 16 rows, whose positions are `rows`; the columns of low
// start at `column`.
template <int D> void turn_back(float* low, float* high, int column, const int rows[16], const Angles& angles) {
    __m512i cosines[16], sines[16];
    for (int i = 0; i < 16; i++) {
        const long angle = (long)rows[i] * (D / 2) + column;
        cosines[i] = _mm512_loadu_si512(angles.cosines + angle);
        sines[i] = _mm512_loadu_si512(angles.sines + angle);
    }
    transpose(cosines);
    transpose(sines);
    for (int i = 0; i < 16; i++)
        turn_back(low + 16 * i, high + 16 * i, _mm512_castsi512_ps(cosines[i]), _mm512_castsi512_ps(sines[i]));
}

}  // namespace
