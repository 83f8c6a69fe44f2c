"""How many bytes a sequence carries from token to token: measured on the tensors of a real decode cache.

Attention's cache grows with every token, a linear mixer's state does not. Nothing here is computed from a config: the
model prefills a sequence through its own cache, decodes the last token, and the storages that the cache then holds are
added up.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ..distill.modeling.cache import cache_keyword

Progress = Callable[[int, int], None]


def cache_bytes(
    model: Any,
    lengths: Iterable[int],
    *,
    prefill: int = 2048,
    chunk: int = 512,
    progress: Progress | None = None,
) -> dict[int, int]:
    """Bytes of the decode cache of one sequence (batch 1) at each context length.

    One sequence is grown through all lengths; the last token of each is a real decode step, after which the storages
    are added up. What has no growing cache (an all-linear student) runs the whole way for real. Where some layers keep
    keys and values, the first `prefill` tokens run for real, and the keys and values of the others are zeros of the
    same shape and dtype that enter through the cache's own `update`: attention over 32k tokens costs a CPU minutes and
    changes no size. In that case recurrent layers skip those tokens too: their state has one size from the first token.

    Args:
        model: any causal language model that takes a cache.
        lengths: context lengths in tokens, each at least 2; they may exceed the model's trained context.
        prefill: tokens that run for real even where attention layers are present.
        chunk: tokens per prefill call.
        progress: called with (tokens done, tokens in all).

    Returns:
        {length: bytes}, in ascending order. Bytes are those of whole storages, so a small view that keeps a large
        tensor alive counts as the large tensor; counters (tensors without dimensions) do not count.

    Raises:
        ValueError: a length below 2, or a model that returns no cache.
    """
    wanted = sorted(set(lengths))
    if not wanted or wanted[0] < 2:
        raise ValueError(f"cache lengths must be at least 2 tokens, found {wanted}")
    sequence = Sequence(model, prefill=prefill, chunk=chunk)
    result = {}
    for length in wanted:
        sequence.grow(length - 1, progress=(lambda done: progress(done, wanted[-1])) if progress else None)
        sequence.decode(1)
        result[length] = held_bytes(sequence.cache)
    return result


def held_bytes(cache: Any) -> int:
    """Bytes of the different storages that the tensors of a cache keep alive."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(cache) if t.dim() > 0}
    return sum(storages.values())


def tensors(value: Any, _seen: set[int] | None = None) -> Iterator[torch.Tensor]:
    """Every tensor reachable from a cache through its attributes, dicts, lists and tuples; each object once."""
    seen = set() if _seen is None else _seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item, seen)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, torch.nn.Module)) and not callable(value):
        yield from tensors(vars(value), seen)


class Sequence:
    """One sequence that grows through a model's own cache. Its token ids are arbitrary but fixed.

    Attributes:
        cache: what the model returned as its cache; None before the first token.
        length: tokens in it.
        rows: equal sequences in it: 1 until `repeat`.
    """

    def __init__(self, model: Any, *, prefill: int | None = None, chunk: int = 512) -> None:
        """`prefill`: tokens to run for real where attention layers are present; None: all."""
        self.model = model
        self.prefill = prefill
        self.chunk = chunk
        self.cache: Any = None
        self.length, self.rows = 0, 1
        self._logits: Any = None
        self._device = next(model.parameters()).device
        self._vocab = model.get_input_embeddings().weight.shape[0]
        accepted = inspect.signature(model.forward).parameters
        self._few_logits = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self._positions = "position_ids" in accepted
        self._keyword = cache_keyword(model)

    @torch.no_grad()
    def grow(self, length: int, progress: Callable[[int], None] | None = None) -> None:
        """Prefill up to `length` tokens, in chunks."""
        while self.length < length:
            if self.prefill is not None and self.length >= self.prefill and self._growing():
                self._fill(length - self.length)
            else:
                stop = length if self.prefill is None or self.length >= self.prefill else min(length, self.prefill)
                self._forward(min(self.chunk, stop - self.length))
            if progress is not None:
                progress(self.length)

    @torch.no_grad()
    def decode(self, tokens: int) -> None:
        """Run `tokens` decode steps of one token each."""
        for _ in range(tokens):
            self._forward(1)

    def next_token(self) -> int:
        """The likeliest next token of the first row, on the host: waits for the device."""
        return int(self._logits[0, -1].argmax())

    def repeat(self, rows: int) -> None:
        """Make one row into many, which decode side by side from here on."""
        self.cache.batch_repeat_interleave(rows)
        self.rows *= rows

    def _forward(self, tokens: int) -> None:
        positions = torch.arange(self.length, self.length + tokens, device=self._device).expand(self.rows, -1)
        ids = (positions * 7919 + 1) % self._vocab  # any ids do; a prime stride visits the whole vocabulary
        extra: dict[str, Any] = {"position_ids": positions} if self._positions else {}
        extra |= {self._keyword: self.cache}
        out = self.model(input_ids=ids, use_cache=True, **extra, **self._few_logits)
        self.cache, self._logits = out.get(self._keyword), out.get("logits")
        if self.cache is None:
            raise ValueError(f"{type(self.model).__name__} returned no {self._keyword} although use_cache=True")
        self.length += tokens

    def _growing(self) -> list[Any]:
        """The cache's layers that hold keys and values."""
        layers = getattr(self.cache, "layers", ())
        return [layer for layer in layers if isinstance(getattr(layer, "keys", None), torch.Tensor)]

    def _fill(self, tokens: int) -> None:
        """Let `tokens` tokens of zeros enter every layer that holds keys and values, through its own `update`."""
        for layer in self._growing():
            keys, values = layer.keys, layer.values
            layer.update(
                keys.new_zeros(*keys.shape[:-2], tokens, keys.shape[-1]),
                values.new_zeros(*values.shape[:-2], tokens, values.shape[-1]),
            )
        self.length += tokens
