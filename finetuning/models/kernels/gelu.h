// GELU, x Phi(x) with Phi the normal distribution function, and its slope Phi(x) + x phi(x).
//
// Both follow from a function of |x| that is read from a table: Phi(-t), and Phi(-t) - t phi(t), the slope at -t. Each of
// 32 intervals has a cubic polynomial, whose absolute error is below 3e-7.

#pragma once

#include <cmath>

#include "lanes.h"

// Each source file has its own copy, so that nothing of it is visible outside.
namespace {

constexpr int kIntervals = 32;
constexpr float kPerUnit = kIntervals / 5.6f;  // intervals for each unit of t; beyond the last one the function is 0

struct Cubics {
    Table coefficients;  // of u^0 to u^3 for each interval, with u from 0 to 1

    // Interpolates at the Chebyshev points, which spread the error evenly.
    explicit Cubics(double (*function)(double)) {
        for (int i = 0; i < kIntervals; i++) {
            double at[4], divided[4], monomials[4] = {};
            for (int j = 0; j < 4; j++) {
                at[j] = 0.5 - 0.5 * std::cos((2 * j + 1) * M_PI / 8);
                divided[j] = i + 1 < kIntervals ? function((i + at[j]) / kPerUnit) : 0;
            }
            for (int order = 1; order < 4; order++)
                for (int j = 3; j >= order; j--) divided[j] = (divided[j] - divided[j - 1]) / (at[j] - at[j - order]);
            for (int j = 3; j >= 0; j--) {  // Newton's form, multiplied out: monomials = monomials (u - at[j]) + divided[j]
                for (int k = 3; k > 0; k--) monomials[k] = monomials[k - 1] - at[j] * monomials[k];
                monomials[0] = divided[j] - at[j] * monomials[0];
            }
            for (int k = 0; k < 4; k++) coefficients.set(i, k, float(monomials[k]));
        }
    }

    Floats operator()(Floats t) const {
        const Floats place = min(mul(t, in_all(kPerUnit)), in_all(kIntervals - 0.5f));
        const Ints i = truncated(place);
        const Floats u = sub(place, to_floats(i));
        Floats of[4];
        coefficients.look_up(i, of);
        return fma(fma(fma(of[3], u, of[2]), u, of[1]), u, of[0]);
    }
};

const Cubics kTail([](double t) { return 0.5 * std::erfc(t * M_SQRT1_2); });
const Cubics kSlope([](double t) {
    return 0.5 * std::erfc(t * M_SQRT1_2) - t * std::exp(-0.5 * t * t) * M_2_SQRTPI * M_SQRT1_2 / 2;
});

inline Floats gelu(Floats x) {
    const Floats t = abs(x);
    return fnma(t, kTail(t), max(x, zeros()));
}

inline Floats gelu_slope(Floats x) {
    const Floats slope = kSlope(abs(x));
    return where_positive(x, sub(in_all(1.f), slope), slope);
}

}  // namespace
