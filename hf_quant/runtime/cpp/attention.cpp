// Attention of one layer for CPUs with AVX-512 VNNI: softmax(s Q K^T + M) V with products of 16-bit integers.
//
// vpdpwssd multiplies 32 pairs of 16-bit integers where a float32 FMA multiplies 16, on every CPU that has fast int8
// products, and rounds less than bfloat16 does: queries and keys get as many bits as their sums leave in 32 bits (13
// for a width of 64, with the sign), probabilities 13, values 14, with one scale a head each. Everything of a head stays
// in the nearest caches: nothing but the output is written to memory.

namespace {

constexpr int CHUNK = 16;                            // pairs of keys whose sum of P V fits into 32 bits:
constexpr float P_MOST = 8191.0f, V_MOST = 8191.0f;  // 32 * 8191 * 8191 < 2^31
constexpr float HIDDEN = -1e30f;  // score of a hidden key; where all are, all are alike

struct Strides {
    int64_t batch, head, row;
};

struct Problem {
    const float *query, *key, *value, *mask;
    const uint8_t *shown;    // instead of the mask: 0 for keys that are hidden
    const int32_t *lengths;  // of sentences, in queries and keys; all are used where it is missing
    void *output;
    int64_t batch, heads, kv_heads, queries, keys, width, value_width;
    int64_t causal, quantized, threads;
    Strides q, k, v, m, o;
    float scale;
    Rounding rounding;
};

// The largest magnitude of rows, as bits of a float: those of infinity and NaN are the largest.
uint32_t largest(const float *rows, int64_t stride, int64_t count, int64_t width) {
    const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
    __m512i most = _mm512_setzero_si512();
    for (int64_t row = 0; row < count; row++)
        for (int64_t at = 0; at < width; at += LANES)
            most = _mm512_max_epu32(most, _mm512_and_epi32(_mm512_loadu_si512(rows + row * stride + at), magnitude));
    return _mm512_reduce_max_epu32(most);
}

// The step of integers up to `most` for values up to `bits`; NaN where there is none.
float step(uint32_t bits, float most) {
    if (bits >= 0x7f800000u) return std::numeric_limits<float>::quiet_NaN();
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value > 0 ? value / most : 1.0f;
}

inline __m512i rounded(const float *from, __m512 inverse) {
    return _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(from), inverse));
}

void quantize_rows(const float *rows, int64_t stride, int64_t count, int64_t width, float step, int16_t *out) {
    const __m512 inverse = _mm512_set1_ps(1.0f / step);
    for (int64_t row = 0; row < count; row++)
        for (int64_t at = 0; at < width; at += LANES)
            _mm256_storeu_si256((__m256i *)(out + row * width + at),
                                _mm512_cvtepi32_epi16(rounded(rows + row * stride + at, inverse)));
}

