"""Where Llama 4's parameters lie in the hub's files, Meta's and GGUF's.

What it is: one `parts.Plan` a layout, made from the canonical shapes, for text and vision, dense layers and experts.
Sources: the state dict of transformers' Llama4ForConditionalGeneration; Meta's reference (llama-models, models/llama4)
and the keys its load hooks take; gguf-py's tensor table for `llama4` and for the projector file (`clip`).
What it is not: a reader.
What is surprising: the hub and Meta keep the experts as x · W wants them, [dim, ffn], the transpose of every other
matrix, all experts of a layer in one tensor; the hub fuses gate and up, gate first. GGUF stores them as [ffn, dim].
Meta's shards of `moe_w_out_eF_D` each hold a stretch of the rows of every expert, not some experts whole. No layout
permutes q and k: all of them pair neighbours. And the router is transposed in Meta's files only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from puna.weights.parts import Index, Part, Plan, Shape, divided

_VISION_HUB = {
    "vision.patch.weight": "vision_model.patch_embedding.linear.weight",
    "vision.class_embedding": "vision_model.class_embedding",
    "vision.position_embedding": "vision_model.positional_embedding_vlm",
    "vision.pre_norm": "vision_model.layernorm_pre",
    "vision.post_norm": "vision_model.layernorm_post",
    "vision.adapter.up.weight": "vision_model.vision_adapter.mlp.fc1.weight",
    "vision.adapter.down.weight": "vision_model.vision_adapter.mlp.fc2.weight",
    "projector.weight": "multi_modal_projector.linear_1.weight",
}
_VISION_META = {
    "vision.patch.weight": "vision_embeddings.vision_encoder.conv1._linear.weight",
    "vision.class_embedding": "vision_embeddings.vision_encoder.class_embedding",
    "vision.position_embedding": "vision_embeddings.vision_encoder.positional_embedding_vlm",
    "vision.pre_norm": "vision_embeddings.vision_encoder.ln_pre",
    "vision.post_norm": "vision_embeddings.vision_encoder.ln_post",
    "vision.adapter.up.weight": "vision_embeddings.vision_adapter.mlp.c_fc.weight",
    "vision.adapter.down.weight": "vision_embeddings.vision_adapter.mlp.c_proj.weight",
    "projector.weight": "vision_projection.weight",
}
_VISION_GGUF = {
    "vision.patch.weight": "v.patch_embd.weight",
    "vision.class_embedding": "v.class_embd",
    "vision.position_embedding": "v.position_embd.weight",
    "vision.pre_norm": "v.pre_ln",
    "vision.post_norm": "v.post_ln",
    "vision.adapter.up.weight": "mm.model.mlp.1.weight",
    "vision.adapter.down.weight": "mm.model.mlp.2.weight",
    "projector.weight": "mm.model.fc.weight",
}
_VISION_LAYER = {
    "hub": {
        "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
        "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "up": "mlp.fc1", "down": "mlp.fc2",
    },
    "meta": {
        "attention_norm": "ln_1", "mlp_norm": "ln_2", "q": "attn.wq", "k": "attn.wk", "v": "attn.wv", "o": "attn.wo",
        "up": "mlp.c_fc", "down": "mlp.c_proj",
    },
    "gguf": {
        "attention_norm": "ln1", "mlp_norm": "ln2", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_out",
        "up": "ffn_up", "down": "ffn_down",
    },
}  # fmt: skip
_VISION_PREFIX = {
    "hub": "vision_model.model.layers.", "meta": "vision_embeddings.vision_encoder.transformer.resblocks.",
    "gguf": "v.blk.",
}  # fmt: skip

_IGNORABLE = re.compile(
    r"rope\.freqs|freq_cis"
    # What Meta's training counted and its libraries kept beside the weights; its own reference drops them too.
    r"|layers\.\d+\.feed_forward\.(?:(?:global|running)_gate_stats_3E|expert_activation_DE)"
    r"|layers\.\d+\.(?:attention\.(?:wo|wqkv)|feed_forward\.(?:experts\.mlp|mlp_shared|mlp))\._extra_state"
    r"|(?:model\.)?vision_model\.rotary_embedding\.freqs_ci"
)


def ignorable(name: str) -> bool:
    """Whether a stored tensor is known by name not to change the arithmetic, so that it may be left over."""
    return _IGNORABLE.fullmatch(name) is not None


def hub(shapes: Mapping[str, Shape], have: Collection[str]) -> Plan:
    """The hub's layout. `have` are the names stored, or none for one to be written: transformers writes
    `language_model.` before the text's names where there is vision; its state dicts have `model.` before that.
    """
    text, head = "model.", "lm_head.weight"
    vision = ""
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
            _hub_layer(plan, f"{text}layers.{word[1]}.", name, shape)
        else:
            plan.whole(name, vision + _vision(name, "hub"), shape)
    return plan


_HUB_LAYER = {
    "attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight",
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "feed_forward.gate_proj", "up": "feed_forward.up_proj", "down": "feed_forward.down_proj",
    "router": "feed_forward.router", "shared": "feed_forward.shared_expert",
}  # fmt: skip


def _hub_layer(plan: Plan, prefix: str, name: str, shape: Shape) -> None:
    _, _, part, *rest = name.split(".")
    if part != "experts":
        if part == "shared":
            rest = [f"{rest[0]}_proj", *rest[1:]]
        plan.whole(name, prefix + ".".join((_HUB_LAYER[part], *rest)), shape)
        return
    expert, matrix = int(rest[0]), rest[1]
    rows, columns = shape
    at: Index = (expert,)
    if matrix == "down":
        stored, inside = "down_proj", (columns, rows)
    else:  # gate first, then up, side by side
        first = 0 if matrix == "gate" else rows
        stored, inside = "gate_up_proj", (columns, 2 * rows)
        at = (expert, slice(None), slice(first, first + rows))
    stored = f"{prefix}feed_forward.experts.{stored}"
    plan.shapes[stored] = (max(expert + 1, plan.shapes.get(stored, (0,))[0]), *inside)
    plan.parts[name] = [Part(stored, at, transposed=True)]


def meta(shapes: Mapping[str, Shape], have: Collection[str], shards: int) -> Plan:
    """Meta's layout in `shards` files of model parallelism.

    Where a part has several spellings the one in `have` is taken, or the one that Meta's released files have.
    """
    plan = Plan(shards)
    for name, shape in shapes.items():
        if name == "norm":
            plan.whole(name, "norm.weight", shape)
        elif name in ("embedding", "head"):
            plan.rows(name, {"embedding": "tok_embeddings.weight", "head": "output.weight"}[name], shape)
        elif not name.startswith("layers."):
            _meta_vision(plan, name, shape)
    for i in range(1 + max((int(name.split(".")[1]) for name in shapes if name.startswith("layers.")), default=-1)):
        _meta_layer(plan, i, shapes, have)
    return plan


def _meta_layer(plan: Plan, i: int, shapes: Mapping[str, Shape], have: Collection[str]) -> None:
    ours, theirs = f"layers.{i}.", f"layers.{i}."
    moe = f"{ours}router.weight" in shapes

    def of(*names: str) -> list[tuple[str, Shape]]:
        return [(ours + name, shapes[ours + name]) for name in names]

    def spelled(*names: str) -> str:
        """The spelling that is there; the first is the one Meta's releases have."""
        return theirs + next((name for name in names if theirs + name in have), names[0])

    name = ours + "attention_norm"
    plan.whole(name, spelled("attention.wqkv.layer_norm_weight", "attention_norm.weight"), shapes[name])
    if theirs + "attention.wq.weight" in have:
        for letter in "qkv":
            plan.rows(f"{ours}{letter}.weight", f"{theirs}attention.w{letter}.weight", shapes[f"{ours}{letter}.weight"])
    else:
        plan.blocks(theirs + "attention.wqkv.weight", of("q.weight", "k.weight", "v.weight"))
    plan.columns(ours + "o.weight", theirs + "attention.wo.weight", shapes[ours + "o.weight"])
    released = "feed_forward.norm.weight" if moe else "feed_forward.mlp.layer_norm_weight"
    name = ours + "mlp_norm"
    plan.whole(name, spelled(released, "feed_forward.norm.weight", "ffn_norm.weight"), shapes[name])
    if not moe:
        if theirs + "feed_forward.w1.weight" in have:
            plan.rows(ours + "gate.weight", theirs + "feed_forward.w1.weight", shapes[ours + "gate.weight"])
            plan.rows(ours + "up.weight", theirs + "feed_forward.w3.weight", shapes[ours + "up.weight"])
        else:
            plan.blocks(theirs + "feed_forward.mlp.fc1_weight", of("gate.weight", "up.weight"))
        stored = spelled("feed_forward.mlp.fc2_weight", "feed_forward.w2.weight")
        plan.columns(ours + "down.weight", stored, shapes[ours + "down.weight"])
        return
    name = ours + "router.weight"
    stored = theirs + "feed_forward.router_DE"
    plan.shapes[stored], plan.parts[name] = shapes[name][::-1], [Part(stored, transposed=True)]
    plan.same.add(stored)
    for matrix, short, long in (("gate", "w_in_shared_FD", "w1"), ("up", "w_swiglu_FD", "w3")):
        stored = spelled(f"feed_forward.{short}.weight", f"feed_forward.shared_expert.{long}.weight")
        plan.rows(f"{ours}shared.{matrix}.weight", stored, shapes[f"{ours}shared.{matrix}.weight"])
    stored = spelled("feed_forward.w_out_shared_DF.weight", "feed_forward.shared_expert.w2.weight")
    plan.columns(ours + "shared.down.weight", stored, shapes[ours + "shared.down.weight"])
    count = sum(name.startswith(ours + "experts.") for name in shapes) // 3
    for matrix, old, new in (("gate", "moe_w_in_eD_F", "w1"), ("up", "moe_w_swiglu_eD_F", "w3")):
        stored = spelled(f"feed_forward.experts.{old}", f"feed_forward.experts.{new}")
        _meta_experts(plan, f"{ours}experts.", matrix, stored, count, shapes)
    stored = spelled("feed_forward.experts.moe_w_out_eF_D", "feed_forward.experts.w2")
    _meta_experts(plan, f"{ours}experts.", "down", stored, count, shapes)


