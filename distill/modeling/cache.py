"""What a student keeps from token to token: in a mixer's layer a state of constant size and a count of tokens."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.masking_utils import create_causal_mask

CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""By what name models take the cache and return it: transformers renamed it in 5.24."""


def cache_keyword(model: Any) -> str:
    """By what name this very model takes its cache: code that came with a checkpoint may know the older one only."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in (CACHE, "past_key_values") if name in accepted), CACHE)


class MixerCacheLayer(LinearAttentionLayer, CacheLayerMixin):  # pyright: ignore[reportIncompatibleMethodOverride]
    """transformers' linear-attention cache layer with what the stock one lacks.

    It counts tokens (so that a model without any attention layer still knows its length), marks that it has a previous
    state (the stock layer does so for convolution states only) and follows batch repetition and selection. The states
    are fp32 tensors, batch first; they are replaced, not copied into, at every step.

    After `activate_past_recording` it keeps the states of earlier tokens as well, and `crop` takes tokens back until
    then: transformers' assisted generation does so with tokens that were drafted and not accepted.
    """

    is_sliding = False

    def __init__(self) -> None:
        CacheLayerMixin.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=1)
        self.states: tuple[torch.Tensor, ...] | None = None
        self.tokens = 0
        self.past: list[tuple[int, tuple[torch.Tensor, ...] | None]] = []
        self.beside: CacheLayerMixin | None = None

    @property
    def is_compileable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """True although states are replaced: transformers skips the mask of a static cache's unused slots otherwise.

        That generate does not compile by itself is said on the model (`_can_compile_fullgraph`).
        """
        return True

    def read(self) -> tuple[torch.Tensor, ...] | None:
        """The states after the tokens seen so far, None before the first."""
        return self.states

    def write(self, states: tuple[torch.Tensor, ...], tokens: int) -> None:
        """Take the states after `tokens` further tokens; those before them are not kept."""
        self.past = []
        self.states = tuple(states)
        self.tokens += tokens
        self.has_previous_state[0] = True
        if self.states:
            self.device, self.dtype = self.states[0].device, self.states[0].dtype

    def record(self, history: list[tuple[torch.Tensor, ...]], tokens: int) -> None:
        """Take the states after each of the last of `tokens` further tokens, and keep those before them."""
        past = self.past or [(self.tokens, self.states)]
        self.write(history[-1], tokens)
        self.past = past + list(enumerate(history, self.tokens - len(history) + 1))

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse keys and values: this layer has none.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError("a mixer's cache layer holds a state, not keys and values: attention was called on it")

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(key length, offset) of the attention layers beside this one, which may be asked for in their stead."""
        return (self.tokens + query_length, 0) if self.beside is None else self.beside.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    @property
    def is_croppable(self) -> bool:
        """Whether earlier states are kept."""
        return self.record_past

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last -`tokens_to_remove` tokens back, and forget the states before those that are left.

        Raises:
            RuntimeError: the state at that token was not recorded.
        """
        if tokens_to_remove != 0 and not self.record_past:
            raise RuntimeError(
                "the state of a linear mixer cannot be cropped: it does not keep single tokens. Call "
                "activate_past_recording() on the cache before the tokens that may be taken back"
            )
        left = self.tokens + tokens_to_remove
        kept = {self.tokens: self.states} | dict(self.past)
        if tokens_to_remove > 0 or left not in kept:
            raise RuntimeError(
                f"a mixer's cache of {self.tokens} tokens cannot be cropped by {tokens_to_remove}: recorded are the "
                f"states after {', '.join(map(str, sorted(kept)))} tokens"
            )
        self.states, self.tokens, self.past = kept[left], left, []
        self.has_previous_state[0] = self.states is not None

    def reset(self) -> None:
        """Forget everything."""
        self.states, self.tokens, self.past = None, 0, []
        self.has_previous_state[0] = False

    def _map(self, change: Any) -> None:
        def changed(states: tuple[torch.Tensor, ...] | None) -> tuple[torch.Tensor, ...] | None:
            return None if states is None else tuple(change(state) for state in states)

        self.states = changed(self.states)
        self.past = [(tokens, changed(states)) for tokens, states in self.past]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Follow beam search."""
        self._map(lambda state: state.index_select(0, beam_idx.to(state.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._map(lambda state: state.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep some rows."""
        self._map(lambda state: state[indices.to(state.device)])

    def offload(self) -> None:
        """Move to the CPU."""
        self._map(lambda state: state.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move back."""
        self._map(lambda state: state.to(self.device, non_blocking=True))


def install_layers(cache: Cache, mixers: list[int], windows: dict[int, int]) -> None:
    """Put the layers of this model wherever `cache` still has the empty ones that transformers made (in place).

    Works on any cache that generate or a caller built, dynamic or static.

    Args:
        cache: of this model, or fresh.
        mixers: layers that hold a mixer.
        windows: kept attention layers with a window that transformers does not know of.

    Raises:
        ValueError: the cache already holds keys and values that do not fit, so it belongs to another model.
    """
    for layer in (*mixers, *windows):
        while len(cache.layers) <= layer:
            cache.layers.append(DynamicLayer())
        present = cache.layers[layer]
        if isinstance(present, MixerCacheLayer) or getattr(present, "relinear_window", None) is not None:
            continue
        if isinstance(present, CacheLayerMixin) and present.is_initialized and present.get_seq_length() > 0:
            what = "a window of its own" if layer in windows else "a mixer"
            raise ValueError(f"past_key_values holds keys and values at layer {layer}, which is {what} in this model")
        cache.layers[layer] = _window_layer(present, windows[layer]) if layer in windows else MixerCacheLayer()
    # transformers makes one mask for all layers of full attention, as long as the first of them says; since 5.24 it
    # takes any layer that counts tokens for one. Only a static cache's layers are longer than what they have seen.
    full = (held for held in cache.layers if isinstance(held, StaticLayer) and not held.is_sliding)
    beside = next(full, None)
    for layer in mixers:
        cache.layers[layer].beside = beside  # pyright: ignore[reportAttributeAccessIssue]


def _window_layer(present: Any, window: int) -> CacheLayerMixin:
    """transformers' own layer for a window, static where `present` is."""
    if isinstance(present, StaticLayer):
        made = StaticSlidingWindowLayer(max_cache_len=present.max_cache_len, sliding_window=window)
    else:
        made = DynamicSlidingWindowLayer(sliding_window=window)
    made.relinear_window = window  # pyright: ignore[reportAttributeAccessIssue]
    return made
