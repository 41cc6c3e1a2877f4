// Products of packed tiles on AMX's tile registers; products_avx512.h has the same ones without them.

#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "packing.h"

namespace {

// Asks the kernel for the tiles' registers. Returns whether this process may use them.
inline bool products_allowed() {
    constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(2)
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Sets this thread's tiles up, and gives them back as they were: other libraries in the process use them too.
class Products {
  public:
    Products() {
        _tile_storeconfig(&before_);
        const TileConfig config;
        _tile_loadconfig(&config);
    }
    ~Products() {
        if (before_.palette) _tile_loadconfig(&before_);
        else _tile_release();
    }

  private:
    TileConfig before_;
};

// C (16 x D) = sum over `count` steps of A (16 x 32) B (32 x D); C as D / 16 tiles of fp32
template <int D> void product(const bf16* A, long A_step, const bf16* B, int count, float* C) {
    constexpr int Together = D == 32 ? 2 : 4;  // tiles of C
    for (int n = 0; n < D / 16; n += Together, B += Together * kTile, C += Together * kSquare) {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (Together == 4) {
            _tile_zero(2);
            _tile_zero(3);
        }
        const bf16 *a = A, *b = B;
        for (int i = 0; i < count; i++, a += A_step, b += D / 16 * kTile) {
            _tile_loadd(4, a, 64);
            _tile_loadd(5, b, 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, b + kTile, 64);
            _tile_dpbf16ps(1, 4, 6);
            if constexpr (Together == 4) {
                _tile_loadd(7, b + 2 * kTile, 64);
                _tile_dpbf16ps(2, 4, 7);
                _tile_loadd(5, b + 3 * kTile, 64);
                _tile_dpbf16ps(3, 4, 5);
            }
        }
        _tile_stored(0, C, 64);
        _tile_stored(1, C + kSquare, 64);
        if constexpr (Together == 4) {
            _tile_stored(2, C + 2 * kSquare, 64);
            _tile_stored(3, C + 3 * kSquare, 64);
        }
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
    if constexpr (D > 32) _tile_loadd(7, B + kTile, 64);
    if constexpr (D > 64) {
        _tile_loadd(2, B + 2 * kTile, 64);
        _tile_loadd(3, B + 3 * kTile, 64);
    }
    for (int j = 0; j < keys; j += 32, A += 32 * D, C += 2 * kSquare) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_loadd(4, A, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, A + 16 * D, 64);
        _tile_dpbf16ps(1, 5, 6);
        if constexpr (D > 32) {
            _tile_loadd(4, A + kTile, 64);
            _tile_dpbf16ps(0, 4, 7);
            _tile_loadd(5, A + 16 * D + kTile, 64);
            _tile_dpbf16ps(1, 5, 7);
        }
        if constexpr (D > 64) {
            _tile_loadd(4, A + 2 * kTile, 64);
            _tile_dpbf16ps(0, 4, 2);
            _tile_loadd(5, A + 16 * D + 2 * kTile, 64);
            _tile_dpbf16ps(1, 5, 2);
            _tile_loadd(4, A + 3 * kTile, 64);
            _tile_dpbf16ps(0, 4, 3);
            _tile_loadd(5, A + 16 * D + 3 * kTile, 64);
            _tile_dpbf16ps(1, 5, 3);
        }
        _tile_stored(0, C, 64);
        _tile_stored(1, C + kSquare, 64);
    }
}

// C (16 Tiles x 16, as tiles) = sum over `count` steps of A (16 Tiles x 32) B (32 x 16); a step of A is `Tiles` tiles
template <int Tiles> void product_of_column(const bf16* A, const bf16* B, int count, float* C) {
    for (int n = 0; n < Tiles; n += 2, A += 2 * kTile, C += 2 * kSquare) {
        _tile_zero(0);
        _tile_zero(1);
        for (int j = 0; j < count; j++) {
            _tile_loadd(4, A + j * Tiles * kTile, 64);
            _tile_loadd(6, B + j * kTile, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, A + (j * Tiles + 1) * kTile, 64);
            _tile_dpbf16ps(1, 5, 6);
        }
        _tile_stored(0, C, 64);
        _tile_stored(1, C + kSquare, 64);
    }
}

// C[i] (16 x 32, as 2 tiles) += A (16 x 32) B[i] (32 x 32), for i below `count`; C[i] are C_step apart
inline void add_products(const bf16* A, const bf16* B, int count, float* C, long C_step) {
    _tile_loadd(4, A, 64);
    for (int i = 0; i < count; i++, B += 2 * kTile, C += C_step) {
        _tile_loadd(0, C, 64);
        _tile_loadd(5, B, 64);
        _tile_dpbf16ps(0, 4, 5);
        _tile_stored(0, C, 64);
        _tile_loadd(1, C + kSquare, 64);
        _tile_loadd(6, B + kTile, 64);
        _tile_dpbf16ps(1, 4, 6);
        _tile_stored(1, C + kSquare, 64);
    }
}

}  // namespace
