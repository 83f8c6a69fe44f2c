"""The plan: layers, tensors, parameters, memory, FLOPs and cache bytes from config.json alone."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from relinear.distill.errors import UserError
from relinear.recipes import costs, loader, teacher_config
from relinear.recipes import plan as planner
from relinear.recipes.units import format_bytes

DOCS = Path(__file__).resolve().parents[3] / "docs" / "tools" / "tutorials.py"
QWEN_7B = runpy.run_path(str(DOCS))["QWEN_7B"] | {
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


@pytest.fixture
def folder(tmp_path: Path):
    """folder(config) -> a folder with that config.json and nothing else."""

    def make(config: Any, name: str = "teacher") -> str:
        path = tmp_path / name
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
        return str(path)

    return make


def made(teacher: str, *changes: str, recipe: str = "rwkv7", **kwargs: Any) -> planner.Plan:
    return planner.plan(loader.load(recipe, [f"teacher.model={teacher}", "data.source=stories", *changes]), **kwargs)


def test_calibrate_before_a_streamed_align_holds_one_layer(folder):
    def calibrate(*changes: str) -> planner.StagePlan:
        recipe = loader.load("qwen2.5-7b-rwkv7", [f"teacher.model={folder(QWEN_7B)}", *changes])
        return planner.plan(recipe).stage("calibrate")

    whole, streamed = calibrate(), calibrate("stages.align.stream={borders: bfloat16}")
    assert streamed.memory["teacher"] < whole.memory["teacher"] / 10
    assert streamed.memory["student"] < whole.memory["student"] / 20
    assert streamed.disk["hidden states"] == pytest.approx(2 * 64_000 * 9 / 8 * 3584 * 2, rel=0.1) and not whole.disk
    assert streamed.flops < whole.flops / 4  # each layer once, instead of all below it again
    both = calibrate("stages.align.stream={borders: bfloat16}", "stages.calibrate.inputs=student")
    assert both.disk["hidden states"] == 2 * streamed.disk["hidden states"]


def test_the_published_recipe(folder):
    recipe = loader.load("qwen2.5-7b-rwkv7", [f"teacher.model={folder(QWEN_7B)}"])
    plan = planner.plan(recipe, gpu="MI300X", mfu=0.15)
    assert plan.counts.teacher == 7_615_616_512  # as the model's card says: 7.62B
    assert plan.layers.drawing == "L" * 28
    calibrate, align, glue, extend = plan.stages[1:]
    assert (calibrate.settings["method"], calibrate.settings["inputs"], calibrate.trained) == ("spread", "teacher", 0)
    assert calibrate.memory["gram"] == 8 * 6 * 3584**2 and calibrate.gpu_hours < 0.1 * align.gpu_hours
    assert (align.steps, glue.steps) == (6104, 10173)  # the released configurations' own counts (radlads.md 1.5)
    assert (align.settings["seq_len"], glue.settings["seq_len"], extend.settings["seq_len"]) == (512, 512, 16384)
    assert align.settings["schedule"] == "quarter_cosine" and align.settings["lr_final"] == 1e-5
    assert glue.settings["loss"] == {"kl": 1.0, "reverse_kl": 0.0, "ce": 0.0, "align": 0.0}
    assert align.trained == plan.counts.all_mixers and glue.trained == plan.counts.student
    assert extend.memory["teacher"] == 0 and glue.memory["teacher"] == 2 * plan.counts.teacher
    for stage, published in ((glue, 44), (extend, 8)):  # GPU-hours on MI300X, Table 3
        assert published / 2 < stage.gpu_hours < published * 2, stage.name
    assert [(tables.layers[0], tables.layers[-1]) for tables in plan.tensors] == [(0, 0), (1, 27)]
    names = {row.name: row.source for row in plan.tensors[0].rows}
    assert names["q_proj.bias"] == "copied" and "v0" not in names
    for tokens, teacher, student in plan.cache:
        assert teacher == 28 * 2 * 4 * 128 * tokens * 2
        assert student == 28 * 4 * 28 * 128 * 128
    notes = {note.split(" needs")[0]: note for note in planner.plan(recipe).notes if " needs about" in note}
    assert list(notes) == ["glue", "extend"]
    assert notes["glue"].endswith("B200, MI300X. A smaller stages.glue.micro_batch needs less")
    assert notes["extend"].endswith("no GPU of the table holds it")  # its micro batch is 1 already


def test_hybrid_cache_and_sliding_windows(folder):
    full = made(folder(TINY), "layers.keep=1,3")
    state = 4 * (8 * 8 * 8 + 3 * 3 * 64)  # the recurrence's, and the last three inputs of the convolution
    for tokens, teacher, student in full.cache:
        assert teacher == 5 * 2 * 32 * tokens * 4
        assert student == 2 * 2 * 32 * tokens * 4 + 3 * state
    window = TINY | {"model_type": "mistral", "sliding_window": 128}
    for _, teacher, student in made(folder(window), "layers.keep=1,3").cache:
        assert teacher == 5 * 2 * 32 * 128 * 4
        assert student == 2 * 2 * 32 * 128 * 4 + 3 * state
    some = QWEN_7B | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20}
    tokens, teacher, _ = made(folder(some), "engine.precision=bf16").cache[1]
    assert (tokens, teacher) == (32768, 2 * 512 * 2 * (20 * 32768 + 8 * 4096))


def test_kept_attention_that_is_changed(folder):
    plain = made(folder(TINY), "layers.keep=1,3")
    plan = made(folder(TINY), "layers.keep=1,3", "layers.attention.window=64", "layers.attention.logit_scale=500")
    state = plain.cache[0][2] - 2 * 2 * 32 * plain.cache[0][0] * 4
    for tokens, teacher, student in plan.cache:
        assert teacher == 5 * 2 * 32 * tokens * 4
        assert student == state + 2 * 2 * 32 * 64 * 4
    assert plan.stage("align").flops == plain.stage("align").flops
    assert plan.stage("glue").flops < plain.stage("glue").flops
    assert "kept attention from glue on: scores × log_500(t + 500), window 64" in planner.render(plan)
    assert plan.to_dict()["layers"]["kept_attention"] == {"rope": True, "logit_scale": 500.0, "window": 64}
    nothing = made(folder(TINY), "layers.convert=all", "layers.attention.rope=false").notes
    assert "layers.attention: no layer keeps its attention, so it changes nothing" in nothing


@pytest.mark.parametrize("mixer", ["rwkv7", "gated_deltanet"])
def test_counts_are_those_of_the_real_model(any_teacher: Path, mixer: str):
    from transformers import AutoModelForCausalLM

    plan = made(str(any_teacher), f"layers.mixer={mixer}", "layers.keep=1")
    model = AutoModelForCausalLM.from_pretrained(any_teacher)
    assert plan.counts.teacher == sum(p.numel() for p in model.parameters())
    attention = sum(p.numel() for p in model.model.layers[0].self_attn.parameters())
    assert plan.counts.attention == attention
    norms = sum(
        p.numel() for n, p in model.named_parameters() if "norm" in n.rsplit(".", 2)[-2] and "self_attn" not in n
    )
    assert plan.counts.norms == norms
    ffn = sum(p.numel() for n, p in model.named_parameters() if ".mlp." in n)
    rest = plan.counts.student - plan.counts.trained("glue", "no-ffn")
    assert rest == ffn
    tables = {layer: table for table in plan.tensors for layer in table.layers}
    assert sorted(tables) == [0, 2, 3]
    assert sum(table.parameters for table in tables.values()) == plan.counts.all_mixers


def test_what_each_stage_trains(folder):
    counts = made(folder(TINY), "layers.keep=1,3").counts
    assert counts.trained("transfer", "") == 0
    assert counts.trained("align", "") == counts.trained("glue", "mixers") == counts.all_mixers
    assert counts.trained("glue", "mixers+norms") == counts.all_mixers + 11 * 64
    assert counts.trained("extend", "all") == counts.student


def test_windows():
    assert planner.window("auto", 2048) == (512, "auto is 512")
    assert planner.window("auto", 256) == (256, "auto is 256, the teacher's context; 512 where that allows it")
    assert planner.window(1024, 256) == (256, "1024 is cut to 256, the teacher's context")
    assert planner.window(128, 256) == (128, "")


def test_sequence_length_follows_the_teachers_context_and_says_so(folder):
    plan = made(folder(TINY))
    assert {stage.settings["seq_len"] for stage in plan.stages[1:]} == {256}
    assert "data.seq_len: auto is 256, the teacher's context; 512 where that allows it" in plan.notes
    plan = made(folder(TINY), "stages.glue.seq_len=4096")
    assert plan.stage("glue").settings["seq_len"] == 256
    assert "stages.glue.seq_len: 4096 is cut to 256, the teacher's context" in plan.notes


def test_settings_are_complete(folder):
    recipe = loader.load("rwkv7", [f"teacher.model={folder(TINY)}", "data.source=x", "seed=5", "stages.glue.seed=7"])
    align = planner.stage_settings(recipe, recipe.stage("align"), 256)
    glue = planner.stage_settings(recipe, recipe.stage("glue"), 256)
    assert (align["seed"], glue["seed"], align["loss"]) == (5, 7, "mse")
    assert align["save_every"] == recipe.stage("align").tokens // 10
    assert align["eval_every"] == recipe.eval.every == 500_000
    assert (align["train"], glue["train"]) == ("all", "all") and "lr_mixers" not in align


def test_settings_are_those_of_the_training_loop(folder):
    from relinear.distill.stage import StageSettings

    recipe = loader.load("rwkv7", [f"teacher.model={folder(TINY)}", "data.source=x"])
    for name, tokens in (("align", 500_000), ("glue", 3_500_000)):
        settings = planner.stage_settings(recipe, recipe.stage(name), 256)
        assert StageSettings(**settings).tokens == tokens


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        (["layers.convert=none"], "no layer is converted: the result is the teacher itself"),
        (["mixers.gdn.conv=4"], "mixers.gated_deltanet: no layer uses it"),
        (["stages.align.tokens=2560"], "align: warm-up takes 20 of 10 steps; lower stages.align.warmup"),
        (["data.source=gone.txt"], "gone.txt is not there (yet): the run would stop at once"),
        (["stages=[{transfer: {}}, {glue: {tokens: 1M}}]"], "glue without align before it"),
    ],
)
def test_what_looks_odd_is_noted(folder, changes: list[str], note: str):
    plan = made(folder(TINY), *changes)
    assert any(note in one for one in plan.notes), plan.notes
    assert not any(note in one for one in made(folder(TINY)).notes)


def test_more_work_costs_more(folder):
    plan = made(folder(TINY))
    hybrid = made(folder(TINY), "layers.keep=0-3")
    assert hybrid.stage("align").flops < plan.stage("align").flops
    assert made(folder(TINY), "stages.glue.tokens=7M").stage("glue").flops == 2 * plan.stage("glue").flops
    larger = made(folder(TINY), "stages.glue.batch=4", "stages.glue.micro_batch=2").stage("glue")
    whole = made(folder(TINY), "stages.glue.batch=4").stage("glue")
    assert plan.stage("glue").memory["activations"] < larger.memory["activations"] < whole.memory["activations"]
    fast = made(folder(TINY), gpu="B200", mfu=0.3).stage("glue").gpu_hours
    slow = made(folder(TINY), gpu="A100", mfu=0.3).stage("glue").gpu_hours
    assert slow / fast == pytest.approx(costs.GPUS["B200"][0] / costs.GPUS["A100"][0])


def test_what_each_rank_holds(folder):
    alone = made(folder(TINY)).stage("align"), made(folder(TINY)).stage("glue")

    def ranks(parallel: str, nproc: int = 2, nodes: int = 2, **kwargs: Any):
        changes = (f"engine.parallel={parallel}", "stages.align.batch=32", "stages.glue.batch=32")
        plan = made(folder(TINY), *changes, nproc=nproc, nodes=nodes, **kwargs)
        return plan.stage("align"), plan.stage("glue")

    def parts(stage: planner.StagePlan):
        return {name: size for name, size in stage.memory.items() if name != "activations"}

    for stage, whole in zip(ranks("ddp"), alone, strict=True):
        assert parts(stage) == parts(whole)
        assert stage.memory["activations"] == whole.memory["activations"] * 8 // whole.sequences
        assert stage.flops == whole.flops and stage.tokens_per_second == 4 * whole.tokens_per_second
    for stage, whole in zip(ranks("fsdp2"), alone, strict=True):
        for name in ("teacher", "student", "gradients", "optimizer"):
            assert stage.memory[name] == -(-whole.memory[name] // 4), name
        assert stage.memory["gathered"] > 0
    for level in (1, 2, 3):
        align, glue = ranks(f"deepspeed-zero{level}")
        share = {name: alone[1].memory[name] / glue.memory[name] for name in ("teacher", "student", "gradients")}
        assert share == {
            "teacher": pytest.approx(4 if level == 3 else 1),
            "student": pytest.approx(4 if level == 3 else 1),
            "gradients": pytest.approx(4 if level > 1 else 1),
        }
        assert glue.memory["optimizer"] == pytest.approx(3 * 4 * glue.trained / 4)
        # Five layers on four ranks: the first rank owns two.
        own = made(folder(TINY)).counts.mixers
        assert align.memory["student"] == alone[0].memory["student"]
        assert align.memory["optimizer"] == 8 * (own[0] + own[4])
        assert [rank for rank, _ in align.ranks][:2] == [0, 1]
    off = made(folder(TINY), "engine.parallel=deepspeed-zero2", "engine.offload=cpu", "stages.glue.batch=4", nproc=2)
    assert off.stage("glue").memory["optimizer"] == 0
    text = planner.render(made(folder(TINY), "engine.parallel=deepspeed-zero1", nproc=2, nodes=2, price=2.5))
    assert "deepspeed-zero1, 2 processes on each of 2 nodes, 4 ranks" in text and "from rank 1" in text


def test_several_processes_need_an_engine(folder):
    with pytest.raises(UserError, match=r"engine.parallel: single, but --nproc 2 --nodes 3 are 6 processes"):
        made(folder(TINY), nproc=2, nodes=3)
    notes = made(folder(TINY), "engine.parallel=ddp", nproc=3).notes
    assert any("cannot be shared by 3 ranks" in note and "stages.glue.batch=" in note for note in notes)
    assert any("needs two processes or more" in note for note in made(folder(TINY), "engine.parallel=ddp").notes)


def test_what_it_costs(folder):
    plan = made(folder(TINY), "engine.parallel=ddp", nproc=2, nodes=4, price=2.5)
    assert plan.cost == pytest.approx(2.5 * plan.gpu_hours) and plan.hours == pytest.approx(plan.gpu_hours / 8)
    assert made(folder(TINY)).cost is None and "  cost\n" not in planner.render(made(folder(TINY)))
    assert plan.to_dict()["cost"] == plan.cost and f"{plan.cost:,.2f}" in planner.render(plan)
    assert plan.gpus["B200"][1] < plan.gpus["H100"][1] == pytest.approx(plan.gpu_hours)


def test_less_that_trains_costs_less(folder):
    each = [made(folder(TINY), f"stages.glue.train={name}").stage("glue").flops for name in ("all", "no-ffn", "mixers")]
    assert each == sorted(each, reverse=True) and len(set(each)) == 3
    some = made(folder(TINY), "stages.align.train=new").stage("align").flops
    assert some < made(folder(TINY)).stage("align").flops


def test_as_text_and_as_json(folder):
    plan = made(folder(TINY), "layers.keep=1,3")
    text = planner.render(plan)
    for word in ("LALAL", "A attention, L rwkv7", "q_proj.weight", "copied", "131,072", "estimates", "Notes"):
        assert word in text
    assert max(map(len, text.split("\n")[1:])) <= 110 and "\x1b" not in text
    found = json.loads(json.dumps(plan.to_dict()))
    assert found["layers"]["kept"] == [1, 3]
    assert found["stages"][1]["total_memory"] == sum(found["stages"][1]["memory"].values())
    assert found["cache"][0]["tokens"] == 4096
    assert found["gpu"] == {"name": "H100", "peak_bf16_tflops": 989, "assumed_mfu": costs.MFU}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "not readable as JSON"),
        ("[]", "expected a mapping, found list"),
        (TINY | {"model_type": "gpt9"}, "model_type 'gpt9' is not a family that relinear knows"),
        ({"model_type": "relinear"}, "this is a converted model, not a teacher"),
        ({k: v for k, v in TINY.items() if k != "vocab_size"}, "vocab_size is None; expected a whole number above 0"),
        (TINY | {"num_key_value_heads": 3}, "is not a multiple of num_kv_heads=3"),
    ],
)
def test_wrong_teachers(folder, config: Any, message: str):
    with pytest.raises(UserError) as error:
        made(folder(config))
    assert message in str(error.value) and "config.json" in str(error.value)


def test_overrides_of_a_recipe_reach_their_layers(folder):
    plan = made(folder(TINY), "layers.keep=none", "layers.overrides.0-1=gla")
    assert [plan.layers.converted[layer][0] for layer in range(3)] == ["gla", "gla", "rwkv7"]


def test_layers_beyond_the_teacher_name_the_line(folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(
        f"extends: rwkv7\nteacher: {{model: {folder(TINY)}}}\ndata: {{source: x}}\nlayers:\n  keep: [7]\n"
    )
    with pytest.raises(UserError) as error:
        planner.plan(loader.load("mine.yaml"))
    assert str(error.value) == "mine.yaml:5: layers.keep: layer 7 does not exist: the teacher has 5 layers, 0 to 4"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "./nowhere: no such folder"),
        ("a/b/c", "a/b/c: no such folder"),
        ("organisation/model", "not in the Hub's cache, and HF_HUB_OFFLINE forbids to ask"),
        ("organisation/a b", "not a Hub id"),
    ],
)
def test_teachers_that_are_not_there(name: str, message: str):
    with pytest.raises(UserError) as error:
        made(name)
    assert message in str(error.value) and "teacher.model=" in str(error.value)


def test_a_folder_without_config(tmp_path: Path):
    with pytest.raises(UserError, match=r"config\.json: not found"):
        made(str(tmp_path))


def test_a_cached_hub_model_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "models--organisation--model" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps(TINY))
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc123")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert made("organisation/model").teacher.num_layers == 5
    assert teacher_config.read_teacher_config("organisation/model", "abc123").context == 256
    with pytest.raises(UserError, match="not in the Hub's cache"):
        teacher_config.read_teacher_config("organisation/model", "another")


def test_wrong_gpu_and_share(folder):
    with pytest.raises(UserError, match=r"--gpu H99: not in the table. Known: A100"):
        made(folder(TINY), gpu="H99")
    with pytest.raises(UserError, match="--mfu 2"):
        made(folder(TINY), mfu=2.0)


def test_a_cache_of_logits_is_counted(folder):
    changes = ["stages.glue.teacher_logits.top_k=8", "stages.glue.loss={kl: 1.0}", "stages.glue.seq_len=64"]
    changes += ["stages.glue.tokens=64000", "stages.glue.batch=10"]
    plain, cached = (made(folder(TINY), *given) for given in (changes[1:], changes))
    note = next(note for note in cached.notes if note.startswith("glue: a cache"))
    # 1,000 rows of 63 counted positions: 8 ids of two bytes, 8 values of two, and the tail's four; 12 bytes a row.
    assert f"takes {format_bytes((63 * 36 + 12) * 1000)} on the disk" in note
    assert not [note for note in plain.notes if "cache of the teacher" in note]
    assert cached.stage("glue").flops < plain.stage("glue").flops
    assert cached.stage("glue").memory["teacher"] == 0
    assert plain.stage("glue").memory["teacher"] > 0
