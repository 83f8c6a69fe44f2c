"""The paper-to-recipe index: `python -m relinear.recipes.methods_index > docs/reference/methods.md`. Torch-free.

What it says stands in the header comments of recipes/methods/*.yaml, beside the values that it is about.
"""

from __future__ import annotations

import re

from . import loader
from .bench_methods_arms import header

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
"""


def markdown() -> str:
    """The page."""
    parts = [_INTRODUCTION]
    rows = ["| recipe | paper | |\n|---|---|---|\n"]
    for name in loader.methods():
        said = header(name.partition("/")[2])
        rows.append(f"| [{name}](#{_anchor(name)}) | {_linked(said['Paper'])} | {said['title']} |\n")
        parts.append(f"\n## {name}\n\n{said['title']}\n\n")
        for field in ("Paper", "Faithful", "Scaled", "Left out", "Kept layer", "Starts from"):
            if field in said:
                parts.append(f"- **{field}**: {_linked(_words(field, said[field]))}\n")
    return parts[0] + "\n" + "".join(rows) + "".join(parts[1:])


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
