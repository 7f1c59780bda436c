// Linear layers for CPUs with AVX-512 VNNI: products of uint8 activations and an int8 weight, with all that comes
// before and after them: rounding a dynamic input, scales, bias, activation function, rounding the output.
//
// The weight lies in panels of 64 outputs, four inputs of an output side by side: (outputs / 64, inputs / 4, 64, 4).
// Where there are no multiples of 64 and 4, it is filled up with 0, and rows of uint8 inputs with anything.

namespace {

constexpr int PANEL = COLUMNS * LANES;  // outputs
constexpr int CHUNK_ROWS = 16 * ROWS;   // tokens, at most, that stay in the nearest caches while panels pass by
constexpr int64_t FEW = 1 << 18;        // products that take less time than to wake up another thread

struct Layer {
    const int8_t *weight;
    const float *scale;   // by output, padded like what follows to whole panels
    const int32_t *sums;  // of each output's weights
    const float *bias;    // may be missing
    int64_t in, out;
};

// How rows of the input become integers, and sums of products floats.
struct Rows {
    const uint8_t *values;
    const float *scales;   // of each row, or one for all
    const int32_t *zeros;  // likewise
    int64_t by_row, count;
    const int32_t *places;  // rows of `values`, in ascending order; all where it is missing
};

enum Post { NONE, RELU, GELU, GELU_TANH };
enum Kind { FLOAT32, BFLOAT16, UINT8 };

struct Output {
    void *values;
    int64_t kind, post;
    Rounding rounding;
    int64_t first;          // row that lies at `values`
    const int32_t *places;  // rows that are written, instead

    int64_t place(int64_t row) const { return places == nullptr ? row - first : places[row]; }
};

// Sums of `R` rows times one panel, [R][64], which begin at `start`, [64]. A function of its own with nothing around its
// loop: else gcc keeps the sums in memory.
template <int R>
__attribute__((noinline)) void multiply_panel(const uint8_t *left, int64_t stride, const int8_t *panel, int64_t fours,
                                              const int32_t *start, int32_t *out) {
    __m512i sums[R * COLUMNS];
    UNROLL for (int i = 0; i < R * COLUMNS; i++) sums[i] = _mm512_load_si512(start + i % COLUMNS * LANES);
    for (int64_t four = 0; four < fours; four++) {
        __m512i columns[COLUMNS];
        UNROLL for (int c = 0; c < COLUMNS; c++) columns[c] = _mm512_load_si512(panel + (four * COLUMNS + c) * 64);
        UNROLL for (int r = 0; r < R; r++) {
            const __m512i one = _mm512_set1_epi32(*(const int32_t *)(left + r * stride + four * 4));
            UNROLL for (int c = 0; c < COLUMNS; c++)
                sums[r * COLUMNS + c] = _mm512_dpbusd_epi32(sums[r * COLUMNS + c], one, columns[c]);
        }
    }
    UNROLL for (int i = 0; i < R * COLUMNS; i++) _mm512_store_si512(out + i * LANES, sums[i]);
}

void multiply_panel(int64_t rows, const uint8_t *left, int64_t stride, const int8_t *panel, int64_t fours,
                    const int32_t *start, int32_t *out) {
    switch (rows) {
        case 1: return multiply_panel<1>(left, stride, panel, fours, start, out);
        case 2: return multiply_panel<2>(left, stride, panel, fours, start, out);
        case 3: return multiply_panel<3>(left, stride, panel, fours, start, out);
        case 4: return multiply_panel<4>(left, stride, panel, fours, start, out);
        case 5: return multiply_panel<5>(left, stride, panel, fours, start, out);
        default: return multiply_panel<ROWS>(left, stride, panel, fours, start, out);
    }
}

// x / (1 + 2^-y)
inline __m512 gated(__m512 x, __m512 y) {
    const __m512 one = _mm512_set1_ps(1.0f);
    return _mm512_div_ps(x, _mm512_add_ps(one, power(_mm512_sub_ps(_mm512_setzero_ps(), y), 1.0f)));
}

// The share of a standard normal distribution below -a, for a from 0 to 7.75, as 32 polynomials: that of each quarter,
// in the distance to its middle. They go through the function at Chebyshev's nodes, so their error is below 2e-8.
struct NormalTail {
    static constexpr int PARTS = 2 * LANES, TERMS = 5;
    static constexpr double WIDTH = 0.25;
    alignas(64) float terms[TERMS][PARTS];

