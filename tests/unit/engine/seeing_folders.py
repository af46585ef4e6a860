"""Small random models that see, as folders that `LLM` loads: tokenizer, chat template and all.

What it is not: a model that knows anything. Which picture it is shown decides what it says, and nothing else is asked.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch

VOCAB = 267
MARKS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|image_start|>",
    "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>", "<|image|>", "<|patch|>",
)  # fmt: skip
IDS = {mark: 256 + i for i, mark in enumerate(MARKS)}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|image|>{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def mllama_folder(folder: Path) -> Path:
    """A Llama 3.2 Vision."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {
        "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 3,
        "num_attention_heads": 6, "num_key_value_heads": 2, "cross_attention_layers": [1], "pad_token_id": 0,
        "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_global_layers": 1,
        "attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 32,
        "intermediate_layers_indices": [0], "max_num_tiles": 4,
    }  # fmt: skip
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=VOCAB)
    return _saved(MllamaForConditionalGeneration(config), folder)


def llama4_folder(folder: Path) -> Path:
    """A Llama 4."""
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    text = {
        "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 20, "intermediate_size_mlp": 28,
        "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4,
        "num_local_experts": 3, "interleave_moe_layer_step": 2, "attention_chunk_size": 8192,
        "max_position_embeddings": 512, "bos_token_id": 256, "eos_token_id": 257,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 7, "vision_output_dim": 12, "projector_input_dim": 12, "projector_output_dim": 12,
        "pixel_shuffle_ratio": 0.5,
    }  # fmt: skip
    config = Llama4Config(
        text_config=text, vision_config=vision, boi_token_index=IDS["<|image_start|>"],
        eoi_token_index=IDS["<|image_end|>"], image_token_index=IDS["<|patch|>"],
    )  # fmt: skip
    return _saved(Llama4ForConditionalGeneration(config), folder)


def _saved(model: torch.nn.Module, folder: Path) -> Path:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("gate_attn", "gate_ffn")):  # what is seen counts
                parameter.fill_(2.0)
            else:
                spread = 2.0 * parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 1.0
                if "cross_attn.v_proj" in name or "cross_attn.o_proj" in name:
                    spread *= 6  # an average of many noises is small
                parameter.normal_(0, spread, generator=random)
    model.to(torch.float32).save_pretrained(folder)  # type: ignore[operator]
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={each: i for i, each in enumerate(bytes_)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in MARKS])
    tokenizer.save(str(folder / "tokenizer.json"))
    said = {"bos_token": MARKS[0], "eos_token": "<|eot_id|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    return folder


def png(seed: int, width: int = 40, height: int = 30) -> bytes:
    """The file of a picture of noise."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()
