"""The figures of docs/explanation/: `python docs/tools/figures.py [FOLDER]` writes them anew, as SVG.

Every number in them is read: from plans of the shipped 7B recipe, from the results beside docs/results/methods.md, from
the tables of docs/results/embedded-teacher.md. Text stays text in the files, so that a test can compare it.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from relinear.recipes import loader, plan

sys.path.insert(0, str(Path(__file__).resolve().parent))
from tutorials import QWEN_7B

DOCS = Path(__file__).resolve().parents[1]
OUT = DOCS / "explanation" / "figures"
# Readable on a light card, whatever the page's own colours; also by eyes that mix red and green up.
INK, SOFT, CARD = "#1b2430", "#5b6675", "#ffffff"
BLUE, ORANGE, GREEN, PURPLE, GREY = "#2563a8", "#d9730d", "#1f8a70", "#7a4fb5", "#8a94a3"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "relinear",
    "font.family": ["DejaVu Sans"],  # a viewer without it takes its own,
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.facecolor": CARD,
    "figure.facecolor": CARD,
    "savefig.facecolor": CARD,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e7ec",
    "legend.frameon": False,
}
GIB = 2**30


def main(out: Path = OUT) -> list[Path]:
    """Write every figure to `out`; the files written."""
    out.mkdir(parents=True, exist_ok=True)
    written = []
    with plt.rc_context(STYLE):
        for draw in (pipeline, attention_and_state, align_and_glue, cache, memory, tokens, recall):
            figure = draw()
            path = out / f"{draw.__name__.replace('_', '-')}.svg"
            figure.savefig(path, metadata={"Date": None, "Creator": None}, bbox_inches="tight", pad_inches=0.18)
            plt.close(figure)
            written.append(path)
    return written


# --- Drawings


def canvas(width: float, height: float) -> tuple[Any, Any]:
    """A figure whose units are those of `box` and `arrow`: tenths of an inch."""
    figure, axes = plt.subplots(figsize=(width / 10, height / 10))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def box(axes: Any, x: float, y: float, w: float, h: float, text: str, color: str = SOFT, fill: str = CARD) -> None:
    """A rounded box with centred text."""
    axes.add_patch(FancyBboxPatch((x, y), w, h, boxstyle="round,pad=0,rounding_size=0.8", ec=color, fc=fill, lw=1.3))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=9, linespacing=1.35)


def arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], color: str = SOFT, **more: Any) -> None:
    """An arrow between two points."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=color, lw=1.2, **more))


def pipeline() -> Any:
    """The stages: what each reads, what each trains."""
    figure, axes = canvas(96, 27)
    stages = [
        ("plan", "config.json", "nothing:\nshows what will be", GREY),
        ("transfer", "attention's weights", "nothing:\ncopies and derives", BLUE),
        ("calibrate", "a few batches", "nothing: fits in\nclosed form", BLUE),
        ("align", "the teacher's layer\ninputs and outputs", "mixers, each\nfor itself", ORANGE),
        ("glue", "the teacher's logits", "everything,\nend to end", ORANGE),
        ("extend", "longer sequences", "everything", ORANGE),
        ("evaluate,\nexport, verify", "held-out text", "nothing:\nmeasures, proves", GREEN),
    ]
    step = 13.7
    for index, (name, reads, trains, color) in enumerate(stages):
        x = 0.4 + index * step
        axes.text(x + 5.7, 23.5, reads, ha="center", va="center", fontsize=7.5, color=SOFT)
        arrow(axes, (x + 5.7, 21.2), (x + 5.7, 17.4))
        box(axes, x, 10.4, 11.4, 6.8, name, color)
        axes.text(x + 5.7, 6.2, trains, ha="center", va="center", fontsize=7.5, color=INK)
        if index:
            arrow(axes, (x - 2.2, 13.8), (x - 0.1, 13.8))
    axes.text(0.4, 1.4, "Above each stage: what it reads. Below: what it trains.", fontsize=7.5, color=SOFT)
    return figure


