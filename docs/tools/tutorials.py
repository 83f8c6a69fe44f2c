"""What the tutorials for GPUs show as printed, printed: `python docs/tools/tutorials.py` fills it in anew.

Only commands that need neither GPU nor network are run: plans, checks, dry runs and the files for schedulers. Each
block stands between `<!-- BEGIN name -->` and `<!-- END name -->`.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path

from relinear.launch.main import main as relinear

PAGES = Path(__file__).resolve().parents[1] / "tutorials"
# What a plan reads of the teachers' config.json.
QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
}
QWEN_1_5B = QWEN_7B | {
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
TEACHERS = {"Qwen2.5-7B-Instruct": QWEN_7B, "Qwen2.5-1.5B-Instruct": QWEN_1_5B}


def one_gpu(page: str) -> dict[str, str]:
    """The blocks of one-gpu.md."""
    plans = commands(page, "relinear plan")
    rows = ["| | glue | extend |", "|---|--:|--:|"]
    for label, line in zip(
        ("as published", "checkpointing, micro batch 1", "the same, adapters"), plans[1:], strict=True
    ):
        stages = {stage["name"]: stage for stage in json.loads(output(f"{line} --json"))["stages"]}
        sizes = [f"{stages[name]['total_memory'] / 2**30:.3g} GiB" for name in ("glue", "extend")]
        rows.append(f"| {label} | {' | '.join(sizes)} |")
    write_recipe(page, "mine.yaml")
    output("relinear check mine.yaml teacher.model=Qwen2.5-1.5B-Instruct")
    return {"plan 1.5B": fenced(after(output(plans[0]), "Stages\n")), "memory 7B": "\n".join(rows)}


def eight_gpus(page: str) -> dict[str, str]:
    """The blocks of eight-gpus.md."""
    write_recipe(page, "seven.yaml")
    output("relinear check seven.yaml teacher.model=Qwen2.5-7B-Instruct")
    (planned,) = commands(page, "relinear plan")
    (dry,) = [line for line in commands(page, "relinear run") if "--dry-run" in line]
    text = output(dry)
    memory = after(text, "Memory of each rank").partition("\nThe whole recipe")[0]
    shown = f"{text.partition(chr(10) + 'rwkv7 in')[0]}\n…\n\n{memory}\n{after(text, 'Decode cache')}"
    return {"plan 8": fenced(after(output(planned), "Stages\n")), "dry run 8": fenced(shown)}


def several_nodes(page: str) -> dict[str, str]:
    """The blocks of several-nodes.md."""
    (planned,), (slurm,) = commands(page, "relinear plan"), commands(page, "relinear slurm")
    output(slurm)
    text = Path("seven.sbatch").read_text(encoding="utf-8")
    asked = "\n".join(line for line in text.splitlines() if line.startswith("#SBATCH"))
    (command,) = [line for line in text.splitlines() if line.startswith("command=")]
    started = after(text, "srun ").partition("step=$!")[0].rstrip()
    (kubernetes,) = commands(page, "relinear kubernetes")
    output(kubernetes)
    shown = f"{asked}\n…\n{command}\n…\n{started}"
    return {"plan 32": fenced(after(output(planned), "Memory of each rank")), "sbatch": fenced(shown)}


FILLED = {"one-gpu.md": one_gpu, "eight-gpus.md": eight_gpus, "several-nodes.md": several_nodes}


def filled(name: str) -> str:
    """A page with its blocks as its commands print them now."""
    page = (PAGES / name).read_text(encoding="utf-8")
    with somewhere():
        blocks = FILLED[name](page)
    for block, text in blocks.items():
        begin, end = f"<!-- BEGIN {block} -->", f"<!-- END {block} -->"
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n\n{text}\n\n{end}{rest.partition(end)[2]}"
    return page


@contextlib.contextmanager
def somewhere() -> Iterator[None]:
    """An empty working folder that holds the teachers' config.json."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name, config in TEACHERS.items():
            os.mkdir(name)
            Path(name, "config.json").write_text(json.dumps(config))
        yield


def commands(page: str, beginning: str) -> list[str]:
    """Lines of a page's bash blocks that begin so, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith(beginning)]


def output(line: str) -> str:
    """What a command prints to stdout; it must succeed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as said:
        code = relinear(shlex.split(line)[1:])
    if code:
        raise RuntimeError(f"{line}: exit code {code}: {said.getvalue()}")
    return out.getvalue()


def write_recipe(page: str, name: str) -> None:
    """The page's recipe of that name, as a file."""
    (text,) = re.findall(rf"```yaml\n# {re.escape(name)}\n(.*?)```", page, flags=re.DOTALL)
    Path(name).write_text(text)


def after(text: str, beginning: str) -> str:
    """The text from a line that begins so."""
    return text[text.index(beginning) :]


def fenced(text: str) -> str:
    """Text as a block."""
    return f"```text\n{text.rstrip()}\n```"


if __name__ == "__main__":
    for page_name in FILLED:
        text_now = filled(page_name)
        (PAGES / page_name).write_text(text_now, encoding="utf-8")
