// What the kernels for CPUs with AVX-512 VNNI share. It and they are compiled as one text.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>

#define UNROLL _Pragma("GCC unroll 32")  // whole, so that sums live in registers

namespace {

constexpr int ROWS = 6;     // rows of the left factor at a time
constexpr int LANES = 16;   // values of 32 bits in a register
constexpr int COLUMNS = 4;  // registers of the right factor at a time: 24 sums, of 32 registers
constexpr float LOG2_E = 1.44269504088896340736f;

inline int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

inline __mmask16 lanes(int64_t left) { return left >= LANES ? 0xffff : (1u << (left > 0 ? left : 0)) - 1; }

// `factor` 2^x, with a relative error below 3e-6.
inline __m512 power(__m512 x, float factor) {
    const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(9.582851702e-03f * factor);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(5.590642663e-02f * factor));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(2.402409865e-01f * factor));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(6.931241931e-01f * factor));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(factor));
    return _mm512_scalef_ps(y, whole);
}

// What is rounded to uint8: `clamp(round(value / step + zero), 0, 255)`, as `quantize_static` does it.
struct Rounding {
    float step = 1.0f, inverse = 1.0f, zero = -128.0f;

    Rounding() = default;
    Rounding(double step, int64_t zero) : step((float)step), inverse(1.0f / (float)step), zero((float)(zero - 128)) {}
};

// The quotient is that of a division, which takes several times longer; with another one, values between two integers
// would go to the other of them than in `quantize_static`. (P. Markstein, "Computation of elementary functions on the
// IBM RISC System/6000 processor", 1990, theorem 8: a product with the reciprocal, and one correction.)
inline __m128i to_uint8(__m512 value, const Rounding &by) {
    const __m512 inverse = _mm512_set1_ps(by.inverse);
    __m512 quotient = _mm512_mul_ps(value, inverse);
    const __m512 rest = _mm512_fnmadd_ps(quotient, _mm512_set1_ps(by.step), value);
    const __mmask16 endless = _mm512_fpclass_ps_mask(rest, 0x99);  // NaN or infinite, as a quotient that is too large is
    quotient = _mm512_mask3_fmadd_ps(rest, inverse, quotient, _knot_mask16(endless));
    const __m512 place = _mm512_min_ps(_mm512_add_ps(quotient, _mm512_set1_ps(by.zero)), _mm512_set1_ps(127.0f));
    const __m512i shifted = _mm512_add_epi32(_mm512_cvtps_epi32(place), _mm512_set1_epi32(128));
    return _mm512_cvtusepi32_epi8(_mm512_max_epi32(shifted, _mm512_setzero_si512()));
}

}  // namespace
