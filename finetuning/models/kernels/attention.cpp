// Attention of whole sequences on a CPU with AMX or AVX512-BF16: softmax(Q K^T / sqrt(D)) V and its gradient, bf16 in and out.
//
// One (sequence, head) pair is one piece of work; its queries, keys and values stay in the core's cache, and no
// matrix of scores is ever written to memory. All arithmetic but the operands of the products is fp32.
//
// Scores are transposed, keys by queries: the maximum and the sum of a query's scores are then one lane of a vector
// each, and keys are the rows that the gradients of K and V sum into.
//
// A head may add a term to each score that depends on the distance between query and key alone, as in MPNet. A term of
// -1e30 hides keys at that distance, as in a causal mask or a sliding window. Blocks of hidden keys are skipped.

#include <algorithm>
#include <cmath>

#ifdef __AMX_BF16__
#include "products_amx.h"
#else
#include "products_avx512.h"
#endif
#include "rotation.h"

namespace {

struct Sizes {
    int batch, length, heads;
    int padded;  // length rounded up to a multiple of 32
    long row, out_row;  // elements from one token to the next, in queries, keys and values, and in the output
    float scale;
};

// A head of a sequence: its first query, key, value, output; and in backward the same places in their gradients.
struct Head {
    bf16 *q, *k, *v, *out;
};

// What a head's scores depend on besides queries and keys.
struct Places {
    const float* bias;  // (padded,) 0, or -inf for padding
    const float* distances;  // (2 padded,) in log2, of query - key at padded - 1 + query - key; or null
    Angles angles;
    int lowest, highest;  // the distances query - key that are not hidden are from lowest to highest
};

struct Range {
    int from, to;  // multiples of 32
    int blocks() const { return (to - from) / 32; }
};

// Blocks with the places from `first` to `last`, cut to those from 0 to `padded`.
Range blocks_of(int first, int last, int padded) {
    const int from = std::max(0, first) / 32 * 32;
    return {from, std::max(from, std::min(padded, last / 32 * 32 + 32))};
}

template <bool Relative> Range keys_of(int query, const Places& places, int padded) {  // of 16 queries
    return Relative ? blocks_of(query - places.highest, query + 15 - places.lowest, padded) : Range{0, padded};
}

template <bool Relative> Range queries_of(int key, const Places& places, int padded) {  // of 32 keys
    return Relative ? blocks_of(key + places.lowest, key + 31 + places.highest, padded) : Range{0, padded};
}

// The lowest value that a maximum of scores takes. So a query that sees no key has weights of about 0, not all the same
// size as the largest, and nothing overflows.
constexpr float kLowest = -1e20f;
constexpr float kHidden = -1e29f;  // terms below hide
constexpr float kSmallest = 0x1p-126f;

// The scores of a key and 16 queries, times the factor, plus a term and that of their distances.
template <bool Relative>
inline __m512 scaled(const float* scores, __m512 factor, __m512 plus, const float* distances, int query, int key,
                     int padded) {
    if constexpr (Relative) plus = _mm512_add_ps(plus, _mm512_loadu_ps(distances + padded - 1 + query - key));
    return _mm512_fmadd_ps(_mm512_load_ps(scores), factor, plus);
}

inline __m512 minus(__m512 x) { return _mm512_sub_ps(_mm512_setzero_ps(), x); }

// log_sum: (length,) log2 of each query's sum, its factor included
template <int D, bool Relative>
void forward_head(const Head& head, const Places& places, const Sizes& size, float* log_sum, Scratch& scratch) {
    constexpr int N = D / 16;
    const int P = size.padded;
    const float* bias = places.bias;
    scratch.reset();
    bf16* rows = scratch.take<bf16>(P * D);
    bf16* transposed = scratch.take<bf16>(P * D);
    bf16* k = scratch.take<bf16>(P * D);
    bf16* v = scratch.take<bf16>(P * D);
    float* scores = scratch.take<float>(16 * P);  // tiles [P / 16] of 16 keys x 16 queries
    bf16* weights = scratch.take<bf16>(16 * P);  // B tiles [P / 32]: keys x queries
    float* context = scratch.take<float>(16 * D);  // tiles [N] of 16 columns of D x 16 queries
    pack_rows<D>(head.v, size.row, size.length, P, rows);
    pack_transposed<D>(rows, P, transposed);
    pack_columns<D>(transposed, P, v);
    pack_turned<D>(head.k, size.row, size.length, P, places.angles, k);
    pack_turned<D>(head.q, size.row, size.length, P, places.angles, rows);
    pack_transposed<D>(rows, P, transposed);
    const __m512 factor = _mm512_set1_ps(size.scale * kLog2e);
    const __m512i interleave = _mm512_load_si512(kHalves);

    for (int first = 0; first < size.length; first += 16) {
        const int count = std::min(16, size.length - first);
        const Range keys = keys_of<Relative>(first, places, P);
        scores_of<D>(k + keys.from * D, transposed + first * D, keys.to - keys.from, scores + 16 * keys.from);
        __m512 top0 = _mm512_set1_ps(kLowest), top1 = top0;
        const auto score = [&](int j, __m512 plus) {
            return scaled<Relative>(scores + 16 * j, factor, plus, places.distances, first, j, P);
        };
        for (int j = keys.from; j < keys.to; j += 2) {
            top0 = _mm512_max_ps(top0, score(j, _mm512_set1_ps(bias[j])));
            top1 = _mm512_max_ps(top1, score(j + 1, _mm512_set1_ps(bias[j + 1])));
        }
        const __m512 top = _mm512_max_ps(top0, top1), shift = minus(top);
        __m512 sum0 = _mm512_setzero_ps(), sum1 = sum0;
        for (int j = keys.from; j < keys.to; j += 2) {
            const __mmask16 keep0 = bias[j] == 0.f ? 0xffff : 0, keep1 = bias[j + 1] == 0.f ? 0xffff : 0;
            const __m512 x0 = exp2(score(j, shift), keep0);
            const __m512 x1 = exp2(score(j + 1, shift), keep1);
            sum0 = _mm512_add_ps(sum0, x0);
            sum1 = _mm512_add_ps(sum1, x1);
            _mm512_store_si512(weights + 16 * j, _mm512_permutexvar_epi16(interleave, to_bf16(x0, x1)));
        }
        alignas(64) float sums[16], tops[16];
        const __m512 sum = _mm512_max_ps(_mm512_add_ps(sum0, sum1), _mm512_set1_ps(kSmallest));
        const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.f), sum);
        _mm512_store_ps(sums, sum);
        _mm512_store_ps(tops, top);
        for (int i = 0; i < count; i++) log_sum[first + i] = tops[i] + std::log2(sums[i]);
        product_of_column<N>(v + keys.from * D, weights + 16 * keys.from, keys.blocks(), context);
        bf16* out = head.out + first * size.out_row;
        for (int n = 0; n < N; n++)
            write_transposed(context + n * kSquare, inverse, out + 16 * n, size.out_row, count);
    }
}

