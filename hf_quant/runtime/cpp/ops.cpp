// The kernels as operations of torch; `vnni.py` says what they take and give.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <mutex>
#include <optional>
#include <stdexcept>
#include <tuple>
#include <vector>

namespace {

using torch::stable::Tensor;

std::mutex lock;
std::vector<Layer> layers;  // by number
thread_local Kept kept;     // what this thread computes of its batch

Layer find_layer(int64_t number) {
    const std::lock_guard<std::mutex> guard(lock);
    if (number < 0 || number >= (int64_t)layers.size() || layers[number].weight == nullptr)
        throw std::runtime_error("the layer of this graph is gone, with the model that was optimized");
    return layers[number];
}

Tensor make(const std::vector<int64_t> &sizes, const std::vector<int64_t> &strides, int32_t type) {
    AtenTensorHandle made;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided((int64_t)sizes.size(), sizes.data(), strides.data(), type,
                                                    aoti_torch_device_type_cpu(), 0, &made));
    return Tensor(made);
}

// Contiguous, of the sizes of `like` but for the last.
Tensor make_rows(const Tensor &like, int64_t width, int32_t type) {
    std::vector<int64_t> sizes(like.dim()), strides(like.dim());
    int64_t stride = 1;
    for (int64_t dim = like.dim() - 1; dim >= 0; dim--) {
        sizes[dim] = dim == like.dim() - 1 ? width : like.size(dim);
        strides[dim] = stride;
        stride *= sizes[dim];
    }
    return make(sizes, strides, type);
}

int32_t type_of(int64_t kind) {
    if (kind == BFLOAT16) return aoti_torch_dtype_bfloat16();
    return kind == UINT8 ? aoti_torch_dtype_uint8() : aoti_torch_dtype_float32();
}

