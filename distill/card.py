"""The README.md of an export: what the model is, how to load it, what was measured. Torch-free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import __version__


def model_card(record: dict[str, Any], recipe: str, result: dict[str, Any] | None = None) -> str:
    """A model card in the Hub's form.

    Args:
        record: run.json.
        recipe: the resolved recipe's text.
        result: `fidelity`, `stages` and `layers` as result.json holds them; without it no figures are given.
    """
    teacher = str(record["teacher"]["source"])
    # A path of somebody's machine says nothing to others: only a Hub id is a base model.
    on_hub = record["teacher"]["revision"] is not None
    mixers = sorted({name for name, _ in record["layers"].values()})
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation"]
    if on_hub:
        lines += [f"base_model: {teacher}", "base_model_relation: finetune"]
    lines += ["tags:", *(f"- {tag}" for tag in ("relinear", "linear-attention", "distillation", *mixers)), "---", ""]
    name = teacher if on_hub else Path(teacher).name
    lines += [
        f"# {name}, converted to {' and '.join(mixers)}",
        "",
        f"A softmax-attention model ({record['teacher']['family']}) whose attention was replaced in "
        f"{len(record['layers'])} layers by linear mixers with a state of constant size, made with relinear "
        f"{__version__}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("FOLDER_OR_ID", trust_remote_code=True)',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_ID")',
        "```",
        "",
        "| layers | mixer |",
        "|---|---|",
        *(
            f"| {', '.join(layer for layer, (other, _) in record['layers'].items() if other == mixer)} | {mixer} |"
            for mixer in mixers
        ),
    ]
    if result is not None:
        lines += _figures(result)
    lines += [
        "",
        "Linear mixers lose recall first: finding an earlier fact again, word for word. Perplexity hides it.",
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe.rstrip("\n"),
        "```",
        "",
    ]
    return "\n".join(lines)


def _figures(result: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    fidelity = result.get("fidelity")
    if fidelity:
        lines += [
            "",
            f"Held-out text, {fidelity['tokens']:,} tokens:",
            "",
            "| | value | standard error |",
            "|---|---|---|",
        ]
        rows = {
            "perplexity": (fidelity["student"]["perplexity"], fidelity["student"]["perplexity_stderr"]),
            "perplexity of the teacher": (fidelity["teacher"]["perplexity"], fidelity["teacher"]["perplexity_stderr"]),
            "KL(teacher, student), nats per token": (fidelity["kl"], fidelity["kl_stderr"]),
            "same likeliest token": (fidelity["top1_agreement"], fidelity["top1_agreement_stderr"]),
        }
        lines += [
            f"| {name} | {value:.4f} | {'–' if error is None else f'{error:.4f}'} |"
            for name, (value, error) in rows.items()
        ]
    stages = result.get("stages") or []
    if stages:
        lines += ["", "| stage | tokens | seconds |", "|---|---|---|"]
        lines += [f"| {stage['name']} | {stage['tokens']:,} | {stage['seconds']:.0f} |" for stage in stages]
    return lines