// delta: (padded,) the product of each row of the output with its gradient
template <int D> void fill_delta(const bf16* out, const bf16* grad, const Sizes& size, float* delta) {
    for (int i = 0; i < size.padded; i++) {
        __m512 dot = _mm512_setzero_ps();
        for (int s = 0; i < size.length && s < D; s += 32) {
            const __m512i o = _mm512_loadu_si512(out + i * size.out_row + s);
            const __m512i g = _mm512_loadu_si512(grad + i * size.out_row + s);
            dot = _mm512_dpbf16_ps(dot, (__m512bh)o, (__m512bh)g);
        }
        delta[i] = _mm512_reduce_add_ps(dot);
    }
}

// The query of a column of backward's grad_pairs and grad_q: of a block's queries, the first half has 0-3 8-11 16-19
// 24-27, and the second the others.
inline int query_of(int block, int half, int column) { return 32 * block + column / 4 * 8 + half * 4 + column % 4; }

// Writes the gradient of queries, (length, D), from tiles [padded / 32][D / 16][2] of 16 columns of D x 16 queries.
template <int D> void write_queries(float* tiles, const Angles& angles, const Sizes& size, bf16* grad) {
    constexpr int N = D / 16;
    const __m512 scale = _mm512_set1_ps(size.scale);
    const auto tile = [=](int block, int n, int half) { return tiles + ((block * N + n) * 2 + half) * kSquare; };
    for (int block = 0; block < size.padded / 32; block++)
        for (int half = 0; angles.cosines && half < 2; half++) {
            int rows[16];
            for (int c = 0; c < 16; c++) rows[c] = std::min(query_of(block, half, c), size.length - 1);
            for (int n = 0; n < N / 2; n++)
                turn_back<D>(tile(block, n, half), tile(block, n + N / 2, half), 16 * n, rows, angles);
        }
    for (int block = 0; block < size.padded / 32; block++)
        for (int n = 0; n < N; n++)
            for (int half = 0; half < 2; half++) {
                __m512i r[16];
                for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(tile(block, n, half) + 16 * i);
                transpose(r);
                for (int c = 0; c < 16; c++) {
                    const int query = query_of(block, half, c);
                    if (query >= size.length) continue;
                    const __m256i packed = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_castsi512_ps(r[c]), scale));
                    _mm256_storeu_si256(reinterpret_cast<__m256i*>(grad + query * size.row + 16 * n), packed);
                }
            }
}

