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
#include <vector>

#define UNROLL _Pragma("GCC unroll 32")  // whole, so that sums live in registers

namespace {

constexpr int ROWS = 6;     // rows of the left factor at a time
constexpr int LANES = 16;   // values of 32 bits in a register
constexpr int COLUMNS = 4;  // registers of the right factor at a time: 24 sums, of 32 registers
constexpr float LOG2_E = 1.44269504088896340736f;

inline int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

inline __mmask64 bytes(int64_t left) { return left >= 64 ? ~0ull : (1ull << (left > 0 ? left : 0)) - 1; }

inline __mmask16 lanes(int64_t left) { return left >= LANES ? 0xffff : (1u << (left > 0 ? left : 0)) - 1; }

// A batch of sentences that are padded at their ends, whose padding is not computed.
struct Kept {
    int64_t batch = 0, length = 0;
    std::vector<int32_t> lengths;  // tokens of each sentence
    std::vector<int32_t> rows;     // of tokens, among batch * length rows

    bool is_of(int64_t sentences, int64_t tokens) const { return batch > 0 && sentences == batch && tokens == length; }
};

// The row that a list of rows has at a place; without a list, all follow each other.
inline int64_t row_at(const int32_t *rows, int64_t place) { return rows == nullptr ? place : rows[place]; }

// Makes padding 0 in rows of `bytes`: nothing may find a NaN there, which no mask hides.
void clear(const Kept &kept, void *output, int64_t bytes, int64_t threads) {
    const int64_t missing = kept.batch * kept.length - (int64_t)kept.rows.size();
#pragma omp parallel for schedule(static) num_threads(missing *bytes < 1 << 17 ? 1 : (int)threads)
    for (int64_t sentence = 0; sentence < kept.batch; sentence++) {
        const int64_t length = kept.lengths[sentence];
        std::memset((char *)output + (sentence * kept.length + length) * bytes, 0, (kept.length - length) * bytes);
    }
}

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
inline __m512i to_int32(__m512 value, const Rounding &by) {
    const __m512 inverse = _mm512_set1_ps(by.inverse), most = _mm512_set1_ps(1024.0f);
    // Within what is kept after all, so that the correction of an infinite one is not NaN.
    const __m512 product = _mm512_max_ps(_mm512_mul_ps(value, inverse), _mm512_sub_ps(_mm512_setzero_ps(), most));
    const __m512 quotient = _mm512_min_ps(product, most);
    const __m512 rest = _mm512_fnmadd_ps(quotient, _mm512_set1_ps(by.step), value);
    const __m512 place = _mm512_add_ps(_mm512_fmadd_ps(rest, inverse, quotient), _mm512_set1_ps(by.zero));
    return _mm512_cvtps_epi32(_mm512_min_ps(place, _mm512_set1_ps(127.0f)));  // what is too low becomes the lowest
}

inline __m128i to_uint8(__m512 value, const Rounding &by) {
    return _mm_xor_si128(_mm512_cvtsepi32_epi8(to_int32(value, by)), _mm_set1_epi8(-128));
}

// The same for four registers, in fewer instructions.
inline __m512i to_uint8(const __m512 *values, const Rounding &by) {
    const __m512i low = _mm512_packs_epi32(to_int32(values[0], by), to_int32(values[1], by));
    const __m512i high = _mm512_packs_epi32(to_int32(values[2], by), to_int32(values[3], by));
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_xor_si512(_mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)), _mm512_set1_epi8(-128));
}

}  // namespace