// Columns of 16 rows of 16 values of 32 bits become rows.
inline void transpose(__m512i *rows) {
    __m512i other[LANES];
    UNROLL for (int i = 0; i < LANES; i += 2) {
        other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    UNROLL for (int i = 0; i < LANES; i += 4) {
        rows[i] = _mm512_unpacklo_epi64(other[i], other[i + 2]);
        rows[i + 1] = _mm512_unpackhi_epi64(other[i], other[i + 2]);
        rows[i + 2] = _mm512_unpacklo_epi64(other[i + 1], other[i + 3]);
        rows[i + 3] = _mm512_unpackhi_epi64(other[i + 1], other[i + 3]);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        other[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
        other[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
        other[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
        other[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    }
    UNROLL for (int i = 0; i < 8; i++) {
        const int from = i;
        rows[from] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0x88);
        rows[from + 8] = _mm512_shuffle_i32x4(other[i], other[i + 8], 0xdd);
    }
}

// Pairs of a key's values, by pair and then by key: [width / 2][keys, padded].
void pack_keys(const float *rows, int64_t stride, int64_t count, int64_t padded, int64_t width, float step,
               int32_t *out) {
    const __m512 inverse = _mm512_set1_ps(1.0f / step);
    for (int64_t at = 0; at < padded; at += LANES)
        for (int64_t column = 0; column < width; column += 2 * LANES) {
            __m512i pairs[LANES];
            const bool two = column + LANES < width;
            UNROLL for (int i = 0; i < LANES; i++) {
                const float *from = rows + (at + i) * stride + column;
                const __m256i none = _mm256_setzero_si256();
                const __m256i low = at + i < count ? _mm512_cvtepi32_epi16(rounded(from, inverse)) : none;
                const __m256i high = two && at + i < count ? _mm512_cvtepi32_epi16(rounded(from + LANES, inverse)) : none;
                pairs[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
            }
            transpose(pairs);
            UNROLL for (int i = 0; i < LANES; i++)
                if (i < LANES / 2 || two) _mm512_storeu_si512(out + (column / 2 + i) * padded + at, pairs[i]);
        }
}

// The same column of two successive values side by side: [keys / 2, padded][width].
void pack_values(const float *rows, int64_t stride, int64_t count, int64_t padded, int64_t width, float step,
                 int32_t *out) {
    const __m512 inverse = _mm512_set1_ps(1.0f / step);
    const __m512i low = _mm512_set1_epi32(0xffff);
    for (int64_t row = 0; row < padded; row += 2)
        for (int64_t at = 0; at < width; at += LANES) {
            const __m512i zero = _mm512_setzero_si512();
            const __m512i first = row < count ? rounded(rows + row * stride + at, inverse) : zero;
            const __m512i second = row + 1 < count ? rounded(rows + (row + 1) * stride + at, inverse) : zero;
            _mm512_storeu_si512(out + row / 2 * width + at,
                                _mm512_or_epi32(_mm512_and_epi32(first, low), _mm512_slli_epi32(second, 16)));
        }
}

// Sums of ROWS rows of pairs times `C` registers of packed columns. A function of its own with nothing around its loop:
// else gcc keeps the sums in memory.
template <int C>
__attribute__((noinline)) void multiply(const int32_t *left, int64_t left_stride, const int32_t *right,
                                        int64_t right_stride, int64_t pairs, int32_t *out, int64_t out_stride) {
    __m512i sums[ROWS * C];
    UNROLL for (int i = 0; i < ROWS * C; i++) sums[i] = _mm512_setzero_si512();
    for (int64_t pair = 0; pair < pairs; pair++) {
        __m512i columns[C];
        UNROLL for (int c = 0; c < C; c++) columns[c] = _mm512_loadu_si512(right + pair * right_stride + c * LANES);
        UNROLL for (int r = 0; r < ROWS; r++) {
            const __m512i one = _mm512_set1_epi32(left[r * left_stride + pair]);
            UNROLL for (int c = 0; c < C; c++)
                sums[r * C + c] = _mm512_dpwssd_epi32(sums[r * C + c], one, columns[c]);
        }
    }
    UNROLL for (int i = 0; i < ROWS * C; i++)
        _mm512_storeu_si512(out + i / C * out_stride + i % C * LANES, sums[i]);
}

// Scores of one query in place, from integers to floats with the mask, up to `limit`; returns the largest.
float finish(float *scores, int64_t limit, float scale, const float *mask, const uint8_t *shown) {
    const __m512 factor = _mm512_set1_ps(scale);
    __m512 most = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int64_t at = 0; at < limit; at += LANES) {
        const __mmask16 there = limit - at >= LANES ? 0xffff : (1u << (limit - at)) - 1;
        __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(scores + at)), factor);
        if (mask != nullptr) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(there, mask + at));
        if (shown != nullptr) {
            const __m128i bytes = _mm_maskz_loadu_epi8(there, shown + at);
            value = _mm512_mask_mov_ps(_mm512_set1_ps(HIDDEN), _mm_test_epi8_mask(bytes, bytes), value);
        }
        most = _mm512_mask_max_ps(most, there, most, value);
        _mm512_storeu_ps(scores + at, value);
    }
    return _mm512_reduce_max_ps(most);
}

// Powers of one row's scores as integers up to P_MOST; returns their sum.
float powers(const float *scores, float largest, int64_t limit, int64_t padded, int16_t *out) {
    const int64_t whole = limit / LANES * LANES;
    const __mmask16 tail = (1u << (limit - whole)) - 1;
    const __m512 factor = _mm512_set1_ps(LOG2_E), top = _mm512_set1_ps(largest);
    const auto integers = [&](int64_t at) __attribute__((always_inline)) {
        return _mm512_cvtps_epi32(power(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + at), top), factor), P_MOST));
    };
    __m512i total = _mm512_setzero_si512();
    const auto keep = [&](int64_t at, __m512i value) __attribute__((always_inline)) {
        total = _mm512_add_epi32(total, value);
        _mm256_storeu_si256((__m256i *)(out + at), _mm512_cvtepi32_epi16(value));
    };
    for (int64_t at = 0; at < whole; at += LANES) keep(at, integers(at));
    if (tail) keep(whole, _mm512_maskz_mov_epi32(tail, integers(whole)));
    for (int64_t at = up(limit, LANES); at < padded; at += LANES) keep(at, _mm512_setzero_si512());
    return (float)_mm512_reduce_add_epi32(total);
}

