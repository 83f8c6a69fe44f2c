"""lm-evaluation-harness through its own code: its tasks, its prompts, its scoring, its Hugging Face model.

What is ours is where the models come from (already loaded, relinear's exports through the installed classes), that
finished batches are kept (`answers`), and that documents' scores are kept for the paired errors (`recovery`). The
figures are those of `lm_eval --model hf --tasks NAME` with the same batch size, digit for digit; a test compares them.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from ..distill.digest import checksum, value_digest
from ..distill.errors import MachineError, UserError
from .answers import AnswerFile, answered
from .local_tasks import LocalTask, local_tasks, write_tasks

CORE = ("mmlu", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande", "lambada_openai")
"""What the suite core measures by default, from the Hub."""

_DATA = re.compile(r"[^\s\"'{}\[\],]+\.(?:jsonl|json|csv|tsv|parquet|txt)\b")


@dataclass(frozen=True)
class TaskChoice:
    """Which tasks are measured, before the harness is loaded.

    Attributes:
        names: tasks, groups or tags as the harness spells them.
        local: shipped definitions among them, filled in with the data folder.
        folder: where those are written.
        task_dir: a folder of definitions of the user's own, or None.
        known: names of all local tasks whose files are there.
        digests: by name, of the local definition and the files that it names; None for the harness's own tasks.
    """

    names: tuple[str, ...]
    local: tuple[LocalTask, ...]
    folder: Path
    task_dir: Path | None
    known: tuple[str, ...]
    digests: dict[str, str | None]


def require_harness() -> str:
    """The installed version of lm-eval.

    Raises:
        MachineError: it is not installed.
    """
    try:
        return metadata.version("lm-eval")
    except metadata.PackageNotFoundError:
        raise MachineError(
            "benchmark tasks need lm-evaluation-harness, which is not installed. To install it: pip install "
            '"relinear[eval]"'
        ) from None


def choose_tasks(
    names: Sequence[str] | None,
    *,
    data: Path | None,
    task_dir: Path | None,
    folder: Path,
    generates: bool = False,
) -> TaskChoice:
    """What to measure.

    Args:
        names: tasks by name; by default the local ones where `data` or `task_dir` is given, else `CORE`.
        data: folder of files for the shipped definitions (`local_tasks`).
        task_dir: folder of definitions in the harness's YAML.
        folder: where shipped definitions are written, filled in.
        generates: by default take the local tasks whose answers are generated; else those whose are not.

    Raises:
        UserError: a folder that is not there or holds no task.
    """
    shipped = [] if data is None else local_tasks(data)
    if task_dir is not None and not (task_dir.is_dir() and any(task_dir.rglob("*.yaml"))):
        raise UserError(f"--task-dir {task_dir}: no such folder, or no .yaml in it; expected the harness's task files")
    own = [] if task_dir is None else _own_names(task_dir)
    if names is None:
        wanted = [task.name for task in shipped if task.generates == generates] + own
        names = wanted or ([] if generates else list(CORE))
    names = list(dict.fromkeys(names))
    if not names:
        raise UserError("--tasks: names no task; e.g. --tasks arc_easy,piqa")
    local = tuple(task for task in shipped if task.name in names)
    made = None if task_dir is None else value_digest(_folder_digests(task_dir))
    digests: dict[str, str | None] = dict.fromkeys(names, made)
    digests |= {task.name: value_digest([task.shipped, [checksum(path) for path in task.files]]) for task in local}
    return TaskChoice(tuple(names), local, folder, task_dir, (*(task.name for task in shipped), *own), digests)


def load_tasks(choice: TaskChoice, found: dict[str, Any] | None = None) -> dict[str, Any]:
    """The harness's own task objects by name, with their data sets.

    Args:
        choice: of `choose_tasks`.
        found: put in here as well, one by one.

    Raises:
        UserError: a task that the harness does not know.
        MachineError: the harness or a package that a task needs is missing, or its data set cannot be had.
    """
    require_harness()
    manager = _manager(choice)
    unknown = [name for name in choice.names if name not in manager.task_index]
    if unknown:
        known = [*choice.known, *manager.all_tasks]
        near = [near for name in unknown for near in difflib.get_close_matches(name, known, 3, 0.6)]
        hint = f" Near: {', '.join(near)}." if near else ""
        raise UserError(
            f"--tasks {','.join(unknown)}: unknown to lm-eval {require_harness()} and not a local task.{hint} To see "
            "them all: lm_eval ls tasks; local ones need --data DIR or --task-dir DIR"
        )
    loaded = {} if found is None else found
    for name in choice.names:
        loaded[name] = _load(manager, name)
    return loaded


def _manager(choice: TaskChoice) -> Any:
    """The harness's index of tasks: the local folders alone where they hold all that is asked for; it is quicker."""
    from lm_eval.tasks import TaskManager

    paths = [] if not choice.local else [write_tasks(list(choice.local), choice.folder)]
    paths += [] if choice.task_dir is None else [choice.task_dir]
    with quiet():
        if paths:
            manager = TaskManager(include_path=[str(path) for path in paths], include_defaults=False)
            if all(name in manager.task_index for name in choice.names):
                return manager
        return TaskManager(include_path=[str(path) for path in paths] or None)


