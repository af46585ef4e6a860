"""Small random Llama 4 and Llama 3.2 Vision models, made and saved by transformers, and split as Meta splits them.

What it is not: our own tables. The splitter names Meta's tensors and cuts them by the rules of Meta's code.
What is surprising: sizes differ in every dimension that could be mistaken for another, and divide by two shards.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import torch

LLAMA4_TEXT: dict[str, Any] = {
    "vocab_size": 520, "hidden_size": 24, "intermediate_size": 20, "intermediate_size_mlp": 28, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4, "num_local_experts": 3,
    "interleave_moe_layer_step": 2, "attention_chunk_size": 8192, "max_position_embeddings": 1 << 20,
}  # fmt: skip
LLAMA4_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7, "vision_output_dim": 12, "projector_input_dim": 12, "projector_output_dim": 12,
    "pixel_shuffle_ratio": 0.5,
}  # fmt: skip
PICTURE_IDS = {"boi_token_index": 500, "eoi_token_index": 501, "image_token_index": 502}

MLLAMA_TEXT: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 5, "num_attention_heads": 6,
    "num_key_value_heads": 2, "cross_attention_layers": [1, 4], "pad_token_id": 0, "max_position_embeddings": 4096,
}  # fmt: skip
MLLAMA_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 3, "num_global_layers": 2, "attention_heads": 2,
    "image_size": 28, "patch_size": 14, "vision_output_dim": 48, "intermediate_layers_indices": [0, 2],
    "max_num_tiles": 4,
}  # fmt: skip


def llama4(*, vision: bool | dict[str, Any] = True, seed: int = 0, **changes: Any) -> Any:
    """A random transformers model, with its vision encoder (of these sizes) or the text alone."""
    from transformers import Llama4Config, Llama4ForCausalLM, Llama4ForConditionalGeneration, Llama4TextConfig

    text = LLAMA4_TEXT | changes
    torch.manual_seed(seed)
    if vision is not False:
        sizes = LLAMA4_VISION | ({} if vision is True else vision)
        model: Any = Llama4ForConditionalGeneration(Llama4Config(text_config=text, vision_config=sizes, **PICTURE_IDS))
    else:
        model = Llama4ForCausalLM(Llama4TextConfig(**text))
    return _random(model)


def mllama(*, vision: bool = True, seed: int = 0) -> Any:
    """A random transformers model, with its vision encoder or the text alone."""
    from transformers import MllamaConfig, MllamaForCausalLM, MllamaForConditionalGeneration
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    torch.manual_seed(seed)
    if vision:
        model: Any = MllamaForConditionalGeneration(
            MllamaConfig(text_config=MLLAMA_TEXT, vision_config=MLLAMA_VISION, image_token_index=128)
        )
    else:
        model = MllamaForCausalLM(MllamaTextConfig(**MLLAMA_TEXT))
    return _random(model)


def _random(model: Any) -> Any:
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def save(model: Any, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """As transformers saves it."""
    model.to(dtype).save_pretrained(folder)
    return folder


def saved_state(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a saved model, read by the safetensors library."""
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def llama4_meta(
    folder: Path, state: dict[str, torch.Tensor], *, shards: int, fused: bool = True, notes: bool = True
) -> Path:
    """A folder of Meta's layout made of the hub's tensors, `shards` ranks of model parallelism.

    `fused`: the spelling of the released files; else that of Meta's published code. `notes`: what training leaves.
    """
    text = LLAMA4_TEXT
    heads, kv, size = text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]
    ranks: list[dict[str, Any]] = [{} for _ in range(shards)]

    def put(name: str, parts: list[torch.Tensor]) -> None:
        for rank, part in zip(ranks, parts, strict=True):
            rank[name] = part.clone().contiguous()

    def by(name: str, tensor: torch.Tensor, axis: int | None) -> None:
        put(name, [tensor] * shards if axis is None else list(tensor.chunk(shards, axis)))

    prefix = "language_model.model."
    by("tok_embeddings.weight", state[f"{prefix}embed_tokens.weight"], 0)
    by("norm.weight", state[f"{prefix}norm.weight"], None)
    by("output.weight", state["language_model.lm_head.weight"], 0)
    for i in range(text["num_hidden_layers"]):
        ours, theirs = f"{prefix}layers.{i}.", f"layers.{i}."
        q, k, v = (state[f"{ours}self_attn.{name}_proj.weight"] for name in "qkv")
        assert (len(q), len(k), len(v)) == (heads * size, kv * size, kv * size)
        before, after = state[f"{ours}input_layernorm.weight"], state[f"{ours}post_attention_layernorm.weight"]
        if fused:
            put(
                theirs + "attention.wqkv.weight",
                [torch.cat(parts) for parts in zip(*(x.chunk(shards) for x in (q, k, v)), strict=True)],
            )
            by(theirs + "attention.wqkv.layer_norm_weight", before, None)
        else:
            for name, tensor in (("q", q), ("k", k), ("v", v)):
                by(f"{theirs}attention.w{name}.weight", tensor, 0)
            by(theirs + "attention_norm.weight", before, None)
        by(theirs + "attention.wo.weight", state[f"{ours}self_attn.o_proj.weight"], 1)
        forward = ours + "feed_forward."
        if forward + "router.weight" not in state:
            gate, up, down = (state[f"{forward}{name}_proj.weight"] for name in ("gate", "up", "down"))
            if fused:
                pairs = zip(gate.chunk(shards), up.chunk(shards), strict=True)
                put(theirs + "feed_forward.mlp.fc1_weight", [torch.cat(pair) for pair in pairs])
                by(theirs + "feed_forward.mlp.fc2_weight", down, 1)
                by(theirs + "feed_forward.mlp.layer_norm_weight", after, None)
            else:
                by(theirs + "feed_forward.w1.weight", gate, 0)
                by(theirs + "feed_forward.w3.weight", up, 0)
                by(theirs + "feed_forward.w2.weight", down, 1)
                by(theirs + "ffn_norm.weight", after, None)
            continue
        by(theirs + ("feed_forward.norm.weight" if fused else "ffn_norm.weight"), after, None)
        by(theirs + "feed_forward.router_DE", state[forward + "router.weight"].T, None)
        for name, old, new in (("gate", "w_in_shared_FD", "w1"), ("up", "w_swiglu_FD", "w3")):
            stored = f"{old}.weight" if fused else f"shared_expert.{new}.weight"
            by(f"{theirs}feed_forward.{stored}", state[f"{forward}shared_expert.{name}_proj.weight"], 0)
        stored = "w_out_shared_DF.weight" if fused else "shared_expert.w2.weight"
        by(f"{theirs}feed_forward.{stored}", state[f"{forward}shared_expert.down_proj.weight"], 1)
        # [E, dim, F]: gate is the first half of the columns. Each rank holds a stretch of F, of every expert.
        gate, up = state[forward + "experts.gate_up_proj"].chunk(2, 2)
        down = state[forward + "experts.down_proj"]
        for name, new, tensor, axis in (
            ("moe_w_in_eD_F", "w1", gate, 2), ("moe_w_swiglu_eD_F", "w3", up, 2), ("moe_w_out_eF_D", "w2", down, 1),
        ):  # fmt: skip
            parts = list(tensor.chunk(shards, axis))
            put(
                f"{theirs}feed_forward.experts.{name if fused else new}",
                [p.flatten(0, 1) if fused else p for p in parts],
            )
        if notes:
            by(theirs + "feed_forward.global_gate_stats_3E", torch.zeros(3, 3), None)
            for rank in ranks:
                rank[theirs + "attention.wqkv._extra_state"] = io.BytesIO(b"\x80\x04spam")
    encoder = "vision_embeddings.vision_encoder."
    by(encoder + "conv1._linear.weight", state["vision_model.patch_embedding.linear.weight"], 0)
    for name, stored in (
        ("class_embedding", "class_embedding"), ("positional_embedding_vlm", "positional_embedding_vlm"),
        ("ln_pre.weight", "layernorm_pre.weight"), ("ln_pre.bias", "layernorm_pre.bias"),
        ("ln_post.weight", "layernorm_post.weight"), ("ln_post.bias", "layernorm_post.bias"),
    ):  # fmt: skip
        by(encoder + name, state[f"vision_model.{stored}"], None)
    for j in range(LLAMA4_VISION["num_hidden_layers"]):
        for name, stored, axis in (
            ("attn.wq", "self_attn.q_proj", 0), ("attn.wk", "self_attn.k_proj", 0), ("attn.wv", "self_attn.v_proj", 0),
            ("attn.wo", "self_attn.o_proj", 1), ("mlp.c_fc", "mlp.fc1", 0), ("mlp.c_proj", "mlp.fc2", 1),
            ("ln_1", "input_layernorm", None), ("ln_2", "post_attention_layernorm", None),
        ):  # fmt: skip
            for kind in ("weight", "bias"):
                split = axis if kind == "weight" or axis != 1 else None
                tensor = state[f"vision_model.model.layers.{j}.{stored}.{kind}"]
                by(f"{encoder}transformer.resblocks.{j}.{name}.{kind}", tensor, split)
    by("vision_embeddings.vision_adapter.mlp.c_fc.weight", state["vision_model.vision_adapter.mlp.fc1.weight"], 0)
    by("vision_embeddings.vision_adapter.mlp.c_proj.weight", state["vision_model.vision_adapter.mlp.fc2.weight"], 1)
    by("vision_projection.weight", state["multi_modal_projector.linear_1.weight"], 0)
    folder.mkdir(parents=True)
    vision = LLAMA4_VISION
    params = {
        "dim": 24, "n_layers": 4, "n_heads": heads, "n_kv_heads": kv, "head_dim": size, "vocab_size": -1,
        "multiple_of": 4, "ffn_dim_multiplier": 0.4, "ffn_exp": 4.5, "norm_eps": 1e-5, "rope_theta": 500000.0,
        "use_scaled_rope": False, "attention_chunk_size": 8192, "nope_layer_interval": 4, "use_qk_norm": True,
        "moe_args": {
            "num_experts": 3, "interleave_moe_layer_step": 2, "top_k": 1, "capacity_factor": 0.5, "auto_scale_F": True,
        },
        "vision_args": {
            "image_size": {"height": 28, "width": 28}, "patch_size": {"height": 7, "width": 7}, "dim": 16,
            "n_layers": vision["num_hidden_layers"], "n_heads": 2, "mlp_ratio": 4.0, "output_dim": 12,
            "pixel_shuffle_ratio": 0.5,
        },
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps({"model": params}))
    for i, rank in enumerate(ranks):
        torch.save(rank, folder / f"consolidated.{i:02d}.pth")
    return folder
