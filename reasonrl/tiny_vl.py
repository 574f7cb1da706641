"""A small Qwen2.5-VL from scratch: the real architecture, over single characters, a few million
parameters. It learns the built-in visual task (`charts`) on a CPU in minutes.

An image of 64 x 64 pixels is 8 x 8 patches, merged two by two: 16 tokens of the prompt. Weights are
random and seeded; the vocabulary is tiny.py's and the three marks around images.
"""

from __future__ import annotations

import torch
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from reasonrl import tiny
from reasonrl.records import InputError

START, IMAGE, END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"


def build(
    *,
    seed: int = 0,
    width: int = 192,
    layers: int = 4,
    heads: int = 4,
    vision_width: int = 128,
    vision_layers: int = 3,
    patch: int = 8,  # pixels
    context: int = 1024,
) -> tuple[Qwen2_5_VLForConditionalGeneration, PreTrainedTokenizerFast, Qwen2VLImageProcessorPil]:
    """A fresh model, its tokenizer and image processor; the same seed gives the same weights."""
    for name, value in (("width", width), ("vision_width", vision_width)):
        if value % (4 * heads) or (name == "width" and value // heads % 8):
            raise InputError(
                f"model_options.{name}: expected a multiple of {8 * heads} (8 * heads), got {value}"
            )
    words = tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": [START, IMAGE, END]})
    start, image, end = (words.get_vocab()[mark] for mark in (START, IMAGE, END))
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(words),
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": context,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": _sections(width // heads // 2),
            },
            "pad_token_id": words.pad_token_id,
            "bos_token_id": words.bos_token_id,
            "eos_token_id": words.eos_token_id,
        },
        vision_config={
            "depth": vision_layers,
            "hidden_size": vision_width,
            "intermediate_size": 3 * vision_width,
            "num_heads": heads,
            "patch_size": patch,
            "spatial_merge_size": 2,
            "temporal_patch_size": 1,
            "window_size": 8 * patch,
            "fullatt_block_indexes": list(range(vision_layers)),
            "out_hidden_size": width,
        },
        vision_start_token_id=start,
        image_token_id=image,
        vision_end_token_id=end,
        video_token_id=len(words) - 1,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch,
        temporal_patch_size=1,
        merge_size=2,
        size={"shortest_edge": (2 * patch) ** 2, "longest_edge": 1 << 20},
        do_convert_rgb=True,
    )
    return model, words, processor


def _sections(half: int) -> list[int]:
    """How many rotary frequencies read the frame, the row and the column."""
    side = 3 * half // 8
    return [half - 2 * side, side, side]