Tensor whole(const Tensor &tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

Tensor by_rows(const Tensor &tensor) {
    const int64_t last = tensor.dim() - 1;
    return tensor.stride(last) == 1 || tensor.size(last) == 1 ? tensor : torch::stable::contiguous(tensor);
}

int64_t threads() { return torch::stable::get_num_threads(); }

int64_t rows_of(const Tensor &tensor) { return tensor.numel() / std::max<int64_t>(tensor.size(tensor.dim() - 1), 1); }

// Which rows of an input are computed: those of tokens, of (batch, length, width) that is this thread's batch, else all.
struct Part {
    const Kept *kept;
    int64_t count;
    const int32_t *places;

    explicit Part(const Tensor &input)
        : kept(input.dim() == 3 && ::kept.is_of(input.size(0), input.size(1)) ? &::kept : nullptr),
          count(kept == nullptr ? rows_of(input) : (int64_t)kept->rows.size()),
          places(kept == nullptr ? nullptr : kept->rows.data()) {}

    // Any bytes are a uint8, which says nothing of padding but is a number.
    Tensor clear(const Tensor &output, int64_t kind) const {
        const int64_t bytes = output.size(output.dim() - 1) * (kind == FLOAT32 ? 4 : 2);
        if (kept != nullptr && kind != UINT8) ::clear(*kept, output.data_ptr(), bytes, threads());
        return output;
    }
};

// As `token_dims` says: rows after the second dimension share a range, and in two dimensions all do.
int64_t group_of(const Tensor &input) {
    return rows_of(input) / (input.dim() < 3 ? 1 : input.size(0) * input.size(1));
}

Tensor product(Tensor quantized, int64_t number, double scale, int64_t zero, int64_t kind, int64_t post,
               double out_scale, int64_t out_zero) {
    const Layer layer = find_layer(number);
    quantized = whole(quantized);
    Tensor output = make_rows(quantized, layer.out, type_of(kind));
    if (output.numel() == 0) return output;
    const Part part(quantized);
    const Output out{output.data_ptr(), kind, post, Rounding(out_scale, out_zero), 0, part.places};
    with_rows(layer, (const uint8_t *)quantized.data_ptr(), part.places, part.count, (float)scale, (int32_t)zero,
              [&](const Rows &rows) { multiply(layer, rows, out, threads()); });
    return part.clear(output, kind);
}

Tensor product_by_token(Tensor input, int64_t number, bool symmetric, int64_t kind, int64_t post) {
    const Layer layer = find_layer(number);
    input = whole(input);
    Tensor output = make_rows(input, layer.out, type_of(kind));
    if (output.numel() == 0) return output;
    const Part part(input);
    const Output out{output.data_ptr(), kind, post, Rounding(), 0, part.places};
    with_rows_by_token(layer, (const float *)input.data_ptr(), part.places, part.count, group_of(input), symmetric,
                       threads(), [&](const Rows &rows) { multiply(layer, rows, out, threads()); });
    return part.clear(output, kind);
}

Strides strides_of(const Tensor &tensor) { return {tensor.stride(0), tensor.stride(1), tensor.stride(2)}; }

Tensor attention(Tensor query, Tensor key, Tensor value, std::optional<Tensor> mask, bool causal, double scale,
                 std::optional<double> out_scale, int64_t out_zero) {
    query = by_rows(query), key = by_rows(key), value = by_rows(value);
    const int64_t batch = query.size(0), heads = query.size(1), queries = query.size(2), width = value.size(3);
    const int64_t row = heads * width;
    Tensor output = make({batch, heads, queries, width}, {queries * row, width, row, 1},
                         type_of(out_scale.has_value() ? UINT8 : FLOAT32));
    if (output.numel() == 0) return output;
    Problem p{};
    if (mask.has_value()) {
        mask = by_rows(*mask);
        if (mask->scalar_type() == torch::headeronly::ScalarType::Bool) p.shown = (const uint8_t *)mask->data_ptr();
        else p.mask = (const float *)mask->data_ptr();
        // Dimensions that are missing, at the front, or 1 are the same for all.
        const auto step = [&](int64_t from_end) {
            const int64_t dim = mask->dim() - from_end;
            return dim < 0 || mask->size(dim) == 1 ? 0 : mask->stride(dim);
        };
        p.m = {step(4), step(3), step(2)};
    }
    p.query = (const float *)query.data_ptr(), p.key = (const float *)key.data_ptr();
    p.value = (const float *)value.data_ptr(), p.output = output.data_ptr();
    p.batch = batch, p.heads = heads, p.kv_heads = key.size(1), p.queries = queries, p.keys = key.size(2);
    p.width = query.size(3), p.value_width = width, p.causal = causal, p.quantized = out_scale.has_value();
    p.threads = threads(), p.q = strides_of(query), p.k = strides_of(key), p.v = strides_of(value);
    p.o = strides_of(output), p.scale = (float)scale, p.rounding = Rounding(out_scale.value_or(1.0), out_zero);
    if (queries == p.keys && kept.is_of(batch, queries)) p.lengths = kept.lengths.data();
    attend(p);
    if (p.lengths != nullptr && !p.quantized) clear(kept, p.output, row * sizeof(float), p.threads);
    return output;
}

// What a norm reads beside its first input, and what it writes.
struct Normed {
    std::optional<Tensor> second, weight, bias;
    Tensor output, rounded;
    Part part;
    Norm norm;

    Normed(const Tensor &like, int64_t width, std::optional<Tensor> other, std::optional<Tensor> factor,
           std::optional<Tensor> shift, double epsilon, std::optional<double> out_scale, int64_t out_zero)
        : second(std::move(other)), weight(std::move(factor)), bias(std::move(shift)),
          output(make_rows(like, width, type_of(FLOAT32))),
          rounded(out_scale.has_value() ? make_rows(like, width, type_of(UINT8)) : make({0}, {1}, type_of(UINT8))),
          part(like) {
        for (auto *each : {&second, &weight, &bias})
            if (each->has_value()) *each = whole(**each);
        norm = {nullptr, floats(second), floats(weight), floats(bias), (float *)output.data_ptr(),
                out_scale.has_value() ? (uint8_t *)rounded.data_ptr() : nullptr, width, (float)epsilon,
                Rounding(out_scale.value_or(1.0), out_zero), 0, nullptr, part.places};
    }

    static const float *floats(const std::optional<Tensor> &each) {
        return each.has_value() ? (const float *)each->data_ptr() : nullptr;
    }

    std::tuple<Tensor, Tensor> both() const { return {part.clear(output, FLOAT32), rounded}; }
};

std::tuple<Tensor, Tensor> norm(Tensor first, std::optional<Tensor> second, std::optional<Tensor> weight,
                                std::optional<Tensor> bias, double epsilon, std::optional<double> out_scale,
                                int64_t out_zero) {
    first = whole(first);
    Normed to(first, first.size(first.dim() - 1), second, weight, bias, epsilon, out_scale, out_zero);
    to.norm.first = (const float *)first.data_ptr(), to.norm.first_places = to.part.places;
    normalize(to.norm, to.part.count, threads());
    return to.both();
}

std::tuple<Tensor, Tensor> product_norm(Tensor quantized, int64_t number, double scale, int64_t zero,
                                        std::optional<Tensor> second, std::optional<Tensor> weight,
                                        std::optional<Tensor> bias, double epsilon, std::optional<double> out_scale,
                                        int64_t out_zero) {
    const Layer layer = find_layer(number);
    quantized = whole(quantized);
    const Normed to(quantized, layer.out, second, weight, bias, epsilon, out_scale, out_zero);
    if (to.output.numel() == 0) return to.both();
    with_rows(layer, (const uint8_t *)quantized.data_ptr(), to.part.places, to.part.count, (float)scale, (int32_t)zero,
              [&](const Rows &rows) { multiply_and_normalize(layer, rows, to.norm, threads()); });
    return to.both();
}

std::tuple<Tensor, Tensor> product_by_token_norm(Tensor input, int64_t number, bool symmetric,
                                                 std::optional<Tensor> second, std::optional<Tensor> weight,
                                                 std::optional<Tensor> bias, double epsilon,
                                                 std::optional<double> out_scale, int64_t out_zero) {
    const Layer layer = find_layer(number);
    input = whole(input);
    const Normed to(input, layer.out, second, weight, bias, epsilon, out_scale, out_zero);
    if (to.output.numel() == 0) return to.both();
    with_rows_by_token(layer, (const float *)input.data_ptr(), to.part.places, to.part.count, group_of(input), symmetric,
                       threads(), [&](const Rows &rows) { multiply_and_normalize(layer, rows, to.norm, threads()); });
    return to.both();
}

std::tuple<Tensor, Tensor> feed_forward(Tensor quantized, int64_t number, double scale, int64_t zero, int64_t post,
                                        double inner_scale, int64_t inner_zero, int64_t then,
                                        std::optional<Tensor> second, std::optional<Tensor> weight,
                                        std::optional<Tensor> bias, double epsilon, std::optional<double> out_scale,
                                        int64_t out_zero) {
    const Layer layer = find_layer(number), last = find_layer(then);
    quantized = whole(quantized);
    const Normed to(quantized, last.out, second, weight, bias, epsilon, out_scale, out_zero);
    if (to.output.numel() == 0) return to.both();
    const Between between{post, false, false, (float)inner_scale, (int32_t)inner_zero, 1};
    with_rows(layer, (const uint8_t *)quantized.data_ptr(), to.part.places, to.part.count, (float)scale, (int32_t)zero,
              [&](const Rows &rows) { multiply_both(layer, rows, between, last, to.norm, threads()); });
    return to.both();
}

std::tuple<Tensor, Tensor> feed_forward_by_token(Tensor input, int64_t number, bool symmetric, int64_t post, int64_t then,
                                                 std::optional<Tensor> second, std::optional<Tensor> weight,
                                                 std::optional<Tensor> bias, double epsilon,
                                                 std::optional<double> out_scale, int64_t out_zero) {
    const Layer layer = find_layer(number), last = find_layer(then);
    input = whole(input);
    const Normed to(input, last.out, second, weight, bias, epsilon, out_scale, out_zero);
    if (to.output.numel() == 0) return to.both();
    const Between between{post, true, symmetric, 1.0f, 0, group_of(input)};
    with_rows_by_token(layer, (const float *)input.data_ptr(), to.part.places, to.part.count, group_of(input), symmetric,
                       threads(), [&](const Rows &rows) { multiply_both(layer, rows, between, last, to.norm, threads()); });
    return to.both();
}

}  // namespace

