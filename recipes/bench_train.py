"""`bench train`: what training reaches, as ratios within one run: time in turns, memory from torch's own allocator.

The teacher is a llama of random weights, grouped heads and no file: speed does not depend on what the weights are. Its
arithmetic limit, for a stage that does what align does, is its own forward-only tokens/s times F_teacher / (F_teacher +
F_mixers), where F_mixers are the mixers' forward, weight gradients and those input gradients that are needed.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from ..distill import checkpoint, families
from ..distill.align import align_stage
from ..distill.data.corpus import open_train
from ..distill.glue import glue_stage
from ..distill.stage import Stage, StageSettings
from ..distill.student import assemble, transfer
from ..distill.teacher import Teacher
from ..eval.memory import peak_bytes
from ..eval.speed import spread
from ..mixers import registry
from . import costs
from .bench import random_batch
from .bench_measure import turns
from .layers import LayerMap
from .teacher_config import TeacherConfig

CASES = ("align", "glue", "memory", "ranks", "loader")
TARGETS = {"align": 0.6, "glue": 0.75, "memory": 1.5, "ranks": 1.7, "loader": 0.03}
"""At least, but for memory and loader: at most."""
MEASURED = "gated_deltanet"
"""The mixer that align's target is for; the others are reported."""


class Settings(NamedTuple):
    """What `bench train` measures.

    Attributes:
        cases: names out of `CASES`.
        mixers: of the case `align`; the others take `MEASURED`.
        hidden, layers, vocab: of the teacher: 100M parameters by default.
        batch, seq_len: of a step.
        repeats: turns, each of which runs both sides once.
        depths: layers of the teachers whose memory is compared.
        stream: tokens that the loader reads.
        threads: of torch.
    """

    cases: tuple[str, ...] = CASES
    mixers: tuple[str, ...] = (MEASURED,)
    hidden: int = 768
    layers: int = 12
    vocab: int = 32000
    batch: int = 2
    seq_len: int = 512
    repeats: int = 5
    depths: tuple[int, ...] = (2, 4, 8)
    stream: int = 2_000_000
    threads: int = 1


Row = dict[str, Any]


def measure(settings: Settings, progress: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """The whole of `bench train`.

    Args:
        settings: what to measure.
        progress: called with a line before each measurement.

    Returns:
        {"settings", "environment", "rows": of {"case", "what", "value" (the case's ratio, median over turns), "target",
        "reached" (None where nothing is asked), and the figures that it is made of}}.
    """
    torch.set_num_threads(settings.threads)
    rows: list[Row] = []
    for case in settings.cases:
        for what, call in _cases(case, settings):
            progress(f"{case}: {what}")
            row = {"case": case, "what": what, **call()}
            asked = case != "align" or what == MEASURED
            row["target"] = TARGETS[case] if asked else None
            over = case in ("memory", "loader")
            within = row["value"] <= TARGETS[case] if over else row["value"] >= TARGETS[case]
            row["reached"] = within if asked else None
            rows.append(row)
            progress(f"{case}: {what}: {row['value']:.3g}")
    return {
        "settings": settings._asdict(),
        "environment": checkpoint.environment() | {"threads": settings.threads},
        "rows": rows,
    }


def failures(result: dict[str, Any]) -> list[str]:
    """What misses its target, in words."""
    return [
        f"{row['case']}, {row['what']}: {row['value']:.3g}, target {row['target']:g}"
        for row in result["rows"]
        if row["reached"] is False
    ]


def _cases(case: str, settings: Settings) -> list[tuple[str, Callable[[], Row]]]:
    if case == "align":
        return [(name, lambda name=name: align_limit(settings, name)) for name in settings.mixers]
    if case == "memory":
        return [(f"{depth} layers", lambda depth=depth: align_memory(settings, depth)) for depth in settings.depths]
    if case == "glue":
        return [(MEASURED, lambda: glue_ratio(settings))]
    if case == "ranks":
        from .bench_ranks import two_processes

        return [("two processes, ddp", lambda: two_processes(settings))]
    return [("packed text", lambda: loader_share(settings))]


def teacher_config(settings: Settings, layers: int | None = None) -> dict[str, Any]:
    """config.json of the teacher: llama, three query heads to a key/value head of 64 channels."""
    heads = max(1, settings.hidden // 64)
    return {
        "model_type": "llama",
        "hidden_size": settings.hidden,
        "intermediate_size": settings.hidden * 8 // 3 // 64 * 64,
        "num_hidden_layers": layers or settings.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 3),
        "vocab_size": settings.vocab,
        "max_position_embeddings": max(2048, settings.seq_len),
        "tie_word_embeddings": True,
    }


def random_teacher(config: dict[str, Any]) -> Teacher:
    """A frozen fp32 teacher of random weights; always the same."""
    model = _model(config).eval().requires_grad_(False)
    return Teacher(model, None, families.FAMILIES["llama"], config, "random weights", Path())


def _model(config: dict[str, Any]) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{key: value for key, value in config.items() if key != "model_type"}))