def _meta_experts(plan: Plan, prefix: str, matrix: str, stored: str, count: int, shapes: Mapping[str, Shape]) -> None:
    """All experts of a layer, the hidden width split over the shards: columns of gate and up, rows of down.

    `moe_…` has the experts one below the other, the later spelling `w1` has a dimension for them.
    """
    flat = ".moe_" in stored
    for e in range(count):
        name = f"{prefix}{e}.{matrix}.weight"
        rows, columns = shapes[name]
        wide = rows if matrix != "down" else columns
        share = divided(wide, plan.shards, name)
        height = columns if matrix != "down" else share
        width = share if matrix != "down" else rows
        plan.shapes[stored] = (count * height, width) if flat else (count, height, width)
        at = (slice(e * height, (e + 1) * height),) if flat else (e,)
        plan.parts[name] = []
        for s in range(plan.shards):
            mine = slice(s * share, (s + 1) * share)
            into = () if plan.shards == 1 else (mine,) if matrix != "down" else (slice(None), mine)
            plan.parts[name].append(Part(stored, at, into, transposed=True, shard=s))


def _meta_vision(plan: Plan, name: str, shape: Shape) -> None:
    stored = _vision(name, "meta")
    part, _, kind = name.rpartition(".")
    part = part.rpartition(".")[2]
    if part in ("q", "k", "v", "up", "patch", "projector"):
        plan.rows(name, stored, shape)
    elif part in ("o", "down") and kind == "weight":
        plan.columns(name, stored, shape)
    else:  # norms, embeddings, and the biases that are added after the shards' sum
        plan.whole(name, stored, shape)


