"""Every family of teachers: what its attention does reaches the mixer, and its students do all that students must.

One mixer, few tokens: that all mixers behave is the contract suite's business, that they do so in a model
test_student.py's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from relinear.distill import verify_child
from relinear.distill.align import align_stage
from relinear.distill.data.batch import Batch
from relinear.distill.export import export_student
from relinear.distill.families import FAMILIES
from relinear.distill.glue import StudentLoss, glue_stage, glue_step
from relinear.distill.loop import StageSettings, run_stage
from relinear.distill.modeling.cache import CACHE, MixerCacheLayer
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import Teacher, load_model, load_teacher
from relinear.eval.logits import ChosenLogits
from relinear.mixers.base import MixerInputs

MIXER = "gated_deltanet"
SOME = [2, 3]  # of two kinds in every family that has two
SETTINGS = StageSettings(tokens=160, batch=4, seq_len=24, lr=1e-2, warmup=1, log_every=1)


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, make_teacher: Callable[..., Path]) -> Path:
    """A tiny teacher of each family in turn."""
    return make_teacher(request.param)


@pytest.fixture(scope="module")
def teacher(folder: Path) -> Teacher:
    return load_teacher(folder)


def moved(teacher: Teacher, layers: list[int], kept: dict[str, Any] | None = None) -> Any:
    """A transferred student whose mixers are moved away from their start, so that every part of them counts."""
    mixers, _ = transfer(teacher, dict.fromkeys(layers, (MIXER, {})))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in mixers.values():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return assemble(teacher, mixers, kept)


@pytest.fixture(scope="module")
def student(teacher: Teacher) -> Any:
    """Layers 2 and 3 converted: not to be changed."""
    return moved(teacher, SOME)


def ids(rows: int = 2, length: int = 21) -> torch.Tensor:
    return torch.randint(3, 320, (rows, length), generator=torch.Generator().manual_seed(1))


def generate(model: Any, tokens: torch.Tensor, mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    mask = torch.ones_like(tokens) if mask is None else mask
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **kwargs}
    return model.generate(tokens, attention_mask=mask, **settings)


class Batches:
    """The same few batches for every run: two documents per row, the second row's end padded."""

    def __init__(self) -> None:
        self.number = 0

    def next_batch(self) -> Batch:
        self.number += 1
        tokens = torch.randint(3, 320, (4, 24), generator=torch.Generator().manual_seed(self.number))
        place = torch.arange(24).expand(4, 24)
        real = torch.ones_like(tokens, dtype=torch.bool)
        real[1, -5:] = False
        positions = torch.where(place >= 9, place - 9, place).masked_fill(~real, 0)
        segments = (place >= 9).long() + (~real).cumsum(1)
        return Batch(tokens, positions, segments, real, real & (positions > 0))

    def state_dict(self) -> dict[str, Any]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.number = state["number"]


# What reaches the mixer


