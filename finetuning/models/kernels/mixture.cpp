// Each sequence's tokens mixed by a few heads, softmax(U X^T scale + bias) X, and its gradient, bf16 in and out.
//
// Heads are few (12) and rows wide (384), so that a token's row is read once for all heads, as it lies in memory, and
// nothing is packed into tiles. All arithmetic but the operands of the products is fp32.

#include <algorithm>
#include <cmath>

#include "packing.h"

namespace {

struct Sizes {
    int batch, heads, length, width;
    float scale;
    const float* bias;  // (heads, padded) in log2, the same for all sequences; or null
    int padded() const { return (length + 15) / 16 * 16; }
};

// What belongs to one sequence: heads (heads, width), tokens (length, width), padding (length) or null.
struct Sequence {
    const bf16 *heads, *tokens;
    const bool* padding;
};

// out[i][j] = a[i] . b[j], for m rows of a and n of b
void dots(const bf16* a, int m, const bf16* b, int n, long width, float* out, long out_row) {
    for (int j = 0; j < n; j += 4)
        for (int i = 0; i < m; i += 4) {
            const bf16 *left[4], *right[4];
            for (int k = 0; k < 4; k++) left[k] = a + std::min(i + k, m - 1) * width;
            for (int k = 0; k < 4; k++) right[k] = b + std::min(j + k, n - 1) * width;
            __m512 sums[4][4];
            for (auto& row : sums) for (auto& sum : row) sum = _mm512_setzero_ps();
            for (long s = 0; s < width; s += 32) {
                __m512bh y[4];
                for (int q = 0; q < 4; q++) y[q] = (__m512bh)_mm512_loadu_si512(right[q] + s);
                for (int p = 0; p < 4; p++) {
                    const __m512bh x = (__m512bh)_mm512_loadu_si512(left[p] + s);
                    for (int q = 0; q < 4; q++) sums[p][q] = _mm512_dpbf16_ps(sums[p][q], x, y[q]);
                }
            }
            for (int p = 0; p < 4 && i + p < m; p++)
                for (int q = 0; q < 4 && j + q < n; q++) out[(i + p) * out_row + j + q] = _mm512_reduce_add_ps(sums[p][q]);
        }
}

// out[i] = factors[i] * (sum over pairs of rows r, r' of weights[i][r] r + weights[i][r'] r'); rows(pair, 0 or 1)
template <class Rows>
void combine(const bf16* weights, long weights_row, int m, const Rows& rows, int pairs, long width, const float* factors,
             bf16* out) {
    constexpr int kAtOnce = 6;
    const __m512i first = _mm512_load_si512(kFirst), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int i = 0; i < m; i += kAtOnce)
        for (long c = 0; c < width; c += 32) {
            const bf16* own[kAtOnce];
            __m512 low[kAtOnce], high[kAtOnce];
            for (int k = 0; k < kAtOnce; k++) {
                own[k] = weights + std::min(i + k, m - 1) * weights_row;
                low[k] = high[k] = _mm512_setzero_ps();
            }
            for (int pair = 0; pair < pairs; pair++) {
                const __m512i a = _mm512_loadu_si512(rows(pair, 0) + c), b = _mm512_loadu_si512(rows(pair, 1) + c);
                const __m512bh left = (__m512bh)_mm512_permutex2var_epi16(a, first, b);
                const __m512bh right = (__m512bh)_mm512_permutex2var_epi16(a, second, b);
                for (int k = 0; k < kAtOnce; k++) {
                    int both;
                    std::memcpy(&both, own[k] + 2 * pair, sizeof both);
                    const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
                    low[k] = _mm512_dpbf16_ps(low[k], weight, left);
                    high[k] = _mm512_dpbf16_ps(high[k], weight, right);
                }
            }
            for (int k = 0; k < kAtOnce && i + k < m; k++) {
                const __m512 factor = _mm512_set1_ps(factors ? factors[i + k] : 1.f);
                const __m512i both = to_bf16(_mm512_mul_ps(low[k], factor), _mm512_mul_ps(high[k], factor));
                _mm512_storeu_si512(out + (i + k) * width + c, both);
            }
        }
}

