"""Fidelity against a per-document computation in fp64 that shares no code with it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from relinear.distill.data.batch import Batch
from relinear.distill.errors import RunFailed
from relinear.eval.fidelity import clustered_mean, measure

WINDOW = 24
BOS = 1
LENGTHS = (9, 61, 4, 24, 25, 2, 40, 13, 24, 3)


def documents(vocab: int = 320) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [[BOS, *torch.randint(3, vocab, (n - 1,), generator=generator).tolist()] for n in LENGTHS]


def windows(ids: list[int]) -> list[list[int]]:
    """Pieces of at most WINDOW tokens; each but the first begins with the last token of the one before."""
    starts = range(0, max(1, len(ids) - 1), WINDOW - 1)
    return [ids[s : s + WINDOW] for s in starts]


def packed(docs: list[list[int]], rows: int) -> Iterator[tuple[Batch, torch.Tensor]]:
    """First fit into rows of WINDOW positions, `rows` of them at a time, padded at the end."""
    pieces = [(number, piece) for number, ids in enumerate(docs) for piece in windows(ids)]
    packs: list[list[tuple[int, list[int]]]] = []
    for number, piece in pieces:
        for pack in packs:
            if sum(len(p) for _, p in pack) + len(piece) <= WINDOW:
                pack.append((number, piece))
                break
        else:
            packs.append([(number, piece)])
    for first in range(0, len(packs), rows):
        group = packs[first : first + rows]
        ids = torch.full((len(group), WINDOW), 2)
        position, segment, document = (torch.zeros(len(group), WINDOW, dtype=torch.long) for _ in range(3))
        real, target = (torch.zeros(len(group), WINDOW, dtype=torch.bool) for _ in range(2))
        for r, pack in enumerate(group):
            at = 0
            for s, (number, piece) in enumerate(pack):
                span = slice(at, at + len(piece))
                ids[r, span], position[r, span] = torch.tensor(piece), torch.arange(len(piece))
                segment[r, span], document[r, span], real[r, span] = s, number, True
                target[r, at + 1 : at + len(piece)] = True
                at += len(piece)
            segment[r, at:] = torch.arange(len(pack), len(pack) + WINDOW - at)
        yield Batch(ids, position, segment, real, target), document


def brute_force(student: Any, teacher: Any, docs: list[list[int]]) -> dict[str, Any]:
    """Every window alone through fp64 models, and the formulas of the module's docstring written out in floats."""
    student, teacher = (load_double(m) for m in (student, teacher))
    rows = []
    for ids in docs:
        sums = [0.0] * 5
        for piece in windows(ids):
            with torch.no_grad():
                q, p = (m(input_ids=torch.tensor([piece])).logits[0].log_softmax(-1) for m in (student, teacher))
            for t in range(1, len(piece)):
                kl = float((p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum())
                agree = float(q[t - 1].argmax() == p[t - 1].argmax())
                values = (1.0, -float(q[t - 1, piece[t]]), -float(p[t - 1, piece[t]]), kl, agree)
                sums = [a + b for a, b in zip(sums, values, strict=True)]
        rows.append(sums)

    def estimate(values: list[float]) -> tuple[float, float]:
        total, count = sum(r[0] for r in rows), len(rows)
        mean = sum(values) / total
        spread = sum((v - mean * r[0]) ** 2 for v, r in zip(values, rows, strict=True))
        return mean, math.sqrt(spread * count / (count - 1)) / total

    loss, loss_se = estimate([r[1] for r in rows])
    teacher_loss, teacher_se = estimate([r[2] for r in rows])
    log_ratio, ratio_se = estimate([r[1] - r[2] for r in rows])
    kl, kl_se = estimate([r[3] for r in rows])
    agree, agree_se = estimate([r[4] for r in rows])
    return {
        "student": one_model(loss, loss_se),
        "teacher": one_model(teacher_loss, teacher_se),
        "perplexity_ratio": math.exp(log_ratio),
        "perplexity_ratio_stderr": math.exp(log_ratio) * ratio_se,
        "kl": kl,
        "kl_stderr": kl_se,
        "top1_agreement": agree,
        "top1_agreement_stderr": agree_se,
        "tokens": int(sum(r[0] for r in rows)),
        "documents": len(rows),
    }


def one_model(loss: float, stderr: float) -> dict[str, float]:
    perplexity = math.exp(loss)
    return {
        "perplexity": perplexity,
        "perplexity_stderr": perplexity * stderr,
        "loss": loss,
        "loss_stderr": stderr,
    }


def load_double(model: Any) -> Any:
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.double().eval()


def flat(result: dict[str, Any]) -> dict[str, float]:
    inner = {f"{k}.{kk}": vv for k, v in result.items() if isinstance(v, dict) for kk, vv in v.items()}
    return inner | {k: v for k, v in result.items() if not isinstance(v, dict)}


@pytest.fixture(scope="module")
def pair(make_teacher) -> tuple[Any, Any]:
    """(student, teacher): two llamas that differ a little."""
    from transformers import AutoModelForCausalLM

    models = [AutoModelForCausalLM.from_pretrained(make_teacher("llama")).eval() for _ in range(2)]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return models[0], models[1]


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("chunk_elements", [None, 320 * 5])
def test_equals_brute_force(pair, rows, chunk_elements):
    expected = brute_force(*pair, documents())
    found = measure(*pair, packed(documents(), rows), chunk_elements=chunk_elements)
    assert list(found) == list(expected)
    assert [list(found[k]) for k in ("student", "teacher")] == [list(expected[k]) for k in ("student", "teacher")]
    assert flat(found) == pytest.approx(flat(expected), rel=2e-5)
    assert found["tokens"] == sum(LENGTHS) - len(LENGTHS)
    assert found["documents"] == len(LENGTHS)
    assert 0 < found["kl"] < 2
    assert 0 < found["top1_agreement"] < 1


class Capped(torch.nn.Module):
    """A model that does something between head and logits, so that backbone + head is not the model."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.model, self.lm_head, self.config = inner, inner.model, inner.lm_head, inner.config
        self.rows_seen: list[int] = []

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def forward(self, input_ids, position_ids=None, use_cache=False):
        self.rows_seen.append(input_ids.shape[0])
        out = self.inner(input_ids=input_ids, position_ids=position_ids, use_cache=use_cache)
        return SimpleNamespace(logits=out.logits.tanh())


def test_logits_that_are_more_than_the_head_are_taken_from_the_model_row_by_row(pair):
    capped = Capped(pair[0])
    found = measure(capped, pair[1], packed(documents(), 3))
    assert set(capped.rows_seen) == {1}
    plain = measure(*pair, packed(documents(), 3))
    assert found["teacher"] == plain["teacher"]
    # tanh is bounded by 1: no token can be likelier than e^2 times another.
    low, high = math.log(320) - 2, math.log(320) + 2
    assert low < found["student"]["loss"] < high
    assert found["student"]["loss"] != pytest.approx(plain["student"]["loss"], rel=1e-3)


class Unpackable(torch.nn.Module):
    """A model of a family nobody knows: no position_ids, and what stands earlier in the row is always seen."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner, self.config = inner, SimpleNamespace(model_type="stranger")

    def get_output_embeddings(self) -> Any:
        return self.inner.lm_head

    def forward(self, input_ids, use_cache=False):
        return self.inner(input_ids=input_ids, use_cache=use_cache)


@pytest.mark.parametrize("rows", [1, 4])
def test_unknown_family_gets_one_document_per_row(pair, rows):
    expected = flat(measure(*pair, packed(documents(), rows)))
    assert flat(measure(Unpackable(pair[0]), pair[1], packed(documents(), rows))) == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("same_object", [True, False])
def test_a_model_against_itself(pair, same_object, make_teacher):
    from transformers import AutoModelForCausalLM

    other = pair[1] if same_object else AutoModelForCausalLM.from_pretrained(make_teacher("llama")).eval()
    found = measure(other, pair[1], packed(documents(), 4))
    assert (found["kl"], found["perplexity_ratio"], found["top1_agreement"]) == (0.0, 1.0, 1.0)
    assert (found["kl_stderr"], found["perplexity_ratio_stderr"], found["top1_agreement_stderr"]) == (0.0, 0.0, 0.0)
    assert found["student"] == found["teacher"]


def test_one_model_alone(pair):
    found = measure(pair[0], None, packed(documents(), 4))
    assert list(found) == ["student", "tokens", "documents"]
    assert found["student"] == measure(*pair, packed(documents(), 4))["student"]


class Fixed(torch.nn.Module):
    """Predicts the same distribution everywhere."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="stranger")
        self.logits = torch.nn.Parameter(torch.tensor(probabilities).log())

    def get_output_embeddings(self) -> Any:
        return torch.nn.Linear(1, len(self.logits))

    def forward(self, input_ids, use_cache=False):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def test_known_distributions():
    q, p = Fixed([0.5, 0.25, 0.125, 0.125]), Fixed([0.25, 0.5, 0.125, 0.125])
    found = measure(q, p, packed([[1, 0, 1, 2], [1, 3], [1, 0, 0]], 2))
    student = (3 * math.log(2) + math.log(4) + 2 * math.log(8)) / 6  # targets 0 1 2 | 3 | 0 0
    teacher = (3 * math.log(4) + math.log(2) + 2 * math.log(8)) / 6
    assert found["tokens"] == 6
    assert found["student"]["loss"] == pytest.approx(student, rel=1e-6)
    assert found["perplexity_ratio"] == pytest.approx(math.exp(student - teacher), rel=1e-6)
    assert found["kl"] == pytest.approx(0.25 * math.log(0.5) + 0.5 * math.log(2), rel=1e-6)  # teacher's expectation
    assert found["kl_stderr"] == pytest.approx(0, abs=1e-7)
    assert found["top1_agreement"] == 0
    assert measure(Fixed([0.25] * 4), None, packed([[1, 0, 3], [1, 2]], 1))["student"]["perplexity"] == pytest.approx(4)


def test_pieces_of_one_document_are_one_cluster(pair):
    whole = measure(*pair, packed(documents(), 3))
    apart = measure(*pair, (batch for batch, _ in packed(documents(), 3)))  # every segment a document of its own
    assert apart["documents"] == sum(len(windows(ids)) for ids in documents()) > whole["documents"]
    assert apart["kl"] == pytest.approx(whole["kl"], rel=1e-12)
    assert apart["kl_stderr"] != pytest.approx(whole["kl_stderr"], rel=1e-3)


def test_clustered_error_agrees_with_the_bootstrap():
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(5, 60, (200,), generator=generator).double()
    level = torch.randn(200, generator=generator).double()  # shared by all tokens of a document
    noise = torch.randn(200, generator=generator).double() * tokens.sqrt()
    sums = tokens * (2 + level) + noise
    mean, stderr = clustered_mean(sums, tokens)
    draws = torch.randint(0, 200, (4000, 200), generator=generator)
    bootstrap = sums[draws].sum(1) / tokens[draws].sum(1)
    assert stderr == pytest.approx(float(bootstrap.std()), rel=0.06)
    assert mean == pytest.approx(float(sums.sum() / tokens.sum()))
    by_token = math.sqrt(2.0 / float(tokens.sum()))  # what treating tokens as independent would claim
    assert stderr > 3 * by_token


def test_single_document_has_no_standard_error(pair):
    found = measure(*pair, packed(documents()[1:2], 2))
    assert found["documents"] == 1
    assert [found[k] for k in ("kl_stderr", "perplexity_ratio_stderr", "top1_agreement_stderr")] == [None] * 3
    assert found["student"]["perplexity_stderr"] is None


def test_progress_and_modes(pair):
    calls = []
    pair[0].train()
    measure(*pair, packed(documents(), 2), progress=lambda done, total: calls.append((done, total)), total=195)
    assert pair[0].training and not pair[1].training
    pair[0].eval()
    done = [d for d, _ in calls]
    assert len(done) > 2 and done == sorted(done) and calls[-1] == (sum(LENGTHS) - len(LENGTHS), 195)


def test_refusals(pair):
    with pytest.raises(ValueError, match="no target token"):
        measure(*pair, [])
    with pytest.raises(ValueError, match="different size: 4 and 3"):
        measure(Fixed([0.25] * 4), Fixed([1 / 3] * 3), packed([[1, 0]], 1))
    with pytest.raises(RunFailed, match="document 0 is not finite"):
        measure(Fixed([math.nan] * 4), None, packed([[1, 0], [1, 2]], 1))
    batch, _ = next(packed(documents(), 2))
    batch.targets[0, 0] = True
    with pytest.raises(ValueError, match="nothing predicts it"):
        measure(*pair, [batch])