// The layer's weight, scales, sums and bias, which stay where they are until it is forgotten, and its sizes.
extern "C" void hf_quant_register(int64_t number, const int64_t *from) {
    const std::lock_guard<std::mutex> guard(lock);
    if (number >= (int64_t)layers.size()) layers.resize(number + 1, Layer{});
    layers[number] = {(const int8_t *)from[0], (const float *)from[1], (const int32_t *)from[2],
                      (const float *)from[3],  from[4],                from[5]};
}

extern "C" void hf_quant_forget(int64_t number) {
    const std::lock_guard<std::mutex> guard(lock);
    layers[number] = Layer{};
}

// From now on this thread computes, of a batch of that many sentences padded to `length` tokens, only the first `lengths`
// tokens of each; all again with a batch of 0.
extern "C" void hf_quant_keep(int64_t batch, int64_t length, const int64_t *lengths) {
    kept.batch = batch, kept.length = length;
    kept.lengths.assign(lengths, lengths + batch);
    kept.rows.clear();
    for (int64_t sentence = 0; sentence < batch; sentence++)
        for (int64_t token = 0; token < lengths[sentence]; token++)
            kept.rows.push_back((int32_t)(sentence * length + token));
}

STABLE_TORCH_LIBRARY_IMPL(hf_quant, CPU, m) {
    m.impl("vnni_product", TORCH_BOX(&product));
    m.impl("vnni_product_by_token", TORCH_BOX(&product_by_token));
    m.impl("vnni_attention", TORCH_BOX(&attention));
    m.impl("vnni_norm", TORCH_BOX(&norm));
    m.impl("vnni_product_norm", TORCH_BOX(&product_norm));
    m.impl("vnni_product_by_token_norm", TORCH_BOX(&product_by_token_norm));
    m.impl("vnni_feed_forward", TORCH_BOX(&feed_forward));
    m.impl("vnni_feed_forward_by_token", TORCH_BOX(&feed_forward_by_token));
}
