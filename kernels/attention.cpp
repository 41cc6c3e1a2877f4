// Attention of whole sequences on a CPU with AMX tiles: softmax(Q K^T / sqrt(D)) V and its gradient, bf16 in and out.
//
// One (sequence, head) pair is one piece of work; its queries, keys and values stay in the core's cache, and no
// matrix of scores is ever written to memory. All arithmetic but the operands of the products is fp32.
//
// A tile product is C (16 x 16, fp32) += A (16 x 32) B (32 x 16), bf16. A is row-major; B holds pairs of its rows
// interleaved ("vnni"): B[p][n] = {row 2p, row 2p + 1} of column n. Both are packed here as tiles of 1 KB.
//
// Backward works on transposed scores, keys by queries, so that keys are the rows that dV and dK sum into, and the
// log-sum-exp of a query is one lane of a vector.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

using bf16 = uint16_t;
constexpr int kTile = 16 * 32;  // bf16 in a tile of A or B
constexpr int kSquare = 16 * 16;  // fp32 in a tile of C
constexpr float kLog2e = 1.4426950408889634f;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Sets this thread's tiles up, and gives them back as they were: other libraries in the process use them too.
class Tiles {
  public:
    Tiles() {
        _tile_storeconfig(&before_);
        const TileConfig config;
        _tile_loadconfig(&config);
    }
    ~Tiles() {
        if (before_.palette) _tile_loadconfig(&before_);
        else _tile_release();
    }

  private:
    TileConfig before_;
};

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
// products

// C (16 x D) = sum over `count` steps of A (16 x 32) B (32 x D); C as D / 16 tiles of fp32
template <int D> void product(const bf16* A, long A_step, const bf16* B, int count, float* C) {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (D == 64) {
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int i = 0; i < count; i++, A += A_step, B += D / 16 * kTile) {
        _tile_loadd(4, A, 64);
        _tile_loadd(5, B, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_loadd(6, B + kTile, 64);
        _tile_dpbf16ps(1, 4, 6);
        if constexpr (D == 64) {
            _tile_loadd(7, B + 2 * kTile, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, B + 3 * kTile, 64);
            _tile_dpbf16ps(3, 4, 5);
        }
    }
    _tile_stored(0, C, 64);
    _tile_stored(1, C + kSquare, 64);
    if constexpr (D == 64) {
        _tile_stored(2, C + 2 * kSquare, 64);
        _tile_stored(3, C + 3 * kSquare, 64);
    }
}

// C (32 x 32, as 2 x 2 tiles) = A (32 x D) B (D x 32)
template <int D> void square(const bf16* A, const bf16* B, float* C) {
    constexpr int S = D / 32;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < S; s++) {
        _tile_loadd(4, A + s * kTile, 64);
        _tile_loadd(6, B + s * kTile, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, B + (S + s) * kTile, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, A + (S + s) * kTile, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, C, 64);
    _tile_stored(1, C + kSquare, 64);
    _tile_stored(2, C + 2 * kSquare, 64);
    _tile_stored(3, C + 3 * kSquare, 64);
}

// C (keys x 16 queries, as tiles) = A (keys x D) B (D x 16)
template <int D> void scores_of(const bf16* A, const bf16* B, int keys, float* C) {
    _tile_loadd(6, B, 64);
    if constexpr (D == 64) _tile_loadd(7, B + kTile, 64);
    for (int j = 0; j < keys; j += 32, A += 32 * D, C += 2 * kSquare) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(4, A, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, A + 16 * D, 64);
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (D == 64) {
            _tile_loadd(4, A + kTile, 64);
            _tile_dpbf16ps(0, 4, 7);
            _tile_loadd(5, A + 16 * D + kTile, 64);
            _tile_dpbf16ps(1, 5, 7);
        }
        _tile_stored(0, C, 64);
        _tile_stored(1, C + kSquare, 64);
    }
}

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

// ---------------------------------------------------------------------------------------------------------------------
// one head of one sequence

struct Sizes {
    int batch, length, heads, padded;  // padded: length, rounded up to a multiple of 32
    long row;  // elements from one token's output to the next one's: heads * D
    float scale;
};

