// What comes before and after a product of 8-bit integers, in the linears of a frozen base with LoRA.
//
//   quantize     rows of x -> 8-bit rows and a scale for each; and x A^T, LoRA's inner rows
//   dequantize   32-bit sums of the product -> rows of y, plus bias and inner B^T
//   accumulate   LoRA's gradients, inner^T x
//
// Elements are bf16 or fp32. A 32-bit lane holds `kPer` of them: two bf16, which one instruction multiplies and adds,
// or one fp32. LoRA matrices come as (ranks, width). They may be block-diagonal: segment i has the next ranks[i] rows
// and the columns below ends[i]. The rest of them is zero and skipped. Ranks are multiples of 4, ends of 32.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "gelu.h"

namespace {

constexpr int kRows = 4;  // rows that share each load of a LoRA matrix
constexpr int kRanks = 4;  // ranks computed at once; kRows x kRanks sums fill half of the registers
constexpr float kSmallest = 1e-30f;  // a row below it counts as zeros: 127 / largest must be finite

struct Segments {
    int count;
    const int *ends, *ranks;
};

template <class Work> void for_each_segment(Segments segments, const Work& work) {
    for (int i = 0, column = 0, rank = 0; i < segments.count; i++) {
        if (segments.ranks[i]) work(column, segments.ends[i], rank, rank + segments.ranks[i]);
        column = segments.ends[i];
        rank += segments.ranks[i];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// elements

template <class T> constexpr int kPer = 4 / sizeof(T);  // elements in a lane

inline __m512 load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* x, __m512 value) { _mm512_storeu_ps(x, value); }
inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b, const float*) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}

#ifdef __AVX512BF16__
using bf16 = uint16_t;
inline __m512 load(const bf16* x) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline void store(bf16* x, __m512 value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), (__m256i)_mm512_cvtneps_pbh(value));
}
inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b, const bf16*) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif

template <class T> __m512i lane_of(const T* x) {  // the same kPer elements in every lane
    int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    return _mm512_set1_epi32(bits);
}

// Sixteen sums, one for each vector.
inline __m512 sums(__m512 v[16]) {
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

// ---------------------------------------------------------------------------------------------------------------------
// quantize

// inner (Rows, ranks) = x A^T
template <class T, int Rows>
void inner_rows(const T* const x[Rows], const T* A, int width, Segments segments, T* inner, int ranks) {
    for_each_segment(segments, [&](int begin, int end, int first, int last) {
        for (int k = first; k < last; k += kRanks) {
            __m512 parts[16] = {};
            for (int c = begin; c < end; c += 16 * kPer<T>)
#pragma GCC unroll 4
                for (int j = 0; j < kRanks; j++) {
                    const __m512i a = _mm512_loadu_si512(A + long(k + j) * width + c);
#pragma GCC unroll 4
                    for (int r = 0; r < Rows; r++)
                        parts[4 * r + j] = multiply_add(parts[4 * r + j], _mm512_loadu_si512(x[r] + c), a, x[r]);
                }
            T all[16];
            store(all, sums(parts));
            for (int r = 0; r < Rows; r++) std::memcpy(inner + long(r) * ranks + k, all + 4 * r, 4 * sizeof(T));
        }
    });
}

// A row as 8-bit integers times the returned scale: NaN if an element is not finite.
template <class T> float quantize_row(const T* x, const float* columns, int width, int8_t* q) {
    const auto value = [=](int c) {
        const __m512 v = load(x + c);
        return columns ? _mm512_mul_ps(v, _mm512_loadu_ps(columns + c)) : v;
    };
    __m512i largest = _mm512_setzero_si512();  // bits of absolute values are ordered like them, NaN above infinity
    for (int c = 0; c < width; c += 16)
        largest = _mm512_max_epu32(largest, _mm512_castps_si512(_mm512_abs_ps(value(c))));
    const uint32_t bits = _mm512_reduce_max_epu32(largest);
    float limit;
    std::memcpy(&limit, &bits, sizeof limit);
    const bool finite = bits < 0x7f800000;
    if (!finite || limit < kSmallest) {
        std::memset(q, 0, width);
        return finite ? 0.f : __builtin_nanf("");
    }
    const __m512 factor = _mm512_set1_ps(127.f / limit);
    for (int c = 0; c < width; c += 16) {
        const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(value(c), factor));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q + c), _mm512_cvtepi32_epi8(rounded));
    }
    return limit / 127.f;
}

