// Layer normalization of a sum of two inputs, rounded for the static layer after it.

namespace {

constexpr int64_t FEW_VALUES = 1 << 14;  // that take less time than to wake up another thread
constexpr int PARALLEL = 4;              // sums, so that none waits for itself

struct Norm {
    const float *first, *second;  // the second may be missing
    const float *weight, *bias;   // either may be missing
    float *out;
    uint8_t *rounded;  // may be missing
    int64_t width;
    float epsilon;
    Rounding rounding;
    int64_t first_row;            // that lies at `first`
    const int32_t *first_places;  // rows of `first`, instead
    const int32_t *places;        // rows of what else there is
};

inline float total(const __m512 *sums) {
    return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

// `WHOLE` where the width is a multiple of what the loops take at a time, so that no lane is missing.
template <bool WHOLE>
void normalize_row(const Norm &norm, int64_t row) {
    const int64_t start = row_at(norm.places, row) * norm.width;
    const float *first = norm.first + (row_at(norm.first_places, row) - norm.first_row) * norm.width;
    float *out = norm.out + start;
    const auto there = [&](int64_t at) __attribute__((always_inline)) {
        return WHOLE ? (__mmask16)0xffff : lanes(norm.width - at);
    };
    __m512 sums[PARALLEL], squares[PARALLEL];
    UNROLL for (int i = 0; i < PARALLEL; i++) sums[i] = squares[i] = _mm512_setzero_ps();
    for (int64_t from = 0; from < norm.width; from += PARALLEL * LANES)
        UNROLL for (int i = 0; i < PARALLEL; i++) {
            const int64_t at = from + i * LANES;
            __m512 value = _mm512_maskz_loadu_ps(there(at), first + at);
            if (norm.second != nullptr) {
                const float *second = norm.second + start + at;
                value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(there(at), second));
                _mm_prefetch((const char *)(second + norm.width), _MM_HINT_T0);  // of the next row, in all likelihood
            }
            sums[i] = _mm512_add_ps(sums[i], value);
            _mm512_mask_storeu_ps(out + at, there(at), value);
        }
    const __m512 mean = _mm512_set1_ps(total(sums) / (float)norm.width);
    for (int64_t from = 0; from < norm.width; from += PARALLEL * LANES)
        UNROLL for (int i = 0; i < PARALLEL; i++) {
            const int64_t at = from + i * LANES;
            const __m512 value = _mm512_maskz_sub_ps(there(at), _mm512_maskz_loadu_ps(there(at), out + at), mean);
            squares[i] = _mm512_fmadd_ps(value, value, squares[i]);
        }
    const float variance = total(squares) / (float)norm.width;
    const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(variance + norm.epsilon));
    for (int64_t from = 0; from < norm.width; from += PARALLEL * LANES) {
        __m512 values[PARALLEL];
        UNROLL for (int i = 0; i < PARALLEL; i++) {
            const int64_t at = from + i * LANES;
            __m512 value = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(there(at), out + at), mean), inverse);
            if (norm.weight != nullptr) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(there(at), norm.weight + at));
            if (norm.bias != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(there(at), norm.bias + at));
            _mm512_mask_storeu_ps(out + at, there(at), value);
            values[i] = value;
        }
        if (norm.rounded == nullptr) continue;
        _mm512_mask_storeu_epi8(norm.rounded + start + from, WHOLE ? ~0ull : bytes(norm.width - from),
                                to_uint8(values, norm.rounding));
    }
}

void normalize_row(const Norm &norm, int64_t row) {
    return norm.width % (PARALLEL * LANES) == 0 ? normalize_row<true>(norm, row) : normalize_row<false>(norm, row);
}

void normalize(const Norm &norm, int64_t rows, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(rows * norm.width < FEW_VALUES ? 1 : (int)threads)
    for (int64_t row = 0; row < rows; row++) normalize_row(norm, row);
}

}  // namespace
