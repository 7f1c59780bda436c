// Layers of an encoder that follow each other, as one: chunks of rows go through all of them, so that what lies between
// two of them stays in the nearest caches.

namespace {

// As many chunks for each thread, all alike, so that none waits for another.
int64_t chunks_for(int64_t rows, int64_t most, int64_t threads) { return up(up(rows, most) / most, threads); }

// Whether there are so few rows that threads had better share the weight than the rows.
bool are_few(int64_t rows, int64_t threads) { return rows < 4 * ROWS * threads; }

void multiply_chunk(const Layer &layer, const Rows &rows, const Output &out, int64_t first, int64_t last) {
    for (int64_t panel = 0; panel < up(layer.out, PANEL) / PANEL; panel++)
        multiply_part(layer, rows, out, first, last, panel);
}

void normalize_chunk(Norm norm, const float *sums, int64_t first, int64_t last) {
    norm.first = sums, norm.first_row = first;
    for (int64_t row = first; row < last; row++) normalize_row(norm, row);
}

// A layer and the norm after it, which reads each chunk of rows while it is in the nearest caches.
void multiply_and_normalize(const Layer &layer, const Rows &rows, Norm norm, int64_t threads) {
    const int64_t chunks = chunks_for(rows.count, CHUNK_ROWS, threads), each = up(rows.count, chunks) / chunks;
    if (are_few(rows.count, threads)) {
        const std::unique_ptr<float[]> sums(new float[rows.count * layer.out]);
        multiply(layer, rows, {sums.get(), FLOAT32, NONE, Rounding(), 0, nullptr}, threads);
        norm.first = sums.get();
        return normalize(norm, rows.count, threads);
    }
#pragma omp parallel num_threads((int)threads)
    {
        const std::unique_ptr<float[]> sums(new float[each * layer.out]);
#pragma omp for schedule(static) nowait
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t first = chunk * each, last = std::min(rows.count, first + each);
            multiply_chunk(layer, rows, {sums.get(), FLOAT32, NONE, Rounding(), first, nullptr}, first, last);
            normalize_chunk(norm, sums.get(), first, last);
        }
    }
}

// What is between two layers.
struct Between {
    int64_t post;
    // The second layer's rounding: by token, or with one scale and zero point.
    bool by_token, symmetric;
    float scale;
    int32_t zero;
    int64_t group;  // rows that share a range, by token

    int64_t kind() const { return by_token ? FLOAT32 : UINT8; }
    Rounding rounding() const { return by_token ? Rounding() : Rounding(scale, zero); }
};

// Two layers and the norm after them, one after the other.
void multiply_one_by_one(const Layer &first, const Rows &rows, const Between &between, const Layer &second,
                         const Norm &norm, int64_t threads) {
    const int64_t bytes = between.by_token ? sizeof(float) : 1;
    const std::unique_ptr<char[]> inner(new char[rows.count * first.out * bytes]);
    multiply(first, rows, {inner.get(), between.kind(), between.post, between.rounding(), 0, nullptr}, threads);
    const auto use = [&](const Rows &found) { multiply_and_normalize(second, found, norm, threads); };
    if (between.by_token)
        with_rows_by_token(second, (const float *)inner.get(), nullptr, rows.count, between.group, between.symmetric,
                           threads, use);
    else
        with_rows(second, (const uint8_t *)inner.get(), nullptr, rows.count, between.scale, between.zero, use);
}

// The same, by chunks.
void multiply_both(const Layer &first, const Rows &rows, const Between &between, const Layer &second, const Norm &norm,
                   int64_t threads) {
    // Rows of 3,072 floats fill a second cache of 1 MB sooner than those of bytes.
    const int64_t most = between.by_token ? CHUNK_ROWS / 2 : CHUNK_ROWS;
    const int64_t chunks = chunks_for(rows.count, most, threads), each = up(rows.count, chunks) / chunks;
    if (are_few(rows.count, threads) || second.in % 4 != 0 || (between.by_token && between.group != 1))
        return multiply_one_by_one(first, rows, between, second, norm, threads);
#pragma omp parallel num_threads((int)threads)
    {
        const std::unique_ptr<float[]> sums(new float[each * second.out]);
        const std::unique_ptr<uint8_t[]> values(new uint8_t[each * second.in]);
        const std::unique_ptr<float[]> floats(between.by_token ? new float[each * (second.in + 1)] : nullptr);
        const std::unique_ptr<int32_t[]> zeros(between.by_token ? new int32_t[each] : nullptr);
        float *const scales = between.by_token ? floats.get() + each * second.in : nullptr;
        void *const inner = between.by_token ? (void *)floats.get() : values.get();
#pragma omp for schedule(static) nowait
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t start = chunk * each, end = std::min(rows.count, start + each), count = end - start;
            multiply_chunk(first, rows, {inner, between.kind(), between.post, between.rounding(), start, nullptr}, start,
                           end);
            Rows found{values.get(), &between.scale, &between.zero, 0, count, nullptr};
            if (between.by_token) {
                for (int64_t row = 0; row < count; row++)
                    quantize_group(floats.get() + row * second.in, 1, second.in, between.symmetric,
                                   values.get() + row * second.in, scales + row, zeros.get() + row);
                found = {values.get(), scales, zeros.get(), 1, count, nullptr};
            }
            multiply_chunk(second, found, {sums.get(), FLOAT32, NONE, Rounding(), 0, nullptr}, 0, count);
            normalize_chunk(norm, sums.get(), start, end);
        }
    }
}

}  // namespace
