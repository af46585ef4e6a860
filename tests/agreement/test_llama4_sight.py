"""What Llama 4 sees: features and logits against transformers' `Llama4ForConditionalGeneration`, by value.

What it is: a small random model of unequal sizes, pictures of odd shapes through our own processor (which
`tests/unit/text/test_pictures.py` holds to transformers'), several in a text, whole and cut into steps.
What is surprising: the names are written out here, not taken from `puna.weights`: the test must not share its map with
what it would test.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import Llama4Config, Llama4ForConditionalGeneration

from puna.kernels.layouts import BF16, page_table
from puna.models import llama4
from puna.models.config import read_hub
from puna.models.tree import TABLES, Llama4Weights, Pixels, Placed, leaves, tree_map
from puna.text.pictures import Llama4Processor

Floats = npt.NDArray[np.float32]

PATCH = 77
"""`<|patch|>` of the small vocabulary."""

CHUNK = 24
SIZES = ((40, 61), (25, 9), (7, 90), (24, 24))
"""Height and width of the pictures: 6, 2, 4 and 1 tiles, and the whole of each but the last."""

HALF = (0.5, 0.5, 0.5)


def hub_config() -> Llama4Config:
    """Sizes that all differ; the width of the encoder's feed-forward is four times its width, as transformers asks."""
    return Llama4Config(
        image_token_index=PATCH, boi_token_index=75, eoi_token_index=76,
        vision_config={
            "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 96,
            "image_size": 24, "patch_size": 4, "vision_output_dim": 20, "projector_input_dim": 20,
            "projector_output_dim": 20, "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        text_config={
            "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
            "num_hidden_layers": 4, "intermediate_size": 28, "intermediate_size_mlp": 56, "vocab_size": 83,
            "num_local_experts": 3, "interleave_moe_layer_step": 2, "attention_chunk_size": CHUNK, "floor_scale": 16,
            "max_position_embeddings": 512, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0},
        },
    )  # fmt: skip


@cache
def model() -> Llama4ForConditionalGeneration:
    """transformers' model, its numbers spread as a trained one's."""
    found = Llama4ForConditionalGeneration._from_config(hub_config(), attn_implementation="eager").eval()
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, p in found.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.uniform_(0.5, 1.5, generator=random)
            elif p.ndim == 1:
                p.normal_(0, 0.5, generator=random)
            elif "experts." in name and p.ndim == 3:
                p.normal_(0, 1.5 * p.shape[1] ** -0.5, generator=random)
            else:
                p.normal_(0, 1.5 * p.shape[-1] ** -0.5, generator=random)
    return found


def parameter(name: str) -> torch.Tensor:
    """The model's tensor for one of our names."""
    found = dict(model().named_parameters())
    if not name.startswith(("vision.", "projector.")):
        return text_parameter(found, name)
    for ours, theirs in (
        ("vision.patch.", "vision.patch_embedding.linear."),
        ("position_embedding", "positional_embedding_vlm"),
        ("pre_norm", "layernorm_pre"),
        ("post_norm", "layernorm_post"),
        ("adapter.up", "vision_adapter.mlp.fc1"),
        ("adapter.down", "vision_adapter.mlp.fc2"),
        ("projector.", "multi_modal_projector.linear_1."),
        *((f".{each}.", f".self_attn.{each}_proj.") for each in "qkvo"),
        ("attention_norm", "input_layernorm"),
        ("mlp_norm", "post_attention_layernorm"),
        (".up.", ".mlp.fc1."),
        (".down.", ".mlp.fc2."),
        ("vision.layers.", "vision.model.layers."),
    ):
        name = name.replace(ours, theirs)
    if name.startswith("vision."):
        name = "vision_model." + name.removeprefix("vision.")
    return found[name]


