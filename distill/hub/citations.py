"""BibTeX of the methods that a conversion used, by arXiv number. Torch-free."""

from __future__ import annotations

import re
from typing import Any

from ...mixers import registry

# arXiv number -> (first author, title)
PAPERS: dict[str, tuple[str, str]] = {
    "2505.03005": (
        "Goldstein, Daniel",
        "RADLADS: Rapid Attention Distillation to Linear Attention Decoders at Scale",
    ),
    "2503.14456": ("Peng, Bo", 'RWKV-7 "Goose" with Expressive Dynamic State Evolution'),
    "2404.05892": ("Peng, Bo", "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence"),
    "2406.06484": ("Yang, Songlin", "Parallelizing Linear Transformers with the Delta Rule over Sequence Length"),
    "2412.06464": ("Yang, Songlin", "Gated Delta Networks: Improving Mamba2 with Delta Rule"),
    "2312.06635": ("Yang, Songlin", "Gated Linear Attention Transformers with Hardware-Efficient Training"),
    "2410.10254": ("Zhang, Michael", "LoLCATs: On Low-Rank Linearizing of Large Language Models"),
    "2404.07904": ("Qin, Zhen", "HGRN2: Gated Linear RNNs with State Expansion"),
    "2510.26692": ("{Kimi Team}", "Kimi Linear: An Expressive, Efficient Attention Architecture"),
    "2503.01496": ("Lan, Disen", "Liger: Linearizing Large Language Models to Gated Recurrent Structures"),
    "2601.22156": (
        "Chen, Yingfa",
        "Hybrid Linear Attention Done Right: Efficient Distillation and Effective Architectures for Extremely Long "
        "Contexts",
    ),
    "2401.04658": (
        "Qin, Zhen",
        "Lightning Attention-2: A Free Lunch for Handling Unlimited Sequence Lengths in Large Language Models",
    ),
    "2312.00752": ("Gu, Albert", "Mamba: Linear-Time Sequence Modeling with Selective State Spaces"),
    "2405.21060": (
        "Dao, Tri",
        "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
    ),
    "2408.15237": ("Wang, Junxiong", "The Mamba in the Llama: Distilling and Accelerating Hybrid Models"),
    "2408.10189": ("Bick, Aviv", "Transformers to SSMs: Distilling Quadratic Knowledge to Subquadratic Models"),
    "2405.04517": ("Beck, Maximilian", "xLSTM: Extended Long Short-Term Memory"),
    "2501.00663": ("Behrouz, Ali", "Titans: Learning to Memorize at Test Time"),
    "2309.17453": ("Xiao, Guangxuan", "Efficient Streaming Language Models with Attention Sinks"),
    "2511.02651": ("Ostapenko, Oleksiy", "Apriel-H1: Towards Efficient Enterprise Reasoning Models"),
    "2106.09685": ("Hu, Edward J.", "LoRA: Low-Rank Adaptation of Large Language Models"),
}
# Beside the paper that a mixer's spec names.
_ALSO = {
    "rwkv7": ("2503.14456",),
    "rwkv6": ("2404.05892",),
    "lightning": ("2401.04658",),
    "mamba": ("2408.15237",),
    "mamba2": ("2408.15237",),
}
_RADLADS, _MOHAWK, _LORA = "2505.03005", "2408.10189", "2106.09685"


def methods(mixers: list[str], stages: list[dict[str, Any]]) -> list[str]:
    """arXiv numbers of what a conversion used: its mixers' papers first, then the procedures of its stages.

    Args:
        mixers: their names.
        stages: `{kind: settings}` each, as a recipe has them.
    """
    found: list[str] = []
    for name in mixers:
        number = re.search(r"\d{4}\.\d{5}", registry.spec(name).paper)
        found += [*([number[0]] if number else []), *_ALSO.get(name, ())]
    for stage in stages:
        for kind, settings in stage.items():
            found += [_MOHAWK] if kind == "matrix" else [_RADLADS] if kind in ("align", "glue", "extend") else []
            found += [_LORA] if (settings or {}).get("train") == "lora" else []
    return list(dict.fromkeys(found))


def bibtex(numbers: list[str]) -> str:
    """Entries for those that `PAPERS` knows."""
    entries = []
    for number in numbers:
        if number not in PAPERS:
            continue
        author, title = PAPERS[number]
        people = author if author.startswith("{") else f"{author} and others"
        entries.append(
            f"@misc{{arxiv{number.replace('.', '_')},\n  title = {{{title}}},\n  author = {{{people}}},\n"
            f"  year = {{20{number[:2]}}},\n  eprint = {{{number}}},\n  archivePrefix = {{arXiv}}\n}}"
        )
    return "\n\n".join(entries)
