"""Speculative decoding: a draft changes the speed and nothing else, whichever side holds mixers."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill.draft import generate, share_equal
from relinear.distill.export import export_student
from relinear.distill.families import FAMILIES, family
from relinear.distill.modeling.cache import CACHE, MixerCacheLayer
from relinear.distill.student import assemble, transfer
from relinear.distill.teacher import Teacher, load_model, load_teacher
from relinear.eval.bench_draft import Settings, measure_length, verdict
from relinear.launch.main import main
from relinear.mixers import registry

# (family, mixer, options, layers, what is changed in kept attention)
EVERY: list[tuple[str, str, dict[str, Any], list[int], dict[str, Any] | None]] = [
    ("llama", name, {}, [0, 1, 3], None) for name in registry.names()
]
PECULIAR: list[tuple[str, str, dict[str, Any], list[int], dict[str, Any] | None]] = [
    ("llama", "gated_deltanet", {"conv": 4, "expand_kv": True}, [0, 1, 2, 3], None),
    ("llama", "rwkv7", {"conv": 4}, [0, 1, 2, 3], None),
    ("qwen3", "rwkv6", {"token_shift": True}, [1, 2], None),
    ("llama", "swa", {"window": 4, "sinks": 2}, [0, 2], None),
    ("llama", "hedgehog", {"window": 4}, [0, 2], None),
    ("llama", "gated_deltanet", {"window": 4}, [0, 2], None),
    ("llama", "gla", {}, [1, 3], {"window": 6}),
    ("qwen2", "kda", {}, [1], {"rope": False, "logit_scale": 16.0}),
    ("gemma2", "mamba2", {}, [0, 3], None),
    ("olmo3", "mlstm", {}, [1], None),
]
OPTIONS = {"pad_token_id": 0, "eos_token_id": 320, "do_sample": False}


def pair(make_teacher: Any, case: tuple) -> tuple[Any, Any]:
    """A teacher's model, and a student of it whose mixers have been moved, so that it errs now and then."""
    family, mixer, options, layers, kept = case
    teacher = load_teacher(make_teacher(family))
    mixers, _ = transfer(teacher, dict.fromkeys(layers, (mixer, options)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in mixers.values():
            for parameter in module.parameters():
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return teacher.model, assemble(teacher, mixers, kept).requires_grad_(False)


def ids(length: int = 21, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 320, (1, length), generator=torch.Generator().manual_seed(seed))


def name(case: tuple) -> str:
    return "-".join((case[0], case[1], *case[2], *(case[4] or ())))


def near(model: Any, share: float = 0.05) -> Any:
    """Almost the same model: it drafts what is sometimes accepted; with a share of many, what is not."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.numel() > 1:
                parameter.add_(share * parameter.std() * torch.randn(parameter.shape, generator=generator))
    return other


@pytest.mark.parametrize("case", EVERY + PECULIAR, ids=name)
def test_greedy_is_the_targets_own(make_teacher: Any, case: tuple) -> None:
    """A student drafts for its teacher, the teacher for the student as the target, and a like student for a student."""
    teacher, student = pair(make_teacher, case)
    prompt, new = ids(), 20
    for target, draft in ((teacher, student), (student, teacher), (student, near(student))):
        alone, own = generate(target, prompt, max_new_tokens=new, **OPTIONS)
        drafted, counts = generate(target, prompt, draft, 3, max_new_tokens=new, **OPTIONS)
        assert verdict(target, alone, drafted) != "different"
        assert own.new_tokens == own.verifications == counts.new_tokens == new and own.drafted == 0
        assert counts.verifications + counts.accepted == new
    assert 0 < counts.accepted < counts.drafted


@pytest.mark.parametrize("family_name", sorted(FAMILIES))
def test_every_family(make_teacher: Any, family_name: str) -> None:
    """Whatever a family does to its logits and layers: verification asks for several, and tells the mixers so."""
    _, student = pair(make_teacher, (family_name, "gated_deltanet", {}, [1, 3], None))
    alone, _ = generate(student, ids(), max_new_tokens=10, **OPTIONS)
    drafted, counts = generate(student, ids(), near(student, 5.0), 3, max_new_tokens=10, **OPTIONS)
    assert verdict(student, alone, drafted) != "different" and counts.accepted < counts.drafted


def test_a_state_that_is_not_taken_back_is_noticed(make_teacher: Any) -> None:
    """The above proves something: where states are not taken back, another text comes out."""
    _, student = pair(make_teacher, PECULIAR[0])
    draft = near(student)
    alone, _ = generate(student, ids(), max_new_tokens=24, **OPTIONS)

    def forgets(self: MixerCacheLayer, tokens_to_remove: int) -> None:
        self.tokens += tokens_to_remove

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MixerCacheLayer, "crop", forgets)
        wrong, _ = generate(student, ids(), draft, 3, max_new_tokens=24, **OPTIONS)
    assert verdict(student, alone, wrong) == "different"


@torch.no_grad()
@pytest.mark.parametrize("case", EVERY + PECULIAR, ids=name)
def test_what_is_taken_back_leaves_no_trace(make_teacher: Any, case: tuple) -> None:
    """Caches of every layer, kept attention with and without windows too, equal those of a run without the tokens."""
    _, student = pair(make_teacher, case)
    tokens = ids(40)

    def cache_after(pieces: list[tuple[int, int]]) -> Any:
        from transformers import DynamicCache

        cache = DynamicCache(config=student.config)
        student(tokens[:, :1], **{CACHE: cache})
        cache.activate_past_recording()
        seen = 1
        for size, back in pieces:
            student(tokens[:, seen : seen + size], **{CACHE: cache})
            cache.crop(-back)
            seen += size - back
        return cache

    found, expected = cache_after([(15, 3), (6, 5), (1, 0), (8, 0), (4, 4)]), cache_after([(22, 0)])
    assert found.get_seq_length() == expected.get_seq_length() == 23
    for a, b in zip(found.layers, expected.layers, strict=True):
        ours = isinstance(a, MixerCacheLayer)
        parts = zip(*((layer.states if ours else (layer.keys, layer.values)) for layer in (a, b)), strict=True)
        assert a.get_seq_length() == 23
        for one, other in parts:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    after = [student(tokens[:, 23:25], **{CACHE: cache}).logits for cache in (found, expected)]
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_taking_back_too_much_is_refused(make_teacher: Any) -> None:
    from transformers import DynamicCache

    _, student = pair(make_teacher, PECULIAR[0])
    cache = DynamicCache(config=student.config)
    student(ids(), logits_to_keep=4, **{CACHE: cache})
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)
    cache.activate_past_recording()
    student(ids(8), logits_to_keep=4, **{CACHE: cache})
    with pytest.raises(RuntimeError, match="recorded are the states after 21, 26, 27, 28, 29 tokens"):
        cache.crop(-4)
    cache.crop(-3)
    assert cache.get_seq_length() == 26


def test_other_ways_of_drafting(make_teacher: Any) -> None:
    """transformers' own door: prompt lookup, left padding, a static cache, and a cache that goes on."""
    teacher, student = pair(make_teacher, PECULIAR[2])
    prompt = ids()
    plain = student.generate(prompt, max_new_tokens=20, **OPTIONS)
    assert torch.equal(student.generate(prompt, max_new_tokens=20, prompt_lookup_num_tokens=3, **OPTIONS), plain)
    padded, mask = torch.cat([torch.zeros(1, 5, dtype=torch.long), prompt], 1), torch.ones(1, 26, dtype=torch.long)
    mask[:, :5] = 0
    for target, draft in ((student, teacher), (teacher, student)):
        alone = target.generate(prompt, max_new_tokens=20, **OPTIONS)
        out, _ = generate(target, padded, draft, attention_mask=mask, max_new_tokens=20, **OPTIONS)
        assert torch.equal(out[:, 5:], alone)
    with pytest.raises(ValueError, match="one sequence at a time"):
        generate(student, ids().repeat(2, 1), teacher, **OPTIONS)


# No cut by rank or mass: which side of it a token is on may be a matter of rounding, here among near-equal ones.
SAMPLING = {"do_sample": True, "temperature": 0.3, "top_k": 0, "pad_token_id": 0, "eos_token_id": 320}


def test_the_draft_samples_as_the_target(make_teacher: Any) -> None:
    """Temperature and its like once for both: a model that drafts for itself has nothing refused."""
    teacher, student = pair(make_teacher, EVERY[0])
    for target in (teacher, student):
        out, counts = generate(target, ids(), target, 4, max_new_tokens=40, **SAMPLING)
        assert out.shape == (1, 61) and counts.verifications == 8 and counts.accepted == 32
    assert student.generation_config.num_assistant_tokens in (None, 20)  # as it was


def test_the_rule_of_acceptance() -> None:
    """x is kept with probability min(1, p(x) / q(x)), else drawn from max(p - q, 0), normalised: arXiv 2211.17192."""
    from transformers.generation.utils import _speculative_sampling

    p, q = torch.tensor([0.5, 0.2, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.5, 0.1])
    target, draws = torch.stack([p, p]).log()[None], 4000
    for x in range(4):
        kept, instead = 0, torch.zeros(4)
        for _ in range(draws):
            tokens, matches = _speculative_sampling(torch.tensor([[9, x]]), q.log()[None, None], 1, target.clone())
            kept += int(matches)
            if not matches:
                instead[tokens[0, 0]] += 1
        chance = min(1.0, float(p[x] / q[x]))
        assert abs(kept / draws - chance) <= 4 * math.sqrt(chance * (1 - chance) / draws) + 1e-9
        if kept < draws:
            residual = (p - q).clamp(min=0) / (p - q).clamp(min=0).sum()
            assert probability(instead, residual) > BELIEVED


BELIEVED = 1e-3


def probability(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of a chi-square as large as that of these counts or larger, if they were drawn from `expected`."""
    inside = expected > 0
    if float(found[~inside].sum()) > 0:
        return 0.0
    wanted = expected[inside].double() * float(found.sum())
    statistic = ((found[inside].double() - wanted) ** 2 / wanted).sum()
    freedom = torch.tensor((int(inside.sum()) - 1) / 2, dtype=torch.float64)
    return 1.0 if freedom == 0 else float(torch.special.gammaincc(freedom, statistic / 2))


def small_pair(tmp_path: Path) -> tuple[Any, Any]:
    """A target with four tokens in its vocabulary, sharply opinionated, and a student of another opinion."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=4, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.8,
    )  # fmt: skip
    target = LlamaForCausalLM(config).eval().requires_grad_(False)
    teacher = Teacher(target, None, family("llama", "made"), config.to_dict(), "made", tmp_path)
    mixers, _ = transfer(teacher, {0: ("gated_deltanet", {})})
    draft = assemble(teacher, mixers).requires_grad_(False)
    with torch.no_grad():
        for parameter in draft.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return target, draft


def drawn(target: Any, draft: Any, draws: int, length: int) -> tuple[torch.Tensor, int, int]:
    """How often each continuation of `length` tokens came, and tokens accepted and drafted."""
    counts, accepted, drafted = torch.zeros((4,) * length), 0, 0
    for _ in range(draws):
        out, count = generate(
            target, torch.tensor([[1, 2]]), draft, 2, max_new_tokens=length,
            do_sample=True, temperature=0.8, top_k=3, pad_token_id=0, eos_token_id=4,
        )  # fmt: skip
        counts[tuple(out[0, 2:].tolist())] += 1
        accepted, drafted = accepted + count.accepted, drafted + count.drafted
    return counts, accepted, drafted


@torch.no_grad()
def distribution(target: Any, length: int) -> torch.Tensor:
    """The target's own of those continuations, from its logits alone."""
    joint = torch.zeros((4,) * length)
    for tokens in torch.cartesian_prod(*[torch.arange(4)] * length).view(-1, length):
        logits = target(torch.cat([torch.tensor([1, 2]), tokens])[None], use_cache=False).logits[0, 1:-1]
        lowest = logits.topk(3).values[:, -1:]
        shares = logits.masked_fill(logits < lowest, -math.inf).div(0.8).softmax(-1)
        joint[tuple(tokens.tolist())] = shares.gather(1, tokens[:, None]).prod()
    return joint


@pytest.mark.parametrize(("draws", "length"), [(300, 2), pytest.param(800, 3, marks=pytest.mark.slow)])
def test_sampled_is_the_targets_own_distribution(tmp_path: Path, draws: int, length: int) -> None:
    """By chi-square, either model drafting for the other; and a draft that is believed too readily is found out."""
    made = small_pair(tmp_path)
    for target, draft in (made, made[::-1]):
        expected = distribution(target, length)
        assert abs(float(expected.sum()) - 1) < 1e-5
        counts, accepted, drafted = drawn(target, draft, draws, length)
        assert 0 < accepted < drafted
        assert probability(counts, expected) > BELIEVED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand_like", torch.zeros_like)  # every drafted token is accepted
        counts, _, _ = drawn(target, draft, draws, length)
    assert probability(counts, expected) < 1e-6


def test_equal_tensors_are_held_once(make_teacher: Any) -> None:
    """All but the mixers of an untrained student; tied stay tied, names do not matter, results are the same."""
    teacher, student = pair(make_teacher, EVERY[0])
    assert teacher.config.tie_word_embeddings
    prompt = ids()
    before = student(prompt, use_cache=False).logits
    mixers = {id(p) for mixer in student.model.mixers().values() for p in mixer.parameters()}
    rest = sum(p.numel() * 4 for p in student.parameters() if id(p) not in mixers)
    shared = share_equal(student, teacher)
    assert shared.bytes == rest and shared.target_bytes == sum(p.numel() * 4 for p in teacher.parameters())
    assert shared.draft_bytes == sum(p.numel() * 4 for p in student.parameters())
    assert student.lm_head.weight is student.model.embed_tokens.weight is teacher.model.embed_tokens.weight
    assert student.model.layers[0].mlp.up_proj.weight is teacher.model.layers[0].mlp.up_proj.weight
    assert torch.equal(student(prompt, use_cache=False).logits, before)

    _, other = pair(make_teacher, EVERY[0])
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.001)
        other.model.layers[1].mlp.up_proj.weight.copy_(teacher.model.layers[2].mlp.up_proj.weight)
    shared = share_equal(other, teacher)
    assert shared.tensors == 1
    assert other.model.layers[1].mlp.up_proj.weight is teacher.model.layers[2].mlp.up_proj.weight


@pytest.fixture
def exported(make_teacher: Any, tmp_path: Path) -> tuple[Path, Path]:
    """A teacher's folder and that of an export made from it."""
    folder = make_teacher("llama")
    _, student = pair(make_teacher, PECULIAR[0])
    return folder, export_student(student, folder, tmp_path / "export")


def test_an_export_drafts_and_verifies_without_relinear(exported: tuple[Path, Path]) -> None:
    """transformers' own `assistant_model=`, with the code that the export brings."""
    from transformers import AutoModelForCausalLM

    folder, export = exported
    student = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True).eval()
    teacher = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(student).__module__.startswith("transformers_modules")
    for target, draft in ((teacher, student), (student, teacher)):
        plain = target.generate(ids(), max_new_tokens=20, **OPTIONS)
        assert torch.equal(target.generate(ids(), max_new_tokens=20, assistant_model=draft, **OPTIONS), plain)


