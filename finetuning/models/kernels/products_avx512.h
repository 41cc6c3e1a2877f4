// Products of packed tiles on AVX512-BF16, for processors without AMX; see products_amx.h for the same ones with it.

#pragma once

#include "packing.h"

namespace {

inline bool products_allowed() { return true; }

struct Products {
    Products() {}  // nothing to set up
};

// C (Rows x 16 Columns, fp32) += sum over `count` steps of A (Rows x 32) B (32 x 16 Columns). C stays in Rows x Columns
// registers: at least 12, or products wait for each other. Rows of A are 32 apart, those of C 16; tiles of columns are
// B_column and C_column apart. Not inlined: it is as fast, and compiling takes half the time.
template <int Rows, int Columns, bool Add>
__attribute__((noinline)) void multiply(const bf16* A, long A_step, const bf16* B, long B_step, long B_column,
                                        int count, float* C, long C_column) {
    __m512 sums[Rows][Columns];
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < Columns; c++)
            sums[r][c] = Add ? _mm512_load_ps(C + c * C_column + 16 * r) : _mm512_setzero_ps();
    for (int i = 0; i < count; i++, A += A_step, B += B_step) {
#pragma GCC unroll 16
        for (int p = 0; p < 16; p++) {
            __m512i b[Columns];
#pragma GCC unroll 4
            for (int c = 0; c < Columns; c++) b[c] = _mm512_load_si512(B + c * B_column + 32 * p);
#pragma GCC unroll 16
            for (int r = 0; r < Rows; r++) {
                int pair;
                std::memcpy(&pair, A + 32 * r + 2 * p, sizeof pair);
                const __m512i a = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
                for (int c = 0; c < Columns; c++)
                    sums[r][c] = _mm512_dpbf16_ps(sums[r][c], (__m512bh)a, (__m512bh)b[c]);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 4
        for (int c = 0; c < Columns; c++) _mm512_store_ps(C + c * C_column + 16 * r, sums[r][c]);
}

// C (16 x D) = sum over `count` steps of A (16 x 32) B (32 x D); C as D / 16 tiles of fp32
template <int D> void product(const bf16* A, long A_step, const bf16* B, int count, float* C) {
    for (int n = 0; n < D / 16; n += 2)
        for (int r = 0; r < 16; r += 8)
            multiply<8, 2, false>(A + 32 * r, A_step, B + n * kTile, D / 16 * kTile, kTile, count,
                                 C + n * kSquare + 16 * r, kSquare);
}

// C (32 x 32, as 2 x 2 tiles) = A (32 x D) B (D x 32)
template <int D> void square(const bf16* A, const bf16* B, float* C) {
    constexpr int S = D / 32;
    for (int i = 0; i < 2; i++)
        for (int r = 0; r < 16; r += 8)
            multiply<8, 2, false>(A + i * S * kTile + 32 * r, kTile, B, kTile, S * kTile, S,
                                 C + 2 * i * kSquare + 16 * r, kSquare);
}

// C (keys x 16 queries, as tiles) = A (keys x D) B (D x 16)
template <int D> void scores_of(const bf16* A, const bf16* B, int keys, float* C) {
    constexpr int S = D / 32;
    for (int j = 0; j < keys; j += 16, A += S * kTile, C += kSquare)
        multiply<16, 1, false>(A, kTile, B, kTile, 0, S, C, 0);
}

// C (16 Tiles x 16, as tiles) = sum over `count` steps of A (16 Tiles x 32) B (32 x 16); a step of A is `Tiles` tiles
template <int Tiles> void product_of_column(const bf16* A, const bf16* B, int count, float* C) {
    for (int n = 0; n < Tiles; n++, A += kTile, C += kSquare)
        multiply<16, 1, false>(A, Tiles * kTile, B, kTile, 0, count, C, 0);
}

// C[i] (16 x 32, as 2 tiles) += A (16 x 32) B[i] (32 x 32), for i below `count`; C[i] are C_step apart
inline void add_products(const bf16* A, const bf16* B, int count, float* C, long C_step) {
    for (int i = 0; i < count; i++, B += 2 * kTile, C += C_step)
        for (int r = 0; r < 16; r += 8) multiply<8, 2, true>(A + 32 * r, 0, B, 0, kTile, 1, C + 16 * r, kSquare);
}

}  // namespace
