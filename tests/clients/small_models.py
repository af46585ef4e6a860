"""Two models for clients to talk to: stories260K, and one of random weights with a real tokenizer and chat format.

What is surprising: the random one answers nonsense, and yet in any form that is asked of it, for that is the engine's
work. It ends no answer by itself in practice: its answers are as long as they may be.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np


def random_chat_model(folder: Path, reference: Path) -> None:
    """Llama 3.1 in the hub's layout: two layers, 64 wide, the real 128,256 words and chat template."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    dim, hidden, layers, heads, kv_heads, words = 64, 128, 2, 4, 2, 128_256
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": dim, "intermediate_size": hidden,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "vocab_size": words, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False,
        "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "torch_dtype": "float32",
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    draw = np.random.default_rng(11)

    def weights(*shape: int) -> np.ndarray:
        return (draw.standard_normal(shape, dtype=np.float32) * 0.05).astype(np.float32)

    head = dim // heads
    tensors = {"model.embed_tokens.weight": weights(words, dim), "model.norm.weight": np.ones(dim, np.float32)}
    for n in range(layers):
        at = f"model.layers.{n}."
        tensors |= {
            f"{at}input_layernorm.weight": np.ones(dim, np.float32),
            f"{at}post_attention_layernorm.weight": np.ones(dim, np.float32),
            f"{at}self_attn.q_proj.weight": weights(heads * head, dim),
            f"{at}self_attn.k_proj.weight": weights(kv_heads * head, dim),
            f"{at}self_attn.v_proj.weight": weights(kv_heads * head, dim),
            f"{at}self_attn.o_proj.weight": weights(dim, heads * head),
            f"{at}mlp.gate_proj.weight": weights(hidden, dim),
            f"{at}mlp.up_proj.weight": weights(hidden, dim),
            f"{at}mlp.down_proj.weight": weights(dim, hidden),
        }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizers = reference / "tokenizers"
    shutil.copy(tokenizers / "llama3" / "tokenizer.model", folder)
    about = json.loads((tokenizers / "llama3.1" / "tokenizer_config.json").read_text())
    template = reference / "prompt_formats" / "chat_templates" / "meta-llama-Llama-3.1-8B-Instruct.jinja"
    about["chat_template"] = template.read_text()
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def stories(file: Path, reference: Path) -> None:
    """stories260K as a GGUF, its tokenizer inside."""
    from puna.cli.main import main

    source = reference / "checkpoints" / "stories260K"
    code = main(["convert", str(source / "stories260K.bin"), "--tokenizer", str(source / "tok512.bin"), "--to", "gguf",
                 "-o", str(file)])  # fmt: skip
    assert code == 0
