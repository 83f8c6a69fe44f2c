"""A run folder as the runner and the suites leave it, small and made up: for tests of what reads such folders."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from relinear.mixers import registry
from relinear.recipes import loader
from relinear.recipes.plan import plan

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
ENVIRONMENT = {"relinear": "0.1.0", "torch": "2.13.0", "python": "3.11.9", "gpu": None, "threads": 1, "world_size": 1}
CHANGES = (
    "data.source=<script>alert(1)</script>.txt",
    "layers.keep=2",
    "stages.align.tokens=60k",
    "stages.glue.tokens=40k",
)


def write(path: Path, value: Any) -> None:
    """JSON, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def begin(folder: Path) -> Path:
    """What stands there once a run has been opened: run.json and recipe.yaml, beside a teacher's folder."""
    teacher = folder.parent / "teacher"
    write(teacher / "config.json", CONFIG)
    recipe = loader.load("rwkv7", [f"teacher.model={teacher}", f"save.dir={folder}", *CHANGES])
    layers = plan(recipe).layers
    held = {"source": str(teacher), "folder": str(teacher), "revision": None, "family": "llama"}
    record = {
        "recipe": recipe.to_dict(),
        "teacher": held | {"fingerprint": {"config.json": "0123abcd"}},
        "layers": {str(layer): list(value) for layer, value in layers.converted.items()},
        "kept_attention": None,
        "start": None,
        "stages": [[stage.name, stage.kind] for stage in recipe.stages],
        "environment": ENVIRONMENT,
        "relinear": "0.1.0",
    }
    write(folder / "run.json", record)
    (folder / "recipe.yaml").write_text(loader.dump(recipe), encoding="utf-8")
    return folder


def transferred(folder: Path) -> None:
    """transfer.json, by the mixers' own tables."""
    made = plan(loader.load(str(folder / "recipe.yaml")))
    report = {}
    for layer, (name, options) in made.layers.converted.items():
        spec = registry.spec(name)
        rows = spec.tensors(made.teacher.geometry(layer), spec.options.parse(options), first=layer == 0, position=0.5)
        by_kind = {kind: [row for row in rows if row.source == kind] for kind in ("copied", "derived", "new")}
        report[str(layer)] = {
            **{kind: {row.name: row.origin for row in own} for kind, own in by_kind.items()},
            "dropped": [],
            "parameters": {kind: sum(row.numel for row in own) for kind, own in by_kind.items()},
            "notes": [],
        }
    write(folder / "transfer.json", report)


def fidelity(ratio: float) -> dict[str, Any]:
    """As eval.fidelity.measure returns it."""
    model = {"perplexity": 3.5, "perplexity_stderr": 0.08, "loss": 1.25, "loss_stderr": 0.02}
    return {
        "student": model | {"perplexity": 3.5 * ratio},
        "teacher": model,
        "perplexity_ratio": ratio,
        "perplexity_ratio_stderr": 0.0071,
        "kl": 0.1234,
        "kl_stderr": 0.0056,
        "top1_agreement": 0.843,
        "top1_agreement_stderr": 0.003,
        "tokens": 20154,
        "documents": 61,
    }


def trained(folder: Path, stages: tuple[str, ...] = ("align", "glue"), share: float = 1.0, spike: bool = True) -> None:
    """metrics.jsonl: ten records for each stage; the last stage up to `share` of its tokens."""
    records = []
    for stage in stages:
        total = {"align": 60_000, "glue": 40_000}[stage]
        names = [f"layer {layer}" for layer in (0, 1, 3, 4)] if stage == "align" else ["kl", "ce", "align"]
        groups = names if stage == "align" else ["mixers", "the rest"]
        for i in range(1, 11):
            tokens = total * i // 10
            if stage == stages[-1] and tokens > share * total:
                break
            losses = {name: 0.5 / i / (place + 1) for place, name in enumerate(names)}
            record = {"stage": stage, "step": 12 * i, "tokens": tokens, "loss": 1.0 / i, "losses": losses}
            record |= {"lr": 1e-3 / i if stage == "align" else [1e-2 / i, 1e-4 / i]}
            record |= {"grad_norm": dict.fromkeys(groups, 1.0), "tokens_per_second": 500.0, "peak_memory": 7 * 10**8}
            if stage == "glue" and i == 3 and spike:
                record["spike"] = {"usual": 0.4}
            records.append(record)
            if i in (5, 10):
                held = {"score": 0.2, "losses": losses} if stage == "align" else {"score": 0.2, **fidelity(1.2)}
                records.append({"stage": stage, "step": 12 * i, "tokens": tokens, "eval": held})
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + '{"stage": "glue", "st', encoding="utf-8")  # cut short by a kill


