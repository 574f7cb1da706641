// A decoder layer that learns, in one call each way: the kernels of cpu/ one after the other.
//
//   s = x + o(attention(q, k, v of n1(x))),  y = s + down(silu(gate) up of n2(s))
//
// Where some tokens alone are asked for, as in a last layer, the others end with their keys, and
// sums over tokens behind the attention have fewer rows. Of all tokens the numbers are those of
// kernels/decoder.py, bit for bit. A small layer's calls from Python cost a quarter of what its
// kernels do, and its tensors fresh memory each time.
#include <algorithm>
#include <vector>

#include "share.h"

namespace reasonrl {
namespace {

constexpr int64_t SHARES = 64;  // of tokens, for the gradient of heads' norms

// Memory in pieces, each on lines of its own.
struct Pieces {
    template <class T = void>
    T* take(int64_t bytes) {
        const uintptr_t at = base + used;
        used += (bytes + 63) / 64 * 64;
        return (T*)at;
    }

    uintptr_t base;
    int64_t used;
};

int64_t floats(int64_t n) {
    return n * (int64_t)sizeof(float);
}

// Of numbers in the products' type.
int64_t narrows(const LayerTask& t, int64_t n) {
    return n * (t.dtype == F32 ? 4 : 2);
}

// Of rows as wide, in that type.
int64_t rows(const LayerTask& t, int64_t width) {
    return narrows(t, t.tokens * width);
}

// What the gradient needs again.
struct Held : Pieces {
    Held(const LayerTask& t, void* memory)
        : Pieces{(uintptr_t)memory, 0},
          total(take<float>(floats(t.answers * t.width))),
          scale1(take<float>(floats(t.tokens))),
          scale2(take<float>(floats(t.answers))),
          shares(take<float>(floats(t.tokens * t.heads * 2))),
          qkv(take(rows(t, t.wide()))),
          seen(take(rows(t, t.heads * t.size))),
          both(take(narrows(t, t.answers * 2 * t.inner))) {}

    float *total, *scale1, *scale2, *shares;
    void *qkv, *seen, *both;
};

// What lives for a moment: the residual's gradient, also as products read it; what a product reads
// or gives; gradients above products.
struct Scratch : Pieces {
    Scratch(const LayerTask& t, void* memory)
        : Pieces{(uintptr_t)memory, 0},
          grad(take<float>(floats(t.tokens * t.width))),
          above(take(rows(t, t.width))),
          read(take(rows(t, std::max(t.width, t.inner)))),
          given(take(rows(t, std::max({t.width, t.inner, t.heads * t.size})))),
          by_seen(take(rows(t, t.heads * t.size))),
          by_both(take(rows(t, std::max(2 * t.inner, t.wide())))),
          by_qkv(by_both),
          normed(take(t.q_norm ? rows(t, t.wide()) : 0)) {}

    float* grad;
    void *above, *read, *given, *by_seen, *by_both, *by_qkv, *normed;
};

NormTask norm1_of(const LayerTask& t, const Held& kept, const float* x) {
    return {x, t.norm1, kept.scale1, t.tokens, t.width, F32, F32, t.dtype, t.eps1};
}

NormTask norm2_of(const LayerTask& t, const Held& kept, const float* x) {
    return {x, t.norm2, kept.scale2, t.answers, t.width, F32, F32, t.dtype, t.eps2};
}

GateTask gate_of(const LayerTask& t, const Held& kept) {
    const char* up = (const char*)kept.both + narrows(t, t.inner);
    return {kept.both, up, t.answers, t.inner, 2 * t.inner, t.dtype};
}

// The heads as attention reads them: where they are normed, turned as well.
void* heads_of(const LayerTask& t, const Held& kept, const Scratch& own, int threads) {
    if (!t.q_norm) return kept.qkv;
    ops().norm_heads({kept.qkv, own.normed, t.cos, t.sin, t.q_norm, t.k_norm, t.tokens, t.heads,
                      t.key_heads, t.size, t.dtype, t.angle_dtype, t.head_eps},
                     threads);
    return own.normed;
}

PackedTask attention_of(const LayerTask& t, const Held& kept, void* heads, bool turns, void* out) {
    const void *cos = turns ? t.cos : nullptr, *sin = turns ? t.sin : nullptr;
    return {heads,  cos,      sin,           t.blocks,  kept.shares,
            out,    t.tokens, t.block_count, t.heads,   t.key_heads,
            t.size, t.dtype,  t.angle_dtype, t.scaling, t.dots};
}

// Through the norms of heads, in place, and by their weights.
void through_norms(const LayerTask& t, const Held& kept, void* by_qkv, float* by_norms,
                   int threads) {
    const int64_t shares = std::min(t.tokens, SHARES), width = 2 * t.size;
    std::vector<float> parts(shares * width);
    ops().norm_heads_grad({kept.qkv, by_qkv, t.cos, t.sin, t.q_norm, t.k_norm, t.tokens, t.heads,
                           t.key_heads, t.size, t.dtype, t.angle_dtype, t.head_eps},
                          parts.data(), shares, threads);
    if (!by_norms) return;
    std::vector<double> sums(width);
    for (int64_t i = 0; i < shares * width; i++) sums[i % width] += parts[i];
    std::copy(sums.begin(), sums.end(), by_norms);
}

// Rows of the tokens that are asked for, one after the other.
void gather(const LayerTask& t, const void* from, int64_t bytes, void* to, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < t.answers; i++) {
        memcpy((char*)to + i * bytes, (const char*)from + t.asked[i] * bytes, bytes);
    }
}

// Back to where the tokens stand, with zeros for the others.
void spread(const LayerTask& t, const void* from, int64_t bytes, void* to, int threads) {
#pragma omp parallel num_threads(threads)
    {
        const Share mine = share_of(t.tokens);
        int64_t i = std::lower_bound(t.asked, t.asked + t.answers, mine.begin) - t.asked;
        for (int64_t token = mine.begin; token < mine.end; token++) {
            char* row = (char*)to + token * bytes;
            const bool known = i < t.answers && t.asked[i] == token;
            if (known) memcpy(row, (const char*)from + i++ * bytes, bytes);
            if (!known) memset(row, 0, bytes);
        }
    }
}

// Gradients of a product's weights and biases.
void learn(const LinearTask& of, const void* above, const void* read, float* weight, float* bias,
           int threads) {
    if (weight) ops().linear_by_weight(of, above, read, weight, threads);
    if (bias) ops().column_sums(above, of.dtype, of.rows, of.outputs, bias, threads);
}

}  // namespace