@torch.no_grad()
def test_heads_are_those_inside_transformers_attention(folder: Path) -> None:
    """Queries, keys and values after norms and rotation, their scale, cap and window, in every layer."""
    from transformers import AttentionInterface

    teacher = load_teacher(folder)
    seen: dict[int, Any] = {}
    given: dict[int, Any] = {}

    def spy(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float, **kwargs: Any) -> Any:
        seen[module.layer_idx] = (query, key, value, scaling, kwargs.get("softcap"), kwargs.get("sliding_window"))
        return query.transpose(1, 2).contiguous(), None

    def note(module: Any, args: Any, kwargs: Any) -> None:
        given[module.layer_idx] = (args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"])

    AttentionInterface.register("spy", spy)
    try:
        teacher.model.set_attn_implementation("spy")
        for layer in range(4):
            teacher.attention(layer).register_forward_pre_hook(note, with_kwargs=True)
        teacher.model(ids(), position_ids=torch.arange(5, 26)[None], use_cache=False)
    finally:
        AttentionInterface._global_mapping.pop("spy")
    mixers, _ = transfer(teacher, dict.fromkeys(range(4), (MIXER, {})))
    for layer, mixer in mixers.items():
        query, key, value, scaling, softcap, window = seen[layer]
        x, rotary = given[layer]
        q, k, v, _ = mixer.project(x, MixerInputs(), None)
        q, k = mixer.turn(q, k, rotary)
        for mine, theirs in ((q, query), (k, key), (v, value)):
            torch.testing.assert_close(mine, theirs.transpose(1, 2), rtol=1e-5, atol=1e-5)
        assert mixer.geometry.query_scale == pytest.approx(scaling)
        assert mixer.geometry.softcap == softcap
        assert (teacher.layer_types[layer] == "sliding_attention") == (window is not None)


def test_the_report_names_the_familys_own_tensors(teacher: Teacher) -> None:
    _, reports = transfer(teacher, {1: (MIXER, {"expand_kv": True})})
    copied, derived = reports[1].copied, {**reports[1].derived}
    fused = {
        "phi3": "rows of qkv_proj.weight",
        "gpt_neox": "rows of query_key_value.weight, head by head",
    }.get(teacher.family.name)
    assert copied["q_proj.weight"] == (fused or "q_proj.weight")
    assert copied["o_proj.weight"] == ("dense.weight" if teacher.family.name == "gpt_neox" else "o_proj.weight")
    if teacher.family.name == "gpt_neox":
        assert not derived and copied["k_proj.weight"] == fused
    else:
        assert derived["k_proj.weight"] == f"repeat_heads({fused or 'k_proj.weight'})"
    assert bool(reports[1].notes) == (teacher.family.name == "gemma2")
    if reports[1].notes:
        assert "caps its scores at 2" in reports[1].notes[0] and MIXER in reports[1].notes[0]


# What a student does


def test_converting_nothing_is_exact(teacher: Teacher) -> None:
    with torch.no_grad():
        assert torch.equal(assemble(teacher, {})(ids()).logits, teacher.model(ids()).logits)


@torch.no_grad()
@pytest.mark.parametrize("layers", [SOME, [0, 1], [0, 1, 2, 3]], ids=["upper", "lower", "all"])
def test_cache_padding_and_packing(teacher: Teacher, layers: list[int]) -> None:
    model = moved(teacher, layers)
    tokens = ids()
    whole = model(tokens, use_cache=False).logits
    cache, pieces = None, []
    for start, stop in ((0, 1), (1, 2), (2, 9), (9, 20), (20, 21)):
        output = model(tokens[:, start:stop], use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=2e-4)
    assert [isinstance(layer, MixerCacheLayer) for layer in cache.layers] == [n in layers for n in range(4)]
    window = teacher.config.get_text_config().sliding_window if "sliding_attention" in teacher.layer_types else None
    for layer, kind in enumerate(teacher.layer_types):
        if layer not in layers:
            assert cache.layers[layer].keys.shape[2] == (window - 1 if kind == "sliding_attention" else 21)

    lengths = [5, 1, 12, 3]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(tokens[:1], position_ids=positions, use_cache=False).logits[0].split(lengths)
    for piece, document in zip(packed, tokens[0].split(lengths), strict=True):
        torch.testing.assert_close(piece, model(document[None], use_cache=False).logits[0], rtol=1e-4, atol=2e-4)

    mask = torch.ones_like(tokens)
    tokens[0, :6], mask[0, :6] = 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits[0, 6:]
    torch.testing.assert_close(padded, model(tokens[:1, 6:], use_cache=False).logits[0], rtol=1e-4, atol=2e-4)


@torch.no_grad()
def test_generation(student: Any) -> None:
    tokens, mask = ids(), torch.ones(2, 21, dtype=torch.long)
    plain = generate(student, tokens, use_cache=False)
    assert torch.equal(generate(student, tokens), plain)
    assert torch.equal(generate(student, tokens, cache_implementation="static"), plain)
    tokens[0, :6], mask[0, :6] = 0, 0
    alone = generate(student, tokens[:1, 6:])[0, 15:]
    assert torch.equal(generate(student, tokens, mask)[0, 21:], alone)


def test_gradient_checkpointing(teacher: Teacher, checkpointing_keeps_gradients: Any) -> None:
    checkpointing_keeps_gradients(moved(teacher, SOME), ids())


@torch.no_grad()
def test_labels_logits_to_keep_and_num_items(student: Any) -> None:
    tokens = ids()
    whole = student(tokens, use_cache=False)
    torch.testing.assert_close(student(tokens, use_cache=False, logits_to_keep=1).logits, whole.logits[:, -1:])
    loss = student(tokens, labels=tokens, use_cache=False).loss
    expected = cross_entropy(whole.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)
    double = student(tokens, labels=tokens, use_cache=False, num_items_in_batch=torch.tensor(80)).loss
    torch.testing.assert_close(double, loss / 2)
    embedded = student(inputs_embeds=student.get_input_embeddings()(tokens), use_cache=False)
    torch.testing.assert_close(embedded.logits, whole.logits)


def test_router_losses(make_teacher: Callable[..., Path]) -> None:
    for family in ("qwen3_moe", "mixtral"):
        student = moved(load_teacher(make_teacher(family)), SOME)
        tokens = ids()
        plain = student(tokens, labels=tokens, use_cache=False).loss
        out = student(tokens, labels=tokens, use_cache=False, output_router_logits=True)
        assert len(out.router_logits) == (3 if family == "qwen3_moe" else 4)
        torch.testing.assert_close(out.loss, plain + student.router_aux_loss_coef * out.aux_loss)
        out.loss.backward()
        assert student.get_parameter("model.layers.2.mlp.gate.weight").grad.abs().max() > 0


# What training does


def test_align_trains_the_mixers_and_nothing_else(teacher: Teacher, tmp_path: Path) -> None:
    """Experts and routers too stay as they are, byte for byte."""
    before = {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}
    mixers, _ = transfer(teacher, dict.fromkeys(SOME, (MIXER, {})))
    start = {layer: {k: p.detach().clone() for k, p in m.named_parameters()} for layer, m in mixers.items()}
    result = run_stage(align_stage(teacher, mixers, SETTINGS), Batches(), SETTINGS, folder=tmp_path)
    assert result.status == "complete" and not result.unchanged
    for layer, mixer in mixers.items():
        assert all(not torch.equal(p, start[layer][name]) for name, p in mixer.named_parameters())
    after = teacher.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all(p.grad is None for p in teacher.model.parameters())


def test_glue_sees_the_models_own_logits(teacher: Teacher, student: Any) -> None:
    batch = Batches().next_batch()
    settings = replace(SETTINGS, loss={"kl": 1.0, "ce": 1.0})
    made = glue_step(StudentLoss(teacher, student, settings.loss, settings), batch, int(batch.targets[:, 1:].sum()))  # pyright: ignore
    student.zero_grad()
    call = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "use_cache": False}
    with torch.no_grad():
        counted = batch.targets[:, 1:]
        log_p = student(**call).logits[:, :-1][counted].log_softmax(-1)
        log_q = teacher.model(**call).logits[:, :-1][counted].log_softmax(-1)
        labels = batch.input_ids[:, 1:][counted]
        torch.testing.assert_close(made["kl"], (log_q.exp() * (log_q - log_p)).sum(-1).mean(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(made["ce"], cross_entropy(log_p, labels), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_evaluation_knows_the_head(teacher: Teacher, student: Any) -> None:
    """Logits are made a few positions at a time, with the scale or cap that the model puts on them."""
    batch = Batches().next_batch()
    for model in (teacher.model, student):
        chosen = ChosenLogits(model, batch)
        assert chosen.by_head and chosen.packs
        chosen.run(batch)
        rows, columns = torch.tensor([0, 2, 3]), torch.tensor([1, 20, 7])
        whole = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        torch.testing.assert_close(chosen.at(rows, columns), whole[rows, columns])


@pytest.mark.parametrize("train", ["no-ffn", "mixers+norms"])
def test_glue_trains_what_it_says(teacher: Teacher, tmp_path: Path, train: str) -> None:
    student = moved(teacher, SOME)
    kinds = {
        f"{path}.{name}": type(module).__name__
        for path, module in student.named_modules()
        for name, _ in module.named_parameters(recurse=False)
    }
    in_mixers = {f"{path}.{name}" for path, m in mixer_paths(student).items() for name, _ in m.named_parameters()}
    in_ffn = {f"{path}.{name}" for path, m in ffn_modules(student).items() for name, _ in m.named_parameters()}
    norms = {name for name, kind in kinds.items() if "Norm" in kind}
    names = set(dict(student.named_parameters()))
    expected = {"no-ffn": names - in_ffn, "mixers+norms": in_mixers | (norms - in_ffn)}[train]
    settings = replace(SETTINGS, loss={"kl": 1.0}, train=train)
    start = {name: p.detach().clone() for name, p in student.named_parameters()}
    result = run_stage(glue_stage(teacher, student, settings), Batches(), settings, folder=tmp_path)
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, start[name])}
    assert changed | set(result.unchanged) == expected and len(result.unchanged) < 4


def mixer_paths(student: Any) -> dict[str, Any]:
    mixers = set(student.mixers().values())
    return {path: module for path, module in student.named_modules() if module in mixers}


def ffn_modules(student: Any) -> dict[str, Any]:
    """The feed-forward blocks, by what transformers calls their classes."""
    return {
        path: module
        for path, module in student.named_modules()
        if type(module).__name__.endswith(("MLP", "MoeBlock")) and not path.endswith("experts")
    }


# What is written


def test_save_and_reload(student: Any, teacher: Teacher, folder: Path, tmp_path: Path) -> None:
    export_student(student, folder, tmp_path / "export")
    again, _ = load_model(tmp_path / "export")
    with torch.no_grad():
        assert torch.equal(again(ids()).logits, student(ids()).logits)
    written = load_file(tmp_path / "export" / "model.safetensors")
    replaced = tuple(teacher.attention_path(layer) for layer in SOME)
    tied = {"lm_head.weight"} if teacher.config.tie_word_embeddings else set()
    for name, tensor in teacher.model.state_dict().items():
        if not name.startswith(replaced) and name not in tied:
            assert torch.equal(written[name], tensor), name
    types = again.config.layer_types
    assert [kind == "linear_attention" for kind in types] == [layer in SOME for layer in range(4)]
    assert again.config.attention_types == teacher.layer_types
    rope = [mixer.geometry.rope for mixer in again.mixers().values()]
    assert rope == [teacher.geometry(layer).rope for layer in SOME]


CHILD = """
import json, sys, traceback
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import verify_child
for work in sys.argv[2:]:
    try:
        verify_child.main(work + "/export", work)
    except Exception:
        Path(work, "results.json").write_text(json.dumps(
            {"checks": {"process": {"ok": False, "detail": traceback.format_exc()}}}))
"""


def test_exports_need_transformers_alone(make_teacher: Callable[..., Path], tmp_path: Path) -> None:
    """One process that cannot import relinear uses an export of every family: all layers converted, or some of them,
    and the others as they were or changed."""
    works = []
    changed = {"rope": False, "logit_scale": 4.0, "window": 12}
    for number, family in enumerate(FAMILIES):
        work = tmp_path / family
        teacher = load_teacher(make_teacher(family))
        model = moved(teacher, [0, 1, 2, 3] if number % 3 == 0 else SOME, changed if number % 3 == 1 else None)
        export_student(model, teacher.folder, work / "export")
        tokens = ids(2, 37)
        with torch.no_grad():
            reference = {"input_ids": tokens, "logits": model(tokens, use_cache=False).logits.contiguous()}
        save_file(reference, work / "reference.safetensors")
        works.append(str(work))
    env = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-I", "-c", CHILD, str(Path(verify_child.__file__).parent), *works]
    child = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    for work in works:
        checks = json.loads(Path(work, "results.json").read_text())["checks"]
        assert not {name: check for name, check in checks.items() if not check["ok"]}, work
        assert len(checks) == 16