def calibrated(folder: Path) -> None:
    """calibrate.json and measured/."""
    row = {"random": 1.01, "transfer": 0.9, "calibrated": 0.8, "aligned": 0.3, "kept": "knobs", "distance": [3.0, 9.0]}
    report = {"method": "spread", "inputs": "teacher", "tokens": 32_768, "held_out_tokens": 4_096}
    write(folder / "calibrate.json", report | {"layers": {str(layer): row for layer in (0, 1, 3, 4)}})
    for name, ratio in (("transfer", 24.3), ("calibrate", 18.7), ("align", 1.3)):
        write(folder / "measured" / f"{name}.json", fidelity(ratio))


def recall() -> dict[str, Any]:
    """As eval.suite.recall_suite returns it: one task that the teacher can do, one that it cannot."""

    def figures(exact: float, error: float) -> dict[str, Any]:
        own = {"exact": exact, "exact_stderr": error, "credit": exact, "credit_stderr": error, "n": 32, "documents": 8}
        cells = [{"length": n, "depth": d, "chance": {"exact": 0.1}, **own} for n in (256, 512) for d in (0.0, 0.5)]
        return own | {"cells": cells}

    def task(about: str, signal: list[str], teacher: float, student: float) -> dict[str, Any]:
        models = {"teacher": figures(teacher, 0.02), "student": figures(student, 0.05)}
        axes = ["length", "depth"]
        return {"about": about, "axes": axes, "chance": {"exact": 0.1}, "signal": signal, "models": models}

    tasks = {"needle": task("a word told once", ["exact"], 0.8, 0.6), "pairs": task("values of keys", [], 0.1, 0.05)}
    shared = {"suite": "recall", "lengths": [256, 512], "samples": 8, "seed": 0, "filler": None, "left_out": []}
    return shared | {"tasks": tasks}


def ended(folder: Path) -> None:
    """result.json."""
    seconds = {"calibrate": 30.0, "align": 120.0, "glue": 80.0}
    tokens = {"calibrate": 32_768, "align": 60_000, "glue": 40_000}
    stages = [
        {"name": name, "steps": 120, "tokens": tokens[name], "seconds": took, "best": None, "unchanged": []}
        for name, took in seconds.items()
    ]
    write(
        folder / "result.json",
        {
            "status": "complete",
            "layers": {"drawing": "LLALL", "kept": [2]},
            "stages": stages,
            "fidelity": fidelity(1.1506),
            "recall": recall(),
            "tokens": 100_000,
            "seconds": 230.0,
            "environment": ENVIRONMENT,
        },
    )