def _load(manager: Any, name: str) -> Any:
    try:
        with quiet():
            return manager.load([name])
    except ImportError as error:
        package = error.name or str(error)
        raise MachineError(
            f"--tasks {name}: needs the package {package}. To install it: pip install {package}"
        ) from None
    except Exception as error:  # whatever datasets, the Hub's client or a task's own code raises
        reason = (str(error).splitlines() or [""])[0]
        entry = manager.task_index[name]
        source = (entry.cfg or {}).get("dataset_path") if entry.cfg else None
        if not isinstance(error, OSError | ValueError | RuntimeError):
            raise UserError(f"--tasks {name}: cannot be set up ({type(error).__name__}: {reason})") from error
        raise MachineError(
            f"--tasks {name}: its data set {source or ''} cannot be had ({reason}). It comes from the Hub: go where "
            "there is a network, or measure local files: --data DIR, or --task-dir DIR with the harness's YAML"
        ) from None


def harness_model(model: Any, tokenizer: Any, batch: int) -> Any:
    """The harness's Hugging Face model around one that is loaded; its `kept` is an `AnswerFile`.

    Args:
        model: causal language model.
        tokenizer: of it; stays as it is (the harness gives its copy a padding token).
        batch: requests per forward pass.
    """
    from lm_eval.models.huggingface import HFLM

    base: Any = HFLM

    class Kept(base):
        """Answers from the file where it has them."""

        kept: AnswerFile

        def keep(self, kept: AnswerFile) -> None:
            """Take answers from this file, and write them there."""
            self.kept = kept
            self.set_cache_hook(kept)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return answered(super(), self.kept, "loglikelihood", requests)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return answered(super(), self.kept, "loglikelihood_rolling", requests)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[Any]:
            return answered(super(), self.kept, "generate_until", requests)

        def _model_call(self, *args: Any, **kwargs: Any) -> Any:
            self.kept.flush()
            return super()._model_call(*args, **kwargs)

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            self.kept.flush()
            return super()._model_generate(*args, **kwargs)

    with quiet():
        return Kept(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch)


def run_task(
    model: Any,
    loaded: Any,
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat: bool = False,
    allow_code: bool = False,
) -> dict[str, Any]:
    """One model's figures on one task or group.

    Args:
        model: of `harness_model`, with its answers' file.
        loaded: entry of `load_tasks`.
        limit: documents per task, the first ones; all if None.
        num_fewshot: examples in front of each question; the task's own number if None.
        chat: put requests through the tokenizer's chat template.
        allow_code: run code that the model wrote, which some tasks score by.

    Returns:
        {"leaves": {task: {"version", "n", "fewshot", "chance", "asked": hash of all prompts, "answers": a document, as
        the first filter leaves them, "figures": {"METRIC,FILTER": {"value", "stderr", "higher_is_better", "values": a
        document where the value is their mean, else None}}}}, "groups": {group: {"METRIC,FILTER": {"value", "stderr",
        "higher_is_better"}}}, "seconds"}.

    Raises:
        UserError: code would be run without leave, or the tokenizer has no chat template.
    """
    from lm_eval.evaluator import evaluate

    began = time.monotonic()
    unsafe = [name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]
    if unsafe and not allow_code:
        raise UserError(
            f"--tasks {unsafe[0]}: runs code that the model writes, with your rights. Where that is safe, a container "
            "for example, add --allow-code"
        )
    if chat and getattr(model.tokenizer, "chat_template", None) is None:
        raise UserError("--chat: this tokenizer has no chat template. Leave it out")
    _prepare(loaded["tasks"], num_fewshot)
    with quiet(), _code_allowed(bool(unsafe)):
        found: Any = evaluate(
            lm=model,
            task_dict=loaded,
            limit=limit,
            log_samples=True,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            confirm_run_unsafe_code=allow_code,
        )
    leaves = {name: _leaf(name, found) for name in loaded["tasks"]}
    groups = {
        name: _figures(found["results"][name], found["higher_is_better"].get(name, {})) for name in loaded["groups"]
    }
    return {"leaves": leaves, "groups": groups, "seconds": round(time.monotonic() - began, 2)}


