// See experts.h.
#include "experts.h"

#include <cmath>

namespace {

int64_t widest(const Mixture& mixture) {
    int64_t hidden = mixture.shared.hidden;
    for (int64_t e = 0; e < mixture.count; e++)
        if (mixture.experts[e].hidden > hidden) hidden = mixture.experts[e].hidden;
    return hidden;
}

int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

}  // namespace

void puna_route(const Kernels& kernels, const float* logits, int64_t rows, int64_t count, int64_t k, int32_t* ids,
                float* scores) {
    kernels.top_k(logits, rows, count, k, ids, scores);
    for (int64_t i = 0; i < rows * k; i++) scores[i] = 1.0f / (1.0f + std::exp(-scores[i]));
}

int64_t puna_experts_scratch(const Mixture& mixture, int64_t rows, int64_t most, int64_t dim) {
    int64_t together = most > rows ? most : rows;
    return 2 * together * widest(mixture) + 2 * padded(most * dim) + padded(most);
}

void puna_experts(const Kernels& kernels, const Mixture& mixture, const float* x, const int32_t* chosen,
                  const float* scores, int64_t rows, int64_t k, int64_t most, int64_t dim, float* scratch, float* out) {
    float *in = scratch, *result = in + padded(most * dim);
    int32_t* places = reinterpret_cast<int32_t*>(result + padded(most * dim));
    float* hidden = reinterpret_cast<float*>(places) + padded(most);
    auto apply = [&](const Gated& part, const float* from, int64_t count, float* to) {
        float *gate = hidden, *up = gate + count * part.hidden;
        Product first[] = {{part.gate, part.hidden, {nullptr, F32}, gate}, {part.up, part.hidden, {nullptr, F32}, up}};
        kernels.linear(from, count, dim, first, 2);
        kernels.swiglu(gate, up, count * part.hidden, gate);
        Product last = {part.down, dim, {nullptr, F32}, to};
        kernels.linear(gate, count, part.hidden, &last, 1);
    };
    apply(mixture.shared, x, rows, out);
    for (int64_t e = 0; e < mixture.count; e++) {
        int32_t id = mixture.ids ? mixture.ids[e] : static_cast<int32_t>(e);
        int64_t count = 0;
        for (int64_t place = 0; place < rows * k; place++)
            if (chosen[place] == id) places[count++] = static_cast<int32_t>(place);
        if (count == 0) continue;
        for (int64_t i = 0; i < count; i++)
            for (int64_t d = 0; d < dim; d++) in[i * dim + d] = x[places[i] / k * dim + d] * scores[places[i]];
        apply(mixture.experts[e], in, count, result);
        for (int64_t i = 0; i < count; i++)
            for (int64_t d = 0; d < dim; d++) out[places[i] / k * dim + d] += result[i * dim + d];
    }
}
