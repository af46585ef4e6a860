"""Puna against transformers' MllamaForConditionalGeneration, by value, on small random models that see pictures.

What it is: logits over {no picture, one of each layout of tiles, two together, two apart, text before them} x {whole,
token by token, in pieces, in a batch with others} x {NumPy reference, each C++ instruction set, torch}, and one bf16
model within its own rounding.
What is surprising: transformers departs in two places from Meta's code, which the released weights were trained with
and Puna follows (see `models.llama3_vision`, `models.llama3_vision_config`). Its text before the first picture sees the
pictures, so here that text is a call of its own, as it would be in a conversation. And it takes the encoder's states a
layer later, so its config here names the layer before.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from transformers import MllamaConfig as TheirConfig
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from puna.kernels.layouts import BF16, PageTable, page_table
from puna.models import llama3_vision
from puna.models.config import read_hub, write_hub
from puna.models.llama3_vision_config import MllamaConfig
from puna.models.tree import KVCache, MllamaWeights, Pixels, Placed, tree_map

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
VOCAB, PICTURE, PAGE, SIZE = 61, 62, 16, 12
LIMIT = 1e-4
RATIOS = ((1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1))

HUB: dict[str, str] = {
    "embedding": "model.language_model.embed_tokens.weight", "norm": "model.language_model.norm.weight",
    "head": "lm_head.weight", "projector.": "model.multi_modal_projector.",
    "vision.patch.": "model.vision_model.patch_embedding.", "vision.class": "model.vision_model.class",
    "vision.position.tiles": "model.vision_model.gated_positional_embedding.tile_embedding.weight",
    "vision.position.": "model.vision_model.gated_positional_embedding.",
    "vision.pre_tile.embedding": "model.vision_model.pre_tile_positional_embedding.embedding.weight",
    "vision.pre_tile.": "model.vision_model.pre_tile_positional_embedding.",
    "vision.post_tile.embedding": "model.vision_model.post_tile_positional_embedding.embedding.weight",
    "vision.post_tile.": "model.vision_model.post_tile_positional_embedding.",
    "vision.pre_norm.": "model.vision_model.layernorm_pre.", "vision.post_norm.": "model.vision_model.layernorm_post.",
    "vision.layers.": "model.vision_model.transformer.layers.",
    "vision.global_layers.": "model.vision_model.global_transformer.layers.",
    "layers.": "model.language_model.layers.",
}  # fmt: skip
"""Beginnings of canonical names, and what the hub calls them."""

VISION_PARTS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "up": "mlp.fc1", "down": "mlp.fc2", "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attention_gate": "gate_attn", "mlp_gate": "gate_ffn",
}  # fmt: skip
OWN_PARTS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
    "attention_norm": "input_layernorm.weight", "mlp_norm": "post_attention_layernorm.weight",
}  # fmt: skip
CROSS_PARTS = OWN_PARTS | {
    "q": "cross_attn.q_proj", "k": "cross_attn.k_proj", "v": "cross_attn.v_proj", "o": "cross_attn.o_proj",
    "q_norm": "cross_attn.q_norm.weight", "k_norm": "cross_attn.k_norm.weight",
    "attention_gate": "cross_attn_attn_gate", "mlp_gate": "cross_attn_mlp_gate",
}  # fmt: skip


def hub_name(name: str, config: MllamaConfig) -> str:
    """What the hub calls a parameter."""
    start = next(start for start in HUB if name.startswith(start))
    rest = name[len(start) :]
    if "layers." in start:
        number, part, *kind = rest.split(".")
        cross = int(number) in config.cross_layers
        parts = VISION_PARTS if start.startswith("vision") else CROSS_PARTS if cross else OWN_PARTS
        rest = ".".join((number, parts[part], *kind))
    return HUB[start] + rest


def their_config(taken: Sequence[int]) -> TheirConfig:
    """A model whose sizes all differ; `taken` as Meta means it: before which layers."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    text = {
        "vocab_size": VOCAB, "hidden_size": 48, "num_hidden_layers": 5, "num_attention_heads": 6, "rms_norm_eps": 1e-5,
        "num_key_value_heads": 2, "intermediate_size": 56, "cross_attention_layers": [1, 3], "rope_parameters": rope,
        "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {
        "hidden_size": 24, "attention_heads": 3, "num_hidden_layers": 4, "num_global_layers": 2, "norm_eps": 1e-5,
        "intermediate_size": 40, "image_size": SIZE, "patch_size": 4, "max_num_tiles": 4,
        "vision_output_dim": 24 * (1 + len(taken)), "supported_aspect_ratios": [list(ratio) for ratio in RATIOS],
        "intermediate_layers_indices": [i - 1 for i in taken],
    }  # fmt: skip
    return TheirConfig(vision_config=vision, text_config=text, image_token_index=PICTURE)