int64_t layer_keeps(const LayerTask& t) {
    return Held(t, nullptr).used;
}

int64_t layer_needs(const LayerTask& t) {
    return Scratch(t, nullptr).used;
}

void decoder_layer(const LayerTask& t, const float* x, void* keeps, void* needs, float* out,
                   int threads) {
    const Held kept(t, keeps);
    const Scratch own(t, needs);
    const Ops& op = ops();
    op.rms_norm(norm1_of(t, kept, x), {}, own.read, threads);
    op.linear(t.qkv, own.read, kept.qkv, threads);
    void* heads = heads_of(t, kept, own, threads);
    void* seen = t.asked ? own.by_seen : kept.seen;
    op.attend_packed(attention_of(t, kept, heads, !t.q_norm, seen), threads);
    if (t.asked) {
        gather(t, seen, narrows(t, t.heads * t.size), kept.seen, threads);
        gather(t, x, floats(t.width), kept.total, threads);
        x = kept.total;
    }
    op.linear(t.out, kept.seen, own.given, threads);
    op.rms_norm(norm2_of(t, kept, x), {own.given, kept.total, t.dtype}, own.read, threads);
    op.linear(t.both, own.read, kept.both, threads);
    op.swiglu(gate_of(t, kept), own.by_both, threads);
    op.linear_onto(t.down, own.by_both, kept.total, out, threads);
}

void decoder_layer_grad(const LayerTask& t, const float* x, void* keeps, void* needs,
                        const float* grad, float* grad_x, const LayerGrads& by, int threads) {
    const Held kept(t, keeps);
    const Scratch own(t, needs);
    const Ops& op = ops();
    op.narrow(grad, t.answers * t.width, t.dtype, own.above, threads);
    char* by_gate = (char*)own.by_both;
    const GateTask gate = gate_of(t, kept);
    void* by_up = by_gate + ((const char*)gate.up - (const char*)gate.gate);
    op.linear_by_gate(t.down, own.above, gate, {nullptr, by_gate, by_up, own.read, 2 * t.inner},
                      threads);
    learn(t.down, own.above, own.read, by.down, by.down_bias, threads);
    op.linear_by_input(t.both, own.by_both, own.given, threads);
    op.rms_norm_grad(norm2_of(t, kept, kept.total),
                     {own.given, grad, own.grad, own.above, by.norm2, own.read, t.dtype}, threads);
    learn(t.both, own.by_both, own.read, by.both, by.both_bias, threads);
    learn(t.out, own.above, kept.seen, by.out, by.out_bias, threads);
    op.linear_by_input(t.out, own.above, t.asked ? own.given : own.by_seen, threads);
    if (t.asked) {
        spread(t, own.given, narrows(t, t.heads * t.size), own.by_seen, threads);
        spread(t, own.grad, floats(t.width), grad_x, threads);
    }
    const float* beside = t.asked ? grad_x : own.grad;
    void* heads = heads_of(t, kept, own, threads);
    op.attend_packed_grad(attention_of(t, kept, heads, true, nullptr), {own.by_seen, own.by_qkv},
                          threads);
    if (t.q_norm) through_norms(t, kept, own.by_qkv, by.heads, threads);
    op.linear_by_input(t.qkv, own.by_qkv, own.given, threads);
    op.rms_norm_grad(norm1_of(t, kept, x),
                     {own.given, beside, grad_x, nullptr, by.norm1, own.read, t.dtype}, threads);
    learn(t.qkv, own.by_qkv, own.read, by.qkv, by.qkv_bias, threads);
}

}  // namespace reasonrl
