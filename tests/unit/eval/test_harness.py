"""lm-eval's tasks on two models: figures, recovery, parts that are taken up, the same batches after a kill, errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill.errors import MachineError, UserError
from relinear.distill.teacher import load_model
from relinear.eval import harness
from relinear.eval.answers import AnswerFile
from relinear.eval.core import core_suite
from relinear.eval.core_table import to_text
from relinear.eval.harness import choose_tasks
from relinear.eval.local_tasks import local_tasks
from relinear.eval.models import Models, open_models

WORDS = ["ball", "kite", "red box", "small dog", "garden", "house", "lake", "park"]


def lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Files for some of the shipped tasks, in the forms that they have."""
    folder = tmp_path_factory.mktemp("data")
    four = [
        {"query": f"Question: What did Tom have, {i}?", "choices": WORDS[:4], "gold": i % 4} for i in range(14)
    ]  # 14 and 11 documents: the last batch is not full
    lines(folder / "foundry" / "arc_easy.jsonl", four)
    pairs = [{"sentence_good": f"Tom has a {w}.", "sentence_bad": f"Tom have a {w}."} for w in WORDS]
    for name in ("agreement", "island"):
        lines(folder / "blimp" / f"{name}.jsonl", pairs)
    options = ["Mia saw Tom in the park so Mia", "Mia saw Tom in the park so Tom"]
    lines(
        folder / "foundry" / "winogrande.jsonl",
        [
            {"context_options": options, "continuation": f"was happy with the {w}.", "gold": i % 2}
            for i, w in enumerate(WORDS)
        ],
    )
    last = [{"context": f"Tom had a {w}. Mia saw the", "continuation": w} for w in WORDS]
    lines(folder / "foundry" / "lambada_openai.jsonl", last)
    lines(folder / "foundry" / "svamp.jsonl", [{"context": f"Tom has {i} balls.", "answer": str(i)} for i in range(11)])
    (folder / "mmlu" / "dev").mkdir(parents=True)
    rows = "\n".join(f"What is {i}?,{i},b,c,d,0" for i in range(5))
    (folder / "mmlu" / "dev" / "anatomy_dev.csv").write_text(
        f"question,choice0,choice1,choice2,choice3,answer\n{rows}\n"
    )
    return folder


@pytest.fixture(scope="module")
def student(llama, tmp_path_factory) -> Path:
    """The teacher with other weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("student")
    model = AutoModelForCausalLM.from_pretrained(llama)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(llama).save_pretrained(folder)
    return folder


@pytest.fixture
def models(student, llama) -> Models:
    return open_models(str(student), str(llama), device="cpu")


ALL = ["local_arc_easy", "local_blimp", "local_lambada", "local_mmlu", "local_winogrande", "local_svamp"]


@pytest.fixture(scope="module")
def measured(student, llama, data, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """(results folder, result) of all tasks."""
    folder = tmp_path_factory.mktemp("results")
    chosen = choose_tasks(ALL, data=data, task_dir=None, folder=folder / "tasks")
    return folder, core_suite(open_models(str(student), str(llama), device="cpu"), chosen, folder / "parts")


def test_every_task_has_its_figures(measured):
    tasks = measured[1]["tasks"]
    assert list(tasks) == ALL
    counts = {name: task["n"] for name, task in tasks.items()}
    assert counts == dict(zip(ALL, (14, 16, 8, 5, 8, 11), strict=True))
    chances = {name: task["chance"] for name, task in tasks.items()}
    assert chances == dict(zip(ALL, (0.25, 0.5, None, 0.25, 0.5, None), strict=True))
    for task in tasks.values():
        assert 0 <= task["student"]["value"] <= 1 and task["student"]["stderr"] is not None
    assert set(tasks["local_arc_easy"]["figures"]) == {"acc,none", "acc_norm,none"}
    assert list(tasks["local_blimp"]["subtasks"]) == ["local_blimp::agreement", "local_blimp::island"]
    mean = measured[1]["mean"]
    assert mean["tasks"] == 6 and mean["chance"] is None
    assert mean["teacher"]["value"] == pytest.approx(sum(task["teacher"]["value"] for task in tasks.values()) / 6)
    assert "local_winogrande" in to_text(measured[1]) and "limit" not in to_text(measured[1])


def by_hand(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Log-probability of a continuation, one request alone."""
    whole, first = tokenizer(context + continuation)["input_ids"], len(tokenizer(context)["input_ids"])
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, whole[i]]) for i in range(first, len(whole)))


def test_a_task_by_hand(measured, student, llama, data):
    """Scores, and the recovery's error from the pairs of answers, without the harness."""
    records = [json.loads(line) for line in (data / "foundry" / "arc_easy.jsonl").read_text().splitlines()]
    right: dict[str, list[float]] = {}
    for side, folder in (("student", student), ("teacher", llama)):
        model, tokenizer = load_model(folder)
        for record in records:
            scores = [
                by_hand(model, tokenizer, record["query"] + "\nAnswer:", f" {choice}") for choice in record["choices"]
            ]
            right.setdefault(side, []).append(float(scores.index(max(scores)) == record["gold"]))
    task = measured[1]["tasks"]["local_arc_easy"]
    for side, values in right.items():
        assert task[side]["value"] == pytest.approx(sum(values) / 14)
    s, t = (torch.tensor(right[side]) for side in ("student", "teacher"))
    r = float(s.mean() / t.mean())
    spread = float((s - r * t).std() / t.mean()) / 14**0.5
    assert task["recovery"]["value"] == pytest.approx(r)
    assert task["recovery"]["stderr"] == pytest.approx(spread)


