"""The table says what was measured, in every form, and leaves out what was not."""

from __future__ import annotations

import json

import pytest

from relinear.eval.tables import (
    Row,
    bytes_name,
    context_name,
    count_name,
    summary_table,
    time_name,
    to_json,
    to_markdown,
    to_text,
)


def fidelity(scale: float) -> dict:
    def model(perplexity: float) -> dict:
        return {"perplexity": perplexity, "perplexity_stderr": 0.041, "loss": 1.3, "loss_stderr": 0.011}

    return {
        "student": model(3.7 * scale),
        "teacher": model(3.7),
        "perplexity_ratio": scale,
        "perplexity_ratio_stderr": 0.0012,
        "kl": 0.5 * (scale - 1),
        "kl_stderr": 0.0007,
        "top1_agreement": 0.91234,
        "top1_agreement_stderr": 0.0031,
        "tokens": 100_000,
        "documents": 512,
    }


def recalled(*accuracies: float) -> dict:
    cells = zip((0, 128, 640), accuracies, strict=False)
    return {"by_distance": {str(d): {"accuracy": a, "stderr": 0.02, "n": 128} for d, a in cells}}


@pytest.fixture
def rows() -> list[Row]:
    full = {1024: 2_097_152, 8192: 16_777_216, 32768: 67_108_864}
    state = dict.fromkeys(full, 131_072)
    hybrid = {n: b // 4 + 98_304 for n, b in full.items()}
    return [
        Row.of_teacher("teacher", fidelity(1.02), recall=recalled(1, 0.99, 0.97), cache_bytes=full),
        Row.of_student(
            "all-linear",
            fidelity(1.05),
            recall=recalled(0.9, 0.42, 0.1),
            cache_bytes=state,
            tokens=1_250_000,
            seconds=95,
        ),
        Row.of_student(
            "hybrid", fidelity(1.01), recall=recalled(1, 0.98), cache_bytes=hybrid, tokens=1_500_000, seconds=128.4
        ),
    ]


def cells(text: str, label: str) -> list[str]:
    (line,) = [line for line in text.splitlines() if label in line]
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_markdown_holds_every_figure(rows):
    text = to_markdown(rows)
    assert text.splitlines()[0] == "|  | teacher | all-linear | hybrid |"
    assert cells(text, "| perplexity |") == ["3.700 ± 0.041", "3.885 ± 0.041", "3.737 ± 0.041"]
    assert cells(text, "perplexity / teacher's") == ["–", "1.0500 ± 0.0012", "1.0100 ± 0.0012"]
    assert cells(text, "KL to teacher") == ["–", "0.0250 ± 0.0007", "0.0050 ± 0.0007"]
    assert cells(text, "same top token") == ["–", "91.2 ± 0.3 %", "91.2 ± 0.3 %"]
    assert cells(text, "recall across 0 ") == ["100.0 ± 2.0 %", "90.0 ± 2.0 %", "100.0 ± 2.0 %"]
    assert cells(text, "recall across 640 ") == ["97.0 ± 2.0 %", "10.0 ± 2.0 %", "–"]
    assert cells(text, "cache at 1k") == ["2.10 MB", "131 kB (÷16)", "623 kB (÷3.4)"]
    assert cells(text, "cache at 32k") == ["67.1 MB", "131 kB (÷512)", "16.9 MB (÷4.0)"]
    assert cells(text, "training tokens") == ["–", "1.25M", "1.5M"]
    assert cells(text, "training time") == ["–", "1 min 35 s", "2 min 08 s"]


def test_text_fits_a_terminal_and_says_the_same(rows):
    text = to_text(rows, title="stories260k", width=88)
    assert text.startswith("stories260k")
    assert max(map(len, text.splitlines())) <= 88
    assert "\x1b" not in text
    for line in to_markdown(rows).splitlines()[2:]:
        for cell in line.strip("| ").split(" | "):
            assert cell in text


def test_json_is_json(rows):
    read = json.loads(json.dumps(to_json(rows)))
    assert [row["name"] for row in read] == ["teacher", "all-linear", "hybrid"]
    assert read[1]["kl"] == {"value": pytest.approx(0.025), "stderr": 0.0007}
    assert read[0]["kl"] is None
    assert read[1]["recall"]["128"] == {"value": 0.42, "stderr": 0.02}
    assert read[2]["cache_bytes"]["32768"] == 16_875_520
    assert read[1]["tokens"] == 1_250_000


def test_what_was_not_measured_is_left_out():
    alone = {"student": {"perplexity": 4.0, "perplexity_stderr": None, "loss": 1.4, "loss_stderr": None}}
    text = to_markdown([Row.of_student("a|b", alone)])
    assert text.splitlines()[0] == "|  | a\\|b |"
    assert cells(text, "| perplexity |") == ["4.000"]
    assert len(text.splitlines()) == 3
    assert summary_table([Row.of_student("x", alone)]).row_count == 1


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (bytes_name, 0, "0 B"),
        (bytes_name, 999, "999 B"),
        (bytes_name, 1000, "1.00 kB"),
        (bytes_name, 999_600, "1.00 MB"),
        (bytes_name, 67_108_864, "67.1 MB"),
        (bytes_name, 3.2e14, "320 TB"),
        (count_name, 512, "512"),
        (count_name, 64_000, "64k"),
        (count_name, 2_048_000, "2.05M"),
        (count_name, 3e9, "3B"),
        (context_name, 32768, "32k"),
        (context_name, 1000, "1000"),
        (time_name, 59.4, "59 s"),
        (time_name, 59.6, "1 min 00 s"),
        (time_name, 7805, "2 h 10 min"),
    ],
)
def test_units(function, value, expected):
    assert function(value) == expected