// bias: (padded,) 0 or -inf; out: rows `row` apart; log_sum: (length,) log2 of each query's sum, its factor included
template <int D>
void forward_head(const bf16* qkv, const float* bias, const Sizes& size, bf16* out, float* log_sum, Scratch& scratch) {
    constexpr int N = D / 16;
    const int T = size.length, P = size.padded;
    scratch.reset();
    bf16* rows = scratch.take<bf16>(P * D);
    bf16* q = scratch.take<bf16>(P * D);
    bf16* k = scratch.take<bf16>(P * D);
    bf16* v = scratch.take<bf16>(P * D);
    float* scores = scratch.take<float>(16 * P);  // tiles [P / 16] of 16 keys x 16 queries
    bf16* weights = scratch.take<bf16>(16 * P);  // B tiles [P / 32]: keys x queries
    float* context = scratch.take<float>(16 * D);  // tiles [N] of 16 columns of D x 16 queries
    pack_rows<D>(qkv + 2 * size.row, 3 * size.row, T, P, rows);
    pack_transposed<D>(rows, P, q);
    pack_columns<D>(q, P, v);
    pack_rows<D>(qkv, 3 * size.row, T, P, rows);
    pack_transposed<D>(rows, P, q);
    pack_rows<D>(qkv + size.row, 3 * size.row, T, P, k);
    const __m512 factor = _mm512_set1_ps(size.scale * kLog2e);
    const __m512i interleave = _mm512_load_si512(kHalves);

    for (int first = 0; first < T; first += 16) {
        scores_of<D>(k, q + first * D, P, scores);
        __m512 top0 = _mm512_set1_ps(-INFINITY), top1 = top0;
        for (int j = 0; j < P; j += 2) {
            const __m512 x0 = _mm512_fmadd_ps(_mm512_load_ps(scores + 16 * j), factor, _mm512_set1_ps(bias[j]));
            const __m512 x1 = _mm512_fmadd_ps(_mm512_load_ps(scores + 16 * j + 16), factor, _mm512_set1_ps(bias[j + 1]));
            top0 = _mm512_max_ps(top0, x0);
            top1 = _mm512_max_ps(top1, x1);
        }
        const __m512 top = _mm512_max_ps(top0, top1);
        __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
        for (int j = 0; j < P; j += 2) {
            const __mmask16 keep0 = bias[j] == 0.f ? 0xffff : 0, keep1 = bias[j + 1] == 0.f ? 0xffff : 0;
            const __m512 x0 = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + 16 * j), factor, top), keep0);
            const __m512 x1 = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + 16 * j + 16), factor, top), keep1);
            sum0 = _mm512_add_ps(sum0, x0);
            sum1 = _mm512_add_ps(sum1, x1);
            _mm512_store_si512(weights + 16 * j, _mm512_permutexvar_epi16(interleave, to_bf16(x0, x1)));
        }
        alignas(64) float sums[16], tops[16];
        const __m512 sum = _mm512_add_ps(sum0, sum1), inverse = _mm512_div_ps(_mm512_set1_ps(1.f), sum);
        _mm512_store_ps(sums, sum);
        _mm512_store_ps(tops, top);
        for (int i = 0; i < 16 && first + i < T; i++) log_sum[first + i] = tops[i] + std::log2(sums[i]);
        for (int n = 0; n < N; n += 2) {
            _tile_zero(0);
            _tile_zero(1);
            for (int j = 0; j < P / 32; j++) {
                _tile_loadd(4, v + (j * N + n) * kTile, 64);
                _tile_loadd(6, weights + j * kTile, 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(5, v + (j * N + n + 1) * kTile, 64);
                _tile_dpbf16ps(1, 5, 6);
            }
            _tile_stored(0, context + n * kSquare, 64);
            _tile_stored(1, context + (n + 1) * kSquare, 64);
        }
        for (int n = 0; n < N; n++) write_transposed(context + n * kSquare, inverse, out + first * size.row + 16 * n, size.row, T - first);
    }
}