// `C` registers of the outputs of ROWS queries.
template <int C>
void weigh(const int32_t *weights, int64_t weights_stride, const int32_t *values, int64_t width, int64_t pairs,
           float *out) {
    alignas(64) int32_t sums[ROWS * C * LANES];
    for (int64_t at = 0; at < pairs; at += CHUNK) {
        multiply<C>(weights + at, weights_stride, values + at * width, width, std::min<int64_t>(CHUNK, pairs - at),
                    sums, C * LANES);
        for (int r = 0; r < ROWS; r++)
            UNROLL for (int c = 0; c < C; c++) {
                float *here = out + r * width + c * LANES;
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums + (r * C + c) * LANES));
                _mm512_storeu_ps(here, at == 0 ? sum : _mm512_add_ps(_mm512_loadu_ps(here), sum));
            }
    }
}

void write(const float *values, int64_t width, float factor, const Problem &p, int64_t place) {
    const __m512 by = _mm512_set1_ps(factor);
    for (int64_t at = 0; at < width; at += LANES) {
        __m512 value = _mm512_mul_ps(_mm512_loadu_ps(values + at), by);
        if (!p.quantized) {
            _mm512_storeu_ps((float *)p.output + place + at, value);
            continue;
        }
        _mm_storeu_si128((__m128i *)((uint8_t *)p.output + place + at), to_uint8(value, p.rounding));
    }
}

// Asks for rows of what comes next, which lie too far apart for the processor to foresee them.
void fetch(const float *rows, const Strides &strides, int64_t from, int64_t to, int64_t width) {
    for (int64_t row = from; row < to; row++)
        for (int64_t at = 0; at < width; at += LANES)
            _mm_prefetch((const char *)(rows + row * strides.row + at), _MM_HINT_T1);
}

