"""The paper-to-recipe index: `python -m relinear.recipes.methods_index > docs/reference/methods.md`. Torch-free.

What it says stands in the header comments of recipes/methods/*.yaml, beside the values that it is about.
"""

from __future__ import annotations

import re

from . import loader
from .bench_methods_arms import header

_AT_SIZE = "qwen2.5-7b-rwkv7"
_INTRODUCTION = """# Published procedures as recipes

What each recipe under `methods/` takes over from its paper, what had to be brought to the size of small teachers, and
what was left out and why. `relinear ls recipes` lists them, `relinear show methods/radlads` shows one in full, and

    relinear run methods/radlads teacher.model=FOLDER data.source=FILE

carries it out. `relinear bench methods` runs them side by side and scales every one to the same number of tokens:
[results](../results/README.md).

For every arm alike: text, order of documents, evaluation, fp32; AdamW without weight decay and gradients clipped at 1
unless said; a warm-up takes at most a tenth of its stage. Published rates were chosen for models a thousand times
as large; the recipes' own are the middle of the grid that `--tune` searches: three factors before glue times three from
glue on, then two other batches, the same for every arm.

This page is made from the recipes' own header comments.

Papers of single mixers stand on the mixers' pages, e.g. [rwkv7](mixers/rwkv7.md).

## By paper

Stages, losses, what trains and how a mixer starts are each paper's own, as "faithful" below lists; the last column is
what is not.
"""


def markdown() -> str:
    """The page."""
    parts = [_INTRODUCTION]
    rows = ["| paper | recipe | what it does | scaled |\n|---|---|---|---|\n", _published()]
    headers = {name: header(name.partition("/")[2]) for name in loader.methods()}
    for name in sorted(headers, key=lambda name: _of(headers[name])):
        said = headers[name]
        rows.append(f"| {_linked(said['Paper'])} | [{name}](#{_anchor(name)}) | {said['title']} | {_scaled(said)} |\n")
    for name, said in headers.items():
        parts.append(f"\n## {name}\n\n{said['title']}\n\n")
        for field in ("Paper", "Faithful", "Scaled", "Left out", "Kept layer", "Starts from"):
            if field in said:
                parts.append(f"- **{field}**: {_linked(_words(field, said[field]))}\n")
    return parts[0] + "\n" + "".join(rows) + "".join(parts[1:])


def _published() -> str:
    """The row of the one recipe that has its paper's values at its paper's size."""
    title = loader.summary(_AT_SIZE)
    paper = _linked("RADLADS, arXiv 2505.03005 v4, Table 2")
    return f"| {paper} | [{_AT_SIZE}](../tutorials/eight-gpus.md) | {title} | nothing; planned here, not run |\n"


def _scaled(said: dict[str, str]) -> str:
    """The first thing that was scaled; the rest stands below."""
    return _linked(said["Scaled"].split(";")[0].rstrip("."))


def _of(said: dict[str, str]) -> tuple[int, str]:
    """Published procedures first, by paper; then ablations of ours that a paper speaks to; then our own."""
    ours = said["Paper"].startswith("none")
    return (2 if ours else 1 if said["title"].startswith("Ablation") else 0, said["Paper"])


def _words(field: str, text: str) -> str:
    if field == "Kept layer":
        return f"chosen by `relinear select --by {text}`; the recipe itself keeps layer 2."
    if field == "Starts from":
        return f"the mixers of methods/{text}."
    return text if text.endswith(".") or field == "Paper" else f"{text}."


def _linked(text: str) -> str:
    """arXiv numbers as links; a table's bars stay text."""
    found = re.sub(r"arXiv (\d{4}\.\d{5})( v\d)?", r"[arXiv \1\2](https://arxiv.org/abs/\1\2)", text)
    return re.sub(r"(abs/\d{4}\.\d{5}) (v\d)", r"\1\2", found).replace("|", "\\|")


def _anchor(name: str) -> str:
    """As Markdown viewers make it of a heading."""
    return re.sub(r"[^\w-]", "", name.lower())


if __name__ == "__main__":
    print(markdown(), end="")
