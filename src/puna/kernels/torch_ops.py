"""The ops on torch tensors: differentiable, on any device, in the tensors' own type.

What it is: the torch twin of `reference.py`, op by op, same shapes and the same meaning of a table of pages. Training,
`--device cuda` and torch.compile all run through here.
What it is not: the CPU inference path; NumPy arrays go to C++.
What is surprising: where transformers rounds (norms in float32, then back to the weights' type), this rounds at the
same place, so that a bf16 model gives the answers its authors saw.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from puna.kernels.layouts import PageTable

Tensor = torch.Tensor


def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of `table` [V, dim] for `ids` [*] → [*, dim] in the table's type."""
    return F.embedding(ids.long(), table)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, the mean in float32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # float64 stays what it is
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x · weightᵀ + bias."""
    return F.linear(x, weight, bias)


def positions(ids: Tensor) -> Tensor:
    """The positions of ids [B, T] whose rows are whole stretches: 0 to T - 1 in each, int32 [B, T]."""
    return torch.arange(ids.shape[1], dtype=torch.int32, device=ids.device).expand(ids.shape)


def rope_table(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of position · inv_freq, in float32 whatever the model's type."""
    angle = positions[..., None].float() * inv_freq
    return angle.cos(), angle.sin()


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate pairs of x [*, T, H, D]; see the reference for the two pairings."""
    cos, sin = cos[..., None, :].to(x.dtype), sin[..., None, :].to(x.dtype)
    half = x.shape[-1] // 2
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    turned = (a * cos - b * sin, b * cos + a * sin)
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


def write_kv(cache_k: Tensor, cache_v: Tensor, k: Tensor, v: Tensor, table: PageTable) -> None:
    """Store k, v [N, G, D] in the caches [pages, page, G, D], in place, where `table` (of tensors) says."""
    page = cache_k.shape[1]
    sequences = torch.arange(len(table.pages), device=k.device)
    sequence = torch.repeat_interleave(sequences, table.starts.diff(), output_size=len(k))
    number, row = table.pages[sequence, table.positions // page].long(), (table.positions % page).long()
    cache_k[number, row] = k.to(cache_k.dtype)
    cache_v[number, row] = v.to(cache_v.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, table: PageTable | None, bf16: bool = False) -> Tensor:
    """softmax(q·kᵀ/√D)·v, causal and grouped, by torch's scaled_dot_product_attention, in q's type whatever `bf16`.

    Over pages one sequence after another; see the reference for shapes.
    """
    if table is None:
        query, key, value = (t.transpose(1, 2) for t in (q, k.to(q.dtype), v.to(q.dtype)))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    parts = []
    starts = table.starts.tolist()
    for b, pages in enumerate(table.pages.long()):
        positions = table.positions[starts[b] : starts[b + 1]]
        length = int(positions[-1]) + 1
        used = pages[: -(-length // k.shape[1])]
        key, value = (cache[used].flatten(0, 1)[:length].to(q.dtype).transpose(0, 1)[None] for cache in (k, v))
        query = q[starts[b] : starts[b + 1]].transpose(0, 1)[None]
        seen = torch.arange(length, device=q.device) <= positions[:, None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return F.silu(gate) * up


def argmax(logits: Tensor) -> Tensor:
    """The id of the largest logit: [*, V] → int32 [*]."""
    return logits.argmax(-1).to(torch.int32)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids and values of the k largest logits, equals by their lower id: [*, V] → two of [*, k]."""
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    return ids[..., :k].to(torch.int32), values[..., :k]
