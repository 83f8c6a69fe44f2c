"""`relinear select` on tiny teachers: what each method measures, what is taken up again, what is refused."""

from __future__ import annotations

import json
import random
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from relinear.distill.attention import AttentionHeads
from relinear.distill.data.packing import make_batch, padded_rows
from relinear.distill.data.tokenise import Tokens
from relinear.distill.data.windows import eval_batches
from relinear.distill.hybrid import Hybrid
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import load_teacher
from relinear.eval.fidelity import measure
from relinear.eval.tasks.document import Answer, Document
from relinear.launch.main import main
from relinear.recipes.layers import select as layers_of
from relinear.recipes.select import attention, forward, guided
from relinear.recipes.select.evaluate import Evaluator
from relinear.recipes.select.run import recall_documents, select

SMALL = [
    "stages.calibrate.tokens=1k",
    "stages.align.tokens=3k",
    "stages.align.batch=4",
    "data.seq_len=64",
    "eval.tokens=500",
]


@pytest.fixture(scope="module")
def teacher(make_teacher: Any) -> Path:
    return make_teacher("llama", num_hidden_layers=3)


def given(teacher: Path, text: Path) -> list[str]:
    return [f"teacher.model={teacher}", f"data.source={text}", *SMALL]


@pytest.fixture(scope="module")
def chosen(teacher: Path, story_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every method has run."""
    out = tmp_path_factory.mktemp("select") / "out"
    by = "restore-kl,all,kl-guided"
    options = {"keep": 2, "by": by, "out": out, "tokens": 1500, "tokens_per_layer": 600}
    select("gated_deltanet", [*given(teacher, story_file), "stages.glue.batch=4"], **options)
    return out


def tokens(lengths: tuple[int, ...] = (40, 70, 23, 31)) -> Tokens:
    rng = np.random.default_rng(5)
    ids = rng.integers(3, 300, sum(lengths)).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    scored = np.ones(len(ids), bool)
    scored[offsets[:-1]] = False
    return Tokens(ids, offsets, scored)


@pytest.fixture
def evaluator(make_teacher: Any, tmp_path: Path) -> Evaluator:
    """RWKV-7, whose layers are coupled, in a family whose logits are capped."""
    teacher = load_teacher(make_teacher("gemma2", num_hidden_layers=3))
    mixers, _ = transfer(teacher, dict.fromkeys(range(3), ("rwkv7", {})), seed=1)
    return Evaluator(Hybrid(teacher, mixers), tokens(), 32, recall_documents(teacher.tokenizer, 200)[:5], tmp_path)


def test_a_choice_is_measured_as_its_student_is(evaluator: Evaluator) -> None:
    """KL and its error, restored and replaced, against a student put together and the usual measurement."""
    teacher = evaluator.hybrid.teacher
    restored, replaced = forward.restore_kl(evaluator), forward.replace_kl(evaluator)
    for scores, converted in ((restored, [{1, 2}, {0, 2}, {0, 1}]), (replaced, [{0}, {1}, {2}])):
        for layer, choice in enumerate(converted):
            student = assemble(teacher, evaluator.hybrid.mixers_of(choice))
            wanted = measure(student, teacher.model, eval_batches(tokens(), 32, 2))
            assert scores.values[layer] == pytest.approx(wanted["kl"], rel=1e-4)
            assert scores.errors is not None
            assert scores.errors[layer] == pytest.approx(wanted["kl_stderr"], rel=1e-3)
            sums = evaluator.text(choice).sum(0)
            assert float(sums[1] / sums[0]) == pytest.approx(wanted["student"]["loss"], rel=1e-5)
    assert restored.order == sorted(range(3), key=lambda layer: restored.values[layer])
    assert replaced.order == sorted(range(3), key=lambda layer: -replaced.values[layer])
    difference = evaluator.text({0}) - evaluator.text({1})
    assert restored.gaps[0][0] == pytest.approx(restored.values[restored.order[1]] - restored.values[restored.order[0]])
    assert difference.shape == (4, 4)


def test_the_teacher_reads_the_text_once_and_nothing_is_measured_twice(evaluator: Evaluator) -> None:
    passes = []
    backbone = evaluator.hybrid.teacher.backbone
    handle = backbone.register_forward_hook(lambda *_: passes.append(1))
    batches = len(list(eval_batches(evaluator.tokens, 32, 8)))
    forward.restore_kl(evaluator)
    assert len(passes) == batches * (1 + 3 + 1)  # teacher, one layer restored, none
    forward.greedy_kl(evaluator, 2)
    assert len(passes) == batches * (5 + 2)  # the first round is restore-kl's
    again = Evaluator(evaluator.hybrid, evaluator.tokens, 32, evaluator.recall_documents, evaluator.folder)
    passes.clear()
    assert forward.restore_kl(again) == forward.restore_kl(evaluator) and passes == []
    with torch.no_grad():
        evaluator.hybrid.mixers[0].o_proj.weight.add_(0.1)
    other = Evaluator(evaluator.hybrid, evaluator.tokens, 32, evaluator.recall_documents, evaluator.folder)
    forward.replace_kl(other)
    handle.remove()
    assert len(passes) == batches * 3  # other mixers, the same teacher


def test_greedy_takes_the_best_layer_of_every_round(evaluator: Evaluator) -> None:
    def kl(kept: set[int]) -> float:
        sums = evaluator.text(set(range(3)) - kept).sum(0)
        return float(sums[2] / sums[0])

    first = min(range(3), key=lambda layer: kl({layer}))
    second = min(set(range(3)) - {first}, key=lambda layer: kl({first, layer}))
    made = forward.greedy_kl(evaluator, 2)
    assert made.order[:2] == [first, second] and made.chosen(1) == [first] and len(made.gaps) == 2
    assert made.details["choices"] == [first, second]


class Stub:
    """Measurements as a method sees them; every document alike but for `spread`."""

    def __init__(self, recall: list[float], right: list[float], teacher: float, spread: float = 0.0) -> None:
        self.layers = range(len(recall))
        self.values = {(): (teacher, 1.0)} | {(i,): pair for i, pair in enumerate(zip(recall, right, strict=True))}
        self.recall_documents = [Document([0] * 9, (Answer(5, 6, 0.25),) * 10) for _ in range(8)]
        self.noise = [(-1) ** i * spread for i in range(8)]

    def recall(self, converted: Any) -> torch.Tensor:
        value = self.values[tuple(converted)][0]
        return torch.tensor([[10 * value + n, 10.0] for n in self.noise], dtype=torch.float64)

    def text(self, converted: Any) -> torch.Tensor:
        value = self.values[tuple(converted)][1]
        scale = sum(converted) + 1
        return torch.tensor([[100, 0, 0, 100 * value + scale * n] for n in self.noise], dtype=torch.float64)


def test_recall_is_what_the_teacher_loses() -> None:
    made = forward.recall_drop(Stub([0.9, 0.2, 0.8], [1, 1, 1], teacher=0.9))  # type: ignore[arg-type]
    assert made.values == pytest.approx([0.0, 0.7, 0.1]) and made.order == [1, 2, 0] and made.signal
    assert made.gaps[0][0] == pytest.approx(0.6)


@pytest.mark.parametrize(("teacher", "lost", "words"), [(0.2, 0.1, "noise"), (0.9, 0.0, "two standard errors")])
def test_recall_without_signal_is_said(teacher: float, lost: float, words: str) -> None:
    stub = Stub([teacher - lost, teacher], [1, 1], teacher)
    made = forward.recall_drop(stub)  # type: ignore[arg-type]
    assert not made.signal and any(words in note for note in made.notes)


def test_halo_divides_by_no_less_than_a_standard_error() -> None:
    stub = Stub([0.9, 0.5, 0.5], [0.50, 0.499, 0.40], teacher=0.9, spread=2.0)
    made = forward.halo(stub)  # type: ignore[arg-type]
    delta = made.details["delta"]
    # paired differences to layer 0 alternate by ±2 and ±4 around -0.1 and 10 of 100 tokens in each of 8 documents
    wanted = [(8 * 8 / 7) ** 0.5 * width / 800 for width in (2.0, 4.0)]
    assert delta == pytest.approx((sum(w * w for w in wanted) / 2) ** 0.5)
    assert made.values == pytest.approx([0.0, 0.4 / delta, 0.4 / 0.1]) and made.order[0] == 1
    assert made.details["denominator at delta"] == [0, 1]


def test_lazy_is_the_mass_on_the_first_and_nearest_tokens(make_teacher: Any, tmp_path: Path) -> None:
    """Against weights that transformers gives out itself."""
    teacher = load_teacher(make_teacher("qwen2", num_hidden_layers=2), attn_implementation="eager")
    mixers, _ = transfer(teacher, dict.fromkeys(range(2), ("gated_deltanet", {})))
    made = attention.lazy(Evaluator(Hybrid(teacher, mixers), tokens((50, 60, 6)), 64, [], tmp_path))
    sums, count = [0.0, 0.0], 0
    recent = 64 // attention.RECENT_SHARE
    for start, stop in ((0, 50), (50, 110)):
        ids = torch.from_numpy(tokens((50, 60, 6)).ids[start:stop].astype(np.int64))[None]
        out = teacher.model(ids, output_attentions=True)
        for query in range(attention.SINK + recent, stop - start):
            near = [key for key in range(query + 1) if key < attention.SINK or key > query - recent]
            count += 1
            for layer in range(2):
                sums[layer] += float(out.attentions[layer][0, :, query, near].sum(-1).mean())
    assert made.values == pytest.approx([value / count for value in sums], rel=1e-4)
    assert made.higher_is == "convert" and made.errors is not None and made.signal


def test_short_text_gives_lazy_nothing(make_teacher: Any, tmp_path: Path) -> None:
    teacher = load_teacher(make_teacher("qwen2", num_hidden_layers=2))
    mixers, _ = transfer(teacher, dict.fromkeys(range(2), ("gated_deltanet", {})))
    made = attention.lazy(Evaluator(Hybrid(teacher, mixers), tokens((5, 6)), 64, [], tmp_path))
    assert not made.signal and "says nothing" not in made.notes and made.values == [1.0, 1.0]


def test_a_copy_is_found_after_its_own_key() -> None:
    """Two keys with the same value, and a value of two tokens."""
    ids = [1, 50, 60, 7, 8, 51, 7, 8, 52, 7, 9, 99, 51, 7, 8, 52, 7, 9]
    document = Document(ids, (Answer(13, 15, 0.5), Answer(16, 18, 0.5)))
    wanted = [(13, range(6, 8)), (14, range(6, 8)), (16, range(9, 11)), (17, range(9, 11))]
    assert [(at, needle) for at, needle, _ in attention.copies(document)] == wanted


def test_a_head_is_at_work_where_it_looks_at_the_same_token_in_the_needle() -> None:
    """Three heads at the token before the answer: on the value, on its copy outside the needle, on the key."""
    document = Document([1, 7, 50, 7, 99, 50, 7], (Answer(6, 7, 0.5),))
    batch = make_batch(padded_rows([(np.array(document.ids, np.int32), np.ones(7, bool))]))
    keys = torch.eye(7)[None, None].expand(1, 3, 7, 7)
    queries = torch.zeros(1, 3, 7, 7)
    for head, place in enumerate((3, 1, 2)):
        queries[0, head, 5, place] = 20.0
    ((at, needle, whole),) = attention.copies(document)
    heads = AttentionHeads(q=queries, k=keys, v=keys, scale=1.0, softcap=None, window=None)
    hits = attention._hits(heads, batch, [(0, at, needle, whole)])
    assert (at, needle, whole) == (6, range(3, 4), range(6, 7)) and hits.tolist() == [[1.0, 0.0, 0.0]]


def test_retrieval_heads_count_where_the_teacher_is_right(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random teacher is never right: noise. Told that it is, counts are those of every head's arg-max."""
    made = attention.retrieval_heads(evaluator)
    assert not made.signal and made.values == [0.0, 0.0, 0.0]
    listen = attention._listen

    def right(evaluator: Any, batch: Any, *rest: Any, **more: Any) -> torch.Tensor:
        listen(evaluator, batch, *rest, **more)
        return torch.roll(batch.input_ids, -1, 1)

    monkeypatch.setattr(attention, "_listen", right)
    made = attention.retrieval_heads(evaluator)
    said = sum(len(attention.copies(document)) for document in evaluator.recall_documents)
    assert made.details["answer tokens counted"] == said > 10
    assert max(made.values) > 0 and all(0 <= head["score"] <= 1 for head in made.details["heads"])


def test_recall_documents_fit_and_are_the_same_again(llama: Path) -> None:
    tokenizer = load_teacher(llama).tokenizer
    documents = recall_documents(tokenizer, 256)
    assert len(documents) > 10 and max(len(one.ids) for one in documents) <= 256
    assert [one.ids for one in recall_documents(tokenizer, 256)] == [one.ids for one in documents]
    assert recall_documents(tokenizer, 16) == []


def test_every_method_writes_what_layers_keep_reads(chosen: Path) -> None:
    result = json.loads((chosen / "select.json").read_text())
    assert len(result["methods"]) == 12 and result["decides"] == "restore-kl"
    for name, scores in result["methods"].items():
        path = chosen / "methods" / f"{name}.json"
        assert layers_of({"scores": str(path), "top": 2}, 3) == scores["chosen"]
    assert layers_of({"scores": str(chosen / "scores.json"), "top": 2}, 3) == result["chosen"]
    assert {name for row in result["sets"] for name in row["methods"]} == set(result["methods"])
    assert (chosen / "scores.png").stat().st_size > 10_000
    assert not result["methods"]["recall"]["signal"] and "recall" not in str(result["methods"]["combined"]["details"])
    for name in ("restore-kl", "replace-kl", "lazy", "kl-guided"):
        assert all(error > 0 for error in result["methods"][name]["stderr"].values()), name


def test_a_recipe_keeps_what_was_chosen(chosen: Path, teacher: Path, story_file: Path, tmp_path: Path) -> None:
    keep = f"layers.keep={{scores: {chosen / 'scores.json'}, top: 2}}"
    assert main(["plan", "gated_deltanet", *given(teacher, story_file), keep]) == 0


def test_trained_scores_start_from_the_restored_student_and_go_on_layer_by_layer(
    chosen: Path, teacher: Path, story_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = json.loads((chosen / "select.json").read_text())["methods"]
    assert result["kl-guided"]["scores"] != result["restore-kl"]["scores"]
    (folder,) = (path for path in (chosen / "cache").glob("kl-guided-*") if path.is_dir())
    assert sorted(path.name for path in folder.iterdir()) == ["0.json", "1.json", "2.json"]
    (folder / "1.json").unlink()
    next(path for path in (chosen / "cache").glob("kl-guided-*.json")).unlink()
    trained = []
    train = guided._train
    monkeypatch.setattr(guided, "_train", lambda *a: trained.append(a[-2]) or train(*a))
    options = {"keep": 2, "by": "kl-guided", "out": chosen, "tokens": 1500, "tokens_per_layer": 600}
    again = select("gated_deltanet", [*given(teacher, story_file), "stages.glue.batch=4"], **options)
    assert trained == [1] and again["methods"]["kl-guided"]["scores"] == result["kl-guided"]["scores"]
    assert (chosen / "scores-restore-kl-2.json").exists()  # what scores.json held before


def test_the_command_prints_tables_or_json(
    chosen: Path, teacher: Path, story_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From what is there: nothing is measured again. --run takes the same student."""
    out = ["--out", str(chosen), "--tokens", "1500"]
    assert main(["select", "gated_deltanet", *given(teacher, story_file), "--keep", "2", *out]) == 0
    text, talk = capsys.readouterr()
    assert text.startswith("2 of 3 layers keep their attention: ") and "uniform" in text
    assert talk.rstrip().splitlines()[-1].startswith("Next: relinear run gated_deltanet")
    other = ["--run", str(chosen / "student"), "--out", str(chosen.parent / "other"), "--tokens", "1500", "--json"]
    assert (
        main(["select", "gated_deltanet", *given(teacher, story_file), "--keep", "2", "--by", "restore-kl", *other])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    wanted = json.loads((chosen / "methods" / "restore-kl.json").read_text())
    assert found["methods"]["restore-kl"]["scores"] == wanted["scores"] and "table" not in found
    assert set(found["methods"]) == {"restore-kl", "uniform"}


def test_an_unfinished_align_needs_resume(
    teacher: Path, story_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from relinear.distill import loop

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    arguments = ["select", "gated_deltanet", *given(teacher, story_file), "--keep", "1", "--by", "restore-kl"]
    arguments += ["--tokens", "500", "--out", str(tmp_path / "out")]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop._Run, "_check_end", killed)
        select(arguments[1], given(teacher, story_file), keep=1, out=tmp_path / "out")
    assert main(arguments) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--by", "restore-lk"], "restore-kl"),
        (["--keep", "3"], "Give 1 to 2"),
        (["--keep", "0"], "Give 1 to 2"),
        (["--tokens", "many"], "--tokens"),
        (["--tokens-per-layer", "0"], "at least 1"),
        (["--run", "nowhere"], "nowhere"),
        (["--run", "OTHER"], "same teacher"),
        (["--run", "PLAIN"], "no align stage"),
        (["--run", "STUDENT", "layers.mixer=gla"], "gated_deltanet"),
        (["stages=[{transfer: {}}]"], "stages: there is no align"),
        (["--by", "kl-guided", "stages=[{transfer: {}}, {align: {tokens: 1k}}]"], "no glue stage"),
    ],
)
def test_wrong_input(
    chosen: Path, teacher: Path, story_file: Path, tmp_path: Path, capsys: Any, options: list[str], words: str
) -> None:
    record = json.loads((chosen / "student" / "run.json").read_text())
    changed = {"OTHER": {"teacher": {**record["teacher"], "source": "another"}}, "PLAIN": {"stages": []}}
    for name, change in changed.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record | change))
    places = {"OTHER": str(tmp_path / "OTHER"), "PLAIN": str(tmp_path / "PLAIN"), "STUDENT": str(chosen / "student")}
    options = [places.get(option, option) for option in options]
    out = ["--out", str(tmp_path / "out")]
    assert main(["select", "gated_deltanet", *given(teacher, story_file), "--keep", "1", *options, *out]) == 2
    text, talk = capsys.readouterr()
    errors = [line for line in talk.splitlines() if line.startswith("error: ")]
    assert text == "" and len(errors) == 1 and words in errors[0], talk


def test_a_run_that_keeps_a_layer_is_refused(chosen: Path, teacher: Path, story_file: Path, tmp_path: Path) -> None:
    record = json.loads((chosen / "student" / "run.json").read_text())
    del record["layers"]["1"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(Exception, match="keeps the attention of layer 1"):
        select("gated_deltanet", given(teacher, story_file), keep=1, run=tmp_path, out=tmp_path / "out")


def test_few_documents_are_counted_by_window(teacher: Path, tmp_path: Path) -> None:
    """One long text: its windows stand for documents, and that is said."""
    rng = random.Random(2)
    (tmp_path / "book.txt").write_text(" ".join(rng.choice(["tom", "had", "a", "kite", "red"]) for _ in range(4000)))
    (tmp_path / "valid.txt").write_text(" ".join(rng.choice(["tom", "had", "a", "kite", "red"]) for _ in range(900)))
    changes = [f"teacher.model={teacher}", f"data.source={tmp_path / 'book.txt'}", *SMALL]
    changes.append(f"data.valid={tmp_path / 'valid.txt'}")
    result = select("gated_deltanet", changes, keep=1, by="restore-kl", out=tmp_path / "out", tokens=800)
    assert result["text"]["documents"] > 8 and any("windows stand for" in note for note in result["notes"])
    assert result["methods"]["restore-kl"]["stderr"]["0"] > 0


def test_coupled_layers_and_a_recipe_that_changes_kept_attention(
    teacher: Path, story_file: Path, tmp_path: Path
) -> None:
    """RWKV-7's lowest layer restored; layers.attention, which only glue follows, does not disturb."""
    changes = [*given(teacher, story_file), "layers.keep=1", "layers.attention.rope=false"]
    result = select("rwkv7", changes, keep=1, by="greedy-kl,restore-kl", out=tmp_path / "out", tokens=600)
    assert types.SimpleNamespace(**result).status == "complete"
    assert result["methods"]["greedy-kl"]["chosen"] == result["methods"]["restore-kl"]["chosen"]
