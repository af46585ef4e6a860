"""How a picture stands in a prompt: the ids that its model was trained to find there.

What it is: a rule for each kind of model that sees: Llama 3.2 Vision's, where a picture is one token and everything
after it looks at it, and Llama 4's, whose tiles are runs of `<|patch|>` between separators, each patch a place that a
feature of the picture takes.
What it is not: where in a message a picture goes (`puna.text.chat`), or how many tiles it has (`puna.text.pictures`).
What is surprising: Llama 3.2's `<|image|>` has an id past the model's vocabulary (128256). Meta's tokenizer has no such
token, or another id for it (128011), so the id comes from the model's config and not from the tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from puna.errors import ChatFormatError

if TYPE_CHECKING:
    from puna.kernels.layouts import Pixels

PICTURE = "<|image|>"
"""What chat templates write where a picture goes, Llama 3.2 Vision's and Llama 4's."""


class Run(NamedTuple):
    """`length` features of a picture, from its `first` on, stand in the prompt from position `at` on."""

    at: int
    first: int
    length: int


class Stand(NamedTuple):
    """Where a picture stands: it takes `length` ids from position `at` on. Where its features take the place of
    embeddings, `runs` says which; without any, the text that follows looks at it from the side."""

    at: int
    length: int
    runs: tuple[Run, ...] = ()


@dataclass(frozen=True)
class Beside:
    """Llama 3.2 Vision's: one token, whatever the picture. Source: its prompt-format page; transformers'
    `MllamaProcessor`. `needs` are the special tokens that the tokenizer must have."""

    token: int
    needs: tuple[str, ...] = ()

    def ids(self, pixels: Pixels, special: Mapping[str, int]) -> tuple[list[int], tuple[Run, ...]]:
        """The ids of a picture, and its runs, counted from the picture's first id."""
        return [self.token], ()


_TILE_NAMES = (
    "<|image_start|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>", PICTURE, "<|image_end|>",
)  # fmt: skip


@dataclass(frozen=True)
class Among:
    """Llama 4's: `tile_tokens` of `<|patch|>` a tile, one separator behind each tile of a row and another behind the
    row, then the whole picture behind `<|image|>`. Source: its prompt-format page; transformers'
    `Llama4Processor._prompt_split_image`."""

    tile_tokens: int
    needs: tuple[str, ...] = _TILE_NAMES

    def ids(self, pixels: Pixels, special: Mapping[str, int]) -> tuple[list[int], tuple[Run, ...]]:
        """See Beside."""
        start, patch, beside, below, whole, end = (special[name] for name in _TILE_NAMES)
        rows, columns = pixels.ratio
        found: list[int] = [start]
        runs: list[Run] = []

        def tile() -> None:
            runs.append(Run(len(found), len(runs) * self.tile_tokens, self.tile_tokens))
            found.extend([patch] * self.tile_tokens)

        if rows * columns > 1:
            for n in range(rows * columns):
                tile()
                found.append(below if (n + 1) % columns == 0 else beside)
        found.append(whole)
        tile()
        found.append(end)
        return found, tuple(runs)


Sight = Beside | Among
"""A model's rule."""


def sight_for(config: Any) -> Sight | None:
    """The rule of a config's model (`models.llama4_config.Llama4Config`, `models.llama3_vision_config.MllamaConfig`),
    or None where it does not see."""
    vision = getattr(config, "vision", None)
    if vision is None:
        return None
    return Among(vision.tile_tokens) if config.generation == "llama4" else Beside(config.image_token)


def stand(
    ids: Sequence[int | None], sight: Sight, pixels: Sequence[Pixels], special: Mapping[str, int]
) -> tuple[list[int], tuple[Stand, ...]]:
    """The ids of a prompt in which every None becomes the next picture, and where those stand.

    Raises ChatFormatError where there are not as many pictures as places for them.
    """
    places = sum(each is None for each in ids)
    if places != len(pixels):
        raise ChatFormatError(
            f"The prompt has {places} places for pictures, and there are {len(pixels)}.",
            remedy="Put pictures into messages of the user.",
        )
    found: list[int] = []
    stands = []
    rest = iter(pixels)
    for each in ids:
        if each is not None:
            found.append(each)
            continue
        own, runs = sight.ids(next(rest), special)
        at = len(found)
        stands.append(Stand(at, len(own), tuple(run._replace(at=at + run.at) for run in runs)))
        found.extend(own)
    return found, tuple(stands)