def attention_and_state() -> Any:
    """One new token under softmax attention, and under a mixer."""
    figure, axes = canvas(92, 36)
    axes.text(20, 33.5, "softmax attention", ha="center", fontsize=11, color=BLUE)
    axes.text(68, 33.5, "a mixer", ha="center", fontsize=11, color=ORANGE)
    for index in range(8):
        x = 2 + index * 4.6
        last = index == 7
        box(axes, x, 3, 3.6, 3.6, "q" if last else "kv", BLUE if last else SOFT, "#eaf1fa" if last else CARD)
        if not last:
            arrow(axes, (x + 1.8, 7), (33.6, 16.4), GREY, connectionstyle="arc3,rad=-0.12")
    arrow(axes, (36, 6.9), (36, 16.2), BLUE)
    box(axes, 30.5, 16.6, 11, 5.4, "weigh all", BLUE)
    arrow(axes, (36, 22.2), (36, 26.2), BLUE)
    axes.text(36, 27.6, "output", ha="center", fontsize=9)
    axes.text(2, 0.2, "kept for every past token: the cache grows, so does the work", fontsize=8, color=SOFT)
    box(axes, 51, 14.6, 13, 9.4, "state S\n(t - 1)", ORANGE, "#fdf3e7")
    box(axes, 72.5, 14.6, 13, 9.4, "state S\n(t)", ORANGE, "#fdf3e7")
    arrow(axes, (64.3, 19.3), (72.2, 19.3), ORANGE)
    axes.text(68.2, 20.6, "decay", ha="center", fontsize=8, color=SOFT)
    box(axes, 61, 3, 3.6, 3.6, "kv")
    box(axes, 76.2, 3, 5.6, 3.6, "q", BLUE, "#eaf1fa")
    arrow(axes, (63, 7), (74, 14.3), GREY)
    axes.text(64, 10.8, "write", ha="right", fontsize=8, color=SOFT)
    arrow(axes, (79, 6.9), (79, 14.3), BLUE)
    axes.text(80, 10.8, "read", ha="left", fontsize=8, color=SOFT)
    arrow(axes, (79, 24.2), (79, 27.2), ORANGE)
    axes.text(79, 28.4, "output", ha="center", fontsize=9)
    axes.text(51, 0.2, "one matrix per head: size and work stay what they are", fontsize=8, color=SOFT)
    return figure


def align_and_glue() -> Any:
    """What is compared with what in the two stages that train."""
    figure, axes = canvas(96, 45)
    axes.text(22, 42.5, "align: each layer for itself", ha="center", fontsize=11, color=ORANGE)
    axes.text(74, 42.5, "glue: the whole model", ha="center", fontsize=11, color=ORANGE)
    for index in range(3):
        y = 5 + index * 12
        box(axes, 1, y, 13, 6, f"attention {index + 1}", BLUE, "#eaf1fa")
        box(axes, 31, y, 11, 6, f"mixer {index + 1}", ORANGE, "#fdf3e7")
        arrow(axes, (7.5, y - 4.6), (7.5, y - 0.2), BLUE)
        arrow(axes, (7.5, y - 2.6), (36.5, y - 0.2), GREY, connectionstyle="arc3,rad=0.12")
        arrow(axes, (14.2, y + 3), (18.6, y + 3), BLUE)
        arrow(axes, (30.8, y + 3), (26.6, y + 3), ORANGE)
        axes.text(22.6, y + 3, "error", ha="center", va="center", fontsize=9, weight="bold")
    arrow(axes, (7.5, 35.2), (7.5, 39), BLUE)
    axes.text(1, -2.2, "the teacher's stream feeds every mixer; no gradient leaves its layer", fontsize=8, color=SOFT)
    for x, name, color, fill in ((54, "teacher", BLUE, "#eaf1fa"), (80, "student", ORANGE, "#fdf3e7")):
        for index in range(3):
            y = 5 + index * 8.4
            box(axes, x, y, 14, 5.6, f"{'attention' if name == 'teacher' else 'mixer'} {index + 1}", color, fill)
            arrow(axes, (x + 7, y - 2.6), (x + 7, y - 0.2), color)
        arrow(axes, (x + 7, 27.6), (x + 7, 31.2), color)
        axes.text(x + 7, 0.4, name, ha="center", fontsize=9)
        axes.text(x + 7, 32.8, "logits", ha="center", fontsize=9)
    arrow(axes, (64.5, 33.4), (70.4, 33.4), BLUE)
    arrow(axes, (83.5, 33.4), (77.6, 33.4), ORANGE)
    axes.text(74, 33.4, "KL", ha="center", va="center", fontsize=9, weight="bold")
    axes.text(54, -2.2, "the student runs on its own stream; gradients reach everything", fontsize=8, color=SOFT)
    axes.set_ylim(-4, 45)
    return figure