def _stage_settings(settings: Settings, **changes: Any) -> StageSettings:
    return StageSettings(tokens=settings.batch * settings.seq_len, batch=settings.batch, **changes)


def _stepper(stage: Stage, settings: Settings) -> Callable[[], None]:
    """A whole step without the loop's bookkeeping: forward, backward, AdamW."""
    batch = random_batch(settings.vocab, settings.batch, settings.seq_len)
    optimizer = torch.optim.AdamW(stage.parameters.values(), lr=1e-5, fused=True)
    stage.module.train()
    counted = stage.count(batch)

    def step() -> None:
        stage.step(batch, counted)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def align_limit(settings: Settings, mixer: str) -> Row:
    """Align with all layers converted, against its arithmetic limit.

    Returns:
        {"value" (tokens/s over the limit's: median, with _min and _max), "tokens_per_second",
        "forward_tokens_per_second" (of the teacher), "limit_tokens_per_second", and per token
        "teacher_flops" and "mixer_flops"}.
    """
    config = teacher_config(settings)
    teacher = random_teacher(config)
    plan: Any = {layer: (mixer, {}) for layer in range(settings.layers)}
    mixers, _ = transfer(teacher, plan)
    step = _stepper(align_stage(teacher, mixers, _stage_settings(settings)), settings)
    batch = random_batch(settings.vocab, settings.batch, settings.seq_len)

    def forward() -> None:
        with torch.no_grad():
            teacher.backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)

    forward()
    step()
    passed, stepped = turns([forward, step], settings.repeats, float("inf"))
    f_teacher, f_mixers = align_flops(config, mixer, settings.seq_len)
    share = f_teacher / (f_teacher + f_mixers)
    tokens = settings.batch * settings.seq_len
    forward_rate = tokens / statistics.median(passed)
    return {
        **spread("value", [a / b / share for a, b in zip(passed, stepped, strict=True)]),
        "tokens_per_second": tokens / statistics.median(stepped),
        "forward_tokens_per_second": forward_rate,
        "limit_tokens_per_second": forward_rate * share,
        "teacher_flops": f_teacher,
        "mixer_flops": f_mixers,
        "turns": len(passed),
    }


def align_flops(config: dict[str, Any], mixer: str, seq_len: int) -> tuple[float, float]:
    """FLOPs per token of the teacher's forward (without its output head), and of what align adds to it."""
    geometry = TeacherConfig("random weights", families.FAMILIES["llama"], config)
    converted: Any = {layer: (mixer, {}) for layer in range(config["num_hidden_layers"])}
    found = [costs.mixer_flops(geometry, LayerMap(geometry.num_layers, [], converted), layer) for layer in converted]
    added = sum(forward + backward - inputs for forward, backward, inputs in found)
    return costs.forward_flops(geometry, seq_len), float(added)


