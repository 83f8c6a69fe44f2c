"""Speculative decoding: a small model drafts tokens, its target verifies them in one forward (arXiv 2211.17192).

The loop and the rule of acceptance are transformers' assisted generation. Ours is what it needs: mixers whose states
can be taken back (`modeling.cache`), the draft and the target holding once what they have in common, and the counts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

FIRST_DRAFT = 5
"""Tokens of the first draft where their number is left to the acceptance."""
_SAMPLES = 64
# What shapes a distribution, in transformers' order: its default, the value that does nothing, and what does it.
_NEUTRAL = {
    "temperature": (1.0, 1.0, TemperatureLogitsWarper),
    "top_k": (50, 0, TopKLogitsWarper),
    "top_p": (1.0, 1.0, TopPLogitsWarper),
    "min_p": (0.0, 0.0, MinPLogitsWarper),
}


@dataclass(frozen=True)
class Shared:
    """What two models hold once.

    Attributes:
        tensors: parameters of the draft that are now the target's.
        bytes: of these.
        draft_bytes: of all the draft's parameters, shared ones included.
        target_bytes: of all the target's.
    """

    tensors: int
    bytes: int
    draft_bytes: int
    target_bytes: int


@dataclass(frozen=True)
class Counts:
    """What a generation took.

    Attributes:
        new_tokens: generated, prompt not counted.
        verifications: forward passes of the target, that of the prompt included.
        drafted: tokens that the draft proposed; 0 without one.
        accepted: of these, tokens that stand in the result.
        seconds: of the whole call, prompt included.
        decode_seconds: after the first verification.
        decoded: tokens of that time.
    """

    new_tokens: int
    verifications: int
    drafted: int
    accepted: int
    seconds: float
    decode_seconds: float
    decoded: int

    @property
    def accepted_per_verification(self) -> float:
        """Drafted tokens that a forward of the target confirmed, on average; the token that it adds is not counted."""
        return self.accepted / max(1, self.verifications)

    @property
    def tokens_per_second(self) -> float | None:
        """After the first verification; None where nothing came after it."""
        return self.decoded / self.decode_seconds if self.decoded else None


def share_equal(draft: torch.nn.Module, target: torch.nn.Module) -> Shared:
    """Have every parameter of `draft` that equals one of `target` byte for byte be that very tensor (in place).

    Parameters that are tied stay tied. Those of the same name are compared first, then all of the same shape. Neither
    model may be trained afterwards: a change of one would be one of both.
    """
    named = dict(target.named_parameters(remove_duplicate=False))
    alike: dict[tuple, list[torch.nn.Parameter]] = {}
    for parameter in target.parameters():
        alike.setdefault(_sample(parameter), []).append(parameter)
    places: dict[int, list[tuple[torch.nn.Module, str, str]]] = {}
    for path, module in draft.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, name, f"{path}.{name}".lstrip(".")))
    tensors = shared = 0
    whole = _bytes(draft)
    for parameter in list(draft.parameters()):
        found = places[id(parameter)]
        candidates = [named[path] for _, _, path in found if path in named] + alike.get(_sample(parameter), [])
        same = next((other for other in candidates if _equal(parameter, other)), None)
        if same is None:
            continue
        for module, name, _ in found:
            module._parameters[name] = same
        tensors, shared = tensors + 1, shared + parameter.numel() * parameter.element_size()
    return Shared(tensors, shared, whole, _bytes(target))


def _bytes(model: torch.nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _sample(parameter: torch.Tensor) -> tuple:
    """What equal tensors have in common, to read few of those that are not."""
    flat = parameter.detach().flatten()
    step = max(1, flat.numel() // _SAMPLES)
    return (tuple(parameter.shape), parameter.dtype, parameter.device, str(flat[::step].tolist()))


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    a, b = (x.detach().contiguous().flatten().view(torch.uint8) for x in (a, b))
    return torch.equal(a, b)


def generate(
    target: Any, ids: torch.Tensor, draft: Any | None = None, draft_tokens: int | None = None, **options: Any
) -> tuple[torch.Tensor, Counts]:
    """What `target.generate` gives, faster where a draft of it guesses well.

    Greedy, the tokens are the target's own; sampled, they follow its own distribution: a drafted token x is accepted
    with probability min(1, p(x) / q(x)), else one is drawn from max(p - q, 0), normalised, with p the target's and q
    the draft's distribution, both after temperature, top-k and top-p.

    Args:
        target: a causal language model.
        ids: (1, T) prompt.
        draft: another one with the same vocabulary, or None for the target alone.
        draft_tokens: of every draft; None begins with `FIRST_DRAFT`, and takes two more after a draft that was
            accepted whole, one fewer after any other.
        options: of transformers' `generate`.

    Returns:
        (1, T + new) tokens, and the counts.

    Raises:
        ValueError: more than one sequence, or an option that transformers refuses.
    """
    if ids.shape[0] != 1:
        raise ValueError(f"one sequence at a time is drafted for, found {ids.shape[0]}")
    watch, drafted = _Watch(), 0

    def count(*_: Any) -> None:
        nonlocal drafted
        drafted += 1

    with torch.no_grad(), _hushed():
        if draft is None:
            begin = time.perf_counter()
            out = target.generate(ids, streamer=watch, **options)
        else:
            handle = draft.register_forward_pre_hook(count)
            try:
                options = _warped_once(target, options)
                with _drafting(draft, draft_tokens):
                    begin = time.perf_counter()
                    out = target.generate(ids, streamer=watch, assistant_model=draft, **options)
            finally:
                handle.remove()
    end = time.perf_counter()
    sizes = watch.sizes
    new, first = sum(sizes), sizes[0] if sizes else 0
    return out, Counts(new, len(sizes), drafted, new - len(sizes), end - begin, end - watch.first, new - first)


def _warped_once(target: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The same sampling with temperature and its like as explicit processors, when there is sampling.

    transformers gives the draft the target's processors and then adds those of the same settings once more, so that the
    draft would guess by another distribution than it could: still exact, but accepted less often.
    """
    config = target.generation_config
    if not options.get("do_sample", config.do_sample):
        return options
    given = {name: options.get(name, getattr(config, name, None)) for name in _NEUTRAL}
    values = {name: default if given[name] is None else given[name] for name, (default, _, _) in _NEUTRAL.items()}
    kinds = {name: kind for name, (_, neutral, kind) in _NEUTRAL.items() if values[name] != neutral}
    processors = [*(options.get("logits_processor") or ()), *(kind(values[name]) for name, kind in kinds.items())]
    neutral = {
        name: neutral for name, (_, neutral, _) in _NEUTRAL.items() if given[name] is not None or name != "min_p"
    }
    return {**options, **neutral, "logits_processor": LogitsProcessorList(processors)}


class _Watch(BaseStreamer):
    """When the first tokens came, and how many came at a time."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.first = 0.0
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt, then the tokens of each forward."""
        if self._prompt:
            self._prompt = False
            return
        if not self.sizes:
            self.first = time.perf_counter()
        self.sizes.append(value.numel())

    def end(self) -> None:
        """Nothing is held back."""


@contextmanager
def _drafting(draft: Any, tokens: int | None) -> Iterator[None]:
    """A draft's generation config with the length of drafts set, and nothing that ends one early."""
    config = draft.generation_config
    wanted = {
        "num_assistant_tokens": FIRST_DRAFT if tokens is None else tokens,
        "num_assistant_tokens_schedule": "heuristic_transient" if tokens is None else "constant",
        "assistant_confidence_threshold": 0.0,
    }
    before = {name: getattr(config, name, None) for name in wanted}
    try:
        for name, value in wanted.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


@contextmanager
def _hushed() -> Iterator[None]:
    """Without transformers' warnings about how it calls itself for a draft."""
    logger = logging.getLogger("transformers.generation.utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
