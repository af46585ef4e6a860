"""The ops on torch tensors: differentiable, on any device, in the tensors' own type.

What it is: the torch twin of `reference.py`, op by op, same shapes and the same meaning of a table of pages. Training,
`--device cuda` and torch.compile all run through here.
What it is not: the CPU inference path; NumPy arrays go to C++.
What is surprising: where transformers rounds (norms in float32, then back to the weights' type), this rounds at the
same place, so that a bf16 model gives the answers its authors saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from puna.kernels.layouts import PageTable

Tensor = torch.Tensor


def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of `table` [V, dim] for `ids` [*] → [*, dim] in the table's type."""
    return F.embedding(ids.long(), table)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, the mean in float32; without a weight its numbers are one."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))  # float64 stays what it is
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return scaled.to(x.dtype) if weight is None else weight * scaled.to(x.dtype)


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


def attention(q: Tensor, k: Tensor, v: Tensor, table: PageTable | None, bf16: bool = False, chunk: int = 0) -> Tensor:
    """softmax(q·kᵀ/√D)·v, causal and grouped, by torch's scaled_dot_product_attention, in q's type whatever `bf16`.

    Over pages one sequence after another, and of a chunked one no pages before the first chunk that is looked at; see
    the reference for shapes.
    """
    if table is None:
        query, key, value = (t.transpose(1, 2) for t in (q, k.to(q.dtype), v.to(q.dtype)))
        if 0 < chunk < q.shape[1]:
            at = torch.arange(q.shape[1], device=q.device)
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=_seen(at, at, chunk), enable_gqa=True)
            return out.transpose(1, 2)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2)
    parts = []
    starts = table.starts.tolist()
    for b, pages in enumerate(table.pages.long()):
        positions = table.positions[starts[b] : starts[b + 1]]
        length = int(positions[-1]) + 1
        page, least = k.shape[1], int(positions[0]) // chunk * chunk if chunk else 0
        used, left = pages[least // page : -(-length // page)], least // page * page
        key, value = (cache[used].flatten(0, 1)[: length - left].to(q.dtype).transpose(0, 1)[None] for cache in (k, v))
        query = q[starts[b] : starts[b + 1]].transpose(0, 1)[None]
        seen = _seen(positions, torch.arange(left, length, device=q.device), chunk)
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
        parts.append(out[0].transpose(0, 1))
    return torch.cat(parts)


def _seen(queries: Tensor, keys: Tensor, chunk: int) -> Tensor:
    """Whether a query at one position [T] sees a key at another [S]: bool [T, S]."""
    seen = keys <= queries[:, None]
    return seen & (keys >= (queries // chunk * chunk)[:, None]) if chunk else seen


def temperature(q: Tensor, positions: Tensor, floor: int, scale: float) -> Tensor:
    """q [*, T, H, D] times 1 + scale · log(1 + ⌊(p + 1) / floor⌋), the factor in float32."""
    longer = torch.log1p(torch.floor((positions.float() + 1.0) / floor)) * scale + 1.0
    return (q * longer[..., None, None]).to(q.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x − mean(x)) / sqrt(var(x) + eps) · weight + bias over the last dimension."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of q [*, Tq, H, D] over all of k and v [*, Tk, G, D], grouped, by scaled_dot_product_attention."""
    query, key, value = (t.reshape(-1, *t.shape[-3:]).transpose(1, 2) for t in (q, k.to(q.dtype), v.to(q.dtype)))
    out = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return out.transpose(1, 2).reshape(q.shape)


def gelu(x: Tensor) -> Tensor:
    """x · (1 + erf(x / √2)) / 2."""
    return F.gelu(x)


def gated(x: Tensor, gate: Tensor) -> Tensor:
    """x · tanh(gate)."""
    return gate.tanh() * x


def concat(parts: Sequence[Tensor], axis: int = -2) -> Tensor:
    """Rows after one another, or columns; see the reference."""
    if axis == -1:
        return torch.cat(list(parts), dim=-1)
    rows = [part if part.ndim > 1 else part[None] for part in parts]
    lead = torch.broadcast_shapes(*(row.shape[:-2] for row in rows))  # type: ignore[no-untyped-call]
    return torch.cat([row.expand(*lead, *row.shape[-2:]) for row in rows], dim=-2)


def pad(x: Tensor, rows: int) -> Tensor:
    """x [*, T, dim] with rows of zeros after it: [*, rows, dim]."""
    return F.pad(x, (0, 0, 0, rows - x.shape[-2]))


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return F.silu(gate) * up


def route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The experts of each token and sigmoid of their logits, taken in float32: two of [*, k]."""
    chosen, values = top_k(logits, k)
    return chosen, values.to(torch.promote_types(values.dtype, torch.float32)).sigmoid().to(logits.dtype)


def experts(
    x: Tensor,
    chosen: Tensor,
    scores: Tensor,
    part: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    shared: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """SwiGLU of x, and the sum over a token's experts of SwiGLU of score · x; see the reference."""

    def gated(rows: Tensor, matrices: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        gate, up, down = matrices
        return linear(swiglu(linear(rows, gate), linear(rows, up)), down)

    rows = x.flatten(0, -2)
    ids, weights = chosen.reshape(len(rows), -1), scores.reshape(len(rows), -1)
    out = gated(rows, shared)
    for e in torch.unique(ids).tolist():
        at, slot = torch.nonzero(ids == e, as_tuple=True)
        out = out.index_add(0, at, gated(rows[at] * weights[at, slot, None], part(e)))
    return out.reshape(x.shape)


def argmax(logits: Tensor) -> Tensor:
    """The id of the largest logit: [*, V] → int32 [*]."""
    return logits.argmax(-1).to(torch.int32)


def top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids and values of the k largest logits, equals by their lower id: [*, V] → two of [*, k]."""
    values, ids = torch.sort(logits, dim=-1, descending=True, stable=True)
    return ids[..., :k].to(torch.int32), values[..., :k]