def glue_ratio(settings: Settings) -> Row:
    """Glue with all layers converted, against a plain step of transformers' own model as the student.

    The plain step: the teacher's logits, a student of the same configuration forward and backward on their KL
    divergence, AdamW.

    Returns:
        {"value" (glue's tokens/s over the plain step's), "tokens_per_second", "plain_tokens_per_second"}.
    """
    config = teacher_config(settings)
    teacher = random_teacher(config)
    plan: Any = {layer: (MEASURED, {}) for layer in range(settings.layers)}
    student = assemble(teacher, transfer(teacher, plan)[0])
    glue = _stepper(glue_stage(teacher, student, _stage_settings(settings, loss={"kl": 1.0})), settings)
    other: nn.Module = _model(config).train()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-5, fused=True)
    batch = random_batch(settings.vocab, settings.batch, settings.seq_len)

    def plain() -> None:
        with torch.no_grad():
            wanted = log_softmax(teacher.model(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1), -1)
        made = log_softmax(other(input_ids=batch.input_ids, use_cache=False).logits.flatten(0, 1), -1)
        kl_div(made, wanted, reduction="batchmean", log_target=True).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    glue()
    plain()
    own, theirs = turns([glue, plain], settings.repeats, float("inf"))
    tokens = settings.batch * settings.seq_len
    return {
        **spread("value", [b / a for a, b in zip(own, theirs, strict=True)]),
        "tokens_per_second": tokens / statistics.median(own),
        "plain_tokens_per_second": tokens / statistics.median(theirs),
        "turns": len(own),
    }


def align_memory(settings: Settings, depth: int) -> Row:
    """The most that an align step holds beyond weights, gradients and optimizer, in layers' activations.

    One layer's activations are what torch keeps of one decoder layer of the student for its backward pass.

    Returns:
        {"value", "peak_bytes", "layer_bytes", "gradient_bytes" (which the peak leaves out)}.
    """
    config = teacher_config(settings, depth)
    teacher = random_teacher(config)
    plan: Any = {layer: (MEASURED, {}) for layer in range(depth)}
    mixers, _ = transfer(teacher, plan)
    stage = align_stage(teacher, mixers, _stage_settings(settings))
    batch = random_batch(settings.vocab, settings.batch, settings.seq_len)
    for parameter in stage.parameters.values():  # where they lie is decided before, as weights' is
        parameter.grad = torch.zeros_like(parameter)
    peak = peak_bytes(lambda: stage.step(batch, batch.tokens))
    layer = kept_bytes(assemble(teacher, mixers).float(), batch) / depth
    gradients = sum(p.nbytes for p in stage.parameters.values())
    return {"value": peak / layer, "peak_bytes": peak, "layer_bytes": round(layer), "gradient_bytes": gradients}


def kept_bytes(student: Any, batch: Any) -> int:
    """What a student's decoder layers keep of a batch for the backward pass, weights left out."""
    own = {p.untyped_storage().data_ptr() for p in student.parameters()}
    held: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    student.requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = student.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    del out
    return sum(held.values())


def loader_share(settings: Settings) -> Row:
    """Reading, tokenising and packing a stream of the settings' number of tokens, against the align steps on them.

    The text is the package's own, the tokenizer the embedded teacher's. Steps are timed between batches and their time
    is taken times their number.

    Returns:
        {"value" (loader's seconds over the steps'), "loader_tokens_per_second", "tokens_per_second", "tokens"}.
    """
    from ..distill.teacher import load_tokenizer
    from .embedded.corpus import DOCUMENTS, SEED
    from .embedded.text import documents
    from .teacher_config import locate

    tokenizer = load_tokenizer(Path(locate("embedded")), settings.vocab)
    teacher = random_teacher(teacher_config(settings))
    plan: Any = {layer: (MEASURED, {}) for layer in range(settings.layers)}
    step = _stepper(align_stage(teacher, transfer(teacher, plan)[0], _stage_settings(settings)), settings)
    step()
    steps, tokens, seconds = [], 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(SEED, DOCUMENTS)))
        start = time.perf_counter()
        source = open_train(
            tokenizer=tokenizer, seq_len=settings.seq_len, batch=settings.batch, source=str(path), stream=True
        )
        seconds += time.perf_counter() - start
        every = max(1, settings.stream // (settings.batch * settings.seq_len) // settings.repeats)
        while tokens < settings.stream:
            start = time.perf_counter()
            for _ in range(every):
                tokens += source.next_batch().tokens
            seconds += time.perf_counter() - start
            start = time.perf_counter()
            step()
            steps.append((time.perf_counter() - start) / (settings.batch * settings.seq_len))
    each = statistics.median(steps)
    return {
        "value": seconds / (each * tokens),
        "loader_tokens_per_second": tokens / seconds,
        "tokens_per_second": 1 / each,
        "tokens": tokens,
        "turns": len(steps),
    }


def names() -> tuple[str, ...]:
    """Every mixer that align can train."""
    return tuple(name for name in registry.names() if name != "identity")