def test_finished_parts_need_no_model(measured, models, data, monkeypatch):
    """The same tasks again, and another selection of them, load nothing."""
    folder, result = measured
    monkeypatch.setattr(Models, "get", lambda *_: pytest.fail("a model was loaded"))
    chosen = choose_tasks(ALL[:2], data=data, task_dir=None, folder=folder / "tasks")
    assert core_suite(models, chosen, folder / "parts")["tasks"] == {name: result["tasks"][name] for name in ALL[:2]}
    with pytest.raises(pytest.fail.Exception, match="loaded"):  # other settings are other parts
        core_suite(models, chosen, folder / "parts", limit=3)


@pytest.mark.parametrize("task", ["local_arc_easy", "local_svamp"])
def test_a_killed_task_goes_on_with_the_same_batches(task, student, llama, data, measured, tmp_path, monkeypatch):
    models = open_models(str(student), None, device="cpu")
    chosen = choose_tasks([task], data=data, task_dir=None, folder=tmp_path / "tasks")
    seen: list[torch.Tensor] = []
    model = models.get("student")[0]
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0] if args else kwargs["input_ids"]).clone()), with_kwargs=True
    )
    whole = core_suite(models, chosen, tmp_path / "whole", batch=4)
    asked, count = list(seen), len(seen)
    seen.clear()
    flush, calls = AnswerFile.flush, []

    def killed(self: AnswerFile) -> None:
        flush(self)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(AnswerFile, "flush", killed)
    with pytest.raises(KeyboardInterrupt):
        core_suite(models, chosen, tmp_path / "killed", batch=4)
    monkeypatch.setattr(AnswerFile, "flush", flush)
    (kept,) = (tmp_path / "killed").glob("*.answers.jsonl")
    with kept.open("a") as file:
        file.write('{"cut')  # what a kill in the middle of a write leaves
    again = core_suite(models, chosen, tmp_path / "killed", batch=4)
    assert again["tasks"] == whole["tasks"] and not kept.exists()
    assert len(seen) == count and all(torch.equal(a, b) for a, b in zip(seen, asked, strict=True))


def test_generation_in_padded_batches_says_what_one_by_one_says(student, data, tmp_path):
    models = open_models(str(student), None, device="cpu")
    chosen = choose_tasks(["local_svamp"], data=data, task_dir=None, folder=tmp_path / "tasks")
    loaded = harness.load_tasks(chosen)["local_svamp"]
    said = []
    for batch in (1, 5):
        wrapped = harness.harness_model(*models.get("student"), batch)
        wrapped.keep(AnswerFile(None))
        harness.run_task(wrapped, loaded, limit=5)
        said.append([request.resps for request in loaded["tasks"]["local_svamp"].instances])
    assert said[0] == said[1] and any(text for (text,) in said[0])


def test_own_definitions(models, data, tmp_path):
    """A folder of the user's own YAML, and examples in the prompt."""
    own = tmp_path / "own"
    own.mkdir()
    text = next(task.text for task in local_tasks(data) if task.name == "local_arc_easy")
    text = text.replace("task: local_arc_easy", "task: mine\nfewshot_split: test")
    (own / "mine.yaml").write_text(text)
    chosen = choose_tasks(None, data=None, task_dir=own, folder=tmp_path / "tasks")
    assert chosen.names == ("mine",)
    result = core_suite(models, chosen, tmp_path / "parts", limit=4, num_fewshot=2)
    assert result["tasks"]["mine"]["n"] == 4 and result["tasks"]["mine"]["fewshot"] == 2
    assert "first 4 documents" in to_text(result)
    (own / "mine.yaml").write_text(text.replace("Answer:", "Reply:"))
    changed = choose_tasks(None, data=None, task_dir=own, folder=tmp_path / "tasks")
    assert changed.digests != chosen.digests


def test_what_is_chosen_and_what_is_missing(data, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--data .*holds none of the files"):
        choose_tasks(None, data=tmp_path, task_dir=None, folder=tmp_path)
    assert choose_tasks(None, data=data, task_dir=None, folder=tmp_path).names == tuple(sorted(ALL[:5]))
    assert choose_tasks(None, data=data, task_dir=None, folder=tmp_path, generates=True).names == ("local_svamp",)
    assert choose_tasks(None, data=None, task_dir=None, folder=tmp_path).names == harness.CORE

    def missing(name: str) -> str:
        raise harness.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(harness.metadata, "version", missing)
    with pytest.raises(MachineError, match=r'pip install "relinear\[eval\]"'):
        harness.require_harness()


@pytest.mark.slow  # the harness reads its 14,000 definitions
def test_names_of_the_harness(models, data, tmp_path):
    def load(*names: str) -> None:
        harness.load_tasks(choose_tasks(names, data=data, task_dir=None, folder=tmp_path))

    with pytest.raises(UserError, match=r"--tasks local_arc_esy: unknown to lm-eval .*Near: local_arc_easy"):
        load("local_arc_esy")
    with pytest.raises(MachineError, match=r"--tasks arc_easy: its data set allenai/ai2_arc cannot be had.*--data DIR"):
        load("arc_easy")


def test_shipped_definitions_fit_the_shared_files(shared):
    found = local_tasks(shared / "evals")
    assert len(found) == len(list((Path(harness.__file__).parent / "harness_tasks").glob("*.yaml")))
    assert {task.name for task in found if task.generates} == {"local_gsm8k", "local_svamp", "local_triviaqa"}
    assert len(next(task for task in found if task.name == "local_blimp").files) == 34
