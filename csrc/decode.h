// A decoder that makes new tokens in one call: what it is made of, and the batch that it goes on
// with. S slots of W tokens, N rows, D hidden, I inner, H query heads, K key heads of d, V words.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

namespace reasonrl {

// A weight (N, K), of which a row is an output's.
struct PackPart {
    const void* weight;
    int64_t outputs;
    int dtype;
};

// Weights of one input, packed one after the other, or two of one shape as halves of every panel.
struct PackTask {
    std::vector<PackPart> parts;
    uint32_t* out;
    int64_t inputs;
    int to;
    bool halves;

    int64_t outputs() const {
        int64_t sum = 0;
        for (const PackPart& part : parts) sum += part.outputs;
        return sum;
    }
};

// A linear layer's weight and bias, packed (cpu/product.h); null: absent.
struct Packed {
    const uint32_t* weight;
    const float* bias;
};

// Keys and values (S, K, room) of slots; see cpu/attend.h.
struct Kept {
    void *keys, *values;
};

struct DecodeLayer {
    const void *norm1, *norm2;    // (D,)
    const void *q_norm, *k_norm;  // (d,) of a head before it is turned; null: none
    float eps1, eps2, head_eps, scaling;
    Packed qkv, out, both, down;  // gate and up are each other's halves of a panel
    Kept prompt, own;             // what a prompt's completions share, what each has for itself
};

// A decoder with its head; see cpu/decode.cpp. Everything but the residual is in `dtype`.
struct DecodeModel {
    std::vector<DecodeLayer> layers;
    const void *embedding, *norm;  // (V, D), (D,)
    Packed head;
    const void *cos, *sin;  // (positions, d)
    float eps;
    int64_t width, inner, heads, key_heads, size, vocab;  // D, I, H, K, d, V
    int64_t prompt_room, own_room;                        // places of a slot, in whole panels
    int dtype, residual, norm_dtype, angle_dtype;
    bool dots;  // whether the CPU multiplies pairs of bf16
};

// Tokens of rows: of completions, whose prompts are kept; or of prompts, in order (slot null),
// which are kept then. Rows of one prompt stand beside each other.
struct DecodeRows {
    const int64_t* token;          // (N,)
    const int64_t* home;           // (N,) where the prompt is kept
    const int64_t* prompt_length;  // (N,) places of it that are seen; a prompt's row: with itself
    const int64_t* slot;           // (N,) where a completion is kept
    const int64_t* position;       // (N,) how many tokens stand before
    const uint8_t* asked;          // (N,) whose logits are wanted; null: all
    int64_t rows;

    // n of them, from the `at`-th on.
    DecodeRows part(int64_t at, int64_t n) const {
        return {token + at,
                home + at,
                prompt_length + at,
                slot ? slot + at : nullptr,
                position + at,
                asked ? asked + at : nullptr,
                n};
    }

    // How many of the first n are asked.
    int64_t before(int64_t n) const { return asked ? n - std::count(asked, asked + n, 0) : n; }

    // Places of its completion that a row sees, with its own.
    int64_t own(int64_t row) const { return slot ? position[row] - prompt_length[row] + 1 : 0; }
};

// The batch that is decoded: slots and the completions in them; R of those, T tokens at most.
struct DecodeState {
    int64_t *token, *length;       // (S,) last token, tokens kept of the completion
    int64_t *row, *home, *prompt;  // (S,) completion, its prompt's place and length
    uint8_t* done;                 // (S,)
    const double* uniform;         // (R, T)
    int64_t *tokens, *count;       // (R, T + 1), (R,)
    float* logp;                   // (R, T + 1)
    const int64_t* eos;
    int64_t slots, eos_count, most;
    float temperature;
};

// Whether the instruction set in use multiplies pairs of bf16.
bool has_dots();

}  // namespace reasonrl