template <class T, int Rows>
void quantize_rows(const T* x, const float* columns, bool activate, int width, const T* A, Segments segments, int ranks,
                   T* scratch, int8_t* q, float* scales, T* inner) {
    const T* rows[Rows];
    for (int r = 0; r < Rows; r++) {
        rows[r] = x + long(r) * width;
        if (activate) {
            T* h = scratch + long(r) * width;
            for (int c = 0; c < width; c += 16) store(h + c, gelu(load(rows[r] + c)));
            rows[r] = h;
        }
        scales[r] = quantize_row(rows[r], columns, width, q + long(r) * width);
    }
    if (ranks) inner_rows<T, Rows>(rows, A, width, segments, inner, ranks);
}

template <class T>
void quantize(const T* x, const float* columns, int activate, int rows, int width, const T* A, Segments segments,
              int ranks, int threads, int8_t* q, float* scales, T* inner) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<T> scratch(activate ? kRows * width : 0);
        const auto work = [&](auto count, int r) {
            quantize_rows<T, count.value>(x + long(r) * width, columns, activate, width, A, segments, ranks,
                                          scratch.data(), q + long(r) * width, scales + r, inner + long(r) * ranks);
        };
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r += kRows)
            if (r + kRows <= rows)
                work(std::integral_constant<int, kRows>(), r);
            else
                for (int i = r; i < rows; i++) work(std::integral_constant<int, 1>(), i);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// dequantize

template <class T> struct Output {
    const float *columns, *bias;  // or null
    const T *inner, *B;  // B (ranks / kPer, width, kPer)
    const T* x;  // or null; input of the GELU whose output y is the gradient of
    T *y, *h;  // h = gelu(x), if x is given
    Segments segments;
    int width, ranks;
};

// 16 columns of `Rows` rows
template <class T, int Rows>
void dequantize_columns(const int32_t* sums, const float* scales, const Output<T>& o, long row, int c, int first, int last) {
    __m512 y[Rows];
    const __m512 column = o.columns ? _mm512_loadu_ps(o.columns + c) : _mm512_set1_ps(1.f);
    const __m512 bias = o.bias ? _mm512_loadu_ps(o.bias + c) : _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
        const __m512 sum = _mm512_cvtepi32_ps(_mm512_loadu_si512(sums + (row + r) * o.width + c));
        y[r] = _mm512_fmadd_ps(_mm512_mul_ps(sum, _mm512_set1_ps(scales[row + r])), column, bias);
    }
    for (int k = first; k < last; k += kPer<T>) {
        const __m512i b = _mm512_loadu_si512(o.B + long(k) * o.width + c * kPer<T>);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; r++)
            y[r] = multiply_add(y[r], lane_of(o.inner + (row + r) * o.ranks + k), b, o.inner);
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++) {
        const long at = (row + r) * o.width + c;
        if (o.x) {
            const __m512 x = load(o.x + at);
            store(o.h + at, gelu(x));
            y[r] = _mm512_mul_ps(y[r], gelu_slope(x));
        }
        store(o.y + at, y[r]);
    }
}

template <class T, int Rows>
void dequantize_rows(const int32_t* sums, const float* scales, const Output<T>& o, long row) {
    int column = 0, rank = 0;
    for (int i = 0; i < o.segments.count; i++) {
        const int next = rank + o.segments.ranks[i];
        for (; column < o.segments.ends[i]; column += 16)
            dequantize_columns<T, Rows>(sums, scales, o, row, column, rank, next);
        rank = next;
    }
}

template <class T>
void dequantize(const int32_t* sums, const float* scales, const Output<T>& o, int rows, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int r = 0; r < rows; r += kRows)
        if (r + kRows <= rows)
            dequantize_rows<T, kRows>(sums, scales, o, r);
        else
            for (int i = r; i < rows; i++) dequantize_rows<T, 1>(sums, scales, o, i);
}

// ---------------------------------------------------------------------------------------------------------------------
// accumulate

inline void pair_rows(const float* row, const float*, __m512i* lanes) {
    lanes[0] = _mm512_loadu_si512(row);
    lanes[1] = _mm512_loadu_si512(row + 16);
}

#ifdef __AVX512BF16__
// 32 columns of two rows: {first, second} of each column, columns 0 to 15 and 16 to 31
inline void pair_rows(const bf16* first, const bf16* second, __m512i* lanes) {
    const auto wide = [](const bf16* x) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    };
    for (int i = 0; i < 2; i++)
        lanes[i] = _mm512_or_si512(wide(first + 16 * i), _mm512_slli_epi32(wide(second + 16 * i), 16));
}
#endif