def _prepare(tasks: dict[str, Any], num_fewshot: int | None) -> None:
    """Seeds and numbers of examples, as the harness's own `simple_evaluate` sets them before it evaluates."""
    import random

    import numpy as np
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for task in tasks.values():
        given = task.get_config("num_fewshot")
        if num_fewshot is None and given is None:
            task.set_config(key="num_fewshot", value=0)
        elif num_fewshot is not None and given != 0:  # a task that says 0 itself means it
            task.set_config(key="num_fewshot", value=num_fewshot)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _leaf(name: str, found: dict[str, Any]) -> dict[str, Any]:
    """What is kept of one task."""
    samples = found["samples"][name]
    figures = _figures(found["results"][name], found["higher_is_better"].get(name, {}))
    for key, figure in figures.items():
        metric, _, chosen = key.partition(",")
        values = [sample.get(metric) for sample in samples if sample["filter"] == chosen]
        plain = [float(value) for value in values if isinstance(value, int | float)]  # numpy's float is one
        average = sum(plain) / len(plain) if plain and len(plain) == len(values) else None
        same = average is not None and abs(average - figure["value"]) <= 1e-9 * max(1.0, abs(average))
        figure["values"] = plain if same else None
    first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
    kind = found["configs"][name].get("output_type")
    options = [len(sample["arguments"]) // (2 if "acc_mutual_info" in sample["metrics"] else 1) for sample in first]
    asked = "".join(sample["doc_hash"] + sample["prompt_hash"] + sample["target_hash"] for sample in first)
    return {
        "version": found["versions"].get(name),
        "n": len(first),
        "fewshot": found["n-shot"].get(name),
        "chance": sum(1 / count for count in options) / len(options) if kind == "multiple_choice" else None,
        "asked": hashlib.sha256(asked.encode("utf-8")).hexdigest(),
        "answers": [sample["filtered_resps"] for sample in first],
        "figures": figures,
    }


def _figures(row: dict[str, Any], higher: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{"METRIC,FILTER": value and standard error} of a row of the harness's results."""
    made = {}
    for key, value in row.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr: Any = row.get(f"{metric}_stderr,{chosen}")
        known = isinstance(stderr, int | float) and stderr == stderr
        better = higher.get(metric)
        made[key] = {
            "value": float(value),
            "stderr": float(stderr) if known else None,
            "higher_is_better": True if better is None else bool(better),
        }
    return made


@contextmanager
def quiet() -> Iterator[None]:
    """Without the harness's log and the progress bars of it and of datasets: relinear shows its own."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "httpx", "evaluate")]
    levels = [logger.level for logger in loggers]
    bars = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with _no_bars():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


@contextmanager
def _no_bars() -> Iterator[None]:
    """tqdm as the harness calls it draws nothing."""
    import tqdm

    before: Callable[..., None] = tqdm.tqdm.__init__

    def hidden(self: Any, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **{**kwargs, "disable": True})

    tqdm.tqdm.__init__ = hidden  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = before  # type: ignore[method-assign]


@contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """The leave that the code-running metric itself looks for in the environment."""
    import os

    name = "HF_ALLOW_CODE_EVAL"
    before = os.environ.get(name)
    if allowed:
        os.environ[name] = "1"
    try:
        yield
    finally:
        if allowed:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _own_names(folder: Path) -> list[str]:
    """Tasks and groups that a folder of definitions names."""
    found = []
    for path in sorted(folder.rglob("*.yaml")):
        named = re.search(
            r"^(?:group|task): *[\"']?([\w.:-]+)[\"']? *$", path.read_text(encoding="utf-8"), re.MULTILINE
        )
        if named is not None:
            found.append(named[1])
    return found


def _folder_digests(folder: Path) -> list[str]:
    """Of every definition and every data file that one names."""
    made = []
    for path in sorted(
        path for path in folder.rglob("*") if path.suffix in (".yaml", ".py", ".jsonl", ".json", ".csv")
    ):
        made.append(checksum(path))
        if path.suffix == ".yaml":
            named = (Path(name).expanduser() for name in _DATA.findall(path.read_text(encoding="utf-8")))
            made += [checksum(file) for file in named if file.is_file()]
    return made