    NormalTail() {
        for (int part = 0; part < PARTS; part++) {
            double nodes[TERMS], slopes[TERMS], sums[TERMS] = {};
            for (int i = 0; i < TERMS; i++) {
                nodes[i] = WIDTH / 2 * std::cos((2 * i + 1) * 3.14159265358979323846 / (2 * TERMS));
                slopes[i] = std::erfc((part * WIDTH + nodes[i]) * 0.70710678118654752440) / 2;
            }
            for (int order = 1; order < TERMS; order++)  // Newton's divided differences
                for (int i = TERMS - 1; i >= order; i--)
                    slopes[i] = (slopes[i] - slopes[i - 1]) / (nodes[i] - nodes[i - order]);
            for (int i = TERMS - 1; i >= 0; i--) {  // his form, multiplied out
                for (int term = TERMS - 1; term > 0; term--) sums[term] = sums[term - 1] - nodes[i] * sums[term];
                sums[0] = slopes[i] - nodes[i] * sums[0];
            }
            for (int term = 0; term < TERMS; term++) terms[term][part] = (float)sums[term];
        }
    }
};

const NormalTail normal_tail;

// x / 2 (1 + erf(x / sqrt 2)) = max(x, 0) - |x| tail(|x|), with an absolute error below 1e-7 |x|.
inline __m512 gelu(__m512 x) {
    const __m512 shift = _mm512_set1_ps(3145728.0f);  // 1.5 2^21: where floats are WIDTH apart, so adding it rounds
    const __m512 size = _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(7.75f));
    const __m512 moved = _mm512_add_ps(size, shift);
    const __m512 rest = _mm512_sub_ps(size, _mm512_sub_ps(moved, shift));
    const __m512i part = _mm512_castps_si512(moved);  // its last bits
    const auto term = [&](int number) __attribute__((always_inline)) {
        const float *terms = normal_tail.terms[number];
        return _mm512_permutex2var_ps(_mm512_load_ps(terms), part, _mm512_load_ps(terms + LANES));
    };
    __m512 tail = term(NormalTail::TERMS - 1);
    UNROLL for (int number = NormalTail::TERMS - 2; number >= 0; number--) tail = _mm512_fmadd_ps(tail, rest, term(number));
    return _mm512_fnmadd_ps(size, tail, _mm512_max_ps(_mm512_setzero_ps(), x));  // in this order, NaN stays NaN
}

// x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
inline __m512 gelu_tanh(__m512 x) {
    const float twice = 2.0f * 0.79788456080286535588f * LOG2_E;
    const __m512 cubic = _mm512_fmadd_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(twice * 0.044715f), _mm512_set1_ps(twice));
    return gated(x, _mm512_mul_ps(x, cubic));
}

template <int POST>
inline __m512 apply(__m512 value) {
    if (POST == RELU) return _mm512_max_ps(value, _mm512_setzero_ps());
    if (POST == GELU) return gelu(value);
    if (POST == GELU_TANH) return gelu_tanh(value);
    return value;
}

// COLUMNS registers of one row of outputs, which begin at `place`; `left` is how many there are from there on.
template <int KIND>
inline void store(const Output &out, int64_t place, int64_t left, const __m512 *values) {
    if (KIND == UINT8) {
        _mm512_mask_storeu_epi8((uint8_t *)out.values + place, bytes(left), to_uint8(values, out.rounding));
        return;
    }
    UNROLL for (int c = 0; c < COLUMNS; c++, place += LANES, left -= LANES) {
        if (KIND == FLOAT32) {
            _mm512_mask_storeu_ps((float *)out.values + place, lanes(left), values[c]);
            continue;
        }
        // bfloat16: to the nearest, to even between two
        const __m512i bits = _mm512_castps_si512(values[c]);
        const __m512i odd = _mm512_and_epi32(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
        const __mmask16 nan = _mm512_cmp_ps_mask(values[c], values[c], _CMP_UNORD_Q);
        const __m512i high = _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
        _mm256_mask_storeu_epi16((uint16_t *)out.values + place, lanes(left), _mm512_cvtepi32_epi16(high));
    }
}

// (q - z) w^T = q w^T - z sum(w), exact in integers: what is subtracted.
inline __m512i shifted(const Layer &layer, int64_t column, int32_t zero) {
    return _mm512_mullo_epi32(_mm512_set1_epi32(zero), _mm512_loadu_si512(layer.sums + column));
}

// From sums of integers to outputs, for one panel of `count` rows; with zero points where each row has its own.
template <int POST, int KIND>
void finish(const int32_t *sums, const Layer &layer, int64_t column, const Rows &rows, const Output &out, int64_t row,
            int64_t count) {
    __m512 scales[COLUMNS], biases[COLUMNS];
    UNROLL for (int c = 0; c < COLUMNS; c++) {
        scales[c] = _mm512_loadu_ps(layer.scale + column + c * LANES);
        if (!rows.by_row) scales[c] = _mm512_mul_ps(scales[c], _mm512_set1_ps(*rows.scales));
        biases[c] = layer.bias == nullptr ? _mm512_setzero_ps() : _mm512_loadu_ps(layer.bias + column + c * LANES);
    }
    for (int64_t r = 0; r < count; r++, sums += PANEL) {
        __m512 values[COLUMNS];
        UNROLL for (int c = 0; c < COLUMNS; c++) {
            __m512i sum = _mm512_load_si512(sums + c * LANES);
            __m512 factor = scales[c];
            if (rows.by_row) {
                sum = _mm512_sub_epi32(sum, shifted(layer, column + c * LANES, rows.zeros[row + r]));
                factor = _mm512_mul_ps(factor, _mm512_set1_ps(rows.scales[row + r]));
            }
            values[c] = apply<POST>(_mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, biases[c]));
        }
        store<KIND>(out, out.place(row + r) * layer.out + column, layer.out - column, values);
    }
}