def test_generate_says_what_drafting_did(exported: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder, export = map(str, exported)
    common = ["generate", folder, "--prompt", "Once upon a time", "--max-new-tokens", "24"]
    assert main(common) == 0
    plain = capsys.readouterr().out
    assert main([*common, "--draft", export, "--draft-tokens", "3"]) == 0
    out, err = capsys.readouterr()
    assert out == plain and "tokens accepted in" in err and "shared: " in err
    assert main([*common, "--draft", export, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    drafted = found["draft"]
    assert found["text"] == plain.removesuffix("\n") and drafted["model"] == export
    assert drafted["verifications"] + drafted["accepted"] == found["new_tokens"]
    assert 0 < drafted["shared_bytes"] < drafted["draft_bytes"]
    assert main([*common, "--temperature", "0.7", "--draft", export]) == 0


def test_bench_draft_keeps_what_it_measured(
    exported: tuple[Path, Path], story_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, export = map(str, exported)
    line = ["bench", "draft", folder, "--draft", export, "--lengths", "16,300", "--prompts", "2", "--tokens", "8"]
    assert main([*line, "--text", str(story_file), "--out", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "draft.json").read_text())
    assert [(row["length"], row["beyond_context"]) for row in found["lengths"]] == [(16, False), (300, True)]
    for row in found["lengths"]:
        assert row["identical"] + row["ties"] == row["prompts"] == 2
        assert row["accepted_per_verification"] + 1 == pytest.approx(row["tokens_per_verification"])
        assert row["speed_up_min"] <= row["speed_up"] <= row["speed_up_max"]
    more = [*line, "--text", str(story_file), "--out", str(tmp_path / "out"), "--lengths", "16,24", "--json"]
    assert main(more) == 0
    out, err = capsys.readouterr()
    assert "measured before: 16 tokens" in err and "24 tokens of context" in err
    again = json.loads(out)["lengths"]
    assert [row["length"] for row in again] == [16, 24, 300] and [again[0], again[2]] == found["lengths"]
    assert main([*more, "--again"]) == 0
    assert [row["length"] for row in json.loads(capsys.readouterr().out)["lengths"]] == [16, 24]
    assert main([*line, "--out", str(tmp_path / "out")]) == 0
    assert "identical" in capsys.readouterr().out.splitlines()[0]
    other = tmp_path / story_file.name
    other.write_text(story_file.read_text() + " The end.")
    assert main([*line, "--text", str(other), "--out", str(tmp_path / "out")]) == 0
    assert "measured before" not in capsys.readouterr().err
    assert main([*line, "--text", str(story_file), "--prompts", "9000"]) == 2


def test_another_vocabulary_is_one_message(make_teacher: Any, capsys: pytest.CaptureFixture[str]) -> None:
    mine, other = str(make_teacher("llama")), str(make_teacher("qwen3"))
    for line in (
        ["generate", mine, "--draft", other, "--prompt", "Once"],
        ["bench", "draft", mine, "--draft", other],
    ):
        assert main(line) == 2
        out, err = capsys.readouterr()
        assert out == "" and "320 and 320 tokens" in err and "an export that was made from it" in err
    assert main(["generate", mine, "--draft-tokens", "3", "--prompt", "Once"]) == 2
    assert "--draft FOLDER" in capsys.readouterr().err


@pytest.mark.slow
def test_two_hundred_prompts(shared: Path, tmp_path: Path) -> None:
    """A real teacher and a conversion of it that has trained for a moment: the teacher's very tokens, in fp32."""
    from relinear.eval.bench_draft import prompts_of
    from relinear.recipes import runner

    folder, text = shared / "teachers" / "stories260k", shared / "corpora" / "tinystories"
    given = [
        f"teacher.model={folder}", f"data.source={text / 'train.txt'}", f"save.dir={tmp_path / 'run'}",
        "stages.align.tokens=30k", "stages.glue.tokens=30k", "eval.every=null",
    ]  # fmt: skip
    runner.convert("gated_deltanet", given)
    (target, tokenizer), (draft, _) = load_model(folder), load_model(tmp_path / "run" / "export")
    settings = Settings(tokens=12, prompts=200)
    row = measure_length(target, draft, prompts_of(tokenizer, [str(text / "valid.txt")], 24, settings, 512), settings)
    assert row["different"] == 0 and row["ties"] <= 2 and row["identical"] + row["ties"] == 200
    assert row["accepted_per_verification"] > 1
