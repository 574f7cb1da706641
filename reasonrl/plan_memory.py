"""Bytes of activations, caches and logits of a decoder with gated MLPs, per token.

Legend: h hidden, q and k widths of all query and all key heads, i intermediate, V vocabulary, c
bytes of the compute dtype, P and R tokens of prompt and completion.
"""

from __future__ import annotations

from dataclasses import dataclass

from reasonrl.plan_shapes import Shape

SCRATCH = 1 << 30  # of logits alive at one time in the fused loss (kernels/linear_logp.py)


@dataclass(frozen=True)
class Lengths:
    prompt: int  # P
    completion: int  # R
    group: int  # completions of a prompt


def activation_bytes(
    shape: Shape, sizes: Lengths, precision: str, checkpointing: bool, plain: bool,
    whole: bool = False,
) -> float:  # fmt: skip
    """What autograd keeps for the backward pass of one packed token, all layers.

    A layer, by what each operation saves (Korthikanti et al., arXiv 2205.05198, section 4.1, done
    again for RMSNorm, grouped keys, a gated MLP and a packed batch):

        norms  two of: input, normalised input and output, in fp32 (4 + 4 + 4 h). mixed: the input
               and the normalised one in fp32, and a bf16 copy of the output for each of 5 products
               (2 (4 + 4) + 10 h). bf16: an fp32 copy, two in bf16 (2 (4 + 2 + 2) h)
        attention  queries, output, and its copy in the packed order (3 c q); keys and values with
               the prompt's in front, once a completion (2 c k (1 + P/R))
        MLP    gate, its activation, up, their product (4 c i)

    Plain attention is that of a CPU, where kernels of ours take what stands between the products:

        norms  two of: input, and output in the compute dtype (2 (4 + c) h; bf16: 2 (2 + c) h)
        attention  queries and output (2 c q); keys and values as above; the weights, with
               S = P + R keys (S heads c)
        MLP    gate, up, their product (3 c i)

    A layer that is one function (`whole_layer`) keeps its input and the sum after attention in fp32
    (8 h), queries, keys, values and what was seen (c (2 q + 2 k)), gate and up (2 c i), and of
    attention a log-sum-exp (4 heads), on a CPU a maximum and a share (8 heads).

    Checkpointing (section 4 there, full recomputation) keeps each layer's input and one layer's
    worth of all that. The last norm keeps 12 h, its input alone where it is ours.
    """
    c, h = 4 if precision == "fp32" else 2, shape.hidden
    stream = (2 if precision == "bf16" else 4) * h
    prompt = 1 + sizes.prompt / sizes.completion
    layer = 2 * c * shape.keys * prompt
    if whole:
        layer = 8 * h + 2 * c * (shape.queries + shape.keys + shape.intermediate)
        layer += shape.heads * (8 if plain else 4)
    elif plain:
        layer += 2 * (stream + c * h) + 2 * c * shape.queries + 3 * c * shape.intermediate
        layer += (sizes.prompt + sizes.completion) * shape.heads * c
    else:
        norms = {"fp32": 24, "mixed": 26, "bf16": 16}[precision] * h
        layer += norms + 3 * c * shape.queries + 4 * c * shape.intermediate
    last = stream if plain else 12 * h
    return shape.layers * (stream if checkpointing else layer) + checkpointing * layer + last


def head_bytes(shape: Shape, tokens: int, compute: int, scratch: int = SCRATCH) -> float:
    """Beside the gradient: one chunk of logits, dW in fp32, the head in the compute dtype where it
    is not, and the hidden states with their gradient. It does not grow with tokens x V."""
    matrix = shape.vocab * shape.hidden
    chunk = min(scratch, tokens * shape.vocab * compute)
    return (
        chunk + matrix * (4 + (compute if compute < 4 else 0)) + 2 * compute * tokens * shape.hidden
    )


def stored_logits(shape: Shape, tokens: int) -> float:
    """What a loss over whole logits adds: fp32 log-probabilities and gradient, 8 V a token."""
    return 8 * shape.vocab * tokens


def kv_bytes_per_token(shape: Shape, compute: int) -> float:
    """A key and a value of every layer."""
    return 2 * shape.layers * shape.keys * compute


def decode_bytes(shape: Shape, compute: int) -> float:
    """Logits of one completion's next token, and three fp32 copies while one is drawn."""
    return shape.vocab * (compute + 12)


def microbatches(sizes: Lengths, groups: int, budget: int) -> tuple[int, int]:
    """(how many, tokens of the largest) that batch.pack makes of equal groups: a prompt stands once
    for the completions of its group in a batch, the last token of one not at all, and one alone
    may exceed the budget."""
    count = largest = used = 0
    last = -1
    for row in range(groups * sizes.group):
        group = row // sizes.group
        cost = sizes.completion - 1 + (sizes.prompt if group != last else 0)
        if count == 0 or used + cost > budget:
            count, used, cost = count + 1, 0, sizes.completion - 1 + sizes.prompt
        used, last = used + cost, group
        largest = max(largest, used)
    return count, largest
