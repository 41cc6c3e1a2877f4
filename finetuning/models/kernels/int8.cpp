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
#ifdef __AVX512BF16__
#include "packing.h"
#endif

namespace {

constexpr int kRows = 4;  // rows that share each load of a LoRA matrix
constexpr int kRanks = kLanes / kRows;  // ranks computed at once; kRows x kRanks sums fill half of the registers
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

inline Floats multiply_add(Floats sum, Ints a, Ints b, const float*) { return fma(as_floats(a), as_floats(b), sum); }

#ifdef __AVX512BF16__
inline __m512 load(const bf16* x) { return load_bf16(x); }
inline void store(bf16* x, __m512 value) { store_bf16(x, value); }
inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b, const bf16*) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
#endif

template <class T> Ints lane_of(const T* x) {  // the same kPer elements in every lane
    int32_t bits;
    std::memcpy(&bits, x, sizeof bits);
    return in_all(bits);
}

// ---------------------------------------------------------------------------------------------------------------------
// quantize

// inner (Rows, ranks) = x A^T
template <class T, int Rows>
void inner_rows(const T* const x[Rows], const T* A, int width, Segments segments, T* inner, int ranks) {
    for_each_segment(segments, [&](int begin, int end, int first, int last) {
        for (int k = first; k < last; k += kRanks) {
            Floats parts[kLanes] = {};
            for (int c = begin; c < end; c += kLanes * kPer<T>)
#pragma GCC unroll 4
                for (int j = 0; j < kRanks; j++) {
                    const Ints a = load_ints(A + long(k + j) * width + c);
#pragma GCC unroll 4
                    for (int r = 0; r < Rows; r++)
                        parts[kRanks * r + j] = multiply_add(parts[kRanks * r + j], load_ints(x[r] + c), a, x[r]);
                }
            T all[kLanes];
            store(all, sums(parts));
            for (int r = 0; r < Rows; r++)
                std::memcpy(inner + long(r) * ranks + k, all + kRanks * r, kRanks * sizeof(T));
        }
    });
}