@dataclass
class Model:
    """Their model, and ours over the same numbers."""

    theirs: MllamaForConditionalGeneration
    exact: MllamaForConditionalGeneration
    """Computing with the same numbers in float32."""
    config: MllamaConfig
    host: MllamaWeights
    tensors: MllamaWeights


@cache
def model(dtype: str) -> Model:
    """A random model: norms away from 1, gates and positions that count."""
    taken = (1, 3)
    theirs = MllamaForConditionalGeneration(their_config(taken)).eval()
    random = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.uniform_(0.5, 1.5, generator=random)
            elif p.ndim == 1:
                p.normal_(0, 0.7, generator=random)
            elif "embedding" in name and "patch" not in name:
                p.normal_(0, 1, generator=random)
            else:
                p.normal_(0, 1.5 * p[0].numel() ** -0.5, generator=random)
            p.data = p.data.to(getattr(torch, dtype))  # not `theirs.to`, which would round rope's table too
        exact = copy.deepcopy(theirs)
        for p in exact.parameters():
            p.data = p.data.float()
    stated = their_config(taken).to_dict()
    stated["vision_config"]["intermediate_layers_indices"] = list(taken)
    read = read_hub(stated)
    assert read.unknown == ()
    config = read.config
    assert isinstance(config, MllamaConfig)
    parameters = dict(theirs.named_parameters())
    assert len(parameters) == len(llama3_vision.shapes(config))

    def tensor(name: str) -> torch.Tensor:
        found = parameters[hub_name(name, config)]
        return found.flatten(1) if name == "vision.patch.weight" else found

    def array(name: str) -> Any:
        found = tensor(name).detach().contiguous()
        if found.dtype == torch.bfloat16:
            return BF16(found.view(torch.int16).numpy().view(np.uint16))
        return found.numpy()

    for name, shape in llama3_vision.shapes(config).items():
        assert tuple(tensor(name).shape) == shape, name
    host = llama3_vision.build(config, array)
    tensors = llama3_vision.build(config, tensor)
    tensors = tree_map(lambda leaf: torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf, tensors)
    return Model(theirs, exact, config, host, tensors)


@dataclass
class Text:
    """A sequence: its ids, and the pictures its `<|image|>` stand for, in order."""

    ids: Ints
    pictures: list[Pixels]

    @property
    def places(self) -> list[int]:
        return [int(at) for at in np.nonzero(self.ids == PICTURE)[0]]


