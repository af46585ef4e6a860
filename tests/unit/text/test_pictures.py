"""Pictures: tiles equal to transformers' processors bit for bit, files read as transformers reads them, limits held.

What is surprising: transformers' processors for these models need torchvision, whose build on PyPI wants CUDA. So
their answers were recorded (`pictures.json`: digests of the pixel tensors, and with what they were made), and beside
that what runs without it is compared live: the resizing (torch), Mllama's canvas and its processor on Pillow.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from puna.errors import ConfigError, PictureError
from puna.kernels.layouts import Pixels
from puna.text import pictures
from puna.text.pictures import Llama4Processor, MllamaProcessor, Processor, processor_for, read, resized

U8 = npt.NDArray[np.uint8]

RECORDED = json.loads((Path(__file__).parent / "pictures.json").read_text("utf-8"))


class Config:
    """What `processor_for` reads of a config."""

    def __init__(self, generation: str, side: int) -> None:
        self.generation = generation
        self.vision = type("Vision", (), {"image_size": side, "max_tiles": 4, "tile_tokens": 9})


def of(generation: str, side: int) -> Processor:
    return processor_for(Config(generation, side))


def noise(height: int, width: int) -> U8:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)


def told(ready: Pixels) -> list[Any]:
    """A picture as it is recorded: rows, columns, and a digest of its tiles."""
    assert ready.tiles.dtype == np.float32
    assert ready.tiles.flags.c_contiguous
    return [*ready.ratio, hashlib.sha256(ready.tiles.tobytes()).hexdigest()[:16]]


def test_tiles_of_any_shape_are_those_of_the_reference() -> None:
    ours = of("llama3.2", 28), of("llama4", 28)
    for height, width, *expected in RECORDED["noise"]:
        assert [told(each.pixels(noise(height, width))) for each in ours] == expected, (height, width)


@pytest.mark.parametrize("name", RECORDED["files"])
def test_tiles_of_real_pictures_are_those_of_the_reference(reference: Path, name: str) -> None:
    data = (reference / "images" / name).read_bytes()
    sides = {"llama3.2": 560, "llama4": 336}
    found = {generation: told(of(generation, side).prepare(data)) for generation, side in sides.items()}
    assert found == RECORDED["files"][name]


@pytest.mark.parametrize(("height", "width"), [(77, 130), (600, 41), (300, 300)])
def test_beside_the_processor_on_pillow_at_most_one_level_lies_between(height: int, width: int) -> None:
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    theirs = MllamaImageProcessorPil(
        size={"height": 56, "width": 56},
        max_image_tiles=4,
        image_mean=pictures._CLIP_MEAN,
        image_std=pictures._CLIP_STD,
    )
    expected = theirs(Image.fromarray(noise(height, width)), return_tensors="np")
    ours = of("llama3.2", 56).pixels(noise(height, width))
    tiles = expected["pixel_values"][0, 0, : len(ours.tiles)]
    away = np.abs(ours.tiles - tiles) * 255 * np.array(pictures._CLIP_STD, np.float32)[:, None, None]
    assert expected["num_tiles"] == [[len(ours.tiles)]]
    assert away.max() < 1.01
    assert (away > 0.5).mean() < 0.1


def test_mllamas_canvas_is_transformers() -> None:
    from transformers.models.mllama.image_processing_pil_mllama import get_optimal_tiled_canvas

    random = np.random.default_rng(3)
    for most in (3, 4, 7):
        ours = MllamaProcessor(14, most, (0.0,) * 3, (1.0,) * 3)
        for height, width in (2 ** random.uniform(0, 9, (300, 2))).astype(int).tolist():
            rows, columns = ours._canvas(height, width, np.dtype(np.float64))
            assert (rows * 14, columns * 14) == get_optimal_tiled_canvas(height, width, most, 14)


def test_resizing_is_torchs() -> None:
    import torch

    fixed_point = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    random = np.random.default_rng(5)
    for height, width, high, wide in (2 ** random.uniform(0, 8, (40, 4))).astype(int).tolist():
        rgb = noise(height, width)
        tensor = torch.from_numpy(rgb).permute(2, 0, 1)[None].contiguous()
        theirs = torch.nn.functional.interpolate(
            tensor if fixed_point else tensor.float(), (high, wide), mode="bilinear", antialias=True
        )
        away = np.abs(resized(rgb, high, wide) - theirs[0].permute(1, 2, 0).numpy().astype(np.float32))
        assert away.max() <= (0 if fixed_point else 1)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def drawing(mode: str) -> Image.Image:
    """A small picture of a mode, see-through in part where the mode can be."""
    image = Image.fromarray(noise(20, 33))
    image = image.resize((33, 20), Image.Resampling.BICUBIC)
    if "A" in mode:
        image.putalpha(Image.fromarray(noise(20, 33)[:, :, 0]))
        return image.convert(mode)
    if mode == "I;16":
        return Image.fromarray(noise(20, 33)[:, :, 0].astype(np.uint16) * 257)
    return image.convert(mode)


PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
FILES: dict[str, Callable[[], bytes]] = {
    **{f"png-{mode}": (lambda mode=mode: saved(drawing(mode), "PNG")) for mode in PNG_MODES},
    **{f"jpeg-{mode}": (lambda mode=mode: saved(drawing(mode), "JPEG")) for mode in ("L", "RGB", "CMYK", "YCbCr")},
    "jpeg-progressive": lambda: saved(drawing("RGB"), "JPEG", progressive=True),
    "png-transparent-colour": lambda: saved(drawing("P"), "PNG", transparency=3),
    "png-moving": lambda: saved(drawing("RGB"), "PNG", save_all=True, append_images=[drawing("L").convert("RGB")]),
    "webp": lambda: saved(drawing("RGB"), "WEBP"),
    "webp-lossless": lambda: saved(drawing("RGBA"), "WEBP", lossless=True),
    "webp-moving": lambda: saved(drawing("RGB"), "WEBP", save_all=True, append_images=[drawing("L").convert("RGB")]),
    "gif": lambda: saved(drawing("P"), "GIF"),
    "gif-moving": lambda: saved(drawing("P"), "GIF", save_all=True, append_images=[drawing("L")], transparency=2),
}  # fmt: skip


@cache
def file(name: str) -> bytes:
    return FILES[name]()


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_is_read_as_transformers_reads_it(name: str) -> None:
    from transformers.image_transforms import convert_to_rgb

    expected = convert_to_rgb(ImageOps.exif_transpose(Image.open(io.BytesIO(file(name)))), return_numpy=True)
    assert np.array_equal(read(file(name)), expected)


@pytest.mark.parametrize("turn", range(10))
def test_a_photo_is_turned_as_its_exif_says(turn: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = saved(drawing("RGB"), "PNG", exif=exif)
    turned = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert np.array_equal(read(data), np.asarray(turned))
    assert read(data).shape == ((33, 20, 3) if 5 <= turn <= 8 else (20, 33, 3))


def png(width: int, height: int) -> bytes:
    """The head of a PNG of so many grey pixels, and a little of its data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def webp(width: int, height: int) -> bytes:
    body = (
        b"WEBPVP8X" + struct.pack("<II", 10, 0) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no PNG, JPEG, WebP or GIF"),
        (b"<svg></svg>", "no PNG, JPEG, WebP or GIF"),
        (saved(Image.new("RGB", (4, 4)), "BMP"), "no PNG, JPEG, WebP or GIF"),
        (saved(Image.new("RGB", (4, 4)), "TIFF"), "no PNG, JPEG, WebP or GIF"),
        (saved(Image.new("L", (4, 4)), "PPM"), "no PNG, JPEG, WebP or GIF"),
        (png(8000, 8000), "8000 × 8000 pixels"),
        (png(40_000, 2), "40000 × 2 pixels"),
        (png(60_000, 60_000), "more than 52,000,000 pixels"),
        (webp(16_000, 16_000), "16000 × 16000 pixels"),
        (b"GIF89a" + struct.pack("<HHBBB", 9000, 9000, 0, 0, 0) + b",", "no PNG, JPEG, WebP or GIF"),
        (png(100, 100), "truncated"),
        (saved(Image.fromarray(noise(90, 90)), "JPEG")[:-900], "truncated"),
        (saved(Image.fromarray(noise(9, 9)), "JPEG") + b"\xff\xda" * 100, "more than 100 scans"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(PictureError, match=why) as caught:
        read(data)
    assert caught.value.remedy


def test_a_file_may_be_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MOST_BYTES", 100)
    with pytest.raises(PictureError, match="has 101 bytes; at most 100"):
        read(bytes(101))


def test_a_bomb_takes_no_memory() -> None:
    import tracemalloc

    tracemalloc.start()
    for data in (png(8000, 8000), webp(16_000, 16_000), png(60_000, 60_000)):
        with pytest.raises(PictureError):
            read(data)
    assert tracemalloc.get_traced_memory()[1] < 4 << 20
    tracemalloc.stop()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    name=st.sampled_from(sorted(FILES)),
    cut=st.floats(0, 1),
    edits=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), max_size=4),
)
def test_a_damaged_file_is_a_picture_or_a_typed_error(name: str, cut: float, edits: list[tuple[int, int]]) -> None:
    data = bytearray(file(name))
    for at, value in edits:
        data[at % min(len(data), 400)] = value
    if cut < 0.5:
        del data[int(len(data) * 2 * cut) :]
    try:
        rgb = read(bytes(data))
    except PictureError:
        return
    assert rgb.size <= 3 * pictures.MOST_PIXELS
    assert rgb.dtype == np.uint8