// A row as 8-bit integers times the returned scale: NaN if an element is not finite.
template <class T> float quantize_row(const T* x, const float* columns, int width, int8_t* q) {
    const auto value = [=](int c) {
        const Floats v = load(x + c);
        return columns ? mul(v, load(columns + c)) : v;
    };
    Ints largest = in_all(0);  // bits of absolute values are ordered like them, NaN above infinity
    for (int c = 0; c < width; c += kLanes) largest = max_unsigned(largest, as_ints(abs(value(c))));
    const uint32_t bits = largest_of(largest);
    float limit;
    std::memcpy(&limit, &bits, sizeof limit);
    const bool finite = bits < 0x7f800000;
    if (!finite || limit < kSmallest) {
        std::memset(q, 0, width);
        return finite ? 0.f : __builtin_nanf("");
    }
    const Floats factor = in_all(127.f / limit);
    for (int c = 0; c < width; c += kLanes) store_bytes(q + c, rounded(mul(value(c), factor)));
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
            for (int c = 0; c < width; c += kLanes) store(h + c, gelu(load(rows[r] + c)));
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

constexpr int kParts = 16 / kLanes;

// 16 columns of `Rows` rows
template <class T, int Rows>
void dequantize_columns(const int32_t* sums, const float* scales, const Output<T>& o, long row, int c, int first, int last) {
    Floats y[Rows][kParts];
#pragma GCC unroll 2
    for (int p = 0; p < kParts; p++) {
        const int at = c + kLanes * p;
        const Floats column = o.columns ? load(o.columns + at) : in_all(1.f);
        const Floats bias = o.bias ? load(o.bias + at) : zeros();
#pragma GCC unroll 4
        for (int r = 0; r < Rows; r++) {
            const Floats sum = to_floats(load_ints(sums + (row + r) * o.width + at));
            y[r][p] = fma(mul(sum, in_all(scales[row + r])), column, bias);
        }
    }
    for (int k = first; k < last; k += kPer<T>) {
        const T* B = o.B + long(k) * o.width + c * kPer<T>;
        Ints b[kParts];
        for (int p = 0; p < kParts; p++) b[p] = load_ints(B + kLanes * kPer<T> * p);
#pragma GCC unroll 4
        for (int r = 0; r < Rows; r++) {
            const Ints lane = lane_of(o.inner + (row + r) * o.ranks + k);
#pragma GCC unroll 2
            for (int p = 0; p < kParts; p++) y[r][p] = multiply_add(y[r][p], lane, b[p], o.inner);
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < Rows; r++)
#pragma GCC unroll 2
        for (int p = 0; p < kParts; p++) {
            const long at = (row + r) * o.width + c + kLanes * p;
            if (o.x) {
                const Floats x = load(o.x + at);
                store(o.h + at, gelu(x));
                y[r][p] = mul(y[r][p], gelu_slope(x));
            }
            store(o.y + at, y[r][p]);
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

constexpr int kWide = 32;  // columns of a block
constexpr int kVectors = kWide / kLanes;
constexpr int kMost = kLanes / kVectors;  // ranks of a block; its sums fill half of the registers
constexpr int kFewest = kMost < 4 ? kMost : 4;
constexpr int kTogether = 32;  // rows that stay in the cache while the blocks of all ranks pass by
constexpr int kAhead = 16;  // rows between the one that is fetched and the one that is used: each is on another page

inline void pair_rows(const float* row, const float*, Ints* lanes) {
    for (int i = 0; i < kVectors; i++) lanes[i] = load_ints(row + kLanes * i);
}

// The lanes of two rows of inner, or of one: {first, second} of each rank
inline void pair_ranks(const float* first, const float*, int ranks, int32_t* lanes) {
    std::memcpy(lanes, first, ranks * sizeof(float));
}

#ifdef __AVX512BF16__
// 32 columns of two rows: {first, second} of each column, columns 0 to 15 and 16 to 31
inline void pair_rows(const bf16* first, const bf16* second, Ints* lanes) {
    const auto wide = [](const bf16* x) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    };
    for (int i = 0; i < 2; i++)
        lanes[i] = _mm512_or_si512(wide(first + 16 * i), _mm512_slli_epi32(wide(second + 16 * i), 16));
}

inline void pair_ranks(const bf16* first, const bf16* second, int ranks, int32_t* lanes) {
    for (int k = 0; k < ranks; k++) lanes[k] = first[k] | int32_t(second ? second[k] : 0) << 16;
}
#endif

// out (Ranks rows from k) += inner^T x for kWide columns from c; `pairs` (rows / kPer, ranks) holds inner's lanes
template <class T, int Ranks>
void accumulate_columns(const T* x, const int32_t* pairs, int rows, int width, int ranks, int c, int k, float* out) {
    Floats total[Ranks][kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < Ranks; j++)
        for (int i = 0; i < kVectors; i++) total[j][i] = load(out + long(k + j) * width + c + kLanes * i);
    for (int r = 0; r < rows; r += kPer<T>, pairs += ranks) {
        Ints lanes[kVectors];
        const T* row = x + long(r) * width + c;
        for (int i = 0; i < kWide * int(sizeof(T)); i += 64)
            _mm_prefetch(reinterpret_cast<const char*>(row + long(kAhead) * width) + i, _MM_HINT_T0);
        pair_rows(row, r + 1 < rows ? row + width : row, lanes);  // the pair of a last odd row has a factor 0
#pragma GCC unroll 8
        for (int j = 0; j < Ranks; j++)
#pragma GCC unroll 4
            for (int i = 0; i < kVectors; i++)
                total[j][i] = multiply_add(total[j][i], in_all(pairs[k + j]), lanes[i], x);
    }
#pragma GCC unroll 8
    for (int j = 0; j < Ranks; j++)
        for (int i = 0; i < kVectors; i++) store(out + long(k + j) * width + c + kLanes * i, total[j][i]);
}

template <class T>
void accumulate(const T* inner, const T* x, int rows, int width, Segments segments, int ranks, int threads, float* out) {
    std::vector<int32_t> pairs(long(rows + kPer<T> - 1) / kPer<T> * ranks);
    for (int r = 0; r < rows; r += kPer<T>) {
        const T* first = inner + long(r) * ranks;
        pair_ranks(first, r + 1 < rows ? first + ranks : nullptr, ranks, &pairs[long(r / kPer<T>) * ranks]);
    }
    std::vector<int> first(width / kWide), last(width / kWide);
    for_each_segment(segments, [&](int begin, int end, int from, int to) {
        for (int i = begin / kWide; i < end / kWide; i++) first[i] = from, last[i] = to;
    });
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int i = 0; i < width / kWide; i++)
        for (int r = 0; r < rows; r += kTogether) {
            const T* part = x + long(r) * width;
            const int32_t* lanes = &pairs[long(r / kPer<T>) * ranks];
            const int count = std::min(kTogether, rows - r);
            int k = first[i];
            for (; k + kMost <= last[i]; k += kMost)
                accumulate_columns<T, kMost>(part, lanes, count, width, ranks, kWide * i, k, out);
            if (k < last[i]) accumulate_columns<T, kFewest>(part, lanes, count, width, ranks, kWide * i, k, out);
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