def suites(folder: Path) -> None:
    """eval/: every suite by the contract of its file, and bench.json."""
    common = {
        "models": {"student": str(folder / "export"), "teacher": "teacher"},
        "checkpoints": {"student": "aa" * 32, "teacher": "bb" * 32},
        "settings": {"limit": 100, "seed": 0},
        "versions": {"relinear": "0.1.0", "transformers": "5.23.0"},
        "seconds": 12.5,
    }

    def estimate(value: float, stderr: float | None = 0.01) -> dict[str, Any]:
        return {"value": value, "stderr": stderr}

    def pair(student: float, teacher: float) -> dict[str, Any]:
        return {"student": estimate(student), "teacher": estimate(teacher)}

    task = {"metric": "acc", "n": 100, "version": 1, "higher_is_better": True, "chance": 0.25, **pair(0.45, 0.5)}
    task |= {"recovery": estimate(0.9, 0.03), "recovery_above_chance": estimate(0.8, 0.06)}
    perplexity = {"metric": "word_perplexity", "n": 50, "version": 1, "higher_is_better": False, "chance": None}
    perplexity |= {**pair(31.0, 28.0), "recovery": None, "recovery_above_chance": None}
    tasks = {"arc_<b>easy</b>": task, "wikitext": perplexity}
    mean = {"student": estimate(0.45), "teacher": estimate(0.5), "recovery": estimate(0.913, 0.021)}
    write(folder / "eval" / "core.json", {"suite": "core", **common, "tasks": tasks, "mean": mean})
    write(folder / "eval" / "quick.json", {"suite": "quick", **common, **fidelity(1.17)})

    def place(start: int, end: int) -> dict[str, Any]:
        model = {"perplexity": 4.0 - start / 2048, "perplexity_stderr": 0.05, "loss": 1.3}
        both = {"student": model | {"perplexity": model["perplexity"] + 0.31}, "teacher": model}
        return {
            "from": start,
            "to": end,
            "tokens": 900,
            **both,
            "kl": 0.1,
            "kl_stderr": 0.01,
            "top1_agreement": 0.8,
            "top1_agreement_stderr": 0.01,
            "beyond_context": start >= 512,
        }

    places = [place(start, end) for start, end in ((0, 128), (128, 256), (256, 512), (512, 1024))]
    write(folder / "eval" / "long.json", {"suite": "long", **common, "lengths": [1024], "positions": places})
    written = {"metric": "exact_match", "n": 64, **pair(0.31, 0.42)}
    examples = [{"prompt": "Once <u>", "text": "upon", "student": "in", "teacher": None}]
    repetition = {"distinct_1": 0.4, "distinct_1_stderr": 0.02, "distinct_2": 0.7, "distinct_4": 0.9, "loops": 0.02}
    completion = {"common_prefix": estimate(11.5, 1.2), "agreement": estimate(0.71), "n": 32, "new_tokens": 64}
    generation = {"tasks": {"gsm8k": written}, "completion": completion}
    generation |= {"repetition": {"student": repetition, "teacher": repetition}, "examples": examples}
    write(folder / "eval" / "generation.json", {"suite": "generation", **common, **generation})
    judged = {"judge": "a judge", "student": {"score": 5.1, "stderr": 0.2, "n": 80}, "teacher": None}
    judged |= {"categories": {"math": {"student": {"score": 3.25, "stderr": 0.5, "n": 20}, "teacher": None}}}
    write(folder / "eval" / "mt_bench.json", {"suite": "mt_bench", **common, **judged})

    def speed(length: int, factor: float) -> dict[str, Any]:
        rates = {"prefill_tokens_per_second": 9000.0 * factor, "decode_tokens_per_second": 80.0 * factor}
        rates |= {"time_to_first_token": 0.2, "peak_bytes": 10**9, "cache_bytes": 1000 * length, "batch_at_memory": 8}
        return rates

    lengths = [
        {"length": n, "student": speed(n, 1.0), "teacher": speed(n, 0.5) if n < 4096 else None}
        for n in (1024, 2048, 4096)
    ]
    write(folder / "eval" / "bench.json", {"machine": {"cpu": "AVX2", "gpu": None}, "lengths": lengths})


def whole(folder: Path) -> Path:
    """A complete run with every suite."""
    begin(folder)
    transferred(folder)
    calibrated(folder)
    trained(folder)
    ended(folder)
    suites(folder)
    notes = [
        {"time": "2026-12-01 04:00:00", "text": text} for text in ("warning: a <i>damaged</i> save", "layers LLALL")
    ]
    (folder / "logs").mkdir()
    (folder / "logs" / "notes.jsonl").write_text("".join(json.dumps(note) + "\n" for note in notes), encoding="utf-8")
    (folder / "logs" / "hung-rank-0.txt").write_text("", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def sample() -> SimpleNamespace:
    """Writers of a run folder's parts: each takes the folder."""
    parts = (begin, transferred, calibrated, trained, ended, suites, whole)
    return SimpleNamespace(**{part.__name__: part for part in parts}, write=write, fidelity=fidelity, recall=recall)
