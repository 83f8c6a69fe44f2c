"""What `bench` measured, as tables: one line per measurement, to read or to grep."""

from __future__ import annotations

from typing import Any

from ..eval.tables import bytes_name, context_name
from .output import table


def ops_text(result: dict[str, Any]) -> str:
    """The result of `recipes.bench_ops.measure`: each op alone, against the baselines, and one token."""
    alone = [line for row in result["alone"] for line in _alone(row)]
    sequence = [(row["op"], row["baseline"], context_name(row["length"]), *_against(row)) for row in result["sequence"]]
    step = [(row["op"], row["baseline"] or "", str(row["batch"]), *_step(row)) for row in result["step"]]
    return "\n\n".join(
        f"{title}\n{table(rows, header)}"
        for title, rows, header in (
            ("Forward and backward, each op alone", alone, ("op", "tokens", "µs/token", "bytes/token", "note")),
            (
                "Forward and backward: their time over ours (all turns), and the most memory held",
                sequence,
                ("op", "baseline", "tokens", "ratio", "ours", "theirs", "our memory", "their memory", "error", "note"),
            ),
            (
                "One token: their time over ours (middle half of the turns), and bytes allocated beyond the output",
                step,
                ("op", "baseline", "rows", "ratio", "ours", "theirs", "bytes", "error", "note"),
            ),
        )
        if rows
    )


def train_text(result: dict[str, Any]) -> str:
    """The result of `recipes.bench_train.measure`: a line per measurement with its target, and what the ratio is of."""
    rows = []
    for row in result["rows"]:
        over = row["case"] in ("memory", "loader")
        target = "" if row["target"] is None else f"{'≤' if over else '≥'} {row['target']:g}"
        reached = {None: "", True: "yes", False: "no"}[row["reached"]]
        rows.append((row["case"], row["what"], _train_value(row), target, reached, _train_parts(row)))
    return table(rows, ("case", "what", "ratio", "target", "reached", "of"))


def _train_value(row: dict[str, Any]) -> str:
    if "value_min" not in row:
        return f"{row['value']:.3g}"
    return f"{row['value']:.3f} ({row['value_min']:.3f} to {row['value_max']:.3f})"


def _train_parts(row: dict[str, Any]) -> str:
    """The two sides of a ratio in words."""
    if row["case"] == "memory":
        layer, gradients = bytes_name(row["layer_bytes"]), bytes_name(row["gradient_bytes"])
        return f"{bytes_name(row['peak_bytes'])}, a layer {layer}, gradients beside them {gradients}"
    own = f"{row['tokens_per_second']:.0f} tokens/s"
    if row["case"] == "align":
        return f"{own}, limit {row['limit_tokens_per_second']:.0f}, forward {row['forward_tokens_per_second']:.0f}"
    other = {"glue": "plain_tokens_per_second", "ranks": "alone_tokens_per_second"}.get(row["case"])
    return f"{own}, {'loader' if other is None else 'other'} {row[other or 'loader_tokens_per_second']:.0f}"


def decode_text(result: dict[str, Any]) -> str:
    """The result of `eval.speed.decode`: a line per model and context, and what the longest costs over the shortest."""
    rows, notes = [], []
    for name, model in result.items():
        for length, row in model["lengths"].items():
            rows.append((name, context_name(length), f"{row['median_ms']:.3f}", bytes_name(row["bytes"])))
        short, long = min(model["lengths"]), max(model["lengths"])
        if "ratio" in model:
            held = "" if model["bytes_ratio"] is None else f", cache × {model['bytes_ratio']:.3g}"
            between = f"{context_name(long)} over {context_name(short)}"
            notes.append(f"{name}: {between} tokens of context: time × {_spread(model, 'ratio')}{held}")
        if model["trained_context"] and long > model["trained_context"]:
            made_for = context_name(model["trained_context"])
            notes.append(
                f"{name}: made for {made_for} tokens; beyond, its time and bytes mean something, its words not"
            )
    return "\n".join([table(rows, ("model", "context", "ms/token", "cache")), *notes])


def methods_text(result: dict[str, Any]) -> str:
    """The result of `recipes.bench_methods_report.summary`: a table per teacher and group, and what follows from it."""
    from ..recipes.bench_methods_report import COLUMNS, TITLES, rows

    parts = []
    for teacher, groups in result["teachers"].items():
        for name, group in groups.items():
            lines = [f"{teacher}: {TITLES[name]}", table(rows(group), COLUMNS), *group["said"]]
            parts.append("\n".join(lines))
    failed = [f"{entry['arm']}, seed {entry['seed']}: {entry['error']}" for entry in result["failed"]]
    return "\n\n".join([*parts, *(["Failed\n" + "\n".join(failed)] if failed else [])])


def _alone(row: dict[str, Any]) -> list[tuple[str, ...]]:
    if "note" in row:
        return [(row["op"], "", "", "", row["note"])]
    lines = []
    for length, cell in row["lengths"].items():
        last = "cost_ratio" in row and length == max(row["lengths"])
        note = f"cost × {_spread(row, 'cost_ratio')}, memory × {row['memory_ratio']:.2f}" if last else ""
        bytes_per_token = f"{cell['bytes_per_token']:.0f}"
        lines.append((row["op"], context_name(length), f"{cell['us_per_token']:.1f}", bytes_per_token, note))
    return lines