// Of 16 tokens from t on, those that are there and no padding.
__mmask16 kept(const bool* padding, int t, int length) {
    const __mmask16 inside = length - t >= 16 ? 0xffff : (1 << (length - t)) - 1;
    if (padding == nullptr) return inside;
    return _mm_mask_cmpeq_epi8_mask(inside, _mm_maskz_loadu_epi8(inside, padding + t), _mm_setzero_si128());
}

// Two tokens; behind the last one itself again, whose weight is 0.
auto pairs_of_tokens(const Sequence& at, const Sizes& size) {
    return [&at, &size](int pair, int i) { return at.tokens + std::min(2 * pair + i, size.length - 1) * (long)size.width; };
}

// A head's scores of 16 tokens, times the factor, minus a term and with their bias.
inline __m512 scaled(const float* scores, __m512 factor, __m512 minus, const Sizes& size, int h, int t) {
    const long at = h * size.padded() + t;
    if (size.bias != nullptr) minus = _mm512_sub_ps(minus, _mm512_loadu_ps(size.bias + at));
    return _mm512_fmsub_ps(_mm512_load_ps(scores + at), factor, minus);
}

// mixed: (heads, width); log_sum: (heads,) log2 of each head's sum, its factor included
void forward_sequence(const Sequence& at, const Sizes& size, bf16* mixed, float* log_sum, Scratch& scratch) {
    const int H = size.heads, T = size.length, P = size.padded();
    scratch.reset();
    float* scores = scratch.take<float>(H * P);
    bf16* weights = scratch.take<bf16>(H * P);
    float* inverses = scratch.take<float>(H);
    dots(at.heads, H, at.tokens, T, size.width, scores, P);
    const __m512 factor = _mm512_set1_ps(size.scale * kLog2e);
    for (int h = 0; h < H; h++) {
        __m512 tops = _mm512_set1_ps(-INFINITY), sums = _mm512_setzero_ps();
        for (int t = 0; t < P; t += 16) {
            const __m512 x = scaled(scores, factor, _mm512_setzero_ps(), size, h, t);
            tops = _mm512_mask_max_ps(tops, kept(at.padding, t, T), tops, x);
        }
        const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(tops));
        for (int t = 0; t < P; t += 16) {
            const __m512 x = scaled(scores, factor, top, size, h, t);
            const __m512 weight = exp2(x, kept(at.padding, t, T));
            sums = _mm512_add_ps(sums, weight);
            store_bf16(weights + h * P + t, weight);
        }
        const float sum = _mm512_reduce_add_ps(sums);
        inverses[h] = 1.f / sum;
        log_sum[h] = _mm512_cvtss_f32(top) + std::log2(sum);
    }
    combine(weights, P, H, pairs_of_tokens(at, size), (T + 1) / 2, size.width, inverses, mixed);
}

