"""Methods that run the student or the teacher with other layers converted, forward only."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

from ...eval.tasks.document import Document
from .evaluate import KL, RIGHT, TOKENS, Evaluator, estimate
from .scores import Scores, ranked


def restore_kl(evaluator: Evaluator) -> Scores:
    """KL(teacher || student) of the all-linear student with each layer's attention restored in turn; low: keep."""
    everything = set(evaluator.layers)
    sums = [evaluator.text(everything - {layer}) for layer in evaluator.layers]
    made = of_text("restore-kl", sums)
    made.details["all converted"] = _named(estimate(*_columns(evaluator.text(everything), KL)))
    return made


def replace_kl(evaluator: Evaluator) -> Scores:
    """KL(teacher || model) of the teacher with each layer converted in turn; high: keep."""
    return of_text("replace-kl", [evaluator.text({layer}) for layer in evaluator.layers])


def greedy_kl(evaluator: Evaluator, keep: int) -> Scores:
    """`restore_kl` again after each choice, with what was chosen restored: `keep` rounds.

    Scores are places: as many points as layers for the first choice, one less for each one after; layers that were not
    chosen follow by their KL in the last round. A gap is how much better a round's best layer is than its second.
    """
    chosen: list[int] = []
    rounds, gaps = [], []
    rest: list[int] = list(evaluator.layers)
    for _ in range(keep):
        sums = {layer: evaluator.text(set(evaluator.layers) - {*chosen, layer}) for layer in rest}
        kl = {layer: estimate(*_columns(sums[layer], KL)) for layer in rest}
        rest.sort(key=lambda layer: (kl[layer][0], layer))
        rounds.append({str(layer): _named(kl[layer]) for layer in rest})
        later = [_gap(sums[a], sums[b], KL) for a, b in pairwise(rest)]
        gaps.append(later[0] if later else (0.0, None))
        chosen.append(rest.pop(0))
        if len(chosen) == keep:
            gaps += later[1:]
    order = [*chosen, *rest]
    values = [float(len(order) - order.index(layer)) for layer in evaluator.layers]
    gaps = gaps[: len(order) - 1]
    return Scores("greedy-kl", values, None, gaps, keep, details={"rounds": rounds, "choices": chosen})


def recall_drop(evaluator: Evaluator) -> Scores:
    """Recall of the teacher minus recall of the teacher with each layer converted in turn; high: keep."""
    teacher = evaluator.recall(())
    sums = [evaluator.recall({layer}) for layer in evaluator.layers]
    asked = teacher[:, 1]
    pairs = [estimate(teacher[:, 0] - one[:, 0], asked) for one in sums]
    values = [value for value, _ in pairs]
    order = ranked(values, "keep")
    gaps = [estimate(sums[b][:, 0] - sums[a][:, 0], asked) for a, b in pairwise(order)]
    made = Scores("recall", values, _errors(pairs), [(abs(gap), error) for gap, error in gaps])
    made.notes, made.signal = recall_signal(teacher, evaluator.recall_documents)
    if made.signal and not any(value > 2 * (error or 0.0) for value, error in pairs):
        made.signal = False
        made.notes.append("converting any single layer costs recall less than two standard errors")
    made.details["teacher"] = _named(estimate(teacher[:, 0], asked))
    return made


def halo(evaluator: Evaluator) -> Scores:
    """HALO's score: recall lost over accuracy lost, each against the best single replacement (arXiv 2601.22156, §3).

        s_i = (max_j R_j - R_i) / max(max_j C_j - C_i, δ)

    R is recall, C the share of held-out tokens whose arg-max is right, in place of the paper's commonsense tasks, both
    of the teacher with layer i converted. δ is one standard error of a difference in C (paired, root mean square over
    the layers): the published denominator is 0 for the best layer. Errors by the delta method.
    """
    recall = [evaluator.recall({layer}) for layer in evaluator.layers]
    text = [evaluator.text({layer}) for layer in evaluator.layers]
    right = [estimate(one[:, 0], one[:, 1])[0] for one in recall]
    share = [estimate(*_columns(one, RIGHT))[0] for one in text]
    top_r, top_c = right.index(max(right)), share.index(max(share))
    lost_r = [estimate(recall[top_r][:, 0] - one[:, 0], one[:, 1]) for one in recall]
    lost_c = [estimate(text[top_c][:, RIGHT] - one[:, RIGHT], one[:, TOKENS]) for one in text]
    errors_c = [error or 0.0 for layer, (_, error) in enumerate(lost_c) if layer != top_c]
    delta = math.sqrt(sum(error**2 for error in errors_c) / max(1, len(errors_c))) or 1.0 / float(
        text[0][:, TOKENS].sum()
    )
    values, errors = [], []
    for (r, r_error), (c, c_error) in zip(lost_r, lost_c, strict=True):
        below = max(c, delta)
        values.append(r / below)
        errors.append(math.hypot(r_error or 0.0, (r / below) * (c_error or 0.0) if c > delta else 0.0) / below)
    order = ranked(values, "keep")
    gaps: list[tuple[float, float | None]] = [
        (values[a] - values[b], math.hypot(errors[a], errors[b])) for a, b in pairwise(order)
    ]
    made = Scores("halo", values, errors, gaps)
    made.notes, made.signal = recall_signal(evaluator.recall(()), evaluator.recall_documents)
    made.notes.append("commonsense is next-token accuracy on the held-out text")
    floored = [layer for layer, (c, _) in enumerate(lost_c) if c <= delta]
    made.details |= {"recall": right, "accuracy": share, "delta": delta, "denominator at delta": floored}
    return made


def of_text(method: str, sums: Sequence[Tensor]) -> Scores:
    """Scores that are KL on text, from each layer's sums by document, with paired gaps."""
    pairs = [estimate(*_columns(one, KL)) for one in sums]
    values = [value for value, _ in pairs]
    made = Scores(method, values, _errors(pairs))
    order = made.order
    made.gaps = [_gap(sums[a], sums[b], KL) for a, b in pairwise(order)]
    return made


def recall_signal(teacher: Tensor, documents: Sequence[Document]) -> tuple[list[str], bool]:
    """Whether the teacher recalls at all: its accuracy must exceed what guessing among the values said gives.

    Returns:
        Sentences, and False where scores by recall are noise.
    """
    accuracy, error = estimate(teacher[:, 0], teacher[:, 1])
    chance = sum(answer.chance for d in documents for answer in d.answers) / float(teacher[:, 1].sum())
    if accuracy > chance + 2 * (error or 0.0):
        return [], True
    said = f"the teacher recalls {100 * accuracy:.1f} % of what was said, guessing gives {100 * chance:.1f} %"
    return [f"{said}: these scores are noise"], False


def _columns(sums: Tensor, column: int) -> tuple[Tensor, Tensor]:
    return sums[:, column], sums[:, TOKENS]


def _gap(first: Tensor, second: Tensor, column: int) -> tuple[float, float | None]:
    """How far apart two choices are, and the paired error of that."""
    value, error = estimate(second[:, column] - first[:, column], first[:, TOKENS])
    return abs(value), error


def _errors(pairs: Sequence[tuple[float, float | None]]) -> list[float] | None:
    errors = [error for _, error in pairs if error is not None]
    return errors if len(errors) == len(pairs) else None


def _named(pair: tuple[float, float | None]) -> dict[str, float | None]:
    return {"value": pair[0], "stderr": pair[1]}


METHODS: dict[str, Callable[[Evaluator], Scores]] = {
    "restore-kl": restore_kl,
    "replace-kl": replace_kl,
    "recall": recall_drop,
    "halo": halo,
}
