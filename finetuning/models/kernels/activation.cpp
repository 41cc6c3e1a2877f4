// GELU and its gradient; bf16 in and out, fp32 within.

#include <algorithm>

#include "gelu.h"
#include "packing.h"

namespace {

constexpr long kChunk = 1 << 14;  // elements that a thread takes at once

// Masked stores are slow on some processors, so only the last few elements are stored with one.
struct All {
    static __m512 load(const bf16* x) { return load_bf16(x); }
    static void store(bf16* x, __m512 value) { store_bf16(x, value); }
};

struct Some {
    __mmask16 lanes;
    __m512 load(const bf16* x) const { return from_bf16(_mm256_maskz_loadu_epi16(lanes, x)); }
    void store(bf16* x, __m512 value) const {
        _mm256_mask_storeu_epi16(x, lanes, (__m256i)_mm512_cvtneps_pbh(value));
    }
};

// Calls work(at, lanes) for every 16 of `count` elements, on several threads.
template <class Work> void for_each_sixteen(long count, int threads, const Work& work) {
    const long whole = count / 16 * 16;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long start = 0; start < whole; start += kChunk)
        for (long at = start, end = std::min(whole, start + kChunk); at < end; at += 16) work(at, All());
    if (whole < count) work(whole, Some{(__mmask16)((1 << (count - whole)) - 1)});
}

}  // namespace

extern "C" {

// y = gelu(x), `count` elements each
void gelu_forward(const bf16* x, long count, int threads, bf16* y) {
    for_each_sixteen(count, threads, [=](long at, auto lanes) {
        lanes.store(y + at, gelu(lanes.load(x + at)));
    });
}

// grad *= gelu'(x), and h = gelu(x)
void gelu_again(const bf16* x, long count, int threads, bf16* grad, bf16* h) {
    for_each_sixteen(count, threads, [=](long at, auto lanes) {
        const __m512 value = lanes.load(x + at);
        lanes.store(h + at, gelu(value));
        lanes.store(grad + at, _mm512_mul_ps(lanes.load(grad + at), gelu_slope(value)));
    });
}

// grad_x = grad gelu'(x)
void gelu_backward(const bf16* x, const bf16* grad, long count, int threads, bf16* grad_x) {
    for_each_sixteen(count, threads, [=](long at, auto lanes) {
        lanes.store(grad_x + at, _mm512_mul_ps(lanes.load(grad + at), gelu_slope(lanes.load(x + at))));
    });
}
}