def text_parameter(found: dict[str, torch.nn.Parameter], name: str) -> torch.Tensor:
    """Of the text model: its experts lie in two tensors, transposed, gate and up side by side."""
    own = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
    if name in own:
        return found["language_model." + own[name]]
    _, layer, *rest = name.split(".")
    prefix = f"language_model.model.layers.{layer}."
    if rest[0] in "qkvo":
        return found[f"{prefix}self_attn.{rest[0]}_proj.{rest[1]}"]
    norms = {"attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight"}
    if rest[0] in norms:
        return found[prefix + norms[rest[0]]]
    prefix += "feed_forward."
    if rest[0] == "experts":
        number, part = int(rest[1]), rest[2]
        if part == "down":
            return found[prefix + "experts.down_proj"][number].T
        return found[prefix + "experts.gate_up_proj"][number].T.chunk(2)[("gate", "up").index(part)]
    if rest[0] == "router":
        return found[prefix + "router.weight"]
    return found[prefix + ("shared_expert." + rest[1] if rest[0] == "shared" else rest[0]) + "_proj.weight"]


CONFIG = read_hub(hub_config().to_dict()).config
"""What our reader makes of transformers' config."""


@cache
def host(dtype: str = "fp32") -> Llama4Weights:
    """Our tree over the model's numbers."""

    def leaf(name: str) -> Any:
        tensor = parameter(name).detach().contiguous()
        if dtype == "bf16":
            return BF16(tensor.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16))
        return tensor.numpy()

    return llama4.build(CONFIG, leaf)  # type: ignore[arg-type]


