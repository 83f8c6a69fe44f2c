"""What a draft gains: accepted tokens per verification and tokens per second beside the target alone, over the context.

For every prompt the target generates alone and with the draft, in alternating order and in one process, greedily and
with no end of sequence, batch 1; ratios are taken within a prompt. The tokens of both are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..distill.data.documents import Fields, read_documents
from ..distill.data.tokenise import tokenise
from ..distill.draft import Counts, generate
from ..distill.errors import UserError
from . import fidelity
from .speed import spread

TIE = 1e-4
"""Logits of the two likeliest tokens that are no further apart may be ordered by rounding."""


@dataclass(frozen=True)
class Settings:
    """How a draft is measured.

    Attributes:
        tokens: generated behind each prompt.
        prompts: of each length, after one that warms up.
        draft_tokens: see `distill.draft.generate`.
        seed: of prompts without text.
    """

    tokens: int = 64
    prompts: int = 3
    draft_tokens: int | None = None
    seed: int = 0


def prompts_of(tokenizer: Any, text: Sequence[str] | None, length: int, settings: Settings, vocabulary: int) -> Any:
    """(prompts, length) token ids: documents of `text` one after the other, each with its BOS; random ones without.

    Raises:
        UserError: the text has no file, or too few tokens.
    """
    count = settings.prompts
    if text is None:
        return torch.randint(vocabulary, (count, length), generator=torch.Generator().manual_seed(settings.seed))
    tokens = tokenise(read_documents(fidelity._files(list(text)), Fields()), tokenizer)
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows: list[list[int]] = []
    row: list[int] = []
    for number in range(len(tokens)):
        document = tokens.document(number).tolist()
        row += document if document[: len(bos)] == bos else bos + document
        if len(row) >= length:
            rows.append(row[:length])
            row = []
            if len(rows) == count:
                return torch.tensor(rows)
    raise UserError(
        f"--text {', '.join(text)}: gives {len(rows)} prompts of {length} tokens, expected {count}; give longer text, "
        "or fewer --prompts"
    )


def measure_length(target: Any, draft: Any, prompts: torch.Tensor, settings: Settings) -> dict[str, Any]:
    """One row of the result.

    Args:
        target: a causal language model in eval mode.
        draft: another one with its vocabulary.
        prompts: (N, length) token ids.
        settings: see there.

    Returns:
        {"length", "beyond_context" (of the target), "prompts", "target" and "drafted" ({"decode_tokens_per_second",
        "tokens_per_second" (prompt included)}, each with _min and _max), "speed_up" and "speed_up_whole" (drafted over
        target: behind the prompt, prompt included), "accepted_per_verification", "acceptance" (share of the drafted),
        "tokens_per_verification", "verifications", "drafted_tokens", "identical", "ties" (different from where two
        logits are within `TIE`), "different"}.
    """
    device = next(target.parameters()).device
    context = getattr(target.config, "max_position_embeddings", None)
    rates: dict[str, list[float]] = {}
    counts: list[Counts] = []
    verdicts = {"identical": 0, "ties": 0, "different": 0}
    _both(target, draft, prompts[:1].to(device), settings, 0)
    for turn, prompt in enumerate(prompts.to(device).split(1)):
        (alone, own), (drafted, ours) = _both(target, draft, prompt, settings, turn)
        verdicts[verdict(target, alone, drafted)] += 1
        counts.append(ours)
        for name, count in (("target", own), ("drafted", ours)):
            rates.setdefault(f"{name}.decode_tokens_per_second", []).append(count.tokens_per_second or 0.0)
            rates.setdefault(f"{name}.tokens_per_second", []).append(count.new_tokens / count.seconds)
    verifications, accepted = sum(c.verifications for c in counts), sum(c.accepted for c in counts)
    made = sum(c.drafted for c in counts)
    row: dict[str, Any] = {
        "length": prompts.shape[1],
        "beyond_context": context is not None and prompts.shape[1] + settings.tokens > context,
        "prompts": len(prompts),
    }
    for name in ("target", "drafted"):
        row[name] = {}
        for key in ("decode_tokens_per_second", "tokens_per_second"):
            row[name] |= spread(key, rates[f"{name}.{key}"])
    for name, key in (("speed_up", "decode_tokens_per_second"), ("speed_up_whole", "tokens_per_second")):
        pairs = zip(rates[f"drafted.{key}"], rates[f"target.{key}"], strict=True)
        row |= spread(name, [ours / theirs if theirs else 0.0 for ours, theirs in pairs])
    return row | {
        "accepted_per_verification": accepted / verifications,
        "tokens_per_verification": sum(c.new_tokens for c in counts) / verifications,
        "acceptance": accepted / max(1, made),
        "verifications": verifications,
        "drafted_tokens": made,
        **verdicts,
    }


def _both(
    target: Any, draft: Any, prompt: torch.Tensor, settings: Settings, turn: int
) -> tuple[tuple[torch.Tensor, Counts], tuple[torch.Tensor, Counts]]:
    """The target alone, and with its draft."""
    options = {
        "do_sample": False,
        "max_new_tokens": settings.tokens,
        "eos_token_id": target.get_output_embeddings().weight.shape[0],  # no token: nothing ends early
        "pad_token_id": 0,
        "attention_mask": torch.ones_like(prompt),
    }
    found = {}
    for drafted in (False, True) if turn % 2 else (True, False):
        found[drafted] = generate(target, prompt, draft if drafted else None, settings.draft_tokens, **options)
    return found[False], found[True]


def verdict(target: Any, alone: torch.Tensor, drafted: torch.Tensor) -> str:
    """`identical`, `ties` where they part at two logits within `TIE`, or `different`."""
    if torch.equal(alone, drafted):
        return "identical"
    if alone.shape == drafted.shape:
        first = int((alone != drafted)[0].nonzero()[0])
        with torch.no_grad():
            best = target(alone[:, :first], use_cache=False).logits[0, -1].float().topk(2).values
        if float(best[0] - best[1]) <= TIE:
            return "ties"
    return "different"
