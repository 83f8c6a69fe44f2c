"""The README.md of an export: the Hub's metadata, how to load the model, what was lost, what it cost. Torch-free.

Everything is read from the export itself: conversion.json, which `export` writes from the run, config.json and
recipe.yaml; and from what `relinear eval` measured since. A licence, base model, language or model name that stands in
the card already is kept when the card is written anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from .. import __version__
from ..mixers import registry
from .errors import UserError
from .hub.card_results import Figure, Results, figures, long_table, model_index, speed_table, table
from .hub.citations import bibtex, methods
from .hub.leaks import public_name, public_values
from .hub.licence import front_matter
from .hub.proof import CARD, read

CONVERSION = "conversion.json"
PLACEHOLDER = "OWNER/NAME"
"""Stands in the quick start until the model has a name on the Hub."""
_KEPT = ("license", "license_name", "license_link", "base_model", "language")

QUICK_START = """from transformers import AutoModelForCausalLM, AutoTokenizer

model_id = "{name}"
tokenizer = AutoTokenizer.from_pretrained(model_id, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(model_id, trust_remote_code=True)

inputs = tokenizer("Once upon a time", return_tensors="pt", return_token_type_ids=False)
output = model.generate(**inputs, max_new_tokens=32)
print(tokenizer.decode(output[0], skip_special_tokens=True))
"""


def conversion(
    record: dict[str, Any],
    saved: dict[str, Any] | None,
    result: dict[str, Any] | None,
    licence: dict[str, str],
    dtype: str,
) -> dict[str, Any]:
    """What conversion.json says: how a model came to be, without any place of this machine.

    Args:
        record: run.json.
        saved: the step that is exported: `stage`, `step`, `tokens`; None where nothing was trained.
        result: of the run, where it tells of this step.
        licence: of the teacher, see `hub.licence.licence_of`.
        dtype: of the weights.
    """
    teacher, recipe = record["teacher"], record["recipe"]
    # A local folder's name says nothing to others: only a Hub id is a base model.
    on_hub = teacher["revision"] is not None
    data = recipe.get("data") or {}
    sources = list(data.get("mix") or {}) or [data.get("source")]
    told = ("fidelity", "recall", "stages", "tokens", "seconds", "measured", "step")
    return {
        "relinear": __version__,
        "teacher": {
            "source": teacher["source"] if on_hub else public_name(str(teacher["source"])),
            "on_hub": on_hub,
            "revision": teacher["revision"],
            "family": teacher["family"],
            "license": licence,
        },
        "layers": record["layers"],
        "kept_attention": record.get("kept_attention"),
        "stages": public_values(recipe["stages"]),
        "data": {"sources": [public_name(str(s)) for s in sources if s], "local": [is_local(s) for s in sources if s]},
        "seq_len": data.get("seq_len"),
        "saved": saved,
        "dtype": dtype,
        "environment": record.get("environment"),
        "result": None if result is None else public_values({key: result.get(key) for key in told}),
    }


def is_local(source: str) -> bool:
    """A data source is of this machine: no Hub data set."""
    return (
        source in ("embedded", "arithmetic")
        or public_name(source) != source
        or source.count("/") != 1
        or Path(source).exists()
    )


def model_card(folder: Path, results: Results | None = None, given: dict[str, Any] | None = None) -> str:
    """The card of an export.

    Args:
        folder: the export.
        results: suite -> result of what was measured on it; the run's own final measurements where a suite is missing.
            `bench` is what `relinear bench model` stored.
        given: metadata that overrules all else: `license`, `license_name`, `license_link`, `base_model`; and
            `name`, the model's on the Hub, for the quick start.

    Raises:
        UserError: the folder was not exported from a run, so nobody knows how it came to be.
    """
    facts = _read(folder / CONVERSION)
    config = _read(folder / "config.json")
    measured = _measured(facts, results or {})
    found = figures(measured)
    card = folder / CARD
    before = card.read_text(encoding="utf-8") if card.exists() else ""
    kept = {key: value for key, value in front_matter(before).items() if key in _KEPT}
    chosen = {**kept, **(given or {})}
    named = re.search(r'^model_id = "(.+)"$', before, re.MULTILINE)
    name = chosen.get("name") or (named[1] if named else PLACEHOLDER)
    metadata = _metadata(facts, found, chosen, name)
    recipe = folder / "recipe.yaml"
    body = [
        *_introduction(facts, metadata),
        "## Use\n",
        f"```python\n{QUICK_START.format(name=name)}```\n",
        _proven(folder, config),
        "## Layers\n",
        *_layers(facts, config),
        *_after(facts),
        *_results(facts, measured, found),
        "## Limits\n",
        *_limits(facts, config, measured),
        *_training(facts),
        *(["## Recipe\n", f"```yaml\n{recipe.read_text(encoding='utf-8').strip()}\n```\n"] if recipe.exists() else []),
        "## Citations\n",
        "Cite the teacher's authors, and the methods that were used:\n",
        f"```bibtex\n{bibtex(methods(_mixers(facts), facts['stages']))}\n```\n",
    ]
    top = {key: value for key, value in metadata.items() if value not in (None, [], "")}
    return f"---\n{yaml.safe_dump(top, sort_keys=False, allow_unicode=True, width=1000)}---\n\n" + "\n".join(body)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found. A card is made of an export of a run: relinear export RUN, then relinear card RUN"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: cannot be read ({error}). Export again: relinear export RUN --overwrite") from None


def _measured(facts: dict[str, Any], results: Results) -> Results:
    own = facts["result"] or {}
    found = {"quick": own.get("fidelity"), "recall": own.get("recall")} | results
    return {suite: result for suite, result in found.items() if result}


def _mixers(facts: dict[str, Any]) -> list[str]:
    return sorted({name for name, _ in facts["layers"].values()})


def _metadata(facts: dict[str, Any], found: list[Figure], given: dict[str, Any], name: str) -> dict[str, Any]:
    teacher = facts["teacher"]
    own = f"{teacher['source'].rsplit('/', 1)[-1]}-{'-'.join(_mixers(facts))}" if name == PLACEHOLDER else name
    data = facts["data"]
    text = next(iter(data["sources"]), None) or "the held-out text"
    base = given.get("base_model") or (teacher["source"] if teacher["on_hub"] else None)
    licence = {key: given[key] for key in ("license", "license_name", "license_link") if key in given}
    return {
        **(licence or teacher["license"]),
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "language": given.get("language"),
        "base_model": base,
        "base_model_relation": "finetune" if base else None,  # of the Hub's four the one whose weights go on training
        "datasets": [s for s, local in zip(data["sources"], data["local"], strict=True) if not local]
        + [step["data"] for step in facts.get("posttrain", []) if not step["local"]],
        "tags": ["relinear", "linear-attention", "distillation", "custom_code", teacher["family"], *_mixers(facts)],
        "model-index": model_index(own, found, text),
    }


def _introduction(facts: dict[str, Any], metadata: dict[str, Any]) -> list[str]:
    teacher, mixers = facts["teacher"], " and ".join(_mixers(facts))
    source = teacher["source"]
    base = metadata.get("base_model")
    shown = f"[{base}](https://huggingface.co/{base})" if base else f"`{source}`"
    return [
        f"# {source.rsplit('/', 1)[-1]}, converted to {mixers or 'itself'}\n",
        f"{shown} is a {teacher['family']} model with softmax attention. Here linear mixers stand in the place of "
        f"attention in {len(facts['layers'])} of its layers: their state has a constant size, so that memory and time "
        "per token do not grow with the text there. Everything else is the teacher's, trained on for a short time. "
        f"Made with relinear {facts['relinear']}.\n",
    ]


def _proven(folder: Path, config: dict[str, Any]) -> str:
    """What the quick start needs, and under which versions it was executed."""
    needs = "It needs torch and transformers alone, and runs the Python files of this repository."
    proof = read(folder)
    versions = config.get("verified_transformers")
    if proof is None or not versions:
        return needs + "\n"
    span = versions["min"] if versions["min"] == versions["max"] else f"{versions['min']} to {versions['max']}"
    return f"{needs} `relinear verify` executed this code offline, with transformers {span}: see verify.json.\n"


def _layers(facts: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Runs of neighbouring layers that are alike, as a table."""
    lines = ["| layers | what mixes tokens |", "|---|---|"]
    total = int(config["num_hidden_layers"])
    kinds = config.get("attention_types") or ["full_attention"] * total

    def kind(layer: int) -> str:
        if str(layer) in facts["layers"]:
            name, options = facts["layers"][str(layer)]
            window = f", beside a softmax window of {options['window']} tokens" if options.get("window") else ""
            spec = registry.spec(name)
            return (
                f"[{spec.title}]({spec.paper}) (`{name}`){window}" if spec.paper else f"{spec.title} (`{name}`){window}"
            )
        return f"the teacher's own attention ({kinds[layer]})"

    start = 0
    for layer in range(1, total + 1):
        if layer == total or kind(layer) != kind(start):
            lines.append(f"| {start if layer == start + 1 else f'{start}–{layer - 1}'} | {kind(start)} |")
            start = layer
    return [*lines, ""]


def _after(facts: dict[str, Any]) -> list[str]:
    """What `relinear posttrain` did to the converted model, a row for each time."""
    steps = facts.get("posttrain") or []
    if not steps:
        return []
    lines = [
        "## After conversion\n",
        "Trained on after that, by TRL. ± one standard error, on examples that were held out.\n",
        "| method | trained | steps | data | measured | before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    for step in steps:
        metric = step["metric"]
        values = []
        for found in (metric["before"], metric["after"]):
            stderr = found.get("stderr")
            values.append(f"{found['value']:.4g}" + ("" if stderr is None else f" ± {stderr:.2g}"))
        lines.append(
            f"| {step['method']} | {step['train']} | {step['steps']:,} | {step['data']} | {metric['name']} | "
            f"{values[0]} | {values[1]} |"
        )
    return [*lines, ""]


def _results(facts: dict[str, Any], measured: Results, found: list[Figure]) -> list[str]:
    lines: list[str] = []
    quality = [figure for figure in found if figure.suite != "recall"]
    recall = [figure for figure in found if figure.suite == "recall"]
    if quality:
        lines += ["## What was lost\n", "± one standard error.\n", *table(quality), ""]
    if measured.get("long"):
        lines += ["### By position\n", *long_table(measured["long"]), ""]
    if measured.get("recall"):
        suite = measured["recall"]
        lines += [
            "## Recall\n",
            f"Facts found again in documents of {', '.join(map(str, suite['lengths']))} tokens: share of exact "
            "answers.\n",
            *(table(recall) if recall else ["At these lengths the teacher itself is at chance in every task."]),
            "",
        ]
    if measured.get("bench"):
        lines += ["## Speed\n", "This model / teacher, on one machine.\n", *speed_table(measured["bench"]), ""]
    return lines


def _limits(facts: dict[str, Any], config: dict[str, Any], measured: Results) -> list[str]:
    kept = int(config["num_hidden_layers"]) - len(facts["layers"])
    lines = [
        "- Linear mixers lose recall first: finding an earlier fact again, word for word. Perplexity hides it."
        + ("" if kept else " No layer of this model kept its attention, which is the known remedy.")
    ]
    missing = {"quick": "perplexity against the teacher", "recall": "recall", "core": "benchmark tasks"}
    names = [text for suite, text in missing.items() if suite not in measured]
    if names:
        lines.append(f"- Not measured: {', '.join(names)}.")
    lengths = {str(facts["seq_len"])} if facts["seq_len"] else set()
    for stage in facts["stages"]:
        for settings in stage.values():
            lengths |= {str(settings["seq_len"])} if (settings or {}).get("seq_len") else set()
    lengths.discard("auto")
    said = f"windows of {', '.join(sorted(lengths, key=lambda t: (len(t), t)))} tokens" if lengths else "short windows"
    if not measured.get("long"):
        lines.append(f"- Trained on {said}; what lies beyond was not measured.")
    lines += [
        "- It knows what the teacher knows, with its errors and its biases; nothing was done about either.",
        "- Assisted decoding and compiled decoding with a cache are not supported; servers with attention of their own "
        "(vLLM, TGI) cannot run it.",
        "- Decays and states stay in float32 whatever the dtype of the weights. Quantised loading was not tried.\n",
    ]
    return lines


def _training(facts: dict[str, Any]) -> list[str]:
    result, where = facts["result"] or {}, facts.get("environment") or {}
    saved = facts["saved"]
    lines = ["## Training\n"]
    if saved is not None:
        lines.append(f"These weights are step {saved['step']} of stage `{saved['stage']}`.\n")
    stages = result.get("stages") or []
    if stages:
        lines += ["| stage | steps | tokens | seconds | loss at its end |", "|---|---|---|---|---|"]
        for stage in stages:
            loss = "" if stage.get("loss") is None else f"{stage['loss']:.4g}"
            lines.append(
                f"| {stage['name']} | {stage['steps']:,} | {stage['tokens']:,} | {stage['seconds']:,.0f} | {loss} |"
            )
        ranks = int(where.get("world_size") or 1)
        hours = (result.get("seconds") or 0) * ranks / 3600
        device = where.get("gpu") or f"CPU ({where.get('threads', '?')} threads)"
        lines.append(
            f"\nCost: {result.get('tokens') or 0:,} training tokens, {hours:.2f} hours of one {device}"
            + (f", on {ranks} of them" if ranks > 1 else "")
            + ".\n"
        )
    else:
        lines += ["| stage | tokens |", "|---|---|"]
        for stage in facts["stages"]:
            for kind, settings in stage.items():
                lines.append(f"| {(settings or {}).get('name', kind)} | {(settings or {}).get('tokens', '–')} |")
        lines.append("")
    lines.append(f"Text: {', '.join(facts['data']['sources']) or 'not recorded'}.\n")
    if where:
        lines.append(
            f"Versions: torch {where.get('torch')}, transformers {where.get('transformers')}, relinear "
            f"{where.get('relinear') or facts['relinear']}.\n"
        )
    return lines


def write_card(folder: Path, results: Results | None = None, given: dict[str, Any] | None = None) -> Path:
    """Write an export's README.md anew (atomic); see `model_card`."""
    from . import files

    path = folder / CARD
    files.write_text(path, model_card(folder, results, given))
    return path