// Gradient of one head: writes its part of grad_qkv, laid out as qkv.
template <int D>
void backward_head(const bf16* qkv, const float* bias, const Sizes& size, const bf16* out, const float* log_sum,
                   const bf16* grad_out, bf16* grad_qkv, Scratch& scratch) {
    constexpr int N = D / 16;
    const int T = size.length, P = size.padded, blocks = P / 32;
    const long row = size.row;
    scratch.reset();
    bf16* rows = scratch.take<bf16>(P * D);
    bf16* k_rows = scratch.take<bf16>(P * D);
    bf16* v_rows = scratch.take<bf16>(P * D);
    bf16* k_columns = scratch.take<bf16>(P * D);
    bf16* q_transposed = scratch.take<bf16>(P * D);
    bf16* q_pairs = scratch.take<bf16>(P * D);
    bf16* g_transposed = scratch.take<bf16>(P * D);
    bf16* g_pairs = scratch.take<bf16>(P * D);
    float* grad_q = scratch.take<float>(P * D);  // tiles [blocks][N][2] of 16 columns of D x 16 queries
    bf16* weights = scratch.take<bf16>(32 * P);  // A tiles [2][blocks]: keys x queries
    bf16* grad_scores = scratch.take<bf16>(32 * P);  // the same
    bf16* grad_pairs = scratch.take<bf16>(32 * P);  // B tiles [blocks][2]: keys x queries
    float* scores = scratch.take<float>(4 * kSquare);
    float* grad_weights = scratch.take<float>(4 * kSquare);
    float* sums = scratch.take<float>(P);
    float* delta = scratch.take<float>(P);
    float* C = scratch.take<float>(16 * D);

    pack_rows<D>(qkv, 3 * row, T, P, rows);
    pack_transposed<D>(rows, P, q_transposed);
    pack_pairs<D>(rows, P, q_pairs);
    pack_rows<D>(grad_out, row, T, P, rows);
    pack_transposed<D>(rows, P, g_transposed);
    pack_pairs<D>(rows, P, g_pairs);
    pack_rows<D>(qkv + row, 3 * row, T, P, k_rows);
    pack_transposed<D>(k_rows, P, rows);
    pack_columns<D>(rows, P, k_columns);
    pack_rows<D>(qkv + 2 * row, 3 * row, T, P, v_rows);
    std::memset(grad_q, 0, sizeof(float) * P * D);
    for (int i = 0; i < P; i++) {  // of a padded query all gradients are 0
        sums[i] = i < T ? log_sum[i] : 0.f;
        __m512 dot = _mm512_setzero_ps();
        for (int s = 0; i < T && s < D; s += 32) {
            const __m512i o = _mm512_loadu_si512(out + i * row + s), g = _mm512_loadu_si512(grad_out + i * row + s);
            dot = _mm512_dpbf16_ps(dot, (__m512bh)o, (__m512bh)g);
        }
        delta[i] = _mm512_reduce_add_ps(dot);
    }
    const __m512 factor = _mm512_set1_ps(size.scale * kLog2e);
    float ones[16], scales[16];
    for (int i = 0; i < 16; i++) ones[i] = 1.f, scales[i] = size.scale;

    for (int key = 0; key < P; key += 32) {
        for (int block = 0; block < blocks; block++) {
            square<D>(k_rows + key * D, q_transposed + block * 32 * D, scores);
            square<D>(v_rows + key * D, g_transposed + block * 32 * D, grad_weights);
            const __m512 sum0 = _mm512_load_ps(sums + 32 * block), sum1 = _mm512_load_ps(sums + 32 * block + 16);
            const __m512 delta0 = _mm512_load_ps(delta + 32 * block), delta1 = _mm512_load_ps(delta + 32 * block + 16);
            bf16* pairs = grad_pairs + 2 * block * kTile;
            for (int r = 0; r < 32; r += 2) {
                __m512i both[2];
                for (int i = 0; i < 2; i++) {
                    const int at = (r / 16) * 2 * kSquare + (r % 16 + i) * 16;
                    const __mmask16 keep = bias[key + r + i] == 0.f ? 0xffff : 0;
                    const __m512 p0 = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + at), factor, sum0), keep);
                    const __m512 p1 = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + at + kSquare), factor, sum1), keep);
                    const __m512 g0 = _mm512_sub_ps(_mm512_load_ps(grad_weights + at), delta0);
                    const __m512 g1 = _mm512_sub_ps(_mm512_load_ps(grad_weights + at + kSquare), delta1);
                    const long to = ((r / 16) * blocks + block) * kTile + (r % 16 + i) * 32;
                    both[i] = to_bf16(_mm512_mul_ps(p0, g0), _mm512_mul_ps(p1, g1));
                    _mm512_store_si512(weights + to, to_bf16(p0, p1));
                    _mm512_store_si512(grad_scores + to, both[i]);
                }
                // columns: queries 0-3 8-11 16-19 24-27 in the first tile, the others in the second
                _mm512_store_si512(pairs + r * 16, _mm512_unpacklo_epi16(both[0], both[1]));
                _mm512_store_si512(pairs + r * 16 + kTile, _mm512_unpackhi_epi16(both[0], both[1]));
            }
        }
        for (int half = 0; half < 2 && key + 16 * half < T; half++) {
            const int first = key + 16 * half, count = T - first < 16 ? T - first : 16;
            product<D>(weights + half * blocks * kTile, kTile, g_pairs, blocks, C);
            write_rows<D>(C, ones, grad_qkv + first * 3 * row + 2 * row, 3 * row, count);
            product<D>(grad_scores + half * blocks * kTile, kTile, q_pairs, blocks, C);
            write_rows<D>(C, scales, grad_qkv + first * 3 * row + row, 3 * row, count);
        }
        for (int n = 0; n < N; n++) {
            _tile_loadd(4, k_columns + (key / 32 * N + n) * kTile, 64);
            for (int block = 0; block < blocks; block++) {
                float* target = grad_q + (block * N + n) * 2 * kSquare;
                _tile_loadd(0, target, 64);
                _tile_loadd(5, grad_pairs + 2 * block * kTile, 64);
                _tile_dpbf16ps(0, 4, 5);
                _tile_stored(0, target, 64);
                _tile_loadd(1, target + kSquare, 64);
                _tile_loadd(6, grad_pairs + (2 * block + 1) * kTile, 64);
                _tile_dpbf16ps(1, 4, 6);
                _tile_stored(1, target + kSquare, 64);
            }
        }
    }
    const __m512 scale = _mm512_set1_ps(size.scale);
    for (int block = 0; block < blocks; block++)
        for (int n = 0; n < N; n++)
            for (int half = 0; half < 2; half++) {
                __m512i r[16];
                const float* source = grad_q + ((block * N + n) * 2 + half) * kSquare;
                for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(source + 16 * i);
                transpose(r);
                for (int c = 0; c < 16; c++) {
                    const int query = 32 * block + c / 4 * 8 + half * 4 + c % 4;
                    if (query >= T) continue;
                    const __m256i packed = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_castsi512_ps(r[c]), scale));
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(grad_qkv + query * 3 * row + 16 * n), packed);
                }
            }
}

