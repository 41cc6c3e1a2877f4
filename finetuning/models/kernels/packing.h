// Tiles of 1 KB: how rows are packed into them, and how results are written back to rows.
//
// Products are made of C (16 x 16, fp32) += A (16 x 32) B (32 x 16), bf16. A is row-major; B holds pairs of its rows
// interleaved ("vnni"): B[p][n] = {row 2p, row 2p + 1} of column n. AMX and AVX512-BF16 both multiply such pairs.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

// Each source file has its own copy, so that nothing of it is visible outside.
namespace {

using bf16 = uint16_t;
constexpr int kTile = 16 * 32;  // bf16 in a tile of A or B
constexpr int kSquare = 16 * 16;  // fp32 in a tile of C
constexpr float kLog2e = 1.4426950408889634f;

// One thread's scratch memory, cut into parts as they are asked for.
class Scratch {
  public:
    explicit Scratch(size_t bytes) : base_(static_cast<char*>(std::aligned_alloc(64, bytes))), next_(base_) {}
    ~Scratch() { std::free(base_); }
    template <class T> T* take(size_t count) {
        T* part = reinterpret_cast<T*>(next_);
        next_ += (count * sizeof(T) + 63) / 64 * 64;
        return part;
    }
    void reset() { next_ = base_; }

  private:
    char *base_, *next_;
};

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

inline __m512 from_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

// 16 elements
inline __m512 load_bf16(const bf16* x) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
inline void store_bf16(bf16* x, __m512 value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), (__m256i)_mm512_cvtneps_pbh(value));
}

inline __m512i to_bf16(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

inline void transpose(__m512i r[16]) {  // 16 x 16 elements of 32 bits
    __m512i t[16];
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        const __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(a, b, 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
        t[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    std::memcpy(r, t, sizeof t);
}

// ---------------------------------------------------------------------------------------------------------------------
// packing: `length` rows of D bf16, `stride` apart, zeros up to `padded` rows, a multiple of 32

// A tiles [padded / 16][D / 32] of the rows themselves
template <int D> void pack_rows(const bf16* x, long stride, int length, int padded, bf16* tiles) {
    for (int i = 0; i < padded; i++)
        for (int s = 0; s < D / 32; s++) {
            const __m512i row = i < length ? _mm512_loadu_si512(x + i * stride + 32 * s) : _mm512_setzero_si512();
            _mm512_store_si512(tiles + ((i / 16) * (D / 32) + s) * kTile + i % 16 * 32, row);
        }
}

// B tiles [padded / 16][D / 32] of the transposed rows (sum over D), from the A tiles
template <int D> void pack_transposed(const bf16* rows, int padded, bf16* tiles) {
    for (int block = 0; block < padded / 16 * (D / 32); block++) {
        __m512i r[16];
        for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(rows + block * kTile + 32 * i);
        transpose(r);
        for (int i = 0; i < 16; i++) _mm512_store_si512(tiles + block * kTile + 32 * i, r[i]);
    }
}

alignas(64) const uint16_t kEven[32] = {0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
                                        32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
alignas(64) const uint16_t kHalves[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
alignas(64) const uint16_t kFirst[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};

// B tiles [padded / 32][D / 16] of the rows (sum over rows), from the A tiles
template <int D> void pack_pairs(const bf16* rows, int padded, bf16* tiles) {
    const __m512i first = _mm512_load_si512(kFirst), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int i = 0; i < padded; i += 2)
        for (int s = 0; s < D / 32; s++) {
            const bf16* source = rows + ((i / 16) * (D / 32) + s) * kTile + i % 16 * 32;
            const __m512i a = _mm512_load_si512(source), b = _mm512_load_si512(source + 32);
            bf16* target = tiles + ((i / 32) * (D / 16) + 2 * s) * kTile + i % 32 / 2 * 32;
            _mm512_store_si512(target, _mm512_permutex2var_epi16(a, first, b));
            _mm512_store_si512(target + kTile, _mm512_permutex2var_epi16(a, second, b));
        }
}

// A tiles [padded / 32][D / 16] of the transposed rows (sum over rows), from the B tiles of pack_transposed
template <int D> void pack_columns(const bf16* transposed, int padded, bf16* tiles) {
    const __m512i even = _mm512_load_si512(kEven), odd = _mm512_add_epi16(even, _mm512_set1_epi16(1));
    for (int block = 0; block < padded / 32; block++)
        for (int p = 0; p < D / 2; p++) {  // columns 2p and 2p + 1
            const bf16* source = transposed + (2 * block * (D / 32) + p / 16) * kTile + p % 16 * 32;
            const __m512i a = _mm512_load_si512(source), b = _mm512_load_si512(source + (D / 32) * kTile);
            bf16* target = tiles + (block * (D / 16) + p / 8) * kTile + p % 8 * 64;
            _mm512_store_si512(target, _mm512_permutex2var_epi16(a, even, b));
            _mm512_store_si512(target + 32, _mm512_permutex2var_epi16(a, odd, b));
        }
}

// ---------------------------------------------------------------------------------------------------------------------
// results

// Writes a tile of 16 columns x 16 rows, times a factor for each row, as 16 bf16 of each of `count` rows.
inline void write_transposed(const float* C, __m512 factors, bf16* rows, long stride, int count) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(C + 16 * i), factors));
    transpose(r);
    for (int i = 0; i < 16 && i < count; i++)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(rows + i * stride), (__m256i)_mm512_cvtneps_pbh(_mm512_castsi512_ps(r[i])));
}

// Writes C (16 x D) times a factor for each row as bf16 rows, `count` of them.
template <int D> void write_rows(const float* C, const float* factors, bf16* rows, long stride, int count) {
    for (int i = 0; i < count; i++) {
        const __m512 factor = _mm512_set1_ps(factors[i]);
        for (int n = 0; n < D / 16; n += 2) {
            const __m512 low = _mm512_mul_ps(_mm512_load_ps(C + n * kSquare + 16 * i), factor);
            const __m512 high = _mm512_mul_ps(_mm512_load_ps(C + (n + 1) * kSquare + 16 * i), factor);
            _mm512_storeu_si512(rows + i * stride + 16 * n, to_bf16(low, high));
        }
    }
}

}  // namespace
