"""Where Llama 3.2 Vision's parameters lie in the hub's files and in Meta's.

What it is: one `parts.Plan` a layout, made from the canonical shapes, for the decoder with its cross-attention layers
and the vision encoder. Sources: the state dict of transformers' MllamaForConditionalGeneration, and Meta's reference
(llama-models, models/llama3/multimodal/model.py).
What it is not: a reader, or a place where q and k are reordered (`names.repair`; those of cross layers never are).
What is surprising: Meta counts self-attention and cross-attention layers apart, the hub together. The embedding's last
rows (for `<|image|>` and its like) are a tensor of their own in Meta's files, and the head has no such rows. And Meta
stores the tile embeddings as a grid [rows, columns], of which the hub keeps one unrolled copy for each aspect ratio.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping

from puna.errors import CheckpointError
from puna.weights.parts import Part, Plan, Shape, divided

_IGNORABLE = re.compile(r"text_model\.rope\.freqs")

_SELF_HUB = {
    "attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
_CROSS_HUB = _SELF_HUB | {
    "q": "cross_attn.q_proj", "k": "cross_attn.k_proj", "v": "cross_attn.v_proj", "o": "cross_attn.o_proj",
    "q_norm": "cross_attn.q_norm.weight", "k_norm": "cross_attn.k_norm.weight",
    "attention_gate": "cross_attn_attn_gate", "mlp_gate": "cross_attn_mlp_gate",
}  # fmt: skip
_LAYER_META = {
    "attention_norm": "attention_norm.weight", "mlp_norm": "ffn_norm.weight",
    "q": "attention.wq", "k": "attention.wk", "v": "attention.wv", "o": "attention.wo",
    "gate": "feed_forward.w1", "up": "feed_forward.w3", "down": "feed_forward.w2",
    "q_norm": "attention.q_norm.weight", "k_norm": "attention.k_norm.weight",
    "attention_gate": "gate_attn", "mlp_gate": "gate_ffwd",
}  # fmt: skip
_VISION = {
    "hub": {
        "vision.patch.weight": "vision_model.patch_embedding.weight",
        "vision.class_embedding": "vision_model.class_embedding",
        "vision.position.embedding": "vision_model.gated_positional_embedding.embedding",
        "vision.position.tiles": "vision_model.gated_positional_embedding.tile_embedding.weight",
        "vision.position.gate": "vision_model.gated_positional_embedding.gate",
        "vision.pre_tile.embedding": "vision_model.pre_tile_positional_embedding.embedding.weight",
        "vision.pre_tile.gate": "vision_model.pre_tile_positional_embedding.gate",
        "vision.post_tile.embedding": "vision_model.post_tile_positional_embedding.embedding.weight",
        "vision.post_tile.gate": "vision_model.post_tile_positional_embedding.gate",
        "vision.pre_norm": "vision_model.layernorm_pre", "vision.post_norm": "vision_model.layernorm_post",
        "projector": "multi_modal_projector",
    },
    "meta": {
        "vision.patch.weight": "vision_model.vision_encoder.conv1._linear.weight",
        "vision.class_embedding": "vision_model.vision_encoder.class_embedding",
        "vision.position.embedding": "vision_model.vision_encoder.positional_embedding",
        "vision.position.tiles": "vision_model.vision_encoder.gated_positional_embedding",
        "vision.position.gate": "vision_model.vision_encoder.gated_positional_embedding_gate",
        "vision.pre_tile.embedding": "vision_model.vision_encoder.pre_tile_pos_embed.embedding",
        "vision.pre_tile.gate": "vision_model.vision_encoder.pre_tile_pos_embed.gate",
        "vision.post_tile.embedding": "vision_model.vision_encoder.post_tile_pos_embed.embedding",
        "vision.post_tile.gate": "vision_model.vision_encoder.post_tile_pos_embed.gate",
        "vision.pre_norm": "vision_model.vision_encoder.ln_pre",
        "vision.post_norm": "vision_model.vision_encoder.ln_post", "projector": "vision_model.vision_projection",
    },
}  # fmt: skip
_VISION_STACK = {
    "hub": {"layers": "vision_model.transformer.layers.", "global_layers": "vision_model.global_transformer.layers."},
    "meta": {
        "layers": "vision_model.vision_encoder.transformer.resblocks.",
        "global_layers": "vision_model.vision_encoder.global_transformer.resblocks.",
    },
}
_VISION_LAYER = {
    "hub": {
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
        "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "up": "mlp.fc1", "down": "mlp.fc2",
        "attention_gate": "gate_attn", "mlp_gate": "gate_ffn",
    },
    "meta": {
        "attention_norm": "ln_1", "mlp_norm": "ln_2", "q": "attn.wq", "k": "attn.wk", "v": "attn.wv", "o": "attn.wo",
        "up": "mlp.c_fc", "down": "mlp.c_proj", "attention_gate": "gate_attn", "mlp_gate": "gate_ffn",
    },
}  # fmt: skip


def ignorable(name: str) -> bool:
    """Whether a stored tensor is known by name not to change the arithmetic, so that it may be left over."""
    return _IGNORABLE.fullmatch(name) is not None


def hub(shapes: Mapping[str, Shape], have: Collection[str]) -> Plan:
    """The hub's layout; `have` are the names stored, or none for one to be written.

    transformers writes `language_model.model.` before the text's names (`model.` where there is only text); its state
    dicts have `model.language_model.`.
    """
    text, head, vision = "model.", "lm_head.weight", ""
    if any(name.startswith("vision.") for name in shapes) or "language_model.model.embed_tokens.weight" in have:
        text, head = "language_model.model.", "language_model.lm_head.weight"
    if "model.language_model.embed_tokens.weight" in have:
        text, head, vision = "model.language_model.", "lm_head.weight", "model."
    plan = Plan()
    for name, shape in shapes.items():
        word = name.split(".")
        if name in ("embedding", "norm", "head"):
            top = {"embedding": text + "embed_tokens.weight", "norm": text + "norm.weight", "head": head}
            plan.whole(name, top[name], shape)
        elif word[0] == "layers":
            parts = _CROSS_HUB if f"layers.{word[1]}.attention_gate" in shapes else _SELF_HUB
            plan.whole(name, ".".join((f"{text}layers.{word[1]}.{parts[word[2]]}", *word[3:])), shape)
        else:
            side = math.isqrt(shape[1] // 3) if name == "vision.patch.weight" else 0
            plan.whole(name, vision + _vision(name, "hub"), (shape[0], 3, side, side) if side else shape)
    return plan


def meta(
    shapes: Mapping[str, Shape], stored_shapes: Mapping[str, Shape], shards: int, *, head_rows: int | None = None
) -> Plan:
    """Meta's layout in `shards` files. `stored_shapes` are those of what is stored, or none for one to be written.

    `head_rows`: rows of the embedding that are `tok_embeddings`; the rest is `learnable_embedding`.
    """
    plan = Plan(shards)
    rows, columns = shapes["embedding"]
    own = head_rows if head_rows is not None else rows
    plan.parts["embedding"] = []
    for stored, begin, end in (("tok_embeddings", 0, own), ("learnable_embedding", own, rows)):
        if begin == end:
            continue
        height = divided(end - begin, shards, stored)
        plan.shapes[f"text_model.{stored}.weight"] = (height, columns)
        for s in range(shards):
            into = (slice(begin + s * height, begin + (s + 1) * height),)
            plan.parts["embedding"].append(Part(f"text_model.{stored}.weight", (), into, shard=s))
    crossed = sorted({int(name.split(".")[1]) for name in shapes if re.fullmatch(r"layers\.\d+\.attention_gate", name)})
    for name, shape in shapes.items():
        word = name.split(".")
        if name == "norm":
            plan.whole(name, "text_model.norm.weight", shape)
        elif name == "head":
            plan.rows(name, "text_model.output.weight", shape)
        elif word[0] == "layers":
            i = int(word[1])
            before = sum(c < i for c in crossed)
            prefix = f"cross_attention_layers.{before}" if i in crossed else f"layers.{i - before}"
            stored = ".".join((f"text_model.{prefix}.{_LAYER_META[word[2]]}", *word[3:]))
            _split(plan, name, stored, shape, word[2], stored_shapes)
        elif name in ("vision.position.tiles", "vision.pre_tile.embedding", "vision.post_tile.embedding"):
            _tiles(plan, name, _vision(name, "meta"), shape, shapes)
        elif name != "embedding":
            stored = _vision(name, "meta")
            if word[-1] == "bias" and (name == "projector.bias" or word[-2] == "up"):
                plan.rows(name, stored, shape)
            else:
                kind = word[-2] if word[-1] in ("weight", "bias") else word[-1]
                _split(plan, name, stored, shape, kind if word[-1] != "bias" else "", stored_shapes)
    return plan


def _split(plan: Plan, name: str, stored: str, shape: Shape, part: str, stored_shapes: Mapping[str, Shape]) -> None:
    """A matrix by the side that Meta splits; norms, gates and embeddings are in every shard."""
    if part in ("q", "k", "v", "gate", "up", "patch", "projector") and len(shape) == 2:
        plan.rows(name, stored, shape)
    elif part in ("o", "down") and len(shape) == 2:
        plan.columns(name, stored, shape)
    else:
        plan.whole(name, stored, shape)
        said = stored_shapes.get(stored, shape)
        # A released gate may be a row of equal numbers or have further dimensions of one; its first number is meant.
        if part in ("attention_gate", "mlp_gate", "gate") and shape == (1,) and said != shape and 0 not in said:
            plan.shapes[stored] = said
            plan.parts[name] = [Part(stored, (*(0,) * (len(said) - 1), slice(0, 1)))]


def ratios(tiles: int) -> list[tuple[int, int]]:
    """The aspect ratios (rows, columns of tiles) of a picture of at most `tiles` tiles, in the order of their ids."""
    return [(h, w) for h in range(1, tiles + 1) for w in range(1, tiles + 1) if h * w <= tiles]


def _tiles(plan: Plan, name: str, stored: str, shape: Shape, shapes: Mapping[str, Shape]) -> None:
    """A grid [tiles, tiles, patches, width], unrolled for each ratio: row id, then a stretch for each of its tiles."""
    width = shapes["vision.class_embedding"][0]
    patches = shapes["vision.position.embedding"][0] if name.endswith("tiles") else 1
    most = shape[1] // (patches * width)
    known = ratios(most)
    if len(known) + 1 != shape[0]:
        raise CheckpointError(
            f"Meta's layout has {len(known)} aspect ratios for {most} tiles, and this model {shape[0] - 1}.",
            remedy="Convert to safetensors.",
        )
    plan.shapes[stored] = (most, most, patches, width)
    plan.same.add(stored)
    plan.filled.add(name)
    step = patches * width
    plan.parts[name] = [
        Part(stored, (t // w, t % w), (i + 1, slice(t * step, (t + 1) * step)))
        for i, (h, w) in enumerate(known)
        for t in range(h * w)
    ]


def _vision(name: str, convention: str) -> str:
    """What a layout calls a parameter of the vision encoder."""
    top = _VISION[convention]
    if name in top:
        return top[name]
    stem, _, kind = name.rpartition(".")
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, stack, layer, part, *rest = name.split(".")
    return ".".join((_VISION_STACK[convention][stack] + layer, _VISION_LAYER[convention][part], *rest))