def _against(row: dict[str, Any]) -> tuple[str, ...]:
    if not row.get("agrees"):
        return ("–", "–", "–", "–", "–", _error(row), _reason(row))
    times = _spread(row, "ratio"), f"{row['ours_ms']:.1f} ms", f"{row['theirs_ms']:.1f} ms"
    return (*times, bytes_name(row["ours_bytes"]), bytes_name(row["theirs_bytes"]), _error(row), "")


def _step(row: dict[str, Any]) -> tuple[str, ...]:
    if "extra_bytes" in row:
        return ("", f"{row['ours_us']:.0f} µs", "", str(row["extra_bytes"]), "", "")
    if not row.get("agrees"):
        return ("–", "–", "–", "", _error(row), _reason(row))
    ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})"
    return (ratio, f"{row['ours_us']:.0f} µs", f"{row['theirs_us']:.0f} µs", "", _error(row), "")


def _spread(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f} ({row[f'{name}_min']:.2f} to {row[f'{name}_max']:.2f})"


def _error(row: dict[str, Any]) -> str:
    return f"{row['error']:.0e}" if "error" in row else "–"


def _reason(row: dict[str, Any]) -> str:
    return row.get("note") or "not compared: they compute different things"


def model_text(result: dict[str, Any]) -> str:
    """The result of `bench model`: a line per model and length, then student over teacher, then what to know."""
    rows, ratios, notes = [], [], []
    for row in result["lengths"]:
        length = context_name(row["length"]) + ("*" if row["beyond_context"] else "")
        for side in ("student", "teacher"):
            if row[side] is not None:
                rows.append((side, length, *_model_figures(row[side])))
                notes += _cache_note(side, row)
        if row["ratios"] is not None:
            timed = (_spread(row["ratios"], name) for name in ("prefill_tokens_per_second", "decode_tokens_per_second"))
            sized = (row["ratios"][name] for name in ("peak_bytes", "cache_bytes", "batch_at_memory"))
            ratios.append((length, *timed, *("–" if value is None else f"{value:.3g}" for value in sized)))
    batch = f"batch in {bytes_name(result['settings']['memory'])}"
    header = ("model", "tokens", "prefill/s", "first token", "decode/s", "peak", "cache", batch)
    parts = [table(rows, header)]
    if ratios:
        header = ("tokens", "prefill", "decode", "peak", "cache", "batch")
        parts.append(f"Student over teacher, within a turn (all turns)\n{table(ratios, header)}")
    if any(row["beyond_context"] for row in result["lengths"]):
        notes.append("* beyond the context that the teacher was made for: its speed, not its sense")
    return "\n\n".join([*parts, "\n".join([*dict.fromkeys(notes), result["memory_is"]])])


def _model_figures(figures: dict[str, Any]) -> tuple[str, ...]:
    return (
        f"{figures['prefill_tokens_per_second']:.0f}",
        f"{figures['time_to_first_token']:.3f} s",
        f"{figures['decode_tokens_per_second']:.1f}",
        bytes_name(figures["peak_bytes"]),
        bytes_name(figures["cache_bytes"]),
        str(figures["batch_at_memory"]),
    )


def _cache_note(side: str, row: dict[str, Any]) -> list[str]:
    """Where the plan said something else of the cache."""
    found, planned = row[side]["cache_bytes"], row[side]["predicted_cache_bytes"]
    if planned in (None, found):
        return []
    return [f"{side}, {context_name(row['length'])}: the plan says {bytes_name(planned)} of cache"]


def draft_line(drafted: dict[str, Any], rate: float | None) -> str:
    """What drafting did in one generation, and what the two models hold once.

    Args:
        drafted: the "draft" of `generate --json`.
        rate: tokens per second behind the prompt, None where there were none.
    """
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    return (
        f"draft: {drafted['accepted']} of {drafted['drafted']} tokens accepted in {drafted['verifications']} "
        f"verifications, {drafted['accepted_per_verification']:.2f} each{speed}; shared: "
        f"{bytes_name(drafted['shared_bytes'])} of the draft's {bytes_name(drafted['draft_bytes'])} "
        f"({drafted['shared_tensors']} tensors)"
    )


def draft_text(result: dict[str, Any]) -> str:
    """The result of `bench draft`: a line per length, and what the two models hold once."""
    rows = []
    for row in result["lengths"]:
        rates = [f"{row[side]['decode_tokens_per_second']:.1f}" for side in ("target", "drafted")]
        ratios = [
            f"{row[name]:.2f} ({row[name + '_min']:.2f} to {row[name + '_max']:.2f})"
            for name in ("speed_up", "speed_up_whole")
        ]
        same = f"{row['identical']}/{row['prompts']}" + (f", {row['ties']} ties" if row["ties"] else "")
        length = context_name(row["length"]) + ("*" if row["beyond_context"] else "")
        accepted = f"{row['accepted_per_verification']:.2f}"
        rows.append((length, accepted, f"{row['acceptance']:.2f}", *rates, *ratios, same))
    header = ("tokens", "accepted", "share", "target/s", "drafted/s", "speed-up", "with prompt", "identical")
    shared = result["shared"]
    lines = [
        table(rows, header),
        f"shared: {shared['tensors']} tensors, {bytes_name(shared['bytes'])} of the draft's "
        f"{bytes_name(shared['draft_bytes'])}; the target has {bytes_name(shared['target_bytes'])}",
    ]
    if any(row["beyond_context"] for row in result["lengths"]):
        lines.append("* beyond the context that the target was made for: its speed, not its sense")
    return "\n\n".join(lines)
