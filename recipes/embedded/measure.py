"""What a teacher of the embedded text can do: `python -m relinear.recipes.embedded.measure TEACHER` prints JSON."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from ...eval.recall import clustered, recall
from .text import KINDS, answers, documents

WINDOW = 32  # tokens: the cut that must make recall fail
SEED = 7  # of the validation documents


def measure(folder: Path, n: int = 200, n_per_cell: int = 256) -> dict[str, Any]:
    """Held-out perplexity per kind of text, answers that follow from earlier text, recall with full and cut attention.

    Args:
        folder: the teacher; its tokenizer must be fast.
        n: validation documents per kind.
        n_per_cell: answers per recall cell.

    Returns:
        {"perplexity": {kind: `text`'s result}, "recall": ..., "window": ...}, the last two as eval.recall.recall
        returns them, the very last with attention cut to `WINDOW` tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    kinds = {"all": KINDS, **{kind: {kind: 1.0} for kind in KINDS}}
    return {
        "perplexity": {name: text(model, tokenizer, list(documents(SEED, n, "valid", k))) for name, k in kinds.items()},
        "recall": recall(model, tokenizer, n_per_cell=n_per_cell),
        "window": recall(model, tokenizer, n_per_cell=n_per_cell, window=WINDOW),
    }


def text(model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    """Perplexity over documents (BOS + text + EOS, every target after BOS once) and exactness of their answers.

    Returns:
        {"perplexity", "nats" (per token), "nats_stderr" (clustered by document), "tokens", "answers": {"accuracy",
        "stderr", "n"} or None where the documents hold none}; an answer is right if its every token is the arg-max.
    """
    import torch
    import torch.nn.functional as F

    sums, counts, right = [], [], []
    for document in texts:
        encoded = tokenizer(document, add_special_tokens=False, return_offsets_mapping=True)
        ids = torch.tensor([[tokenizer.bos_token_id, *encoded["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        sums.append(F.cross_entropy(logits, ids[0, 1:], reduction="sum").item())
        counts.append(ids.shape[1] - 1)
        hit = (logits.argmax(-1) == ids[0, 1:]).tolist()
        offsets = encoded["offset_mapping"]
        spans = [
            all(hit[i] for i, (start, end) in enumerate(offsets) if end > first and start < after)
            for first, after in answers(document)
        ]
        if spans:
            right.append((sum(spans), len(spans)))
    nats = sum(sums) / sum(counts)
    spread = sum((s - nats * c) ** 2 for s, c in zip(sums, counts, strict=True))
    return {
        "perplexity": math.exp(nats),
        "nats": nats,
        "nats_stderr": math.sqrt(spread * len(sums) / max(1, len(sums) - 1)) / sum(counts),
        "tokens": sum(counts),
        "answers": clustered(right) if right else None,
    }


def main() -> None:
    """The command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("teacher", type=Path, help="folder with the model and its tokenizer")
    parser.add_argument("--documents", type=int, default=200, help="validation documents per kind")
    parser.add_argument("--answers", type=int, default=256, help="answers per recall cell")
    args = parser.parse_args()
    print(json.dumps(measure(args.teacher, args.documents, args.answers), indent=1))


if __name__ == "__main__":
    main()