@cache
def pictures() -> tuple[Pixels, ...]:
    """Noise of each size, as our processor makes it ready."""
    random = np.random.default_rng(0)
    processor = Llama4Processor(24, 16, HALF, HALF, CONFIG.vision.tile_tokens)  # type: ignore[attr-defined]
    return tuple(processor.pixels(random.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in SIZES)


def close(ours: Any, theirs: torch.Tensor, tolerance: float = 1e-5) -> None:
    expected = theirs.float().numpy()
    assert ours.shape == expected.shape
    assert np.abs(np.asarray(ours, np.float32) - expected).max() < tolerance * np.abs(expected).max()


def test_the_pictures_are_of_several_layouts() -> None:
    assert [each.ratio for each in pictures()] == [(2, 3), (2, 1), (1, 4), (1, 1)]
    assert [len(each.tiles) for each in pictures()] == [7, 3, 5, 1]
    assert [each.tokens for each in pictures()] == [3 + 7 * 9 + 6, 3 + 3 * 9 + 2, 3 + 5 * 9 + 4, 3 + 9]


def test_features(kernels: str) -> None:
    with torch.no_grad():
        for pixels in pictures():
            tiles = torch.from_numpy(pixels.tiles)
            theirs = model().vision_model(tiles).last_hidden_state.flatten(0, 1)
            close(seen(kernels, pixels), model().multi_modal_projector(theirs))


def seen(kernels: str, pixels: Pixels) -> Any:
    weights = host()
    if kernels == "torch":
        weights, pixels = tree_map(torch.from_numpy, weights), pixels._replace(tiles=torch.from_numpy(pixels.tiles))
    return llama4.see(weights, CONFIG, pixels)  # type: ignore[arg-type]


def text(*parts: int | str) -> tuple[npt.NDArray[np.int32], list[Placed]]:
    """Ids of a text, and its pictures: a number is so many random tokens, "n" the n-th picture: a run a tile."""
    random, ids, placed = np.random.default_rng(len(parts)), [], []
    for part in parts:
        if isinstance(part, int):
            ids += random.integers(0, 70, part).tolist()
            continue
        pixels, features = pictures()[int(part)], llama4.see(host(), CONFIG, pictures()[int(part)])  # type: ignore[arg-type]
        count, width = len(pixels.tiles), CONFIG.vision.tile_tokens  # type: ignore[attr-defined]
        for tile in range(count):
            ids.append(71 if tile < count - 1 else 72)  # some separator
            placed.append(Placed(0, len(ids), features[tile * width : (tile + 1) * width]))
            ids += [PATCH] * width
    return np.array(ids, np.int32), placed


TEXTS: dict[str, tuple[int | str, ...]] = {
    "none": (30,), "one": (5, "0", 12), "several": ("1", 3, "3", "2", 20, "0", 1), "twice": ("3", "3"),
}  # fmt: skip


@cache
def answer(case: str) -> torch.Tensor:
    """transformers' logits [T, V] for one of TEXTS."""
    ids, _ = text(*TEXTS[case])
    tiles = [torch.from_numpy(pictures()[int(part)].tiles) for part in TEXTS[case] if isinstance(part, str)]
    came: list[torch.Tensor] = []
    # The decoder's own, as it is called: transformers 5.24 then asks its answer for what it does not have, and fails.
    hook = model().language_model.register_forward_hook(lambda *call: came.append(call[-1].logits[0]))
    try:
        with torch.no_grad(), suppress(AttributeError):
            model()(torch.from_numpy(ids)[None].long(), torch.cat(tiles) if tiles else None)
    finally:
        hook.remove()
    return came[0]


@pytest.mark.parametrize("case", TEXTS)
def test_logits(kernels: str, case: str) -> None:
    ids, placed = text(*TEXTS[case])
    if kernels == "torch":
        weights = tree_map(torch.from_numpy, host())
        placed = [each._replace(sight=torch.from_numpy(each.sight)) for each in placed]
        hidden = llama4.forward(weights, CONFIG, torch.from_numpy(ids)[None], placed=placed)  # type: ignore[arg-type]
        close(llama4.logits(weights, hidden)[0].numpy(), answer(case))
        return
    hidden = llama4.forward(host(), CONFIG, ids[None], placed=placed)  # type: ignore[arg-type]
    close(llama4.logits(host(), hidden)[0], answer(case))


def in_steps(ids: npt.NDArray[np.int32], placed: list[Placed], cuts: list[int]) -> Floats:
    """Logits of a text whose tokens come in steps; every step gets all the pictures."""
    pages = (len(ids) + 15) // 16
    cache = llama4.make_cache(CONFIG, pages, 16, lambda shape: np.zeros(shape, np.float32))
    rows = []
    for start, stop in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        table = page_table([start], [stop - start], np.arange(pages)[None])
        hidden = llama4.forward(host(), CONFIG, ids[start:stop], table, cache, placed)  # type: ignore[arg-type]
        rows.append(llama4.logits(host(), hidden))
    return np.concatenate(rows)


def test_steps_that_cut_a_picture() -> None:
    ids, placed = text(*TEXTS["several"])
    close(in_steps(ids, placed, [11, 12, 40, 90]), answer("several"))


def test_bf16_within_its_own_rounding() -> None:
    pixels = pictures()[0]
    with torch.no_grad():
        tiles = torch.from_numpy(pixels.tiles)
        exact = model().multi_modal_projector(model().vision_model(tiles).last_hidden_state.flatten(0, 1)).numpy()
    ours = llama4.see(host("bf16"), CONFIG, pixels)  # type: ignore[arg-type]
    assert np.abs(ours - exact).max() < 0.05 * np.abs(exact).max()


def test_the_tables_are_the_only_leaves_that_are_no_parameters() -> None:
    assert {name for name, _ in leaves(host())} == {*llama4.shapes(CONFIG), *TABLES}  # type: ignore[arg-type]


def test_tiles_of_another_size_are_refused() -> None:
    pixels = Pixels(np.zeros((1, 3, 20, 24), np.float32), (1, 1), 12)
    with pytest.raises(ValueError, match=r"\[N, 3, 24, 24\] here, not \(1, 3, 20, 24\)"):
        llama4.see(host(), CONFIG, pixels)  # type: ignore[arg-type]
    without = replace(host(), vision=None)
    with pytest.raises(ValueError, match="without its vision encoder"):
        llama4.see(without, CONFIG, pictures()[3])  # type: ignore[arg-type]