Sizes sizes(int batch, int length, int heads, int width) {
    return {batch, length, heads, (length + 31) / 32 * 32, static_cast<long>(heads) * width, 1 / std::sqrt((float)width)};
}

// What every head of a sequence shares: 0 for a key to attend to, -inf for padding.
void fill_bias(const bool* padding, int sequence, const Sizes& size, float* bias) {
    for (int j = 0; j < size.padded; j++)
        bias[j] = j >= size.length || (padding && padding[(long)sequence * size.length + j]) ? -INFINITY : 0.f;
}

template <class Head> void for_each_head(const Sizes& size, int threads, size_t scratch_bytes, const Head& head) {
#pragma omp parallel num_threads(threads)
    {
        const Tiles tiles;
        Scratch scratch(scratch_bytes);
#pragma omp for schedule(dynamic, 1) nowait
        for (int item = 0; item < size.batch * size.heads; item++)
            head(item / size.heads, item % size.heads, scratch);
    }
}

template <int D>
void forward(const bf16* qkv, const bool* padding, const Sizes& size, int threads, bf16* out, float* log_sum) {
    const size_t P = size.padded, T = size.length;
    for_each_head(size, threads, P * (8 * D + 16 * 6 + 4) + 64 * D + 4096, [&](int b, int h, Scratch& scratch) {
        alignas(64) float bias[4096];
        fill_bias(padding, b, size, bias);
        const long at = b * T * size.row + h * D;
        forward_head<D>(qkv + 3 * b * T * size.row + h * D, bias, size, out + at, log_sum + ((long)b * size.heads + h) * T,
                        scratch);
    });
}

template <int D>
void backward(const bf16* qkv, const bool* padding, const Sizes& size, int threads, const bf16* out,
              const float* log_sum, const bf16* grad_out, bf16* grad_qkv) {
    const size_t P = size.padded, T = size.length;
    for_each_head(size, threads, P * (20 * D + 32 * 6 + 8) + 64 * D + 16384, [&](int b, int h, Scratch& scratch) {
        alignas(64) float bias[4096];
        fill_bias(padding, b, size, bias);
        const long at = b * T * size.row + h * D, wide = 3 * b * T * size.row + h * D;
        backward_head<D>(qkv + wide, bias, size, out + at, log_sum + ((long)b * size.heads + h) * T, grad_out + at,
                         grad_qkv + wide, scratch);
    });
}

}  // namespace

extern "C" {

// Asks the kernel for the tiles' registers. Returns whether this process may use them.
int amx_attention_allowed() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// qkv (batch, length, 3, heads, width) bf16; padding (batch, length) or null; out (batch, length, heads, width) bf16;
// log_sum (batch, heads, length) fp32. width is 32 or 64, length at most 4096.
void amx_attention_forward(const bf16* qkv, const bool* padding, int batch, int length, int heads, int width,
                           int threads, bf16* out, float* log_sum) {
    const Sizes size = sizes(batch, length, heads, width);
    if (width == 32) forward<32>(qkv, padding, size, threads, out, log_sum);
    else forward<64>(qkv, padding, size, threads, out, log_sum);
}

// The same, and grad_out like out; writes grad_qkv like qkv.
void amx_attention_backward(const bf16* qkv, const bool* padding, int batch, int length, int heads, int width,
                            int threads, const bf16* out, const float* log_sum, const bf16* grad_out, bf16* grad_qkv) {
    const Sizes size = sizes(batch, length, heads, width);
    if (width == 32) backward<32>(qkv, padding, size, threads, out, log_sum, grad_out, grad_qkv);
    else backward<64>(qkv, padding, size, threads, out, log_sum, grad_out, grad_qkv);
}
}