def test_how_many_tokens_a_picture_takes() -> None:
    ours = of("llama4", 28)
    assert isinstance(ours, Llama4Processor)
    assert [ours.pixels(noise(*size)).tokens for size in ((28, 28), (28, 56), (56, 84))] == [
        3 + 9, 3 + 3 * 9 + 2, 3 + 7 * 9 + 6,
    ]  # fmt: skip
    assert of("llama3.2", 28).pixels(noise(56, 84)).tokens == 1


def test_the_released_models_processors() -> None:
    assert of("llama4", 336) == Llama4Processor(336, 16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 9)
    assert of("llama3.2", 560).most_tiles == 4
    with pytest.raises(PictureError, match="takes no pictures"):
        processor_for(object())


def test_a_models_own_numbers_are_heeded(tmp_path: Path) -> None:
    from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

    theirs = MllamaImageProcessorPil(
        size={"height": 28, "width": 28}, image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 1]
    )
    theirs.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["preprocessor_config.json"]
    said = json.loads((tmp_path / "preprocessor_config.json").read_text())
    config = Config("llama3.2", 28)
    expected = MllamaProcessor(28, 4, (0.1, 0.2, 0.3), (0.5, 0.6, 1.0))
    assert processor_for(config, tmp_path) == expected
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {**said, "image_std": [1, 1, 1]}}))
    assert processor_for(config, tmp_path).std == (1.0, 1.0, 1.0)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Llama4Processor"}))
    assert processor_for(config, tmp_path) == expected
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"max_patches": 4}))
    assert processor_for(Config("llama4", 28), tmp_path).most_tiles == 4
    assert processor_for(config, tmp_path / "none") == of("llama3.2", 28)


@pytest.mark.parametrize(
    "said",
    [
        "{", "[]", "[" * 3000, {"do_normalize": False}, {"do_rescale": 0}, {"resample": 3}, {"rescale_factor": 1},
        {"resize_to_max_canvas": True}, {"size": {"height": 28, "width": 30}}, {"size": 28}, {"image_mean": [0.5]},
        {"image_mean": 0.5}, {"image_std": [0, 1, 1]}, {"image_std": [True, 1, 1]},
        {"image_mean": [float("nan"), 0, 0]},
        {"max_image_tiles": 5}, {"max_image_tiles": 0}, {"max_image_tiles": "4"}, {"do_center_crop": [1]},
    ],
)  # fmt: skip
def test_a_processor_that_is_not_this_one_is_refused(tmp_path: Path, said: Any) -> None:
    (tmp_path / "preprocessor_config.json").write_text(said if isinstance(said, str) else json.dumps(said))
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json") as caught:
        processor_for(Config("llama3.2", 28), tmp_path)
    assert isinstance(said, str) or next(iter(said)) in str(caught.value)
