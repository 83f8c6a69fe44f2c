"""Progress: plain lines without a terminal, a bar with one, and figures that are right."""

from __future__ import annotations

import io

from rich.console import Console

from relinear.launch.output import data_json, duration, table
from relinear.launch.progress import Progress, memory


class Clock:
    """Seconds that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def plain(every: float = 10.0) -> tuple[Progress, io.StringIO, Clock]:
    text, clock = io.StringIO(), Clock()
    return Progress(Console(file=text, width=80), every=every, clock=clock), text, clock


def test_plain_lines_come_every_few_seconds():
    progress, text, clock = plain()
    progress.stage("align", 1_000_000)
    for second in range(1, 26):
        clock.now = second
        progress.update(second * 10_000, loss=0.5 / second)
    progress.done()
    lines = text.getvalue().splitlines()
    assert lines[0] == "align: 1M tokens"
    assert lines[1].startswith("align  100k/1M  10k tokens/s  loss 0.05  ")
    assert lines[1].endswith("1m30s left")
    assert lines[2].startswith("align  200k/1M")
    assert lines[3] == "align done: 250k tokens in 25s, 10k tokens/s"
    assert len(lines) == 4


def test_tokens_of_an_earlier_session_do_not_count_towards_the_rate():
    progress, text, clock = plain()
    progress.stage("glue", 1000, done_tokens=900)
    clock.now = 10
    progress.update(950)
    line = text.getvalue().splitlines()[-1]
    assert "950/1k  5 tokens/s" in line and line.endswith("10s left")


def test_a_stage_without_a_total_says_what_it_knows():
    progress, text, clock = plain(every=1)
    progress.stage("verify")
    clock.now = 2
    progress.update(0)
    progress.note("left padding is exact [checked]")
    progress.done()
    lines = text.getvalue().splitlines()
    assert "left" not in lines[1] and "tokens/s" not in lines[1]
    assert lines[2] == "left padding is exact [checked]"
    assert lines[3] == "verify done: 2s"


def test_a_total_may_be_learnt_on_the_way():
    progress, text, clock = plain(every=1)
    progress.stage("eval")
    clock.now = 5
    progress.counted(500, 1000)
    assert "500/1k" in text.getvalue() and "5s left" in text.getvalue()


def test_a_terminal_gets_a_bar_and_is_left_in_order():
    text = io.StringIO()
    progress = Progress(Console(file=text, force_terminal=True, width=120, color_system=None))
    try:
        with progress:
            progress.stage("align", 1000)
            progress.update(500, loss=0.25)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert "align" in text.getvalue() and "loss 0.25" in text.getvalue()
    hidden, shown = text.getvalue().count("\x1b[?25l"), text.getvalue().count("\x1b[?25h")
    assert hidden == shown == 1, "the cursor stays hidden"


def test_memory_is_this_process():
    assert 2**20 < memory() < 2**40


def test_durations_and_tables_for_people():
    assert [duration(s) for s in (0.4, 59.4, 61, 3599, 7500)] == ["0s", "59s", "1m01s", "59m59s", "2h05m"]
    assert table([("a", 1), ("bcd", 20)], ("name", "n")) == "name   n\na      1\nbcd   20"
    assert table([], ("name", "n")) == "name  n"


def test_json_holds_no_nan(capsys):
    data_json({"a": float("nan"), "b": [1.5, float("inf")], "c": "ä"})
    assert capsys.readouterr().out == '{\n  "a": null,\n  "b": [\n    1.5,\n    null\n  ],\n  "c": "ä"\n}\n'