# --- Plots


def planned(*changes: str, **machine: Any) -> plan.Plan:
    """A plan of the shipped 7B recipe."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(QWEN_7B))
        return plan.plan(loader.load("qwen2.5-7b-rwkv7", [f"teacher.model={folder}", *changes]), **machine)


def cache() -> Any:
    """Bytes of the decode cache over length; the plan gives three lengths, and both parts are straight lines."""
    figure, axes = plt.subplots(figsize=(7.2, 3.8))
    every, some = planned().cache, planned("layers.keep=3,9,15,21,27").cache
    lengths = [row[0] for row in every]
    lines: list[tuple[str, list[int], str, int, tuple[int, int]]] = [
        ("teacher, 28 layers of attention", [row[1] for row in every], BLUE, -1, (-4, 8)),
        ("5 layers keep attention", [row[2] for row in some], PURPLE, 1, (8, -14)),
        ("all layers rwkv7", [row[2] for row in every], ORANGE, -1, (-4, 8)),
    ]
    for label, sizes, color, at, away in lines:
        axes.plot(lengths, [size / GIB for size in sizes], marker="o", color=color, lw=2)
        said, side = f"{label}: {size_text(sizes[-1])}", "right" if at < 0 else "left"
        point = (lengths[at], sizes[at] / GIB)
        axes.annotate(said, point, away, textcoords="offset points", ha=side, color=color)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the context", ylabel="GiB for one sequence")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.minorticks_off()
    axes.set_ylim(0.03, 14)
    axes.set_title("Decode cache of Qwen2.5-7B, by `relinear plan`", loc="left", fontsize=11)
    return figure


def size_text(count: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{count / GIB:.3g} GiB" if count >= GIB else f"{count / 2**20:.3g} MiB"


def memory() -> Any:
    """What one GPU holds in glue, by engine and number of GPUs."""
    figure, axes = plt.subplots(figsize=(7.2, 3.4))
    cases: list[tuple[str, list[str], dict[str, int]]] = [
        ("one GPU", [], {}),
        ("one GPU, micro batch 1,\ncheckpointing", ["stages.glue.micro_batch=1", "engine.checkpointing=true"], {}),
        ("one GPU, the same,\ntrain: lora", [
            "stages.glue.micro_batch=1", "engine.checkpointing=true", "stages.glue.train=lora",
        ], {}),
        ("8 GPUs, fsdp2,\ncheckpointing", ["engine.parallel=fsdp2", "engine.checkpointing=true"], {"nproc": 8}),
        ("32 GPUs, fsdp2,\ncheckpointing", ["engine.parallel=fsdp2", "engine.checkpointing=true"],
         {"nproc": 8, "nodes": 4}),
    ]  # fmt: skip
    uses = [("teacher", BLUE), ("student", ORANGE), ("gradients", GREEN), ("optimizer", PURPLE)]
    uses += [("activations", GREY), ("gathered", "#c9a227")]
    for row, (_, changes, machine) in enumerate(cases):
        held = next(stage for stage in planned(*changes, **machine).stages if stage.name == "glue").memory
        left = 0.0
        for use, color in uses:
            width = held.get(use, 0) / GIB
            axes.barh(
                row, width, left=left, color=color, height=0.62, label=use if row == 0 or use == "gathered" else ""
            )
            left += width
        axes.text(left + 1.5, row, f"{left:.3g} GiB", va="center", fontsize=9)
    for gigabytes, name in ((80, "H100"), (141, "H200")):
        axes.axvline(gigabytes * 1e9 / GIB, color=SOFT, lw=1, ls=":")
        axes.text(gigabytes * 1e9 / GIB, -0.75, name, ha="center", fontsize=8, color=SOFT)
    axes.set_yticks(range(len(cases)), [case[0] for case in cases], color=INK, fontsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="GiB on one GPU", xlim=(0, 185))
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys(), ncol=6, fontsize=8, loc="upper left", bbox_to_anchor=(-0.3, -0.17))
    axes.set_title("Glue of Qwen2.5-7B, by `relinear plan`", loc="left", fontsize=11, pad=16)
    return figure


def tokens() -> Any:
    """Held-out perplexity over the teacher's along training, means over seeds, from the results of `bench methods`."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    arms = [
        ("relinear", "relinear's default", ORANGE),
        ("radlads", "RADLADS, rates from the grid", BLUE),
        ("radlads_published", "RADLADS, published rates", "#7fb0de"),
        ("taylor", "Taylor-Calibrate", GREEN),
        ("mamba_in_llama", "MambaInLlama", PURPLE),
        ("mohawk", "MOHAWK", GREY),
    ]
    for arm, label, color in arms:
        files = sorted((DOCS / "results" / "methods").glob(f"stories260k-{arm}-s*.json"))
        runs = [json.loads(file.read_text())["curve"] for file in files]
        points = [
            (mean(point["tokens"] for point in at) / 1e3, mean(point["ratio"] for point in at))
            for at in zip(*runs, strict=True)
        ]
        points = [(x, y) for x, y in points if x > 0]
        seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
        axes.plot(*zip(*points, strict=True), color=color, lw=2, label=f"{label} ({seeds})")
    axes.axhline(1.1, color=SOFT, lw=1, ls=":")
    axes.text(8, 1.105, "1.1 times the teacher's", fontsize=8, color=SOFT, va="bottom")
    axes.set(
        xlabel="training tokens, thousands", ylabel="held-out perplexity / teacher's", ylim=(1.04, 2.6), xlim=(0, 610)
    )
    axes.set_yscale("log")
    axes.set_yticks([1.1, 1.2, 1.4, 1.6, 2.0, 2.5], ["1.1", "1.2", "1.4", "1.6", "2", "2.5"])
    axes.minorticks_off()
    axes.legend(fontsize=8.5, ncol=3, loc="upper left", bbox_to_anchor=(-0.1, -0.14))
    axes.set_title("Tokens that a conversion needs: stories260k, every layer", loc="left", fontsize=11)
    return figure


