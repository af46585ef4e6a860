"""Pictures as the numbers that a vision encoder takes, and the limits a stranger's file is held to.

What it is: a reader of PNG, JPEG, WebP and GIF files (Pillow decodes them), and the two image processors of the family:
Llama 3.2 Vision's (Meta's `VariableSizeImageTransform`, transformers' `MllamaImageProcessor`) and Llama 4's
(`Llama4ImageProcessor`): choose a canvas of tiles, resize to fit, pad with black, cut, normalise.
What it is not: an encoder (`puna.models`), or the ids that a picture takes in a prompt (`puna.text.sight`).
What is surprising:
- The tiles equal transformers' bit for bit. Those processors resize 8-bit channels in fixed-point arithmetic, weights
  rounded to 16 bits, columns before rows and 8 bits between (torch's `interpolate`, `antialias=True`, on x86 with AVX2
  and on Arm); Pillow's own filter has 22 bits, and one level of 255 lies between the two where they round apart.
- Llama 4's processor normalises in bfloat16, and picks its canvas in float32; so does this, for the ties to fall alike.
- Transparent pictures lie on white, a photo is turned as its EXIF says, and of a moving picture the first frame is
  taken: as transformers loads them.
"""

from __future__ import annotations

import io
import json
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from puna.errors import ConfigError, PictureError, PunaError
from puna.kernels.blocks import bf16_to_float32
from puna.kernels.layouts import Pixels, to_bf16

if TYPE_CHECKING:
    from PIL.Image import Image

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

MOST_BYTES = 32 << 20
"""Of a picture's file; a photo of 50 million pixels has 10 to 25 MB."""

MOST_PIXELS = 52_000_000
"""Of a picture, decoded: what the largest common phone camera makes. Eight bytes a pixel are taken while it is
read, sixteen for a WebP."""

MOST_SIDE = 1 << 15
"""Pixels along a side."""

MOST_SCANS = 100
"""Passes over a JPEG: a progressive one has ten, and a few hundred bytes can ask for one more over all its pixels."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")

_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5)
_BAND = 256  # rows converted at a time, so that no second copy of a picture is made

_REMEDY = "Save it again as a PNG or JPEG and send that."
_SMALLER = "Send a smaller one: no model of the family sees more than 1344 pixels along a side."


def check_length(length: int) -> None:
    """Raises PictureError for a file of more bytes than are read."""
    if length > MOST_BYTES:
        raise PictureError(f"A picture has {length:,} bytes; at most {MOST_BYTES:,} are read.", remedy=_SMALLER)


def read(data: bytes) -> U8:
    """The picture in a file, [height, width, 3] in RGB, upright, on white where it is transparent.

    Raises PictureError for what is none of `FORMATS`, damaged, or larger than the limits, which are held before any
    pixel is decoded.
    """
    check_length(len(data))
    if data[:2] == b"\xff\xd8" and data.count(b"\xff\xda") > MOST_SCANS:
        raise PictureError(f"A JPEG has more than {MOST_SCANS} scans.", remedy=_REMEDY)
    _check_size(*_webp_size(data))  # libwebp takes memory for the canvas as soon as the file is opened
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(*image.size)
        image.load()
        turn = image.getexif().get(_ORIENTATION, 1)
    except PunaError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError("This is no PNG, JPEG, WebP or GIF picture.", remedy=_REMEDY) from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"A picture has more than {MOST_PIXELS:,} pixels.", remedy=_SMALLER) from error
    except MemoryError as error:
        raise PictureError("There is no memory for a picture of this size.", remedy=_SMALLER) from error
    except Exception as error:  # a stranger's file may fail a decoder in any way
        raise PictureError(
            f"A picture is damaged: {str(error) or type(error).__name__:.200}.", remedy=_REMEDY
        ) from error
    return _turned(_rgb(image), turn)


_ORIENTATION = 0x0112


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS or max(width, height) > MOST_SIDE:
        raise PictureError(
            f"A picture is {width} × {height} pixels; {MOST_PIXELS:,} are read at most, {MOST_SIDE:,} along a side.",
            remedy=_SMALLER,
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height as a WebP's first chunk says them (RFC 9649, sections 2.5 to 2.7); zeros for another file."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return 0, 0
    if data[12:16] == b"VP8X":
        return int.from_bytes(data[24:27], "little") + 1, int.from_bytes(data[27:30], "little") + 1
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _rgb(image: Image) -> U8:
    """The pixels in RGB, as transformers' `convert_to_rgb` has them, a band of rows at a time."""
    from PIL import Image

    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    width, height = image.size
    out = np.empty((height, width, 3), np.uint8)
    try:
        for top in range(0, height, _BAND):
            band = image.crop((0, top, width, min(top + _BAND, height)))
            if transparent:
                band = band.convert("RGBA")
                band = Image.alpha_composite(Image.new("RGBA", band.size, (255, 255, 255, 255)), band)
            out[top : top + _BAND] = np.asarray(band.convert("RGB"))
    except (ValueError, OSError, KeyError) as error:  # a mode for which there is no way to RGB
        raise PictureError(f"A picture's colours ({image.mode}) are of no kind known here.", remedy=_REMEDY) from error
    return out