def gguf(shapes: Mapping[str, Shape]) -> Plan:
    """GGUF's layout of the text; an expert is a stretch of a tensor of three dimensions, so it stays a view."""
    plan = Plan()
    for name, shape in shapes.items():
        word = name.split(".")
        if name in _GGUF_TOP:
            plan.whole(name, _GGUF_TOP[name], shape)
        elif word[0] == "layers" and word[2] == "experts":
            stored = f"blk.{word[1]}.ffn_{word[4]}_exps.weight"
            expert = int(word[3])
            plan.shapes[stored] = (max(expert + 1, plan.shapes.get(stored, (0,))[0]), *shape)
            plan.parts[name] = [Part(stored, (expert,))]
        elif word[0] == "layers" and word[2] == "shared":
            plan.whole(name, f"blk.{word[1]}.ffn_{word[3]}_shexp.weight", shape)
        elif word[0] == "layers":
            plan.whole(name, ".".join((f"blk.{word[1]}", _GGUF_LAYER[word[2]], *word[3:])), shape)
        else:
            plan.whole(name, _vision(name, "gguf"), shape)
    return plan


_GGUF_TOP = {"embedding": "token_embd.weight", "norm": "output_norm.weight", "head": "output.weight"}
_GGUF_LAYER = {
    "attention_norm": "attn_norm.weight", "mlp_norm": "ffn_norm.weight", "q": "attn_q", "k": "attn_k", "v": "attn_v",
    "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down", "router": "ffn_gate_inp",
}  # fmt: skip


def _vision(name: str, convention: str) -> str:
    """What a layout calls a parameter of the vision encoder."""
    top = {"hub": _VISION_HUB, "meta": _VISION_META, "gguf": _VISION_GGUF}[convention]
    if name in top:
        return top[name]
    stem, _, kind = name.rpartition(".")
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, _, layer, part, kind = name.split(".")
    return f"{_VISION_PREFIX[convention]}{layer}.{_VISION_LAYER[convention][part]}.{kind}"
