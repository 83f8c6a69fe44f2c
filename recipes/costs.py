"""What a conversion costs, counted from geometry alone: parameters, bytes, FLOPs. Memory and time are estimates.

FLOPs count matrix products (a multiply-add is two) and take a backward pass as twice its forward. Peak rates are dense
bf16 tensor-core figures of the vendors' data sheets; the share of the peak that a run reaches (MFU) is an assumption,
0.15 unless said otherwise: RADLADS' glue of a 7B model took 44 MI300X-hours for 500M tokens, 0.14 of the peak.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..mixers import registry
from .layers import LayerMap
from .teacher_config import TeacherConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MFU = 0.15
# name: (peak dense bf16 TFLOP/s, memory in GB)
GPUS: dict[str, tuple[float, int]] = {
    "A100": (312, 80),
    "H100": (989, 80),
    "H200": (989, 141),
    "B200": (2250, 180),
    "MI300X": (1307, 192),
    "L40S": (362, 48),
    "RTX4090": (165, 24),
}
CACHE_LENGTHS = (4096, 32768, 131072)
# Floats kept for a backward pass, per token, counted from the tensors that plain torch saves at widths 128 to 512: by
# rwkv7 38 to 40 per inner channel (gated_deltanet 25 to 27), by the rest of a layer 5 per hidden and 4 per feed-forward
# channel. Attention's 8 are q, k, v, their rotated copies and the output.
_MIXER_FLOATS, _ATTENTION_FLOATS, _HIDDEN_FLOATS, _FFN_FLOATS = 40, 8, 5, 4
_LOGITS = 2**26  # logits of one model held at once, as `distill.losses.CHUNK_ELEMENTS` says of GPUs


@dataclass(frozen=True)
class Counts:
    """Parameters by part.

    Attributes:
        embeddings: input embedding and, where it is not tied to it, the output head.
        attention: of one attention layer.
        ffn: of one feed-forward block.
        norms: of all norms outside attention.
        layers: decoder layers.
        mixers: layer -> parameters of its mixer, for converted layers.
        qk_norms: of one attention layer's query and key norms, contained in `attention`.
    """

    embeddings: int
    attention: int
    ffn: int
    norms: int
    layers: int
    mixers: dict[int, int]
    qk_norms: int

    @property
    def teacher(self) -> int:
        """All parameters of the teacher."""
        return self.embeddings + self.norms + self.layers * (self.attention + self.ffn)

    @property
    def student(self) -> int:
        """All parameters of the converted model."""
        return self.teacher - len(self.mixers) * self.attention + self.all_mixers

    @property
    def all_mixers(self) -> int:
        """Parameters of all mixers."""
        return sum(self.mixers.values())

    def trained(self, kind: str, train: str) -> int:
        """Parameters that a stage trains.

        Args:
            kind: of the stage.
            train: its `train`, for glue and extend.
        """
        if kind == "transfer":
            return 0
        if kind == "align" or train == "mixers":
            return self.all_mixers
        if train == "mixers+norms":
            return self.all_mixers + self.norms + (self.layers - len(self.mixers)) * self.qk_norms
        return self.student - (self.layers * self.ffn if train == "no-ffn" else 0)


def count(teacher: TeacherConfig, layers: LayerMap) -> Counts:
    """Parameters of the teacher and of what it becomes."""
    g, config = teacher.geometry, teacher.config
    hidden, ffn, depth = g.hidden_size, config["intermediate_size"], teacher.num_layers
    qk_norms = 2 * g.head_dim if g.qk_norm else 0
    attention = hidden * (2 * g.inner_size + 2 * g.kv_size) + qk_norms
    attention += (g.inner_size + 2 * g.kv_size) * g.qkv_bias + hidden * g.o_bias
    block = 3 * hidden * ffn + (2 * ffn + hidden if config.get("mlp_bias") else 0)
    tables = 1 if config.get("tie_word_embeddings", False) else 2
    lowest = {name: min(layers.layers_of(name)) for name, _ in layers.converted.values()}
    mixers = {}
    for layer, (name, options) in layers.converted.items():
        spec = registry.spec(name)
        rows = spec.tensors(
            g, spec.options.parse(options), first=layer == lowest[name], position=layer / max(1, depth - 1)
        )
        mixers[layer] = sum(row.numel for row in rows)
    norms = (2 * depth + 1) * hidden
    return Counts(tables * config["vocab_size"] * hidden, attention, block, norms, depth, mixers, qk_norms)


def flops_per_token(teacher: TeacherConfig, layers: LayerMap, kind: str, seq_len: int, needs_teacher: bool) -> float:
    """FLOPs that a stage spends per token.

    Args:
        teacher: geometry.
        layers: what is converted.
        kind: of the stage.
        seq_len: window; attention over it costs half its square.
        needs_teacher: glue and extend: the loss has a KL part.
    """
    g, config = teacher.geometry, teacher.config
    attention = 4 * g.hidden_size * (g.inner_size + g.kv_size) + 2 * g.inner_size * seq_len
    block = 6 * g.hidden_size * config["intermediate_size"]
    head = 2 * g.hidden_size * config["vocab_size"]
    mixers = 0
    for name, options in layers.converted.values():
        spec = registry.spec(name)
        mixers += spec.flops_per_token(g, spec.options.parse(options))
    body = teacher.num_layers * (attention + block)
    if kind == "align":
        return body + 3 * mixers
    student = body - len(layers.converted) * attention + mixers + head
    return 3 * student + (body + head if needs_teacher else 0)


def memory(
    teacher: TeacherConfig,
    counts: Counts,
    kind: str,
    trained: int,
    tokens: int,
    dtype: str,
    precision: str,
    needs_teacher: bool,
) -> dict[str, int]:
    """Estimated bytes of a training stage on one device, by use.

    Args:
        teacher: geometry.
        counts: parameters.
        kind: of the stage.
        trained: parameters that it trains.
        tokens: of one forward pass (micro batch times window).
        dtype: of the teacher's weights.
        precision: of the student's compute.
        needs_teacher: glue and extend: the loss has a KL part.
    """
    g, config = teacher.geometry, teacher.config
    size = 2 if precision == "bf16" else 4
    mixer = _MIXER_FLOATS * g.inner_size * tokens
    rest = (_HIDDEN_FLOATS * g.hidden_size + _FFN_FLOATS * config["intermediate_size"]) * tokens
    if kind == "align":  # one layer's graph at a time, beside one layer of the teacher
        student, activations = counts.all_mixers, mixer + rest
    else:
        kept = counts.layers - len(counts.mixers)
        student = counts.student
        activations = (
            len(counts.mixers) * mixer + kept * _ATTENTION_FLOATS * g.inner_size * tokens + counts.layers * rest
        )
        # Both models' logits, their probabilities: fp32 whatever the precision.
        activations += 4 * min(tokens * config["vocab_size"], _LOGITS) * (4 // size)
    return {
        "teacher": BYTES[dtype] * counts.teacher if kind == "align" or needs_teacher else 0,
        "student": 4 * student,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": size * activations,
    }


def gpu_hours(flops: float, gpu: str, mfu: float) -> float:
    """Hours on one GPU of that name at that share of its peak."""
    return flops / (GPUS[gpu][0] * 1e12 * mfu) / 3600


def cache_bytes(teacher: TeacherConfig, layers: LayerMap, length: int, dtype: str) -> tuple[int, int]:
    """Bytes that one sequence of `length` tokens keeps for decoding, (teacher, student)."""
    g = teacher.geometry
    types = teacher.family.layer_types(teacher.config)
    window = teacher.config.get("sliding_window") or length
    before = after = 0
    for layer, kind in enumerate(types):
        held = min(length, window) if kind == "sliding_attention" else length
        attention = 2 * g.kv_size * held * BYTES[dtype]
        before += attention
        if layer in layers.converted:
            name, options = layers.converted[layer]
            spec = registry.spec(name)
            after += spec.state_bytes(g, spec.options.parse(options))
        else:
            after += attention
    return before, after
