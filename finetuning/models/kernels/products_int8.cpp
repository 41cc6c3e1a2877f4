// The product of 8-bit integers on processors with AVX2-VNNI: sums = q W, exact in 32 bits.
//
// One instruction multiplies four unsigned by four signed bytes in each lane. The weight becomes unsigned by adding 128
// while it is packed, and each sum starts at -128 times the sum of its row of q.
//
// A panel holds 16 columns of the weight, (depth / 4, 16, 4) bytes, and stays in the cache while all rows pass by. It
// is packed for each product, because a second copy of each weight would cost more memory than 8 bits save.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int kRows = 6;  // rows of a tile: 6 x 16 sums fill 12 of the 16 registers
constexpr int kColumns = 16;
constexpr int kFewestRows = 8 * kRows;  // of a task: below it, packing the panel takes too large a part

struct alignas(64) Line {
    uint8_t bytes[4 * kColumns];
};

inline __m256i load(const void* x) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)); }
inline void store(void* x, __m256i value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), value); }
inline __m256i plus_128(__m256i bytes) { return _mm256_xor_si256(bytes, _mm256_set1_epi8(char(0x80))); }

// Transposes a block of 32-bit elements: 8 rows, `stride` bytes apart, to 8 rows, 64 bytes apart.
inline void transpose(const int8_t* from, long stride, uint8_t* to) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; i++) a[i] = plus_128(load(from + i * stride));
    for (int i = 0; i < 4; i++) {
        b[2 * i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[2 * i + 1] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    for (int i = 0; i < 8; i += 4)
        for (int j = 0; j < 2; j++) {
            a[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + j + 2]);
            a[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        store(to + 64 * i, _mm256_permute2x128_si256(a[i], a[i + 4], 0x20));
        store(to + 64 * (i + 4), _mm256_permute2x128_si256(a[i], a[i + 4], 0x31));
    }
}

// The panel of 16 columns of W, whose transpose (width, depth) is in memory; `from` is the first column.
void pack_transposed(const int8_t* from, int depth, uint8_t* panel) {
    for (int k = 0; k < depth; k += 32)
        for (int half = 0; half < 2; half++)
            transpose(from + long(8 * half) * depth + k, depth, panel + kColumns * k + 32 * half);
}

// The same of W (depth, width).
void pack(const int8_t* from, int depth, int width, uint8_t* panel) {
    for (int k = 0; k < depth; k += 4, from += 4L * width, panel += 4 * kColumns) {
        const auto row = [=](int i) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + long(i) * width));
        };
        const __m128i low[2] = {_mm_unpacklo_epi8(row(0), row(1)), _mm_unpacklo_epi8(row(2), row(3))};
        const __m128i high[2] = {_mm_unpackhi_epi8(row(0), row(1)), _mm_unpackhi_epi8(row(2), row(3))};
        const auto columns = [](const __m128i* pairs) {  // the four bytes of each of 8 columns
            return _mm256_set_m128i(_mm_unpackhi_epi16(pairs[0], pairs[1]), _mm_unpacklo_epi16(pairs[0], pairs[1]));
        };
        store(panel, plus_128(columns(low)));
        store(panel + 32, plus_128(columns(high)));
    }
}

// -128 times the sum of a row
int32_t shift_of(const int8_t* row, int depth) {
    __m256i total = _mm256_setzero_si256();
    for (int k = 0; k < depth; k += 32) total = _mm256_dpbusd_avx_epi32(total, _mm256_set1_epi8(1), load(row + k));
    int32_t parts[8], sum = 0;
    store(parts, total);
    for (const int32_t part : parts) sum += part;
    return -128 * sum;
}

// sums (Rows, 16) = q (Rows, depth) times a panel
template <int Rows>
void tile(const int8_t* q, int depth, const uint8_t* panel, const int32_t* shifts, int32_t* sums, int width) {
    __m256i total[Rows][2];
    for (int r = 0; r < Rows; r++) total[r][0] = total[r][1] = _mm256_set1_epi32(shifts[r]);
    for (int k = 0; k < depth; k += 4, panel += 4 * kColumns) {
        const __m256i w[2] = {load(panel), load(panel + 32)};
#pragma GCC unroll 6
        for (int r = 0; r < Rows; r++) {
            int32_t bytes;
            std::memcpy(&bytes, q + long(r) * depth + k, sizeof bytes);
            const __m256i x = _mm256_set1_epi32(bytes);
            total[r][0] = _mm256_dpbusd_avx_epi32(total[r][0], w[0], x);
            total[r][1] = _mm256_dpbusd_avx_epi32(total[r][1], w[1], x);
        }
    }
    for (int r = 0; r < Rows; r++)
        for (int i = 0; i < 2; i++) store(sums + long(r) * width + 8 * i, total[r][i]);
}

template <int Rows = kRows>
void rest(int rows, const int8_t* q, int depth, const uint8_t* panel, const int32_t* shifts, int32_t* sums, int width) {
    if (rows == Rows) return tile<Rows>(q, depth, panel, shifts, sums, width);
    if constexpr (Rows > 1) rest<Rows - 1>(rows, q, depth, panel, shifts, sums, width);
}

}  // namespace

// sums (rows, width) = q (rows, depth) W, with W (depth, width) or its transpose in memory. Depth and width are
// multiples of 32.
extern "C" void multiply_int8(const int8_t* q, const int8_t* weight, int rows, int depth, int width, int transposed,
                              int threads, int32_t* sums) {
    const int panels = width / kColumns;
    const int wanted = (4 * threads + panels - 1) / panels;  // parts of the rows: four tasks a thread, as cores differ
    const int parts = std::max(1, std::min(wanted, rows / kFewestRows));
    const int rows_per_part = (rows + parts * kRows - 1) / (parts * kRows) * kRows;
    std::vector<int32_t> shifts(rows);
#pragma omp parallel num_threads(threads)
    {
        std::vector<Line> lines(depth / 4);
        uint8_t* const panel = lines.data()->bytes;
#pragma omp for schedule(static)
        for (int r = 0; r < rows; r++) shifts[r] = shift_of(q + long(r) * depth, depth);
#pragma omp for schedule(dynamic)
        for (int task = 0; task < panels * parts; task++) {
            const int column = task / parts * kColumns, first = task % parts * rows_per_part;
            const int last = std::min(rows, first + rows_per_part);
            if (transposed)
                pack_transposed(weight + long(column) * depth, depth, panel);
            else
                pack(weight + column, depth, width, panel);
            for (int r = first; r < last; r += kRows)
                rest(std::min(kRows, last - r), q + long(r) * depth, depth, panel, &shifts[r],
                     sums + long(r) * width + column, width);
        }
    }
}
