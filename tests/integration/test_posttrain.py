"""Training after conversion, by TRL: what learns and what does not, going on, refusals, and that metrics move."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

pytest.importorskip("trl", reason="the extra relinear[posttrain] is not installed")

from relinear.distill.errors import RunFailed, UserError
from relinear.distill.modeling.cache import MixerCacheLayer
from relinear.distill.teacher import load_model
from relinear.launch.main import main
from relinear.recipes import loader, runner
from relinear.recipes.posttrain import frozen, run, saving, trainers
from relinear.recipes.posttrain.schema import load

SMALL = ["data.source=arithmetic", "data.arithmetic.high=9", "batch=4", "eval.examples=6", "warmup=0", "lr=1e-2"]
GRPO = ["grpo.generations=4", "grpo.max_new_tokens=5", "grpo.read=line", "grpo.reward=near"]


@pytest.fixture(scope="module")
def converted(make_teacher: Any, story_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model with mixers in one layer of two, transferred and not trained."""
    out = tmp_path_factory.mktemp("converted")
    given = [f"teacher.model={make_teacher('llama', num_hidden_layers=2)}", f"data.source={story_file}"]
    stages = ["layers.keep=1", "stages=[{transfer: {}}]", "eval.tokens=500", "data.seq_len=64"]
    runner.run(loader.load("gated_deltanet", [*given, *stages, f"save.dir={out}"]))
    return out / "export"


def go(method: str, model: Path, out: Path, *changes: str, **options: Any) -> dict[str, Any]:
    given = [f"model={model}", *SMALL, *(GRPO if method == "grpo" else []), f"save.dir={out}", *changes]
    return run.run(load(method, given), **options)


def tensors(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model.safetensors")


def changed(before: Path, after: Path) -> set[str]:
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    return {name for name, tensor in old.items() if not tensor.equal(new[name])}


def test_sft_trains_what_it_should_and_exports_with_its_history(converted: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "sft"
    given = ["posttrain", "sft", f"model={converted}", *SMALL, "steps=3", "train=no-ffn", "--out", str(out), "--json"]
    assert main(given) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metric"]["after"]["value"] < result["metric"]["before"]["value"]
    assert result["changed"]["ffn"] == {
        "tensors": 6,
        "bytes": 6 * 64 * 32 * 4,
        "changed_tensors": 0,
        "changed_bytes": 0,
    }
    names = changed(converted, out / "export")
    assert names and not any(".mlp." in name for name in names)
    assert "model.layers.0.self_attn.q_proj.weight" in names and "model.embed_tokens.weight" in names
    facts = json.loads((out / "export" / "conversion.json").read_text())
    assert [step["method"] for step in facts["posttrain"]] == ["sft"] and facts["result"] is None
    assert facts["layers"] == json.loads((converted / "conversion.json").read_text())["layers"]
    card = (out / "export" / "README.md").read_text()
    assert "## After conversion" in card and "| sft | no-ffn | 3 | arithmetic | completion loss |" in card
    assert (out / "export" / "recipe.yaml").read_text() == (converted / "recipe.yaml").read_text()
    assert "method: sft" in (out / "export" / "posttrain.yaml").read_text()
    assert str(tmp_path) not in (out / "export" / "posttrain.yaml").read_text()
    config = [json.loads((folder / "config.json").read_text()) for folder in (converted, out / "export")]
    assert config[0] == config[1]
    again = go("sft", out / "export", tmp_path / "again", "steps=1", "lr=1e-3", "train=mixers")
    facts = json.loads((tmp_path / "again" / "export" / "conversion.json").read_text())
    assert [step["train"] for step in facts["posttrain"]] == ["no-ffn", "mixers"]
    assert again["changed"]["rest"]["changed_tensors"] == again["changed"]["ffn"]["changed_tensors"] == 0


@pytest.mark.parametrize(("method", "changes"), [("sft", []), ("dpo", []), ("grpo", ["grpo.beta=0.1"])])
def test_adapters_are_merged_and_all_else_stays(
    method: str, changes: list[str], converted: Path, tmp_path: Path
) -> None:
    go(method, converted, tmp_path / "run", "steps=2", "train=lora", "lora.targets=[q_proj]", *changes)
    names = changed(converted, tmp_path / "run" / "export")
    assert names and all(name.endswith("q_proj.weight") for name in names)


def test_dpo_learns_against_the_model_as_it_began(converted: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"Is it {i}?", "chosen": " yes", "rejected": " no"} for i in range(40)]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = go("dpo", converted, tmp_path / "run", "steps=4", f"data.source={pairs}", "data.arithmetic=null")
    after = result["metric"]["after"]
    assert after["name"] == "preference accuracy" and after["n"] == 4
    assert after["implicit"]["value"] == 1.0
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[1])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3), "at the first step the model is the reference"


