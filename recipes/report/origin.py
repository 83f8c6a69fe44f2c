"""Where it comes from: what went wrong on the way, the recipe, versions, and the commands that make it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

from ...eval.tables import count_name
from . import words
from .blocks import Block, Code, Missing, Notice, Table, Text
from .lost import eval_command
from .made import run_again
from .read import Run
from .trained import TRAINING

_ALARMING = re.compile(
    r"warning|not a whole checkpoint|left out|go back|nothing to do, the mixers|damaged", re.IGNORECASE
)


def warnings(run: Run) -> list[str]:
    """What a reader of the figures must know, a sentence each."""
    found = [*run.problems]
    for name, kind, _ in run.stages:
        spikes = [record for record in run.steps(name) if "spike" in record] if kind in TRAINING else []
        if spikes:
            steps = ", ".join(str(record["step"]) for record in spikes[:10]) + (" …" if len(spikes) > 10 else "")
            number = "1 step" if len(spikes) == 1 else f"{len(spikes)} steps"
            found.append(f"{name}: {number} left out, as the loss was a spike (step {steps})")
    if run.replays:
        found.append(f"steps that failed, kept in replay/: {', '.join(run.replays)}")
    if run.hung:
        found.append(f"processes that hung, their stacks in logs/: {', '.join(run.hung)}")
    result = run.result or {}
    for stage in result.get("stages", []):
        if stage.get("unchanged"):
            some = ", ".join(stage["unchanged"][:4])
            found.append(f"{stage['name']}: {len(stage['unchanged'])} parameters did not change, e.g. {some}")
    found += _elsewhere(run, result)
    found += [str(note.get("text", "")) for note in run.notes if _ALARMING.search(str(note.get("text", "")))]
    return list(dict.fromkeys(found))


def _elsewhere(run: Run, result: dict[str, Any]) -> list[str]:
    """Parts of the run, or its measurements, that belong to different machines or models."""
    found = []
    began, ended = run.record["environment"], result.get("environment") or {}
    changed = [f"{key} {began.get(key)} → {value}" for key, value in ended.items() if began.get(key) != value]
    if changed:
        found.append(f"the run began and ended in different environments: {', '.join(changed)}")
    sums = {
        suite: value["checkpoints"].get("student")
        for suite, value in run.suites.items()
        if isinstance(value.get("checkpoints"), dict)
    }
    if len({value for value in sums.values() if value}) > 1:
        said = ", ".join(f"{suite} {str(value)[:8]}" for suite, value in sums.items())
        found.append(f"suites were measured on different weights ({said}): measure again")
    return found


def happened(run: Run) -> Iterator[Block]:
    """Warnings, and all that the run said."""
    said = warnings(run)
    for text in said:
        yield Notice(text)
    if not said:
        yield Text("No spikes, no failed or left-out steps, no damaged saves were recorded.")
    if run.notes:
        lines = [f"{note.get('time', '')}  {note.get('text', '')}" for note in run.notes]
        yield Code("\n".join(lines), folded=f"All that the run said ({len(lines)} lines)")


def recipe(run: Run) -> Iterator[Block]:
    """The resolved recipe, every key."""
    if run.recipe is None:
        yield Missing("recipe.yaml is missing from the folder.")
        return
    yield Text("Every key as it was resolved, defaults included. “relinear run” takes this file as it is.")
    yield Code(run.recipe.rstrip("\n"), folded="recipe.yaml")


def versions(run: Run) -> Iterator[Block]:
    """Versions and machine at the beginning and the end, and the teacher's identity."""
    began, ended = run.record["environment"], (run.result or {}).get("environment") or {}
    keys = list(dict.fromkeys([*began, *ended]))
    header = ["", "the run began with", *(["and ended with"] if ended else [])]
    rows = [[key, *(words.plain(one.get(key)) for one in ([began, ended] if ended else [began]))] for key in keys]
    yield Table("Versions and machine", header, rows, words=(0, 1, 2))
    teacher = run.record["teacher"]
    rows = [["model", str(teacher["source"])], ["revision", words.plain(teacher.get("revision"))]]
    rows += [["family", str(teacher["family"])]]
    rows += [[name, str(value)] for name, value in (teacher.get("fingerprint") or {}).items()]
    yield Table("Teacher: what it is, and the hashes of its files", ["", "as recorded"], rows, words=(0, 1))
    suites = {
        suite: value["versions"] for suite, value in run.suites.items() if isinstance(value.get("versions"), dict)
    }
    if suites:
        names = list(dict.fromkeys(name for value in suites.values() for name in value))
        rows = [[suite, *(words.plain(value.get(name)) for name in names)] for suite, value in suites.items()]
        yield Table("Versions that the suites ran with", ["suite", *names], rows, words=range(len(names) + 1))


def again(run: Run) -> Iterator[Block]:
    """What to type for the same model, and for the same figures."""
    start = run.record.get("start")
    number = (run.record["environment"].get("world_size")) or 1
    command = ["relinear", "run", str(run.folder / "recipe.yaml"), "--out", "ANOTHER_FOLDER"]
    command += ["--start", str(start)] if start else []
    command += ["--nproc", str(number)] if number > 1 else []
    lines = [shlex.join(command)]
    if run.result is None:
        lines = [f"{run_again(run)}    # goes on with this one", *lines]
    else:
        lines.append(shlex.join(["relinear", "verify", str(run.folder)]))
        lines += [eval_command(run, suite) for suite in run.suites]
        if run.bench is not None:
            export = str(run.folder / "export")
            lines.append(shlex.join(["relinear", "bench", "model", export, "--against", run.teacher]))
    yield Text(
        f"With relinear {run.record.get('relinear')} on the same machine, with the same versions, threads and number "
        "of processes, the weights are the same to the last bit."
    )
    yield Code("\n".join(lines))
    tokens = sum(settings.get("tokens") or 0 for _, kind, settings in run.stages if kind in TRAINING)
    yield Text(f"The recipe trains on {count_name(tokens)} tokens from seed {run.record['recipe'].get('seed')}.")