// `grad.out` is the gradient that is given; those of q, k and v are written.
template <int D, bool Relative>
void backward_head(const Head& head, const Head& grad, const Places& places, const Sizes& size, const float* log_sum,
                   Scratch& scratch) {
    constexpr int N = D / 16;
    const int P = size.padded, blocks = P / 32;
    const float* bias = places.bias;
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

    pack_turned<D>(head.q, size.row, size.length, P, places.angles, rows);
    pack_transposed<D>(rows, P, q_transposed);
    pack_pairs<D>(rows, P, q_pairs);
    pack_rows<D>(grad.out, size.out_row, size.length, P, rows);
    pack_transposed<D>(rows, P, g_transposed);
    pack_pairs<D>(rows, P, g_pairs);
    pack_turned<D>(head.k, size.row, size.length, P, places.angles, k_rows);
    pack_transposed<D>(k_rows, P, rows);
    pack_columns<D>(rows, P, k_columns);
    pack_rows<D>(head.v, size.row, size.length, P, v_rows);
    std::memset(grad_q, 0, sizeof(float) * P * D);
    for (int i = 0; i < P; i++) sums[i] = i < size.length ? log_sum[i] : 0.f;  // a padded query's gradients are all 0
    fill_delta<D>(head.out, grad.out, size, delta);
    const __m512 factor = _mm512_set1_ps(size.scale * kLog2e);
    float ones[16], scales[16];
    for (int i = 0; i < 16; i++) ones[i] = 1.f, scales[i] = size.scale;

    for (int key = 0; key < P; key += 32) {
        const Range queries = queries_of<Relative>(key, places, P);
        const int from = queries.from / 32;
        for (int block = from; block < queries.to / 32; block++) {
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
                    const auto score = [&](int half, __m512 plus) {
                        const float* of = scores + at + half * kSquare;
                        const int query = 32 * block + 16 * half;
                        return scaled<Relative>(of, factor, plus, places.distances, query, key + r + i, P);
                    };
                    const __m512 p0 = exp2(score(0, minus(sum0)), keep), p1 = exp2(score(1, minus(sum1)), keep);
                    const __m512 g0 = _mm512_sub_ps(_mm512_load_ps(grad_weights + at), delta0);
                    const __m512 g1 = _mm512_sub_ps(_mm512_load_ps(grad_weights + at + kSquare), delta1);
                    const long to = ((r / 16) * blocks + block) * kTile + (r % 16 + i) * 32;
                    both[i] = to_bf16(_mm512_mul_ps(p0, g0), _mm512_mul_ps(p1, g1));
                    _mm512_store_si512(weights + to, to_bf16(p0, p1));
                    _mm512_store_si512(grad_scores + to, both[i]);
                }
                // columns in the order of query_of
                _mm512_store_si512(pairs + r * 16, _mm512_unpacklo_epi16(both[0], both[1]));
                _mm512_store_si512(pairs + r * 16 + kTile, _mm512_unpackhi_epi16(both[0], both[1]));
            }
        }
        for (int half = 0; half < 2 && key + 16 * half < size.length; half++) {
            const int first = key + 16 * half, count = std::min(16, size.length - first);
            const int skipped = half * blocks + from;
            product<D>(weights + skipped * kTile, kTile, g_pairs + queries.from * D, queries.blocks(), C);
            write_rows<D>(C, ones, grad.v + first * size.row, size.row, count);
            product<D>(grad_scores + skipped * kTile, kTile, q_pairs + queries.from * D, queries.blocks(), C);
            if (places.angles.cosines) turn_back<D>(C, first, count, places.angles);
            write_rows<D>(C, scales, grad.k + first * size.row, size.row, count);
        }
        for (int n = 0; n < N; n++)
            add_products(k_columns + (key / 32 * N + n) * kTile, grad_pairs + from * 2 * kTile, queries.blocks(),
                         grad_q + (from * N + n) * 2 * kSquare, N * 2 * kSquare);
    }
    write_queries<D>(grad_q, places.angles, size, grad.q);
}

constexpr int kLongest = 4096;

// What every head of a sequence shares: 0 for a key to attend to, -inf for padding.
void fill_bias(const bool* padding, int sequence, const Sizes& size, float* bias) {
    for (int j = 0; j < size.padded; j++)
        bias[j] = j >= size.length || (padding && padding[(long)sequence * size.length + j]) ? -INFINITY : 0.f;
}

Head at(const Head& all, const Sizes& size, int width, long b, int h) {
    const long from = b * size.length * size.row + h * width;
    return {all.q + from, all.k + from, all.v + from, all.out + b * size.length * size.out_row + h * width};
}