template <int POST>
void finish(const int32_t *sums, const Layer &layer, int64_t column, const Rows &rows, const Output &out, int64_t row,
            int64_t count) {
    switch (out.kind) {
        case UINT8: return finish<POST, UINT8>(sums, layer, column, rows, out, row, count);
        case BFLOAT16: return finish<POST, BFLOAT16>(sums, layer, column, rows, out, row, count);
        default: return finish<POST, FLOAT32>(sums, layer, column, rows, out, row, count);
    }
}

void finish(const int32_t *sums, const Layer &layer, int64_t column, const Rows &rows, const Output &out, int64_t row,
            int64_t count) {
    switch (out.post) {
        case RELU: return finish<RELU>(sums, layer, column, rows, out, row, count);
        case GELU: return finish<GELU>(sums, layer, column, rows, out, row, count);
        case GELU_TANH: return finish<GELU_TANH>(sums, layer, column, rows, out, row, count);
        default: return finish<NONE>(sums, layer, column, rows, out, row, count);
    }
}

// One part of the output: the rows of a chunk and one panel.
void multiply_part(const Layer &layer, const Rows &rows, const Output &out, int64_t first, int64_t last, int64_t panel) {
    alignas(64) int32_t sums[ROWS * PANEL], start[PANEL] = {};
    const int64_t fours = up(layer.in, 4) / 4, stride = fours * 4;
    const std::unique_ptr<uint8_t[]> together(rows.places == nullptr ? nullptr : new uint8_t[ROWS * stride]);
    if (!rows.by_row)
        for (int at = 0; at < PANEL; at += LANES) {
            const __m512i less = shifted(layer, panel * PANEL + at, *rows.zeros);
            _mm512_store_si512(start + at, _mm512_sub_epi32(_mm512_setzero_si512(), less));
        }
    for (int64_t row = first; row < last; row += ROWS) {
        const int64_t count = std::min<int64_t>(ROWS, last - row);
        const uint8_t *left = rows.values + row_at(rows.places, row) * stride;
        if (rows.places != nullptr && rows.places[row + count - 1] - rows.places[row] != count - 1) {
            for (int64_t r = 0; r < count; r++)  // the end of a sentence and the start of the next
                std::memcpy(together.get() + r * stride, rows.values + rows.places[row + r] * stride, stride);
            left = together.get();
        }
        multiply_panel(count, left, stride, layer.weight + panel * fours * PANEL * 4, fours, start, sums);
        finish(sums, layer, panel * PANEL, rows, out, row, count);
    }
}

// Within a parallel region: parts are dealt out so that a thread's successive ones read the same rows.
void multiply_parts(const Layer &layer, const Rows &rows, const Output &out) {
    const int64_t panels = up(layer.out, PANEL) / PANEL, chunks = up(rows.count, CHUNK_ROWS) / CHUNK_ROWS;
    const int64_t each = up(rows.count, chunks) / chunks;  // all alike, so that no thread waits for another
#pragma omp for schedule(static) nowait
    for (int64_t part = 0; part < chunks * panels; part++) {
        const int64_t first = part / panels * each;
        multiply_part(layer, rows, out, first, std::min(rows.count, first + each), part % panels);
    }
}

int team(const Layer &layer, int64_t rows, int64_t threads) {
    return rows * layer.in * layer.out < FEW ? 1 : (int)threads;
}