def _turned(rgb: U8, turn: object) -> U8:
    """The picture upright, as EXIF's orientation (1 to 8) asks; any other value asks for nothing."""
    if turn in (5, 6, 7, 8):
        rgb = rgb.transpose(1, 0, 2)
    if turn in (3, 4, 7, 8):
        rgb = rgb[::-1]
    if turn in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    return rgb


def resized(rgb: U8, height: int, width: int) -> U8:
    """[H, W, 3] as [height, width, 3]: the triangle filter, as wide as what a pixel of the result covers.

    It is torch's `interpolate(mode="bilinear", antialias=True)` on 8-bit channels: columns first, then rows.
    """
    if width != rgb.shape[1]:
        columns = np.ascontiguousarray(rgb.transpose(1, 0, 2))
        rgb = _filtered(columns, width).transpose(1, 0, 2)
    if height != rgb.shape[0]:
        rgb = _filtered(np.ascontiguousarray(rgb), height)
    return rgb


def _filtered(rows: U8, size: int) -> U8:
    """[n, m, 3] as [size, m, 3]."""
    first, weights, precision = _weights(len(rows), size)
    flat = rows.reshape(len(rows), -1)
    out = np.empty((size, flat.shape[1]), np.uint8)
    half = float(1 << precision >> 1)
    for i in range(size):
        taps = flat[first[i] : first[i] + weights.shape[1]]
        total = weights[i, : len(taps)] @ taps.astype(np.float64)  # whole numbers below 2^30: exact in any order
        out[i] = np.minimum(np.floor((total + half) * 2.0**-precision), 255.0)
    return out.reshape(size, *rows.shape[1:])


def _weights(before: int, after: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64], int]:
    """Of each pixel after: the first pixel before it that counts, and the weights [after, taps] from there on as whole
    numbers that add up to about 2^precision, the largest just below 2^15."""
    scale = before / after
    reach = max(scale, 1.0)
    taps = 2 * math.ceil(reach) + 1
    centre = scale * (np.arange(after) + 0.5)
    first = np.maximum((centre - reach + 0.5).astype(np.int64), 0)
    counts = np.minimum((centre + reach + 0.5).astype(np.int64), before) - first
    steps = np.arange(taps)
    away = (steps + (first - centre)[:, None] + 0.5) * (1.0 / reach)
    weights = np.where(steps < counts[:, None], np.maximum(1.0 - np.abs(away), 0.0), 0.0)
    weights /= np.cumsum(weights, axis=1)[:, -1:]
    largest, precision = float(weights.max()), 0
    while precision < 22 and int(0.5 + largest * (1 << (precision + 1))) < 1 << 15:
        precision += 1
    return first, np.floor(weights * (1 << precision) + 0.5), precision