// What all heads of a call share of their places.
struct Given {
    const bool* padding;
    const float* distances;
    Angles angles;
};

Places places_of(int h, const float* bias, const Given& given, const Sizes& size) {
    Places places{bias, nullptr, given.angles, 1 - size.length, size.length - 1};
    if (!given.distances) return places;
    places.distances = given.distances + 2L * size.padded * h;
    const float* zero = places.distances + size.padded - 1;
    while (places.lowest < size.length && zero[places.lowest] < kHidden) places.lowest++;
    while (places.highest > places.lowest && zero[places.highest] < kHidden) places.highest--;
    return places;
}

// Calls work(sequence, head, places, scratch) for each pair of the two, on several threads.
template <class Work>
void for_each_head(const Sizes& size, int width, const Given& given, int threads, const Work& work) {
    // Heads of a sequence are neighbours in memory, so a thread takes them together where there are enough for all.
    const int items = size.batch * size.heads, together = std::max(1, std::min(size.heads, items / (8 * threads)));
#pragma omp parallel num_threads(threads)
    {
        const Products products;
        Scratch scratch((size_t)size.padded * (20 * width + 32 * 6 + 8) + 64 * width + 16384);  // what backward takes
        alignas(64) float bias[kLongest];
#pragma omp for schedule(dynamic, together) nowait
        for (int item = 0; item < items; item++) {
            fill_bias(given.padding, item / size.heads, size, bias);
            work(item / size.heads, item % size.heads, places_of(item % size.heads, bias, given, size), scratch);
        }
    }
}

template <int D, bool Relative>
void forward(const Head& all, const Given& given, const Sizes& size, int threads, float* log_sum) {
    for_each_head(size, D, given, threads, [&](long b, int h, const Places& places, Scratch& scratch) {
        forward_head<D, Relative>(at(all, size, D, b, h), places, size, log_sum + (b * size.heads + h) * size.length,
                                  scratch);
    });
}

template <int D, bool Relative>
void backward(const Head& all, const Head& grad, const Given& given, const Sizes& size, int threads,
              const float* log_sum) {
    for_each_head(size, D, given, threads, [&](long b, int h, const Places& places, Scratch& scratch) {
        backward_head<D, Relative>(at(all, size, D, b, h), at(grad, size, D, b, h), places, size,
                                   log_sum + (b * size.heads + h) * size.length, scratch);
    });
}

Sizes sizes(int batch, int length, int heads, int width, long row) {
    return {batch, length, heads, (length + 31) / 32 * 32, row, (long)heads * width, 1 / std::sqrt((float)width)};
}

Angles angles_of(const float* cos_sin, int length, int width) {
    return {cos_sin, cos_sin ? cos_sin + (long)length * (width / 2) : nullptr};
}

}  // namespace

extern "C" {

// Whether this process may use the instructions.
int attention_allowed() { return products_allowed(); }

// q, k, v (batch, length, heads, width) bf16, tokens row apart; padding (batch, length) or null; distances (heads,
// 2 padded) fp32 or null; cos_sin (2, length, width / 2) fp32 or null; out (batch, length, heads, width) bf16; log_sum
// (batch, heads, length) fp32. width is 32, 64 or 128; length at most 4096.
void attention_forward(bf16* q, bf16* k, bf16* v, const bool* padding, const float* distances, const float* cos_sin,
                       int batch, int length, int heads, int width, int row, int threads, bf16* out, float* log_sum) {
    const auto plain = width == 32 ? forward<32, false> : width == 64 ? forward<64, false> : forward<128, false>;
    const auto relative = width == 32 ? forward<32, true> : width == 64 ? forward<64, true> : forward<128, true>;
    (distances ? relative : plain)({q, k, v, out}, {padding, distances, angles_of(cos_sin, length, width)},
                                   sizes(batch, length, heads, width, row), threads, log_sum);
}

// The same, what forward gave, and the gradient of out; writes the gradients of q, k and v, laid out as these.
void attention_backward(bf16* q, bf16* k, bf16* v, const bool* padding, const float* distances, const float* cos_sin,
                        int batch, int length, int heads, int width, int row, int threads, bf16* out,
                        const float* log_sum, bf16* grad_out, bf16* grad_q, bf16* grad_k, bf16* grad_v) {
    const auto plain = width == 32 ? backward<32, false> : width == 64 ? backward<64, false> : backward<128, false>;
    const auto relative = width == 32 ? backward<32, true> : width == 64 ? backward<64, true> : backward<128, true>;
    (distances ? relative : plain)({q, k, v, out}, {grad_q, grad_k, grad_v, grad_out},
                                   {padding, distances, angles_of(cos_sin, length, width)},
                                   sizes(batch, length, heads, width, row), threads, log_sum);
}
}
