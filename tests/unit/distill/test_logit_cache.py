"""The cache of a teacher's logits: what it holds, what it refuses, what a kill or a full disk leaves of it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from relinear.distill import files
from relinear.distill.data.batch import Batch
from relinear.distill.data.corpus import Corpus, open_corpus
from relinear.distill.data.source import Source
from relinear.distill.errors import MachineError, UserError
from relinear.distill.glue import glue_stage
from relinear.distill.logit_cache import sizes
from relinear.distill.logit_cache.key import LogitSettings, cache_folder, cache_key, differences
from relinear.distill.logit_cache.make import bytes_needed, make_cache, predicted
from relinear.distill.logit_cache.store import CheckedSource, LogitCache, shard_path
from relinear.distill.loop import StageSettings, run_stage
from relinear.distill.student import assemble
from relinear.distill.teacher import Teacher, load_teacher

BATCH, LENGTH, STEPS, K = 6, 32, 5, 9
TOKENS = BATCH * LENGTH * STEPS
KEEP = LogitSettings(top_k=K, dtype="float32")
SHARD = 4000  # bytes: four rows, so that shards end inside batches


@pytest.fixture
def corpus(teacher: Teacher, story_file: Path) -> Corpus:
    return open_corpus(tokenizer=teacher.tokenizer, source=str(story_file), valid_documents=2, valid_tokens=10)


def source_of_corpus(corpus: Corpus, seed: int = 3, pack: bool = True, seq_len: int = LENGTH) -> Source:
    return corpus.train(seq_len=seq_len, batch=BATCH, seed=seed, pack=pack)


def make(teacher: Teacher, corpus: Corpus, place: Path, settings: LogitSettings = KEEP, **options: Any) -> Any:
    source = options.pop("source", None) or source_of_corpus(corpus)
    key = cache_key(teacher, source, options.pop("tokens", TOKENS), settings)
    return make_cache(teacher, source, cache_folder(place, key), key, shard_bytes=SHARD, **options)


def test_holds_what_the_teacher_predicts_in_every_row(teacher: Teacher, corpus: Corpus, tmp_path: Path) -> None:
    cache = make(teacher, corpus, tmp_path)
    assert cache.manifest["rows"] == BATCH * STEPS and cache.manifest["steps"] == STEPS
    assert len(cache.manifest["shards"]) > STEPS
    source = source_of_corpus(corpus)
    for _ in range(STEPS):
        batch = source.next_batch()
        cache.check(batch)
        for part in (batch, batch.rows(0, 2), batch.rows(2, BATCH)):
            wanted, found = predicted(teacher, part, K), cache.read(part.index)
            assert torch.equal(found.ids.long(), wanted.ids)
            torch.testing.assert_close(found.log_probs, wanted.log_probs, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.log_tail, wanted.log_tail, rtol=1e-5, atol=1e-6)
    assert cache.manifest["tail_mass"] == pytest.approx(_mean_tail(teacher, corpus), rel=1e-5)


def _mean_tail(teacher: Teacher, corpus: Corpus) -> float:
    source, tails = source_of_corpus(corpus), []
    for _ in range(STEPS):
        tails.append(predicted(teacher, source.next_batch(), K).log_tail.double().exp())
    return float(torch.cat(tails).mean())


def test_rows_of_unequal_length_and_parts_of_a_batch(teacher: Teacher, corpus: Corpus, tmp_path: Path) -> None:
    """Not packed, a batch is as wide as its longest row; the making may cut it elsewhere than the reading."""
    cache = make(teacher, corpus, tmp_path, source=source_of_corpus(corpus, pack=False), micro_batch=2)
    source = source_of_corpus(corpus, pack=False)
    for _ in range(cache.manifest["steps"]):
        batch = source.next_batch()
        cache.check(batch)
        part = batch.rows(1, 4)
        assert torch.equal(cache.read(part.index).ids.long(), predicted(teacher, part, K).ids)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere2"])
def test_scale_and_softcap_are_in_it(make_teacher: Callable[..., Path], batch_of: Callable[..., Batch], family: str):
    teacher = load_teacher(make_teacher(family))
    batch = batch_of(2)
    with torch.no_grad():
        logits = teacher.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    wanted = logits[:, :-1][batch.targets[:, 1:]].div(1.5).log_softmax(-1)
    found = predicted(teacher, batch, 320, temperature=1.5)
    torch.testing.assert_close(found.log_probs, wanted.sort(-1, descending=True).values, rtol=1e-4, atol=1e-4)


def test_size_is_as_planned(teacher: Teacher, corpus: Corpus, tmp_path: Path) -> None:
    cache = make(teacher, corpus, tmp_path, LogitSettings(top_k=K, dtype="float16"))
    planned, made = bytes_needed(cache.folder, cache.manifest["key"], 320)
    held = sum(path.stat().st_size for path in cache.folder.glob("*.safetensors"))
    headers = 500 * len(cache.manifest["shards"])
    positions = cache.manifest["positions"] * sizes.position_bytes(K, "float16", 320)
    assert made == held == cache.manifest["bytes"]
    assert positions < held <= planned + headers
    assert max(path.stat().st_size for path in cache.folder.glob("*.safetensors")) <= SHARD + 500


def test_is_made_once(teacher: Teacher, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(teacher, corpus, tmp_path)
    monkeypatch.setattr("relinear.distill.logit_cache.make.predicted", _refuse)
    assert make(teacher, corpus, tmp_path).manifest["complete"]


def _refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("the teacher was run")


@pytest.mark.parametrize("kill_at", [0, 1, 3])
def test_a_killed_making_goes_on_with_the_next_shard(
    teacher: Teacher, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    """Killed between the shard and its record, which is where most can go wrong: that shard alone is made again."""
    whole = make(teacher, corpus, tmp_path / "whole")
    written = files.write_json

    def kill(path: Path, value: Any) -> None:
        if path.name == f"shard-{kill_at:05d}.json":
            raise KeyboardInterrupt
        written(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_json", kill)
        with pytest.raises(KeyboardInterrupt):
            make(teacher, corpus, tmp_path / "killed")
    folder = next((tmp_path / "killed").iterdir())
    (folder / "shard-00001.safetensors.tmp-1").write_bytes(b"half")
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.json")}
    assert len(kept) == kill_at
    with pytest.raises(UserError, match="not complete"):
        LogitCache(folder)
    cache = make(teacher, corpus, tmp_path / "killed")
    assert {name: (folder / name).stat().st_mtime_ns for name in kept} == kept
    assert cache.manifest["shards"] == whole.manifest["shards"]
    assert not list(folder.glob("*.tmp-*"))


def test_stops_when_told_and_goes_on(teacher: Teacher, corpus: Corpus, tmp_path: Path) -> None:
    asked = iter([False, False, True])
    assert make(teacher, corpus, tmp_path, should_stop=lambda: next(asked)) is None
    told: list[int] = []
    assert make(teacher, corpus, tmp_path, progress=told.append).manifest["complete"]
    assert told[-1] == TOKENS and len(told) == STEPS


def test_a_flipped_byte_is_named_and_that_shard_alone_made_again(
    teacher: Teacher, corpus: Corpus, tmp_path: Path
) -> None:
    cache = make(teacher, corpus, tmp_path)
    path = shard_path(cache.folder, 1)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    broken = LogitCache(cache.folder)
    broken.read(torch.tensor([0]))
    per = cache.manifest["rows_per_shard"]
    with pytest.raises(MachineError, match=r"shard-00001.*changed since it was written.*rm .*shard-00001"):
        broken.read(torch.tensor([per]))
    path.unlink()
    with pytest.raises(MachineError, match=r"shard-00001.*missing"):
        LogitCache(cache.folder)
    before = shard_path(cache.folder, 0).stat().st_mtime_ns
    again = make(teacher, corpus, tmp_path)
    assert again.manifest["shards"] == cache.manifest["shards"]
    assert shard_path(cache.folder, 0).stat().st_mtime_ns == before


def test_a_truncated_shard_is_named(teacher: Teacher, corpus: Corpus, tmp_path: Path) -> None:
    cache = make(teacher, corpus, tmp_path)
    path = shard_path(cache.folder, 2)
    os.truncate(path, path.stat().st_size - 7)
    with pytest.raises(MachineError, match=r"shard-00002.safetensors: [\d,]+ bytes, written with"):
        LogitCache(cache.folder)


def test_another_key_is_another_folder_and_naming_one_says_what_differs(
    teacher: Teacher, corpus: Corpus, tmp_path: Path, qwen2: Path
) -> None:
    cache = make(teacher, corpus, tmp_path)
    others = [
        {"settings": replace(KEEP, top_k=K + 1)},
        {"settings": replace(KEEP, temperature=2.0)},
        {"settings": replace(KEEP, dtype="float16")},
        {"tokens": TOKENS - 1},
        {"source": source_of_corpus(corpus, seed=4)},
        {"source": source_of_corpus(corpus, seq_len=16)},
        {"source": source_of_corpus(corpus, pack=False)},
    ]
    names = ["top_k: made with 9, now 10", "temperature: made with 1.0, now 2.0", "dtype: made with float32"]
    names += ["tokens: made with 960, now 959", "data.seed: made with 3, now 4", "data.seq_len", "data.pack"]
    for other, name in zip(others, names, strict=True):
        with pytest.raises(UserError, match=name):
            make(teacher, corpus, cache.folder, **other)
        assert make(teacher, corpus, tmp_path, **other).folder != cache.folder
    stranger = load_teacher(qwen2)
    text = str(corpus.parts[0].source)
    with pytest.raises(UserError, match=r"teacher model.safetensors: made with.*tokenizer tokenizer.json: made with"):
        make(stranger, open_corpus(tokenizer=stranger.tokenizer, source=text), cache.folder)
    assert LogitCache(cache.folder).manifest == cache.manifest


def test_differences_name_what_is_only_in_one():
    assert differences({"a": 1, "t": {"x": 1}}, {"a": 1, "t": {"y": 2}}) == [
        "t y: made with None, now 2",
        "t x: made with 1, now None",
    ]


def test_data_that_changed_under_the_same_key_is_named_by_row(teacher: Teacher, corpus: Corpus, tmp_path: Path) -> None:
    cache = make(teacher, corpus, tmp_path)
    source = source_of_corpus(corpus)
    checked = CheckedSource(source, cache)
    checked.next_batch()
    take = source.next_batch

    def changed() -> Batch:
        batch = take()
        batch.input_ids[2, 5] += 1
        return batch

    source.next_batch = changed  # type: ignore[method-assign]
    with pytest.raises(UserError, match=f"row {BATCH + 2} of the data is not what the teacher read"):
        checked.next_batch()


def test_a_full_disk_leaves_what_was_made(
    teacher: Teacher, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = os.fsync
    calls = []

    def full(descriptor: int) -> None:
        if ".safetensors" in os.readlink(f"/proc/self/fd/{descriptor}"):
            calls.append(descriptor)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(MachineError, match=r"no space left.*2 shards are made and stay.*goes on from there"):
            make(teacher, corpus, tmp_path)
    folder = next(tmp_path.iterdir())
    assert sorted(p.name for p in folder.glob("*.safetensors*")) == [f"shard-{n:05d}.safetensors" for n in (0, 1)]
    assert make(teacher, corpus, tmp_path).manifest["complete"]


def test_too_little_disk_is_said_before_any_work(
    teacher: Teacher, corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("relinear.distill.logit_cache.make.predicted", _refuse)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    with pytest.raises(MachineError, match=r"needs [\d,]+ bytes more, 1,000 are free.*teacher_logits.top_k"):
        make(teacher, corpus, tmp_path)


def test_two_ranks_make_the_same_cache(teacher: Teacher, corpus: Corpus, tmp_path: Path) -> None:
    """One after the other here: what a rank makes does not depend on the other."""
    from relinear.distill.logit_cache import make as making

    whole = make(teacher, corpus, tmp_path / "one")
    source = source_of_corpus(corpus)
    key = cache_key(teacher, source, TOKENS, KEEP)
    folder = cache_folder(tmp_path / "two", key)
    begun = making._begin(folder, key, 320, SHARD, [])
    for rank in (1, 0):
        world = making.World(rank, 2)
        work = making._Making(teacher, folder, key, begun["rows_per_shard"], None, world)
        assert work.run(source_of_corpus(corpus), lambda tokens: None, lambda: False)
        numbers = {int(path.stem[-5:]) % 2 for path in folder.glob("*.safetensors")}
        assert numbers == ({1} if rank == 1 else {0, 1})
    making._finish(folder, begun, work.rows, work.steps)
    assert LogitCache(folder).manifest["shards"] == whole.manifest["shards"]


@pytest.fixture
def student_of(mixers_of: Callable[..., Any]) -> Callable[[Teacher], Any]:
    return lambda teacher: assemble(teacher, mixers_of(teacher, [1, 2]))


SETTINGS = StageSettings(
    tokens=TOKENS, batch=BATCH, seq_len=LENGTH, lr=1e-3, warmup=1, loss={"kl": 1.0, "ce": 0.1}, log_every=1
)


def losses_of(folder: Path) -> list[float]:
    return [record["loss"] for record in files.read_metrics(folder / "metrics.jsonl") if "loss" in record]


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_glue_with_the_whole_vocabulary_cached_is_glue(
    teacher: Teacher,
    corpus: Corpus,
    tmp_path: Path,
    student_of: Callable[[Teacher], Any],
    monkeypatch: pytest.MonkeyPatch,
    micro_batch: int | None,
) -> None:
    """And the teacher is not run: its forward raises."""
    settings = replace(SETTINGS, micro_batch=micro_batch)
    plain = glue_stage(teacher, student_of(teacher), settings)
    run_stage(plain, source_of_corpus(corpus), settings, folder=tmp_path / "plain")
    cache = make(teacher, corpus, tmp_path / "cache", LogitSettings(top_k=320, dtype="float32"))
    stage = glue_stage(teacher, student_of(teacher), settings, cache=cache)
    monkeypatch.setattr(teacher.backbone, "forward", _refuse)
    run_stage(stage, CheckedSource(source_of_corpus(corpus), cache), settings, folder=tmp_path / "cached")
    assert losses_of(tmp_path / "cached") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-4)


def test_glue_resumes_by_step(
    teacher: Teacher, corpus: Corpus, tmp_path: Path, student_of: Callable[[Teacher], Any]
) -> None:
    from relinear.distill.loop import Callbacks

    cache = make(teacher, corpus, tmp_path / "cache")

    def go(folder: Path, resume: bool = False, steps: int = 10) -> None:
        stage = glue_stage(teacher, student_of(teacher), SETTINGS, cache=LogitCache(cache.folder))
        source = CheckedSource(source_of_corpus(corpus), cache)
        count = iter([False] * steps + [True] * 9)
        run_stage(
            stage,
            source,
            SETTINGS,
            folder=folder,
            resume=resume,
            callbacks=Callbacks(should_stop=lambda: next(count)),
        )

    go(tmp_path / "through")
    go(tmp_path / "parts", steps=2)
    go(tmp_path / "parts", resume=True)
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "through")


def test_what_a_cache_does_not_hold_is_refused(
    teacher: Teacher, corpus: Corpus, tmp_path: Path, student_of: Callable[[Teacher], Any]
) -> None:
    cache = make(teacher, corpus, tmp_path)
    for term in ("align", "reverse_kl"):
        with pytest.raises(ValueError, match="need the teacher itself"):
            glue_stage(teacher, student_of(teacher), replace(SETTINGS, loss={"kl": 1.0, term: 0.5}), cache=cache)
    with pytest.raises(UserError, match="holds 30 rows, row 30 was asked for"):
        cache.read(torch.tensor([30]))
    (cache.folder / "cache.json").write_text("{")
    with pytest.raises(UserError, match=r"cache.json: cannot be read"):
        LogitCache(cache.folder)
    with pytest.raises(UserError, match="no cache of logits"):
        LogitCache(tmp_path / "nowhere")
    assert json.loads((cache.folder / "shard-00000.json").read_text())["rows"] > 0