def text(seed: int, length: int, *pictures: tuple[int, tuple[int, int]]) -> Text:
    """Random ids and tiles; a picture is its place and its layout."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, VOCAB, length, dtype=np.int32)
    found = []
    for at, ratio in pictures:
        ids[at] = PICTURE
        tiles = random.standard_normal((ratio[0] * ratio[1], 3, SIZE, SIZE), dtype=np.float32)
        found.append(Pixels(tiles, ratio, 1))
    return Text(ids, found)


TEXTS = {
    "no-picture": text(1, 40),
    "one": text(2, 33, (0, (2, 2))),
    "after-text": text(3, 37, (6, (1, 3))),
    "together": text(4, 30, (3, (1, 1)), (4, (2, 1))),
    "apart": text(5, 34, (0, (4, 1)), (13, (1, 2))),
    "three": text(6, 35, (2, (1, 4)), (3, (1, 1)), (20, (3, 1))),
    "last": text(7, 18, (5, (1, 1)), (17, (1, 2))),
}

LAYOUTS = {f"layout {ratio}": text(20 + i, 4, (0, ratio)) for i, ratio in enumerate(RATIOS)}


@cache
def theirs(name: str, dtype: str = "float32", wide: bool = False, at_once: bool = False) -> Floats:
    """transformers' logits [T, V]; the text before the first picture is a call of its own unless `at_once`.

    `wide`: with the numbers of `dtype` in float32.
    """
    sequence, net = (TEXTS | LAYOUTS)[name], model(dtype).exact if wide else model(dtype).theirs
    ids = torch.from_numpy(sequence.ids)[None].long()
    with torch.no_grad():
        if not sequence.pictures:
            logits = net(input_ids=ids).logits
        else:
            tiles = [len(one.tiles) for one in sequence.pictures]
            pixels = torch.zeros((1, len(tiles), 4, 3, SIZE, SIZE), dtype=net.dtype)
            shown = torch.zeros((1, len(tiles), 4), dtype=torch.long)
            for i, one in enumerate(sequence.pictures):
                pixels[0, i, : tiles[i]] = torch.from_numpy(one.tiles)
                shown[0, i, : tiles[i]] = 1
            ratios = torch.tensor([[RATIOS.index(one.ratio) + 1 for one in sequence.pictures]])
            sparse = get_cross_attention_token_mask(sequence.ids.tolist(), PICTURE)
            mask = torch.from_numpy(
                convert_sparse_cross_attention_mask_to_dense([sparse], [tiles], 4, len(sequence.ids))
            )
            first = 0 if at_once else sequence.places[0]
            past, before = None, []
            if first:
                done = net(input_ids=ids[:, :first], use_cache=True)
                past, before = done.past_key_values, [done.logits]
            done = net(
                input_ids=ids[:, first:], pixel_values=pixels, aspect_ratio_ids=ratios, aspect_ratio_mask=shown,
                cross_attention_mask=mask[:, first:], past_key_values=past, use_cache=True,
            )  # fmt: skip
            logits = torch.cat([*before, done.logits], dim=1)
    result: Floats = logits[0].float().numpy()
    return result


class Ours:
    """A model of Puna on one kind of array, fed with NumPy ids and tables; logits come back as NumPy."""

    def __init__(self, of: Model, *, on_torch: bool) -> None:
        self.config, self.torch = of.config, on_torch
        self.weights = of.tensors if on_torch else of.host
        self._sights: dict[int, Any] = {}

    @torch.no_grad()
    def sight(self, pixels: Pixels) -> Any:
        """What `see` makes of a picture, once."""
        if id(pixels) not in self._sights:
            tiles: Any = pixels.tiles
            if self.torch:
                tiles = torch.from_numpy(tiles).to(self.weights.norm.dtype)
            self._sights[id(pixels)] = llama3_vision.see(self.weights, self.config, pixels._replace(tiles=tiles))
        return self._sights[id(pixels)]

    def placed(self, texts: Sequence[Text]) -> list[Placed]:
        """All pictures of some sequences."""
        return [
            Placed(b, at, self.sight(pixels))
            for b, one in enumerate(texts)
            for at, pixels in zip(one.places, one.pictures, strict=True)
        ]

    def cache(self, pages: int) -> KVCache:
        def zeros(shape: tuple[int, ...]) -> Any:
            return torch.zeros(shape, dtype=self.weights.norm.dtype) if self.torch else np.zeros(shape, np.float32)

        return llama3_vision.make_cache(self.config, pages, PAGE, zeros)

    @torch.no_grad()
    def __call__(
        self, tokens: Ints, placed: Sequence[Placed], table: PageTable | None = None, cache: KVCache | None = None
    ) -> Floats:
        ids: Any = tokens
        if self.torch:
            ids = torch.from_numpy(tokens)
            table = None if table is None else PageTable(*map(torch.from_numpy, table))
        hidden = llama3_vision.forward(self.weights, self.config, ids, table, cache, placed)
        scores = llama3_vision.logits(self.weights, hidden)
        result: Floats = scores.float().numpy() if self.torch else scores
        return result

    def in_pieces(self, one: Text, sizes: Sequence[int]) -> Floats:
        """One sequence, some tokens a call, over a cache; the last size is for whatever is left."""
        pages = np.random.default_rng(3).permutation(-(-len(one.ids) // PAGE)).astype(np.int32)[None]
        cache, placed, parts, start = self.cache(pages.size), self.placed([one]), [], 0
        while start < len(one.ids):
            size = min(sizes[min(len(parts), len(sizes) - 1)], len(one.ids) - start)
            table = page_table([start], [size], pages)
            parts.append(self(one.ids[start : start + size].copy(), placed, table, cache))
            start += size
        return np.concatenate(parts)


@pytest.fixture
def ours(kernels: str) -> Ours:
    return Ours(model("float32"), on_torch=kernels == "torch")


def assert_near(got: Floats, want: Floats) -> None:
    assert got.shape == want.shape
    assert np.max(np.abs(got - want)) < LIMIT * np.max(np.abs(want))


@pytest.mark.parametrize("name", TEXTS)
def test_logits_are_theirs_whole_token_by_token_and_in_pieces(ours: Ours, name: str) -> None:
    one, want = TEXTS[name], theirs(name)
    assert_near(ours(one.ids[None], ours.placed([one]))[0], want)
    for sizes in ([len(one.ids)], [1], [2, 3, 1, 9, 5]):
        assert_near(ours.in_pieces(one, sizes), want)


def test_every_layout_of_tiles(ours: Ours) -> None:
    for name, one in LAYOUTS.items():
        assert_near(ours(one.ids[None], ours.placed([one]))[0], theirs(name))


def test_a_batch_of_sequences_with_and_without_pictures(ours: Ours) -> None:
    """All in one call, then steps of one token each in which one of them is idle."""
    names = list(TEXTS)
    texts = [TEXTS[name] for name in names]
    each = -(-max(len(one.ids) for one in texts) // PAGE)
    pages = np.random.default_rng(4).permutation(len(texts) * each).astype(np.int32).reshape(len(texts), each)
    cache, at = ours.cache(pages.size), [0] * len(texts)
    found: list[list[Floats]] = [[] for _ in texts]

    def step(counts: list[int]) -> None:
        busy = [i for i, count in enumerate(counts) if count]
        tokens = np.concatenate([texts[i].ids[at[i] : at[i] + counts[i]] for i in busy])
        table = page_table([at[i] for i in busy], [counts[i] for i in busy], pages[busy])
        logits = ours(tokens, ours.placed([texts[i] for i in busy]), table, cache)
        for i, part in zip(busy, np.split(logits, table.starts[1:-1]), strict=True):
            found[i].append(part)
            at[i] += counts[i]

    step([len(one.ids) - 3 for one in texts])
    for idle in range(4):
        step([int(i % 4 != idle and at[i] < len(one.ids)) for i, one in enumerate(texts)])
    assert at == [len(one.ids) for one in texts]
    for name, parts in zip(names, found, strict=True):
        assert_near(np.concatenate(parts), theirs(name))


def test_bf16_rounds_no_worse_than_theirs(kernels: str) -> None:
    of = Ours(model("bfloat16"), on_torch=kernels == "torch")
    for name in ("no-picture", "one", "three"):
        exact, rounded = theirs(name, "bfloat16", wide=True), theirs(name, "bfloat16")
        got = of(TEXTS[name].ids[None], of.placed([TEXTS[name]]))[0]
        noise = [float(np.sqrt(np.mean(np.square(one - exact)))) for one in (got, rounded)]
        assert noise[0] < 1.25 * noise[1], (name, noise)


def test_a_picture_changes_nothing_before_it_nor_in_other_sequences() -> None:
    of = Ours(model("float32"), on_torch=False)
    one = TEXTS["after-text"]
    with_it = of(one.ids[None], of.placed([one]))[0]
    without = of(one.ids[None], [])[0]
    assert np.array_equal(with_it[:6], without[:6])
    assert np.min(np.max(np.abs(with_it[6:] - without[6:]), axis=1)) > 0.01
    both = of(np.stack([one.ids, one.ids]), of.placed([one]))
    assert np.max(np.abs(both[1] - without)) < 1e-5


@pytest.mark.parametrize("name", ["after-text", "three"])
def test_one_call_agrees_where_their_attention_is_shut_off_before_the_first_picture(name: str) -> None:
    """What Meta's code does and transformers does not (its cross layers' attention is not masked by row)."""
    of, first = model("float32"), TEXTS[name].places[0]

    def shut(_: Any, __: Any, output: Any) -> Any:
        output[0][:, :first] = 0
        return output

    left_alone = theirs(name, at_once=True)
    theirs.cache_clear()
    layers = of.theirs.model.language_model.layers
    hooks = [layers[i].cross_attn.register_forward_hook(shut) for i in of.config.cross_layers]
    try:
        want = theirs(name, at_once=True)
    finally:
        for hook in hooks:
            hook.remove()
        theirs.cache_clear()
    assert_near(theirs(name), want)
    assert np.max(np.abs(left_alone - want)) > 0.01


def test_gradients_reach_the_gates_through_rows_that_see_and_rows_that_do_not() -> None:
    of = model("float32")
    one = TEXTS["after-text"]
    weights = tree_map(lambda leaf: leaf.detach().double(), of.tensors)
    gates = [weights.layers[i].attention_gate for i in of.config.cross_layers]
    tiles = torch.from_numpy(one.pictures[0].tiles).double()

    def loss() -> torch.Tensor:
        sight = llama3_vision.see(weights, of.config, one.pictures[0]._replace(tiles=tiles))
        placed = [Placed(0, one.places[0], sight)]
        hidden = llama3_vision.forward(weights, of.config, torch.from_numpy(one.ids)[None], placed=placed)
        return llama3_vision.logits(weights, hidden).square().mean()

    for gate in (*gates, weights.vision.class_embedding):
        gate.requires_grad_()
    loss().backward()
    with torch.no_grad():
        for gate in (*gates, weights.vision.class_embedding):
            sides = []
            for step in (1e-5, -1e-5):
                gate[0] += step
                sides.append(float(loss()))
                gate[0] -= step
            slope = (sides[0] - sides[1]) / 2e-5
            assert abs(slope) > 1e-6
            assert float(gate.grad[0]) == pytest.approx(slope, rel=1e-4)


def test_transformers_reads_the_config_that_puna_writes() -> None:
    config = model("float32").config
    written = write_hub(config, dtype="float32", bos_id=1, eos_ids=(2,))
    read, want = TheirConfig.from_dict(written), their_config((2, 4))  # from 0: what the file says, not what they do
    ours_said, said = read.text_config.to_dict(), want.text_config.to_dict()
    for key in ("dtype", "architectures", "pad_token_id"):
        ours_said.pop(key, None), said.pop(key, None)
    assert ours_said == said
    assert read.image_token_id == PICTURE
    differing = {
        key for key, value in want.vision_config.to_dict().items() if getattr(read.vision_config, key) != value
    }
    assert differing <= {"dtype", "architectures", "transformers_version"}
