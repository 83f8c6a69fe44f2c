"""The suites by name: what each measures, which options it takes, and how it is called. Torch-free until one runs.

`evaluate` is the one way to a result: it looks for a stored one, measures where there is none, and stores it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ..distill.digest import checksum, value_digest
from ..distill.errors import UserError
from ..distill.files import finite
from . import store
from .models import Models
from .texts import Text


class Progress(Protocol):
    """Whom an evaluation tells how far it is; `launch.progress.Progress` is one."""

    def stage(self, name: str, total_tokens: int | None = None, done_tokens: int = 0, unit: str = "tokens") -> None:
        """Something begins."""

    def counted(self, done: int, total: int | None) -> None:
        """So much of it is done."""

    def note(self, text: str) -> None:
        """A sentence to the reader."""

    def done(self) -> None:
        """It ended."""


@dataclass
class Ask:
    """What is to be measured.

    Attributes:
        models: student and, where there is one, teacher.
        store: where results lie.
        text: held-out text, None where there is none.
        options: given by the user, by name; what is absent takes the suite's default.
        again: measure anew what is stored.
        progress: whom to tell.
    """

    models: Models
    store: store.Store
    text: Text | None = None
    options: dict[str, Any] = field(default_factory=dict)
    again: bool = False
    progress: Progress | None = None

    def given(self, *names: str) -> dict[str, Any]:
        """Those of the named options that the user gave."""
        return {name: self.options[name] for name in names if self.options.get(name) is not None}

    def need_text(self, suite: str) -> Text:
        """The text.

        Raises:
            UserError: there is none.
        """
        if self.text is None:
            raise UserError(
                f"--text FILE: the suite {suite} needs held-out text, and {self.models.names['student']} is not the "
                f"export of a run that set some apart. Add --text FILE, or measure recall: --suite recall"
            )
        return self.text

    def counted(self, done: int, total: int | None) -> None:
        """Tell how far a suite is."""
        if self.progress is not None:
            self.progress.counted(done, total)


@dataclass(frozen=True)
class Suite:
    """One suite.

    Attributes:
        about: in a few words.
        options: of the command line that it takes.
        run: measures.
        inputs: digest of what it reads beside the models; also says early what is missing.
        packages: libraries whose versions its figures depend on, beside the usual.
        unit: of its progress.
    """

    about: str
    options: tuple[str, ...]
    run: Callable[[Ask], dict[str, Any]]
    inputs: Callable[[Ask], str | None]
    packages: tuple[str, ...] = ()
    unit: str = "tokens"


def _quick(ask: Ask) -> dict[str, Any]:
    from .fidelity import measure_tokens

    student, tokenizer, teacher = ask.models.pair()
    text = ask.need_text("quick")
    given: dict[str, Any] = {"seq_len": text.seq_len} | ask.given("seq_len", "max_tokens")
    made = measure_tokens(student, teacher, text.tokens(tokenizer), text.label, progress=ask.counted, **given)
    return {**made, "text": text.label}


def _recall(ask: Ask) -> dict[str, Any]:
    from .suite import recall_suite

    student, tokenizer, teacher = ask.models.pair()
    given = ask.given("tasks", "lengths", "samples", "seed", "generate", "filler")
    return recall_suite(student, tokenizer, teacher, progress=ask.counted, **given)


def _core(ask: Ask) -> dict[str, Any]:
    from .core import core_suite

    return core_suite(ask.models, _choice(ask), **_harness_settings(ask))


def _choice(ask: Ask, generates: bool = False) -> Any:
    from .harness import choose_tasks

    data, task_dir = ask.options.get("data"), ask.options.get("task_dir")
    return choose_tasks(
        ask.options.get("tasks"),
        data=None if data is None else Path(data),
        task_dir=None if task_dir is None else Path(task_dir),
        folder=ask.store.folder / "tasks",
        generates=generates,
    )


def _harness_settings(ask: Ask) -> dict[str, Any]:
    progress = ask.progress
    return {
        "parts": ask.store.parts("core"),
        "again": ask.again,
        "stage": None if progress is None else lambda name: progress.stage(name, unit="requests"),
        "progress": ask.counted,
        **ask.given("limit", "num_fewshot", "batch", "chat", "allow_code"),
    }


def _long(ask: Ask) -> dict[str, Any]:
    from .position_plots import perplexity_by_position
    from .positions import long_suite

    student, tokenizer, teacher = ask.models.pair()
    given = ask.given("lengths", "max_tokens")
    text = ask.need_text("long").files()
    made = long_suite(student, tokenizer, teacher, text=text, progress=ask.counted, **given)
    perplexity_by_position(made, ask.store.folder / "long.png")
    return made


def _generation(ask: Ask) -> dict[str, Any]:
    """Completions, made and .jsonl tasks by our own code; every other task by name through the harness."""
    from .generation import generation_suite

    own, others = _split_tasks(ask)
    student, tokenizer, teacher = ask.models.pair()
    given: dict[str, Any] = ask.given("samples", "max_new_tokens", "seed") | ({} if own is None else {"tasks": own})
    text = None if ask.text is None else ask.text.files()
    made = generation_suite(student, tokenizer, teacher, text=text, progress=ask.counted, **given)
    if others:
        from .core import core_suite

        again = Ask(ask.models, ask.store, None, {**ask.options, "tasks": others}, ask.again, ask.progress)
        measured = core_suite(ask.models, _choice(again, generates=True), **_harness_settings(again))
        made["tasks"] |= measured["tasks"]
    return made


def _split_tasks(ask: Ask) -> tuple[list[str] | None, list[str]]:
    """(tasks of `generation_suite`, tasks of the harness)."""
    from .exact import MADE

    named = ask.options.get("tasks")
    if named is None:
        return None, []
    own = [name for name in named if name in MADE or name.endswith(".jsonl")]
    return own, [name for name in named if name not in own]


def _mt_bench(ask: Ask) -> dict[str, Any]:
    from .mt_bench import mt_bench_suite

    _questions(ask)
    student, tokenizer, teacher = ask.models.pair()
    given = ask.given("questions", "endpoint", "judge", "api_key_env", "max_new_tokens", "seed")
    folder = ask.store.parts("mt_bench")
    return mt_bench_suite(student, tokenizer, teacher, progress=ask.counted, folder=folder, **given)


def _text_digest(suite: str) -> Callable[[Ask], str | None]:
    return lambda ask: ask.need_text(suite).digest


def _filler_digest(ask: Ask) -> str | None:
    filler = ask.options.get("filler")
    return checksum(filler) if filler is not None and Path(filler).is_file() else None


def _core_digest(ask: Ask) -> str | None:
    from .harness import require_harness

    require_harness()
    return value_digest(_choice(ask).digests)


def _generation_digest(ask: Ask) -> str | None:
    files = [name for name in ask.options.get("tasks") or () if name.endswith(".jsonl") and Path(name).is_file()]
    others = _split_tasks(ask)[1]
    if others:
        from .harness import require_harness

        require_harness()
    return value_digest([None if ask.text is None else ask.text.digest, [checksum(name) for name in files]])


def _questions(ask: Ask) -> str | None:
    questions = ask.options.get("questions")
    if questions is None:
        raise UserError("--questions FILE: the suite mt_bench needs MT-Bench's question.jsonl, one object a line")
    if not Path(questions).is_file():
        raise UserError(f"--questions {questions}: no such file; expected MT-Bench's question.jsonl")
    return checksum(questions)


_HARNESS = ("tasks", "limit", "num_fewshot", "data", "task_dir", "batch", "chat", "allow_code")

SUITES: dict[str, Suite] = {
    "quick": Suite(
        "perplexity of both, KL divergence, top-1 agreement on held-out text",
        ("text", "max_tokens", "seq_len"),
        _quick,
        _text_digest("quick"),
    ),
    "recall": Suite(
        "facts found again",
        ("tasks", "lengths", "samples", "seed", "generate", "filler", "plots"),
        _recall,
        _filler_digest,
    ),
    "core": Suite("benchmark tasks of lm-eval", _HARNESS, _core, _core_digest, ("lm-eval", "datasets"), "requests"),
    "long": Suite(
        "perplexity, KL and agreement by position",
        ("text", "lengths", "max_tokens"),
        _long,
        _text_digest("long"),
    ),
    "generation": Suite(
        "what is said: completions beside the teacher's, repetition, exact answers",
        ("text", "samples", "max_new_tokens", "seed", *_HARNESS),
        _generation,
        _generation_digest,
        ("lm-eval", "datasets"),
        "prompts",
    ),
    "mt_bench": Suite(
        "MT-Bench by a judge",
        ("questions", "endpoint", "judge", "api_key_env", "max_new_tokens", "seed"),
        _mt_bench,
        _questions,
        (),
        "answers",
    ),
}


def evaluate(name: str, ask: Ask) -> tuple[dict[str, Any], bool]:
    """A suite's result.

    Args:
        name: of the suite.
        ask: what is measured.

    Returns:
        (result as stored, whether it had been stored before).

    Raises:
        UserError, MachineError, RunFailed: as the suite; what was stored before is untouched.
    """
    key, about = describe(name, ask)
    held = None if ask.again else ask.store.find(name, key)
    if held is not None:
        return held, True
    began = time.monotonic()
    if ask.progress is not None:
        ask.progress.stage(name, unit=SUITES[name].unit)
    made = SUITES[name].run(ask)
    if ask.progress is not None:
        ask.progress.done()
    return keep(name, ask, made, time.monotonic() - began, (key, about)), False


def describe(name: str, ask: Ask) -> tuple[str, dict[str, Any]]:
    """(key under which a suite's result is stored, what every result file says), before anything is measured.

    Raises:
        UserError, MachineError: something that the suite needs is missing.
    """
    suite = SUITES[name]
    inputs = suite.inputs(ask)
    settings = {key: _plain(value) for key, value in ask.given(*suite.options).items() if key != "plots"}
    if "text" in suite.options and ask.text is not None:
        settings["text"] = ask.text.label
    settings |= {"dtype": ask.models.dtype, "device": ask.models.device}
    checkpoints = {"student": ask.models.digest("student"), "teacher": ask.models.digest("teacher")}
    used = store.versions(*suite.packages)
    about = {
        "suite": name,
        "models": {side: ask.models.names.get(side) for side in ("student", "teacher")},
        "checkpoints": checkpoints,
        "settings": settings,
        "versions": used,
    }
    return store.result_key(name, checkpoints, settings, inputs, used), about


def keep(
    name: str, ask: Ask, made: dict[str, Any], seconds: float, described: tuple[str, dict[str, Any]] | None = None
) -> dict[str, Any]:
    """Store what a suite measured, and return it as stored."""
    key, about = described or describe(name, ask)
    result = finite({**made, **about, "seconds": round(seconds, 2), "key": key})
    ask.store.put(name, result)
    return result


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