// The lanes of two rows of inner, or of one: {first, second} of each rank
inline void pair_ranks(const float* first, const float*, int ranks, int32_t* lanes) {
    std::memcpy(lanes, first, ranks * sizeof(float));
}

#ifdef __AVX512BF16__
inline void pair_ranks(const bf16* first, const bf16* second, int ranks, int32_t* lanes) {
    for (int k = 0; k < ranks; k++) lanes[k] = first[k] | int32_t(second ? second[k] : 0) << 16;
}
#endif

// out (Ranks rows from k) += inner^T x for 32 columns from c; `pairs` (rows / kPer, ranks) holds inner's lanes
template <class T, int Ranks>
void accumulate_columns(const T* x, const int32_t* pairs, int rows, int width, int ranks, int c, int k, float* out) {
    __m512 total[Ranks][2];
#pragma GCC unroll 8
    for (int j = 0; j < Ranks; j++)
        for (int i = 0; i < 2; i++) total[j][i] = _mm512_loadu_ps(out + long(k + j) * width + c + 16 * i);
    for (int r = 0; r < rows; r += kPer<T>, pairs += ranks) {
        __m512i lanes[2];
        const T* row = x + long(r) * width + c;
        pair_rows(row, r + 1 < rows ? row + width : row, lanes);  // the pair of a last odd row has a factor 0
#pragma GCC unroll 8
        for (int j = 0; j < Ranks; j++)
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++)
                total[j][i] = multiply_add(total[j][i], _mm512_set1_epi32(pairs[k + j]), lanes[i], x);
    }
#pragma GCC unroll 8
    for (int j = 0; j < Ranks; j++)
        for (int i = 0; i < 2; i++) _mm512_storeu_ps(out + long(k + j) * width + c + 16 * i, total[j][i]);
}

template <class T>
void accumulate(const T* inner, const T* x, int rows, int width, Segments segments, int ranks, int threads, float* out) {
    std::vector<int32_t> pairs(long(rows + kPer<T> - 1) / kPer<T> * ranks);
    for (int r = 0; r < rows; r += kPer<T>) {
        const T* first = inner + long(r) * ranks;
        pair_ranks(first, r + 1 < rows ? first + ranks : nullptr, ranks, &pairs[long(r / kPer<T>) * ranks]);
    }
    std::vector<int> first(width / 32), last(width / 32);
    for_each_segment(segments, [&](int begin, int end, int from, int to) {
        for (int i = begin / 32; i < end / 32; i++) first[i] = from, last[i] = to;
    });
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < width / 32; i++) {
        int k = first[i];
        for (; k + 8 <= last[i]; k += 8) accumulate_columns<T, 8>(x, pairs.data(), rows, width, ranks, 32 * i, k, out);
        if (k < last[i]) accumulate_columns<T, 4>(x, pairs.data(), rows, width, ranks, 32 * i, k, out);
    }
}

}  // namespace

// The functions that Python calls, for one type of element. Arrays that may be missing are null.
#define EXPORT(T, NAME)                                                                                                \
    void quantize_##NAME(const T* x, const float* columns, int activate, int rows, int width, const T* A,              \
                         int segments, const int* ends, const int* ranks, int rank, int threads, int8_t* q,            \
                         float* scales, T* inner) {                                                                    \
        quantize<T>(x, columns, activate, rows, width, A, {segments, ends, ranks}, rank, threads, q, scales, inner);   \
    }                                                                                                                  \
    void dequantize_##NAME(const int32_t* sums, const float* scales, const float* columns, const float* bias,          \
                           const T* inner, const T* B, const T* x, int rows, int width, int segments, const int* ends, \
                           const int* ranks, int rank, int threads, T* y, T* h) {                                      \
        const Output<T> output = {columns, bias, inner, B, x, y, h, {segments, ends, ranks}, width, rank};             \
        dequantize<T>(sums, scales, output, rows, threads);                                                            \
    }                                                                                                                  \
    void accumulate_##NAME(const T* inner, const T* x, int rows, int width, int segments, const int* ends,             \
                           const int* ranks, int rank, int threads, float* out) {                                      \
        accumulate<T>(inner, x, rows, width, {segments, ends, ranks}, rank, threads, out);                             \
    }

extern "C" {
EXPORT(float, fp32)
#ifdef __AVX512BF16__
EXPORT(bf16, bf16)
#endif
}
