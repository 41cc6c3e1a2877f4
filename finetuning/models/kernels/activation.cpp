// GELU and its gradient, and gated activations with theirs; bf16 in and out, fp32 within.

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

// A gated activation is act(a) b, with a the first half of a row of x and b the second.
struct Gelu {
    static __m512 value(__m512 a) { return gelu(a); }
    static __m512 slope(__m512 a) { return gelu_slope(a); }
};

struct Silu {  // a s with s the logistic function, whose slope is s (1 - s)
    static __m512 logistic(__m512 a) {
        const __m512 one = _mm512_set1_ps(1.f), power = exp2(_mm512_mul_ps(a, _mm512_set1_ps(-kLog2e)), 0xffff);
        return _mm512_div_ps(one, _mm512_add_ps(one, power));
    }
    static __m512 value(__m512 a) { return _mm512_mul_ps(a, logistic(a)); }
    static __m512 slope(__m512 a) {
        const __m512 s = logistic(a);
        return _mm512_mul_ps(s, _mm512_fmadd_ps(a, _mm512_sub_ps(_mm512_set1_ps(1.f), s), _mm512_set1_ps(1.f)));
    }
};

// Calls work(at, gate, lanes) for every 16 of `rows` by `width` elements, on several threads. `at` is the place in the
// output, `gate` that of a in x; b is `width` further.
template <class Work> void for_each_gate(long rows, long width, int threads, const Work& work) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        const long at = row * width, whole = width / 16 * 16;
        for (long i = 0; i < whole; i += 16) work(at + i, 2 * at + i, All());
        if (whole < width) work(at + whole, 2 * at + whole, Some{(__mmask16)((1 << (width - whole)) - 1)});
    }
}

template <class Act> void gated_forward(const bf16* x, long rows, long width, int threads, bf16* h) {
    for_each_gate(rows, width, threads, [=](long at, long gate, auto lanes) {
        lanes.store(h + at, _mm512_mul_ps(Act::value(lanes.load(x + gate)), lanes.load(x + gate + width)));
    });
}

template <class Act>
void gated_again(const bf16* x, const bf16* grad, long rows, long width, int threads, bf16* grad_x, bf16* h) {
    for_each_gate(rows, width, threads, [=](long at, long gate, auto lanes) {
        const __m512 a = lanes.load(x + gate), b = lanes.load(x + gate + width), g = lanes.load(grad + at);
        const __m512 value = Act::value(a);
        lanes.store(h + at, _mm512_mul_ps(value, b));
        lanes.store(grad_x + gate, _mm512_mul_ps(_mm512_mul_ps(g, b), Act::slope(a)));
        lanes.store(grad_x + gate + width, _mm512_mul_ps(g, value));
    });
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

// h = act(a) b: x (rows, 2 width), h (rows, width)
void geglu_forward(const bf16* x, long rows, long width, int threads, bf16* h) {
    gated_forward<Gelu>(x, rows, width, threads, h);
}
void swiglu_forward(const bf16* x, long rows, long width, int threads, bf16* h) {
    gated_forward<Silu>(x, rows, width, threads, h);
}

// h again, and the gradient of x from that of h
void geglu_again(const bf16* x, const bf16* grad, long rows, long width, int threads, bf16* grad_x, bf16* h) {
    gated_again<Gelu>(x, grad, rows, width, threads, grad_x, h);
}
void swiglu_again(const bf16* x, const bf16* grad, long rows, long width, int threads, bf16* grad_x, bf16* h) {
    gated_again<Silu>(x, grad, rows, width, threads, grad_x, h);
}
}