// grad_heads: (heads, width); grad_tokens: (length, width), or null
void backward_sequence(const Sequence& at, const Sizes& size, const bf16* mixed, const float* log_sum, const bf16* grad,
                       bf16* grad_heads, bf16* grad_tokens, Scratch& scratch) {
    const int H = size.heads, T = size.length, P = size.padded();
    scratch.reset();
    float* scores = scratch.take<float>(H * P);
    float* grad_weights = scratch.take<float>(H * P);
    bf16* grad_scores = scratch.take<bf16>(H * P);
    bf16* both = scratch.take<bf16>(2 * H * P);  // (tokens, heads, 2): a weight and the gradient of its score
    dots(at.heads, H, at.tokens, T, size.width, scores, P);
    dots(grad, H, at.tokens, T, size.width, grad_weights, P);
    const __m512 factor = _mm512_set1_ps(size.scale * kLog2e), scale = _mm512_set1_ps(size.scale);
    for (int h = 0; h < H; h++) {
        float dot;
        dots(grad + h * (long)size.width, 1, mixed + h * (long)size.width, 1, size.width, &dot, 1);
        const __m512 delta = _mm512_set1_ps(dot), sum = _mm512_set1_ps(log_sum[h]);
        for (int t = 0; t < P; t += 16) {
            const __m512 x = scaled(scores, factor, sum, size, h, t);
            const __mmask16 keep = kept(at.padding, t, T);
            const __m512 weight = exp2(x, keep), slope = _mm512_sub_ps(_mm512_load_ps(grad_weights + h * P + t), delta);
            const __m512 grad_score = _mm512_maskz_mul_ps(keep, _mm512_mul_ps(weight, slope), scale);
            store_bf16(grad_scores + h * P + t, grad_score);
            alignas(64) bf16 pairs[32];
            _mm512_store_si512(pairs, _mm512_permutexvar_epi16(_mm512_load_si512(kHalves), to_bf16(weight, grad_score)));
            for (int i = 0; i < 16; i++) std::memcpy(both + ((t + i) * H + h) * 2L, pairs + 2 * i, 4);
        }
    }
    combine(grad_scores, P, H, pairs_of_tokens(at, size), (T + 1) / 2, size.width, nullptr, grad_heads);
    if (grad_tokens == nullptr) return;
    const auto rows = [&](int h, int i) { return (i == 0 ? grad : at.heads) + h * (long)size.width; };
    combine(both, 2 * H, T, rows, H, size.width, nullptr, grad_tokens);
}

// Calls work(sequence's number, sequence, scratch) for each, on several threads.
template <class Work>
void for_each_sequence(const bf16* heads, const bf16* tokens, const bool* padding, const Sizes& size, int threads,
                       const Work& work) {
#pragma omp parallel num_threads(threads)
    {
        Scratch scratch((size.heads * (size_t)size.padded() * 16 + size.heads * 4 + 1024) / 64 * 64);  // what backward takes
#pragma omp for schedule(dynamic, 1) nowait
        for (long b = 0; b < size.batch; b++) {
            const bool* own = padding ? padding + b * size.length : nullptr;
            work(b, Sequence{heads + b * size.heads * size.width, tokens + b * size.length * size.width, own}, scratch);
        }
    }
}

}  // namespace

extern "C" {

// heads, mixed: (batch, heads, width), tokens: (batch, length, width), bf16, the width a multiple of 32;
// padding: (batch, length) or null; bias: (heads, length rounded up to a multiple of 16) fp32 or null;
// log_sum: (batch, heads) fp32
void mixture_forward(const bf16* heads, const bf16* tokens, const bool* padding, const float* bias, int batch,
                     int head_count, int length, int width, float scale, int threads, bf16* mixed, float* log_sum) {
    const Sizes size{batch, head_count, length, width, scale, bias};
    for_each_sequence(heads, tokens, padding, size, threads, [&](long b, const Sequence& at, Scratch& scratch) {
        forward_sequence(at, size, mixed + b * head_count * width, log_sum + b * head_count, scratch);
    });
}

// The same, what forward gave, and the gradient of mixed; grad_tokens: like tokens, or null
void mixture_backward(const bf16* heads, const bf16* tokens, const bool* padding, const float* bias, int batch,
                      int head_count, int length, int width, float scale, int threads, const bf16* mixed,
                      const float* log_sum, const bf16* grad, bf16* grad_heads, bf16* grad_tokens) {
    const Sizes size{batch, head_count, length, width, scale, bias};
    for_each_sequence(heads, tokens, padding, size, threads, [&](long b, const Sequence& at, Scratch& scratch) {
        const long of_heads = b * head_count * width, of_tokens = b * length * width;
        backward_sequence(at, size, mixed + of_heads, log_sum + b * head_count, grad + of_heads, grad_heads + of_heads,
                          grad_tokens ? grad_tokens + of_tokens : nullptr, scratch);
    });
}
}