// `count` rows with one range become uint8, with one scale and zero point, both as `token_qparams` finds them.
void quantize_group(const float *from, int64_t count, int64_t width, bool symmetric, uint8_t *to, float *scale,
                    int32_t *zero) {
    // Two of each, so that none waits for itself.
    __m512 low[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, high[2] = {low[0], low[0]};
    __mmask16 bad = 0;
    const auto see = [&](int half, __m512 value) __attribute__((always_inline)) {
        low[half] = _mm512_min_ps(low[half], value), high[half] = _mm512_max_ps(high[half], value);
        bad |= _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    };
    int64_t at = 0;
    for (; at + 2 * LANES <= count * width; at += 2 * LANES)
        see(0, _mm512_loadu_ps(from + at)), see(1, _mm512_loadu_ps(from + at + LANES));
    for (; at < count * width; at += LANES) see(0, _mm512_maskz_loadu_ps(lanes(count * width - at), from + at));
    low[0] = _mm512_min_ps(low[0], low[1]), high[0] = _mm512_max_ps(high[0], high[1]);
    const float least = _mm512_reduce_min_ps(low[0]), most = _mm512_reduce_max_ps(high[0]);
    float step = symmetric ? std::max(-least, most) / 127.5f : (most - least) / 255.0f;
    float place = 0;
    if (!symmetric && step > 0) place = std::nearbyint(std::min(127.0f, std::max(-128.0f, -128.0f - least / step)));
    if (step == 0) step = std::numeric_limits<float>::epsilon();
    const Rounding rounding(step, (int64_t)place + 128);
    // What is not finite makes all outputs of its rows NaN, as it does in float.
    const float kept = bad || !std::isfinite(step) ? std::numeric_limits<float>::quiet_NaN() : step;
    for (int64_t row = 0; row < count; row++, from += width, to += up(width, 4)) {
        scale[row] = kept, zero[row] = (int32_t)place + 128;
        __m512 values[4];
        for (at = 0; at + 4 * LANES <= width; at += 4 * LANES) {
            UNROLL for (int i = 0; i < 4; i++) values[i] = _mm512_loadu_ps(from + at + i * LANES);
            _mm512_storeu_si512(to + at, to_uint8(values, rounding));
        }
        if (at == width) continue;
        UNROLL for (int i = 0; i < 4; i++)
            values[i] = _mm512_maskz_loadu_ps(lanes(width - at - i * LANES), from + at + i * LANES);
        _mm512_mask_storeu_epi8(to + at, bytes(width - at), to_uint8(values, rounding));
    }
}

// `count` rows of uint8 inputs, with one scale and zero point; `use` reads them within a parallel region of its own.
template <typename Use>
void with_rows(const Layer &layer, const uint8_t *values, const int32_t *places, int64_t count, float scale,
               int32_t zero, Use use) {
    const int64_t stride = up(layer.in, 4);
    std::unique_ptr<uint8_t[]> copy;
    if (stride != layer.in) {
        copy.reset(new uint8_t[count * stride]());
        for (int64_t row = 0; row < count; row++)
            std::memcpy(copy.get() + row * stride, values + row_at(places, row) * layer.in, layer.in);
        values = copy.get(), places = nullptr;
    }
    use(Rows{values, &scale, &zero, 0, count, places});
}

// `count` rows of float32 inputs, of which `group` successive ones have one range, as uint8.
template <typename Use>
void with_rows_by_token(const Layer &layer, const float *input, const int32_t *places, int64_t count, int64_t group,
                        bool symmetric, int64_t threads, Use use) {
    const int64_t stride = up(layer.in, 4);
    const std::unique_ptr<char[]> memory(new char[count * (stride + sizeof(float) + sizeof(int32_t))]);
    float *scales = (float *)memory.get();
    int32_t *zeros = (int32_t *)(scales + count);
    uint8_t *values = (uint8_t *)(zeros + count);
#pragma omp parallel for schedule(static) num_threads(team(layer, count, threads))
    for (int64_t row = 0; row < count; row += group)
        quantize_group(input + row_at(places, row) * layer.in, group, layer.in, symmetric, values + row * stride,
                       scales + row, zeros + row);
    use(Rows{values, scales, zeros, 1, count, nullptr});
}

void multiply(const Layer &layer, const Rows &rows, const Output &out, int64_t threads) {
#pragma omp parallel num_threads(team(layer, rows.count, threads))
    multiply_parts(layer, rows, out);
}

}  // namespace
