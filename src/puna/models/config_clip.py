"""The keys of a vision encoder's own GGUF (`clip.*`), which llama.cpp keeps beside the model's: read and written.

What it is: from and to `Llama4VisionConfig`; the keys are those of llama.cpp's tools/mtmd/clip-impl.h, the values those
its converter writes for Llama 4 (conversion/llama4.py).
What it is not: a reader of files, or of projectors of other models: those are refused by name.
What is surprising: the ratio of the pixel shuffle is said as the whole number it divides by, and the frequency of the
2-D rope and the width after the shuffle are not said at all: the one is the same in every release, and the other is
seen from the tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from puna.errors import ConfigError
from puna.models.config import ANOTHER, Fields
from puna.models.llama4_config import LAYER_NORM_EPS, VISION_ROPE_THETA, Llama4VisionConfig, settled_vision

ARCHITECTURE = "clip"
PROJECTOR = "llama4"

MEAN_AND_DEVIATION = (0.5, 0.5, 0.5)
"""Of the pixels, which Llama 4's image processor shifts and divides by."""


def text_width(data: Mapping[str, Any], source: str) -> int:
    """The width of the text model that a projector is made for. Raises ConfigError where it says none."""
    return Fields(data, source).integer("clip.vision.projection_dim")


def read_clip(data: Mapping[str, Any], source: str, *, output_dim: int) -> tuple[Llama4VisionConfig, tuple[str, ...]]:
    """The encoder's numbers, and keys that are not known; `output_dim` is the width of the adapter's tensors.

    Raises ConfigError naming file and key for a missing, wrong or unimplemented value.
    """
    f = Fields({key: data[key] for key in data if key.startswith("clip.")}, source)
    if not f.has("clip.projector_type") and not f.has("clip.vision.projector_type"):
        raise f.fault("clip.projector_type", "is missing")
    f.choice("clip.projector_type", (PROJECTOR,), PROJECTOR)
    f.choice("clip.vision.projector_type", (PROJECTOR,), PROJECTOR)
    f.choice("clip.has_vision_encoder", (True,), True)
    f.choice("clip.has_audio_encoder", (False,), False)
    f.choice("clip.use_gelu", (True,), True)
    f.choice("clip.use_silu", (False,), False)
    for key in ("clip.vision.image_mean", "clip.vision.image_std"):
        said = f.data[key] if f.has(key) else np.array(MEAN_AND_DEVIATION)
        if not isinstance(said, np.ndarray) or said.tolist() != list(MEAN_AND_DEVIATION):
            raise f.fault(key, f"must be {list(MEAN_AND_DEVIATION)}", remedy=ANOTHER)
    heads, dim = f.integer("clip.vision.attention.head_count"), f.integer("clip.vision.embedding_length")
    eps = f.number("clip.vision.attention.layer_norm_epsilon", LAYER_NORM_EPS)
    config = Llama4VisionConfig(
        dim=dim,
        layers=f.integer("clip.vision.block_count", most=4096),
        heads=heads,
        hidden_dim=f.integer("clip.vision.feed_forward_length"),
        image_size=f.integer("clip.vision.image_size", most=1 << 14),
        patch_size=f.integer("clip.vision.patch_size", most=1 << 14),
        output_dim=output_dim,
        shuffle=1 / f.integer("clip.vision.projector.scale_factor", most=64),
        rope_theta=VISION_ROPE_THETA,
        norm_eps=eps,
    )
    settled_vision(config, source)
    f.ignore("clip.vision.projection_dim")
    return config, f.unread()


def write_clip(config: Llama4VisionConfig, dim: int) -> dict[str, Any]:
    """The `clip.*` keys of an encoder for a text model of width `dim`.

    Raises ConfigError for what they cannot say: a shuffle by no whole number, another rope.
    """
    factor = round(1 / config.shuffle)
    if 1 / factor != config.shuffle or config.rope_theta != VISION_ROPE_THETA:
        raise ConfigError(
            "A vision encoder's GGUF has no word for this one's pixel shuffle or rope.",
            remedy="Convert to safetensors.",
        )
    return {
        "clip.has_vision_encoder": True,
        "clip.projector_type": PROJECTOR,
        "clip.use_gelu": True,
        "clip.vision.image_size": config.image_size,
        "clip.vision.patch_size": config.patch_size,
        "clip.vision.embedding_length": config.dim,
        "clip.vision.feed_forward_length": config.hidden_dim,
        "clip.vision.block_count": config.layers,
        "clip.vision.projection_dim": dim,
        "clip.vision.attention.head_count": config.heads,
        "clip.vision.attention.layer_norm_epsilon": config.norm_eps,
        "clip.vision.projector.scale_factor": factor,
        "clip.vision.image_mean": np.array(MEAN_AND_DEVIATION, np.float32),
        "clip.vision.image_std": np.array(MEAN_AND_DEVIATION, np.float32),
    }
