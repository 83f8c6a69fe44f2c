"""What the teacher's softmax attention looks at: its weights, from a layer's input, for every family alike."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from .data.batch import Batch
from .teacher import Teacher

_NAME = __name__.replace(".", "_")
"""Of `_give_heads` among transformers' attention functions."""


@dataclass(frozen=True)
class AttentionHeads:
    """Queries, keys and values as transformers' own attention function receives them, after biases, norms and rotation.

    Attributes:
        q: (B, H, T, d).
        k: (B, K, T, d); query head h reads key head h // (H / K).
        v: (B, K, T, d), values.
        scale: factor of the scores q . k.
        softcap: scores are bounded by softcap * tanh(score / softcap); None where they are not.
        window: tokens that a layer sees, the token itself included; None for all before it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    softcap: float | None
    window: int | None

    def weights(self, batch: Batch, start: int = 0, stop: int | None = None) -> Tensor:
        """The softmax weights of the queries start..stop, (B, H, stop - start, T), in fp32 (fp64 for fp64 queries).

        Every row sums to 1 over the tokens of its document up to itself, within the layer's window; at padding it is 0.
        Blocks of queries keep memory linear in T.
        """
        stop = self.q.shape[2] if stop is None else stop
        dtype = torch.float64 if self.q.dtype == torch.float64 else torch.float32
        with torch.autocast(self.q.device.type, enabled=False):
            grouped = self.q[:, :, start:stop].to(dtype).unflatten(1, (self.k.shape[1], -1))  # (B, K, H / K, t, d)
            scores = (grouped @ self.k.to(dtype).mT[:, :, None]).flatten(1, 2) * self.scale
            if self.softcap is not None:
                scores = self.softcap * torch.tanh(scores / self.softcap)
            sees = visible(batch, self.window, start, stop)[:, None]
            # A row at padding sees nothing: its softmax would be NaN.
            return scores.masked_fill(~sees, torch.finfo(dtype).min).softmax(-1).masked_fill(~sees, 0.0)


def visible(batch: Batch, window: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
    """(B, stop - start, T) bool: the query sees the token, which is of its document, not later, and in the window.

    Args:
        batch: its documents and padding.
        window: tokens seen, the token itself included; None for all.
        start, stop: of the queries; all by default.
    """
    place = torch.arange(batch.shape[1], device=batch.real.device)
    rows = slice(start, stop)
    back = place[rows, None] - place
    sees = (back >= 0) if window is None else (back >= 0) & (back < window)
    same = batch.segments[:, rows, None] == batch.segments[:, None]
    return sees & same & batch.real[:, rows, None] & batch.real[:, None]


def attention_heads(
    teacher: Teacher, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None
) -> AttentionHeads:
    """What a layer's attention hands to transformers' attention function for this layer input.

    The layer's own module computes it, so it is exact for every family. Hooks of the module are not called, so it may
    be asked for inside one.

    Args:
        teacher: not changed.
        layer: its number.
        hidden: (B, T, D) layer input, brought to the teacher's dtype.
        rotary: cos and sin as the backbone gives them to the layer (`position_embeddings`).
    """
    module = teacher.attention(layer)
    kind = next(module.parameters()).dtype
    turned = None if rotary is None else tuple(part.to(kind) for part in rotary)
    with _listening(module):
        try:
            module.forward(hidden_states=hidden.to(kind), attention_mask=None, position_embeddings=turned)
        except _Heads as heard:
            return heard.heads
    raise AssertionError(f"layer {layer}: {type(module).__name__} did not call its attention function")


def attention_weights(
    teacher: Teacher, layer: int, hidden: Tensor, rotary: tuple[Tensor, Tensor] | None, batch: Batch
) -> Tensor:
    """A layer's attention matrices softmax(scale q k^T), (B, H, T, T): `attention_heads`, then all their `weights`."""
    return attention_heads(teacher, layer, hidden, rotary).weights(batch)


class _Heads(Exception):
    """Leaves the module's forward: the output projection is not needed."""

    def __init__(self, heads: AttentionHeads) -> None:
        super().__init__()
        self.heads = heads


def _give_heads(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> NoReturn:
    """Stands among transformers' attention functions: takes queries (B, H, T, d), keys and values (B, K, T, d)."""
    scale = kwargs.get("scaling")
    scale = module.head_dim**-0.5 if scale is None else float(scale)
    raise _Heads(AttentionHeads(query, key, value, scale, kwargs.get("softcap"), kwargs.get("sliding_window")))


@contextmanager
def _listening(module: nn.Module) -> Iterator[None]:
    """Have one attention module call `_give_heads`."""
    AttentionInterface.register(_NAME, _give_heads)
    config: Any = module.config
    view = copy.copy(config)
    view._attn_implementation_internal = _NAME
    module.config = view
    try:
        yield
    finally:
        module.config = config