def recall() -> Any:
    """What is recalled across 640 tokens, by the number of pairs, from the tables of embedded-teacher.md."""
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    page = (DOCS / "results" / "embedded-teacher.md").read_text(encoding="utf-8")
    rows = [
        ("Recall with full attention", "teacher", BLUE, "o"),
        ("Converted: all layers but one", "one layer keeps attention", PURPLE, "s"),
        ("Converted: all layers linear", "all layers gated_deltanet", ORANGE, "o"),
        ("The same weights, attention cut to 32 tokens", "teacher, window of 32 tokens", GREY, "v"),
    ]
    for title, label, color, marker in rows:
        section = page.split(f"## {title}\n")[1].split("\n## ")[0]
        cells = [line.strip("|").split("|") for line in section.splitlines() if re.match(r"\| \d+ \|", line)]
        pairs = [int(row[0]) for row in cells]
        found = [[float(part) for part in row[-1].split("±")] for row in cells]
        axes.errorbar(
            [str(count) for count in pairs], [value for value, _ in found], [error for _, error in found],
            color=color, marker=marker, lw=2, capsize=3, label=label,
        )  # fmt: skip
    axes.set(xlabel="key-value pairs to remember", ylabel="recalled across 640 tokens, %", ylim=(-4, 106))
    axes.legend(fontsize=8.5, loc="center right", bbox_to_anchor=(1.0, 0.68))
    axes.set_title("What perplexity hides: recall of the embedded teacher", loc="left", fontsize=11)
    return figure


if __name__ == "__main__":
    for written in main(*(Path(argument) for argument in sys.argv[1:2])):
        print(written)
