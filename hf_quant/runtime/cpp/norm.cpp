// Layer normalization of a sum of two inputs, rounded for the static layer after it.

namespace {

constexpr int64_t FEW_VALUES = 1 << 14;  // that take less time than to wake up another thread

struct Norm {
    const float *first, *second;  // the second may be missing
    const float *weight, *bias;   // either may be missing
    float *out;
    uint8_t *rounded;  // may be missing
    int64_t width;
    float epsilon;
    Rounding rounding;
    int64_t first_row;  // that lies at `first`
};

void normalize_row(const Norm &norm, int64_t row) {
    const int64_t start = row * norm.width;
    const float *first = norm.first + start - norm.first_row * norm.width;
    float *out = norm.out + start;
    __m512 total = _mm512_setzero_ps();
    for (int64_t at = 0; at < norm.width; at += LANES) {
        const __mmask16 there = lanes(norm.width - at);
        __m512 value = _mm512_maskz_loadu_ps(there, first + at);
        if (norm.second != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(there, norm.second + start + at));
        total = _mm512_add_ps(total, value);
        _mm512_mask_storeu_ps(out + at, there, value);
    }
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(total) / (float)norm.width);
    __m512 squares = _mm512_setzero_ps();
    for (int64_t at = 0; at < norm.width; at += LANES) {
        const __mmask16 there = lanes(norm.width - at);
        const __m512 value = _mm512_maskz_sub_ps(there, _mm512_maskz_loadu_ps(there, out + at), mean);
        squares = _mm512_fmadd_ps(value, value, squares);
    }
    const float variance = _mm512_reduce_add_ps(squares) / (float)norm.width;
    const __m512 inverse = _mm512_set1_ps(1.0f / std::sqrt(variance + norm.epsilon));
    for (int64_t at = 0; at < norm.width; at += LANES) {
        const __mmask16 there = lanes(norm.width - at);
        __m512 value = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(there, out + at), mean), inverse);
        if (norm.weight != nullptr) value = _mm512_mul_ps(value, _mm512_maskz_loadu_ps(there, norm.weight + at));
        if (norm.bias != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(there, norm.bias + at));
        _mm512_mask_storeu_ps(out + at, there, value);
        if (norm.rounded == nullptr) continue;
        _mm_mask_storeu_epi8(norm.rounded + start + at, there, to_uint8(value, norm.rounding));
    }
}

void normalize(const Norm &norm, int64_t rows, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(rows * norm.width < FEW_VALUES ? 1 : (int)threads)
    for (int64_t row = 0; row < rows; row++) normalize_row(norm, row);
}

}  // namespace