@dataclass(frozen=True)
class Processor(ABC):
    """How a model wants its pictures: `side` pixels along a tile, at most `most_tiles` of them, and each channel's mean
    and standard deviation, of values from 0 to 1."""

    side: int
    most_tiles: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def prepare(self, data: bytes) -> Pixels:
        """The pixels of a picture's file. Raises PictureError as `read` does."""
        return self.pixels(read(data))

    @abstractmethod
    def pixels(self, rgb: U8) -> Pixels:
        """The pixels of a decoded picture [height, width, 3]."""

    @abstractmethod
    def _values(self) -> F32:
        """[3, 256]: what becomes of each value of each channel."""

    def _canvas(self, height: int, width: int, dtype: np.dtype[Any]) -> tuple[int, int]:
        """Rows and columns of tiles for a picture: those to which it grows least, at least to its own size; where it
        exceeds them all, those to which it shrinks least; the fewest of these."""
        most = self.most_tiles
        pairs = np.array([(r, c) for r in range(1, most + 1) for c in range(1, most // r + 1)])
        scales = ((pairs * self.side).astype(dtype) / np.array((height, width), dtype)).min(axis=1)
        growing = scales[scales >= 1]
        best = pairs[scales == (growing.min() if len(growing) else scales.max())]
        rows, columns = best[best.prod(axis=1).argmin()]
        return int(rows), int(columns)

    def _cut(self, rgb: U8, rows: int, columns: int) -> F32:
        """The picture in the corner of a black canvas, cut into tiles [rows · columns, 3, S, S], and normalised."""
        canvas = np.zeros((rows * self.side, columns * self.side, 3), np.uint8)
        canvas[: rgb.shape[0], : rgb.shape[1]] = rgb
        tiles = canvas.reshape(rows, self.side, columns, self.side, 3).transpose(0, 2, 4, 1, 3)
        tiles = tiles.reshape(rows * columns, 3, self.side, self.side)
        values, out = self._values(), np.empty(tiles.shape, np.float32)
        for channel in range(3):
            np.take(values[channel], tiles[:, channel], out=out[:, channel])
        return out


class MllamaProcessor(Processor):
    """Llama 3.2 Vision's. Its cross attention takes what is seen on the side: a picture is one token."""

    def pixels(self, rgb: U8) -> Pixels:
        """As `MllamaImageProcessor`: a picture fills its canvas as far as its shape allows, and is enlarged only where
        a side is shorter than a tile's."""
        height, width = rgb.shape[:2]
        rows, columns = self._canvas(height, width, np.dtype(np.float64))
        high = min(max(height, self.side), rows * self.side)
        wide = min(max(width, self.side), columns * self.side)
        by_height, by_width = high / height, wide / width
        if by_width < by_height:
            high = min(max(math.floor(height * by_width), 1), high)
        else:
            wide = min(max(math.floor(width * by_height), 1), wide)
        return Pixels(self._cut(resized(rgb, high, wide), rows, columns), (rows, columns), 1)

    def _values(self) -> F32:
        mean, std = (np.array(each, np.float32)[:, None] * np.float32(255) for each in (self.mean, self.std))
        values: F32 = (np.arange(256, dtype=np.float32) - mean) / std
        return values


@dataclass(frozen=True)
class Llama4Processor(Processor):
    """Llama 4's. Each tile is `tile_tokens` tokens of the text, and a picture of several tiles comes once more, whole
    and out of shape, in a last one."""

    tile_tokens: int

    def pixels(self, rgb: U8) -> Pixels:
        """As `Llama4ImageProcessor`: a picture is enlarged only where a side is shorter than a tile's."""
        height, width = rgb.shape[:2]
        rows, columns = self._canvas(height, width, np.dtype(np.float32))
        high, by_height = self._fit(height, rows)
        wide, by_width = self._fit(width, columns)
        single = isinstance(by_height, np.float32) or isinstance(by_width, np.float32)
        if np.float32(by_width) < np.float32(by_height) if single else by_width < by_height:
            high = max(min(_part(height, by_width), high), 1)
        else:
            wide = max(min(_part(width, by_height), wide), 1)
        tiles, count = self._cut(resized(rgb, high, wide), rows, columns), rows * columns
        if count > 1:
            tiles = np.concatenate([tiles, self._cut(resized(rgb, self.side, self.side), 1, 1)])
        # <|image_start|>, the tiles and a separator behind each, <|image|>, the whole, <|image_end|>
        tokens = 3 + len(tiles) * self.tile_tokens + (count if count > 1 else 0)
        return Pixels(tiles, (rows, columns), tokens)

    def _fit(self, length: int, tiles: int) -> tuple[int, float | np.float32]:
        """How long a side becomes if the other does not hold it back, and by how much it grows: float32 where it is
        the canvas that limits it, a tensor's number in transformers, else Python's own."""
        most, free = tiles * self.side, max(length, self.side)
        if most < free:
            return most, np.float32(most) / np.float32(length)
        return free, free / length

    def _values(self) -> F32:
        values = _rounded(np.arange(256, dtype=np.float32) * np.float32(1 / 255))
        mean, std = (_rounded(np.array(each, np.float32)[:, None]) for each in (self.mean, self.std))
        return _rounded(_rounded(values - mean) / std)


def _part(length: int, scale: float | np.float32) -> int:
    return math.floor(np.float32(length) * scale if isinstance(scale, np.float32) else length * scale)


def _rounded(values: F32) -> F32:
    rounded: F32 = bf16_to_float32(to_bf16(values).bits)
    return rounded


def processor_for(config: Any, folder: Path | None = None) -> Processor:
    """How the model of a config wants its pictures: `models.llama4_config.Llama4Config` or
    `models.llama3_vision_config.MllamaConfig`.

    The number of tiles and the numbers to normalise by are those that the `processor_config.json` or
    `preprocessor_config.json` in the model's folder says, else the released models' (Meta's
    `VariableSizeImageTransform`; the hub's files). Raises PictureError for a model that does not see, and ConfigError
    for a file that is damaged or asks for what is not done here.
    """
    vision = getattr(config, "vision", None)
    if vision is None:
        raise PictureError(
            "This model takes no pictures.", remedy="Use one that sees, such as Llama 3.2 Vision or Llama 4."
        )
    said = _Said(folder, vision.image_size)
    if config.generation == "llama4":
        mean, std, most = said.three("image_mean", _HALF), said.three("image_std", _HALF), said.count("max_patches", 16)
        return Llama4Processor(vision.image_size, most, mean, std, vision.tile_tokens)
    mean, std = said.three("image_mean", _CLIP_MEAN), said.three("image_std", _CLIP_STD)
    if (most := said.count("max_image_tiles", vision.max_tiles)) != vision.max_tiles:
        raise said.fault("max_image_tiles", f"is {most}, and the model has {vision.max_tiles}")
    return MllamaProcessor(vision.image_size, most, mean, std)


PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""What transformers calls a processor's config beside a model; the first counts."""

MOST_CONFIG_BYTES = 1 << 20
"""Of a processor's config; real ones have 600."""

_SWITCHES: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("do_convert_rgb", "do_normalize", "do_pad", "do_rescale", "do_resize"), (True, None)),
    **dict.fromkeys(("do_center_crop", "resize_to_max_canvas"), (False, None)),
    "resample": (2, None),  # Pillow's number for bilinear
}
"""What the processors do; a file that asks for something else asks for another processor."""


class _Said:
    """What the processor's config in a model's folder says; nothing where there is none."""

    def __init__(self, folder: Path | None, side: int) -> None:
        """Raises ConfigError for a file that is no JSON object, and for what is not done here."""
        self._values: dict[str, Any] = {}
        for path in [] if folder is None else [folder / name for name in PROCESSOR_FILES]:
            self._path = path
            found = self._read() if path.is_file() else {}
            if path.name == PROCESSOR_FILES[0]:  # holds the image processor's beside others
                found = found.get("image_processor", {})
            if found:
                self._values = found
                break
        for key, allowed in _SWITCHES.items():
            value = self._values.get(key)
            if not any(type(value) is type(one) and value == one for one in allowed):
                raise self.fault(key, f"is {value!r:.80}, which is not done here")
        factor = self._values.get("rescale_factor", 1 / 255)
        if not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6:
            raise self.fault("rescale_factor", f"is {factor!r:.80}, not 1/255")
        if (size := self._values.get("size", {"height": side, "width": side})) != {"height": side, "width": side}:
            raise self.fault("size", f"is {size!r:.80}, and the model's tiles have {side} pixels along a side")

    def _read(self) -> dict[str, Any]:
        try:
            with self._path.open("rb") as file:
                data = json.loads(file.read(MOST_CONFIG_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{self._path} cannot be read: {error!s:.200}.", remedy=_FETCH) from error
        if not isinstance(data, dict) or not isinstance(data.get("image_processor", {}), dict):
            raise ConfigError(f"{self._path} holds no JSON object.", remedy=_FETCH)
        return data

    def three(self, key: str, default: tuple[float, float, float]) -> tuple[float, float, float]:
        """A number from 0 to 1 for each channel; a deviation is not 0."""
        value = self._values.get(key, list(default))
        least = 1e-6 if key == "image_std" else 0.0
        if (
            not isinstance(value, list)
            or len(value) != 3
            or not all(
                isinstance(one, int | float) and not isinstance(one, bool) and least <= one <= 1 for one in value
            )
        ):
            raise self.fault(key, f"must be three numbers from {least:g} to 1, not {value!r:.80}")
        return float(value[0]), float(value[1]), float(value[2])

    def count(self, key: str, default: int) -> int:
        """How many tiles a picture may have."""
        value = self._values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 64:
            raise self.fault(key, f"must be a whole number from 1 to 64, not {value!r:.80}")
        return value

    def fault(self, key: str, what: str) -> ConfigError:
        """The error for a key."""
        return ConfigError(f"{self._path}: {key!r} {what}.", remedy=_FETCH)


_FETCH = "Fetch the file again, or remove it where the model is one of Meta's."
