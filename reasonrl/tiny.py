"""A small Llama from scratch over single characters: it learns on two CPU cores in minutes.

Weights are random and seeded; the vocabulary is the printable ASCII characters and newline, so
every task with an ASCII prompt works. About 1.3 M parameters as it stands.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reasonrl.records import InputError

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
CHARACTERS = "\n" + "".join(chr(i) for i in range(32, 127))


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; ids 0..3 are pad, bos, eos, unk."""
    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, UNK, *CHARACTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK
    )


def build(
    *, seed: int = 0, width: int = 160, layers: int = 4, heads: int = 4, context: int = 1024
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A fresh model of `layers` blocks `width` wide; the same seed gives the same weights."""
    if width % (2 * heads):
        raise InputError(
            f"model_options.width must be a multiple of 2*heads = {2 * heads}, got {width}"
        )
    words = tokenizer()
    marks = words.get_vocab()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        pad_token_id=marks[PAD],
        bos_token_id=marks[BOS],
        eos_token_id=marks[EOS],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config), words