def test_grpo_samples_through_the_recurrent_cache(converted: Path, tmp_path: Path, monkeypatch: Any) -> None:
    steps: list[int] = []
    write = MixerCacheLayer.write

    def counted(self: Any, states: Any, tokens: int) -> None:
        steps.append(tokens)
        write(self, states, tokens)

    monkeypatch.setattr(MixerCacheLayer, "write", counted)
    result = go(
        "grpo", converted, tmp_path / "run", "steps=2", "grpo.beta=0.1", "train=no-ffn", "grpo.max_new_tokens=6"
    )
    # Two measurements and two steps: a prompt each, then one token at a time, never the whole again.
    assert sum(tokens > 1 for tokens in steps) == 4 and steps.count(1) > 4 * 3
    assert result["changed"]["ffn"]["changed_bytes"] == 0 and len(result["samples"]) == 6
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[2]["kl"] > 0, "the reference is the model as it began"
    assert all({"reward", "reward_std"} <= line.keys() for line in lines[1:3])


@pytest.mark.parametrize("method", ["sft", pytest.param("grpo", marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_same_bits(method: str, converted: Path, tmp_path: Path) -> None:
    go(method, converted, tmp_path / "whole", "steps=3")
    stopped = go(method, converted, tmp_path / "parts", "steps=3", max_hours=1e-9)
    assert (stopped["status"], stopped["step"]) == ("stopped", 1) and not (tmp_path / "parts" / "export").exists()
    with pytest.raises(UserError, match="Continue it with --resume"):
        go(method, converted, tmp_path / "parts", "steps=3")
    with pytest.raises(UserError, match=r"recipe\.lr was 0\.01, is 0\.1"):
        go(method, converted, tmp_path / "parts", "steps=3", "lr=0.1", resume=True)
    broken = tmp_path / "parts" / "checkpoints" / "checkpoint-2"  # what a kill while it was saved leaves
    shutil.copytree(tmp_path / "parts" / "checkpoints" / "checkpoint-1", broken)
    (broken / saving.COMMIT).unlink()
    assert go(method, converted, tmp_path / "parts", "steps=3", resume=True)["status"] == "complete"
    assert changed(tmp_path / "whole" / "export", tmp_path / "parts" / "export") == set()

    def metrics(name: str) -> list[dict[str, Any]]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k != "step_time"} for line in lines]

    assert metrics("whole") == metrics("parts") and len(metrics("whole")) == 5
    shutil.rmtree(tmp_path / "parts" / "export")
    (tmp_path / "parts" / "result.json").unlink()  # killed after the last step
    go(method, converted, tmp_path / "parts", "steps=3", resume=True)
    assert changed(tmp_path / "whole" / "export", tmp_path / "parts" / "export") == set()


def test_a_gradient_that_is_not_finite_stops_before_it_harms(converted: Path, tmp_path: Path, monkeypatch: Any) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(converted, broken)
    held = tensors(broken)
    held["model.layers.0.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(held, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RunFailed, match="held-out examples is not finite before any step"):
        go("sft", broken, tmp_path / "run", "steps=2")
    ends = saving.Keeper.on_step_end

    def poison(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == 2:
            kwargs["model"].model.norm.weight.data[0] = float("nan")
        return ends(self, args, state, control, **kwargs)

    monkeypatch.setattr(saving.Keeper, "on_step_end", poison)
    with pytest.raises(RunFailed, match=r"sft, step 3: the gradient is not finite; .* checkpoint-2 is saved: --resume"):
        go("sft", converted, tmp_path / "other", "steps=5", "save.every=1", "save.keep=1")


def test_a_frozen_tensor_that_changes_is_found(converted: Path) -> None:
    model, _ = load_model(converted)
    held = frozen.hold(model, "mixers", "mlp")
    frozen.check_frozen(held)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    with pytest.raises(RunFailed, match=r"frozen tensors changed: model\.layers\.1\.mlp\.up_proj\.weight"):
        frozen.check_frozen(held)


def test_a_missing_library_says_what_to_install(converted: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(trainers, "find_spec", lambda name: None)
    assert main(["posttrain", "sft", f"model={converted}", "data.source=arithmetic"]) == 3
    said = capsys.readouterr().err
    assert "pip install 'relinear[posttrain]'" in said and "stages.glue.loss={ce: 1.0}" in said


def test_chats_without_a_template(converted: Path, tmp_path: Path, capsys: Any) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(converted, bare)
    (bare / "chat_template.jinja").unlink()
    given = ["posttrain", "sft", f"model={bare}", "data.source=arithmetic", "data.arithmetic.chat=true", "steps=1"]
    assert main(given) == 2
    said = capsys.readouterr().err
    assert "has no chat template" in said and "data.chat_template=FILE" in said and "arithmetic.chat=false" in said
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% if")
    assert main([*given, f"data.chat_template={template}"]) == 2
    assert "is no chat template" in capsys.readouterr().err
    template.write_text((converted / "chat_template.jinja").read_text())
    assert main([*given, f"data.chat_template={template}", "warmup=0", "--out", str(tmp_path / "run")]) == 0
    assert (tmp_path / "run" / "export" / "chat_template.jinja").read_text() == template.read_text()


def test_conversations_are_learnt_on_the_assistants_words(converted: Path, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "see you")]
    lines = [[{"role": role, "content": f"{text} {i}"} for role, text in turns] for i in range(8)]
    chats.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in lines))
    out = tmp_path / "run"
    result = go("sft", converted, out, "steps=2", f"data.source={chats}", "data.arithmetic=null", "data.valid=0.25")
    assert result["metric"]["before"]["n"] == 2
    _, tokenizer = load_model(converted)
    said = sum(len(tokenizer.encode(f"{text} 1", add_special_tokens=False)) + 1 for text in ("hello", "see you"))
    rows = trainers.tokenised([{"messages": lines[1], "place": "here"}], tokenizer)
    assert sum(label != -100 for label in rows[0]["labels"]) == said


def test_what_cannot_be_trained_is_refused(converted: Path, make_teacher: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a llama model, not an export of relinear"):
        go("sft", make_teacher("llama", num_hidden_layers=2), tmp_path / "run", "steps=1")
    with pytest.raises(UserError, match=r"300 tokens of completion leave no room .* grpo\.max_new_tokens=128"):
        go("grpo", converted, tmp_path / "run", "steps=1", "grpo.max_new_tokens=300")
    with pytest.raises(UserError, match="no decoder layer has a linear layer 'nope'"):
        go("sft", converted, tmp_path / "other", "steps=1", "train=lora", "lora.targets=[nope]")
    for method in ("sft", "dpo"):
        with pytest.raises(UserError, match=r"no prompt leaves room"):
            go(method, converted, tmp_path / f"short-{method}", "steps=1", "max_length=3")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="exists and is not a run"):
        go("sft", converted, full, "steps=1")


def test_a_dry_run_writes_nothing(converted: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["posttrain", "grpo", f"model={converted}", *SMALL, "--out", str(tmp_path / "run"), "--dry-run"]
    assert main(given) == 0
    said = capsys.readouterr()
    assert "grpo of" in said.out and "90 examples to train on" in said.out and not (tmp_path / "run").exists()
    assert f"save.dir={tmp_path / 'run'}" in said.err


@pytest.fixture(scope="module")
def knows_sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded teacher, transferred and calibrated: it adds a little up to 20 + 20, and not beyond."""
    out = tmp_path_factory.mktemp("sums")
    given = ["teacher.model=embedded", "data.source=embedded", "layers.keep=1", f"save.dir={out}"]
    small = ["eval.tokens=500", "data.seq_len=256", "stages=[{transfer: {}}, {calibrate: {tokens: 4k}}]"]
    runner.run(loader.load("gated_deltanet", [*given, *small]))
    return out / "export"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "changes", "least"),
    [
        ("sft", ["steps=25", "lr=1e-3"], -2.0),
        ("dpo", ["steps=25", "lr=5e-4"], 0.08),
        ("grpo", ["steps=25", "lr=5e-4", "grpo.max_new_tokens=5", "grpo.read=line"], 0.08),
    ],
)
def test_each_method_moves_its_own_metric(
    method: str, changes: list[str], least: float, knows_sums: Path, tmp_path: Path
) -> None:
    given = [f"model={knows_sums}", "data.source=arithmetic", "data.arithmetic.high=40", "eval.examples=128"]
    result = run.run(load(method, [*given, "train=no-ffn", *changes, f"save.dir={tmp_path / 'run'}"]))
    metric = result["metric"]
    moved = metric["after"]["value"] - metric["before"]["value"]
    assert moved <= least if method == "sft" else moved >= least, metric
    assert result["changed"]["ffn"]["changed_bytes"] == 0 < result["changed"]["mixers"]["changed_bytes"]


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere2", "gpt_neox", "mixtral"])
def test_trl_scores_completions_as_the_model_itself_does(family: str, make_teacher: Any) -> None:
    """Families scale, cap or bias their logits; TRL computes them anew from the last hidden state."""
    import torch
    from trl.trainer.utils import add_fused_lm_head

    from relinear.distill.student import assemble, transfer
    from relinear.distill.teacher import load_teacher

    teacher = load_teacher(make_teacher(family, num_hidden_layers=2))
    mixers, _ = transfer(teacher, {0: ("gated_deltanet", {})})
    student = assemble(teacher, mixers).eval()
    ids = torch.randint(3, 300, (2, 19), generator=torch.Generator().manual_seed(0))
    own = student(ids, use_cache=False).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    add_fused_lm_head(student)
    assert (student(input_ids=ids, labels=ids, fused_lm_head=True).log_probs - own).abs().max() < 1e-4
    trainers.plain(student)
    assert "logits" in student(ids, use_cache=False)