// One head's queries from `first` to `last`.
void head(const Problem &p, int64_t batch, int64_t number, int64_t first, int64_t last, char *memory) {
    const int64_t kv = number / (p.heads / p.kv_heads), pairs = p.width / 2;
    const int64_t there = p.lengths == nullptr ? p.keys : p.lengths[batch];
    const int64_t seen = p.causal ? std::min(there, last) : there;
    const int64_t padded = up(seen, COLUMNS * LANES);
    int32_t *keys = (int32_t *)memory;
    int32_t *values = keys + pairs * padded;
    float *scores = (float *)(values + padded / 2 * p.value_width);
    int16_t *weights = (int16_t *)(scores + ROWS * padded);
    float *outputs = (float *)(weights + ROWS * padded);
    int16_t *queries = (int16_t *)(outputs + ROWS * p.value_width);

    const float *query = p.query + batch * p.q.batch + number * p.q.head + first * p.q.row;
    const float *key = p.key + batch * p.k.batch + kv * p.k.head;
    const float *value = p.value + batch * p.v.batch + kv * p.v.head;
    const float most = std::min(32767.0f, std::floor(std::sqrt(2147483647.0f / (float)p.width)));
    const float query_step = step(largest(query, p.q.row, last - first, p.width), most);
    const float key_step = step(largest(key, p.k.row, seen, p.width), most);
    const float value_step = step(largest(value, p.v.row, seen, p.value_width), V_MOST);
    const float scale = query_step * key_step * p.scale;  // NaN where anything is not finite, and so is the output
    const bool finite = std::isfinite(scale) && std::isfinite(value_step);
    if (finite) {
        pack_keys(key, p.k.row, seen, padded, p.width, key_step, keys);
        pack_values(value, p.v.row, seen, padded, p.value_width, value_step, values);
    }
    // The head that this thread takes next, in all likelihood.
    const int64_t next = number + 1 < p.heads ? number + 1 : 0, next_batch = batch + (next == 0);
    const int64_t next_kv = next / (p.heads / p.kv_heads);
    for (int64_t row = first; row < last; row += ROWS) {
        if (next_batch < p.batch) {
            const int64_t to = row + ROWS;
            fetch(p.query + next_batch * p.q.batch + next * p.q.head, p.q, row, std::min(to, p.queries), p.width);
            fetch(p.key + next_batch * p.k.batch + next_kv * p.k.head, p.k, row, std::min(to, p.keys), p.width);
            fetch(p.value + next_batch * p.v.batch + next_kv * p.v.head, p.v, row, std::min(to, p.keys), p.value_width);
        }
        const int64_t count = std::min<int64_t>(ROWS, last - row);
        const float *masks[ROWS];
        const uint8_t *shown[ROWS];
        float factors[ROWS];
        for (int r = 0; r < ROWS; r++) {
            const int64_t at = std::min(row + r, last - 1);
            const int64_t place = batch * p.m.batch + number * p.m.head + at * p.m.row;
            masks[r] = p.mask == nullptr ? nullptr : p.mask + place;
            shown[r] = p.shown == nullptr ? nullptr : p.shown + place;
            factors[r] = std::numeric_limits<float>::quiet_NaN();
        }
        if (finite) {
            if (count < ROWS) std::memset(queries, 0, ROWS * p.width * sizeof(int16_t));
            quantize_rows(query + (row - first) * p.q.row, p.q.row, count, p.width, query_step, queries);
            const int64_t limit = p.causal ? std::min(there, row + count) : there;
            const int64_t used = up(limit, COLUMNS * LANES);
            for (int64_t at = 0; at < used; at += COLUMNS * LANES)
                multiply<COLUMNS>((const int32_t *)queries, pairs, keys + at, padded, pairs, (int32_t *)scores + at, padded);
            const auto own = [&](int64_t r) { return p.causal ? std::min(there, row + r + 1) : there; };
            float most[ROWS];
            for (int64_t r = 0; r < count; r++)
                most[r] = finish(scores + r * padded, own(r), scale, masks[r], shown[r]);
            for (int64_t r = 0; r < count; r++)
                factors[r] = value_step / powers(scores + r * padded, most[r], own(r), used, weights + r * padded);
            const int64_t chunk = up(limit, 2) / 2;
            for (int64_t at = 0; at < p.value_width; at += COLUMNS * LANES) {
                const int64_t left = (p.value_width - at) / LANES;
                const int32_t *from = (const int32_t *)weights;
                if (left >= 4) weigh<4>(from, padded / 2, values + at, p.value_width, chunk, outputs + at);
                else if (left == 3) weigh<3>(from, padded / 2, values + at, p.value_width, chunk, outputs + at);
                else if (left == 2) weigh<2>(from, padded / 2, values + at, p.value_width, chunk, outputs + at);
                else weigh<1>(from, padded / 2, values + at, p.value_width, chunk, outputs + at);
            }
        }
        for (int64_t r = 0; r < count; r++)
            write(outputs + r * p.value_width, p.value_width, factors[r], p,
                  batch * p.o.batch + number * p.o.head + (row + r) * p.o.row);
    }
}

void attend(const Problem &p) {
    const int64_t padded = up(p.keys, COLUMNS * LANES);
    const size_t bytes = padded * p.width / 2 * 4 + padded / 2 * p.value_width * 4 + ROWS * padded * 6 +
                         ROWS * p.value_width * 4 + ROWS * p.width * 2;
    // With fewer heads than threads, several threads share the queries of one.
    const int64_t all = p.batch * p.heads;
    const int64_t parts = std::max<int64_t>(1, std::min(up(p.threads, all) / all, p.queries / ROWS));
    const int64_t part = up(up(p.queries, parts) / parts, ROWS);
    // Where sentences have lengths of their own, all threads share each; else a thread has its own again in each layer.
    const int64_t units = all * parts;
    const int64_t share = up(p.lengths == nullptr ? units : p.heads, p.threads) / p.threads;
    bool failed = false;
#pragma omp parallel num_threads((int)std::min(p.threads, units)) reduction(|| : failed)
    {
        char *memory = (char *)std::aligned_alloc(64, up(bytes, 64));
        failed = memory == nullptr;
#pragma omp for schedule(static, share) nowait
        for (int64_t unit = 0; unit < units; unit++) {
            const int64_t batch = unit / parts / p.heads, first = unit % parts * part;
            const int64_t last = std::min<int64_t>(p.lengths == nullptr ? p.queries : p.lengths[batch], first + part);
            if (!failed && first < last) head(p, batch, unit / parts % p.heads, first, last, memory);
        }
        std::free(memory);
    }
    if (failed) throw std::bad_alloc();
}

}  // namespace
