"""What a conversion costs, counted from geometry alone: parameters, bytes, FLOPs. Memory and time are estimates.

FLOPs count matrix products (a multiply-add is two) and take a backward pass as twice its forward. Peak rates are dense
bf16 tensor-core figures of the vendors' data sheets; the share of the peak that a run reaches (MFU) is an assumption,
0.15 unless said otherwise: RADLADS' glue of a 7B model took 44 MI300X-hours for 500M tokens, 0.14 of the peak.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
PER_LAYER = ("matrix", "align")
"""Stages on the teacher's layer inputs, one layer's graph at a time."""
# What these tensors do comes before the mixing of tokens, or after it.
_UNMIXED = ("v_proj", "o_proj", "g_proj", "out_norm", "ln_x", "v0", "v1", "v2", "g0", "g1", "g2")
CACHE_LENGTHS = (4096, 32768, 131072)
# Floats kept for a backward pass, per token, counted from the tensors that plain torch saves at widths 128 to 512: by
# rwkv7 38 to 40 per inner channel (gated_deltanet 25 to 27), by the rest of a layer 5 per hidden and 4 per feed-forward
# channel. Attention's 8 are q, k, v, their rotated copies and the output.
_MIXER_FLOATS, _ATTENTION_FLOATS, _HIDDEN_FLOATS, _FFN_FLOATS = 40, 8, 5, 4
_CANDIDATES = 40 * 4096  # knobs' values tried by calibrate in a layer, times the tokens that they are tried on
_MATRICES = 16  # matrices (tokens x tokens) held at once per row and head, counted likewise: 8 to 21
_LOGITS = 2**26  # logits of one model held at once, as `distill.losses.CHUNK_ELEMENTS` says of GPUs


@dataclass(frozen=True)
class Counts:
    """Parameters by part.

    Attributes:
        embeddings: input embedding and, where it is not tied to it, the output head.
        attention: of one attention layer.
        ffn: of all feed-forward blocks, every expert counted.
        norms: of all norms outside attention.
        layers: decoder layers.
        mixers: layer -> parameters of its mixer, for converted layers.
        qk_norms: of one attention layer's query and key norms, contained in `attention`.
        new: of all mixers, what transfer does not take from attention.
        mixing: of all mixers, what their mixing matrices depend on.
    """

    embeddings: int
    attention: int
    ffn: int
    norms: int
    layers: int
    mixers: dict[int, int]
    qk_norms: int
    new: int = 0
    mixing: int = 0

    @property
    def teacher(self) -> int:
        """All parameters of the teacher."""
        return self.embeddings + self.norms + self.layers * self.attention + self.ffn

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
            train: its `train`, for training stages.
        """
        if kind == "transfer":
            return 0
        if train == "new":
            return self.new
        if kind == "matrix":
            return self.mixing
        if kind == "align" or train == "mixers":
            return self.all_mixers
        if train == "mixers+norms":
            return self.all_mixers + self.norms + (self.layers - len(self.mixers)) * self.qk_norms
        return self.student - (self.ffn if train == "no-ffn" else 0)


def count(teacher: TeacherConfig, layers: LayerMap) -> Counts:
    """Parameters of the teacher and of what it becomes."""
    g, values, depth = teacher.geometry(0), teacher.family.values(teacher.config), teacher.num_layers
    norm_sizes = {"": 0, "head": 2 * g.head_dim, "full": g.inner_size + g.kv_size}
    qk_norms = norm_sizes[g.qk_norm]
    attention = g.hidden_size * (2 * g.inner_size + 2 * g.kv_size) + qk_norms
    attention += (g.inner_size + 2 * g.kv_size) * g.qkv_bias + g.hidden_size * g.o_bias
    tables = 1 if values.get("tie_word_embeddings", False) else 2
    lowest = {name: min(layers.layers_of(name)) for name, _ in layers.converted.values()}
    mixers, new, mixing = {}, 0, 0
    for layer, (name, options) in layers.converted.items():
        spec = registry.spec(name)
        first, position = layer == lowest[name], layer / max(1, depth - 1)
        rows = spec.tensors(teacher.geometry(layer), spec.options.parse(options), first=first, position=position)
        mixers[layer] = sum(row.numel for row in rows)
        new += sum(row.numel for row in rows if row.source == "new")
        mixing += sum(row.numel for row in rows if row.name.split(".")[0] not in _UNMIXED)
    norms = (teacher.family.norms * depth + 1) * g.hidden_size * (2 if teacher.family.norm_bias else 1)
    ffn = sum(_ffn(teacher, layer)[0] for layer in range(depth))
    embeddings = tables * values["vocab_size"] * g.hidden_size
    return Counts(embeddings, attention, ffn, norms, depth, mixers, qk_norms, new, mixing)


def adapters(teacher: TeacherConfig, layers: LayerMap, rank: int, targets: list[str]) -> int:
    """Parameters of adapters of that rank on those linear layers (attention's, mixers', a plain feed-forward block's).

    Args:
        teacher: geometry.
        layers: what is converted.
        rank: of the adapters.
        targets: names such as `q_proj`, wherever they stand.
    """
    total, depth = 0, teacher.num_layers
    for layer in range(depth):
        g = teacher.geometry(layer)
        shapes = {"q_proj": (g.inner_size, g.hidden_size), "o_proj": (g.hidden_size, g.inner_size)}
        shapes |= dict.fromkeys(("k_proj", "v_proj"), (g.kv_size, g.hidden_size))
        if teacher.family.fused:
            both = {"blocks": ("qkv_proj", "o_proj"), "heads": ("query_key_value", "dense")}[teacher.family.fused]
            shapes = {both[0]: (g.inner_size + 2 * g.kv_size, g.hidden_size), both[1]: shapes["o_proj"]}
        if layer in layers.converted:
            name, options = layers.converted[layer]
            spec, first = registry.spec(name), layer == min(layers.layers_of(name))
            rows = spec.tensors(g, spec.options.parse(options), first=first, position=layer / max(1, depth - 1))
            shapes = {row.name.removesuffix(".weight"): row.shape for row in rows if row.name.endswith("proj.weight")}
        if teacher.family.gated and teacher.family.experts(teacher.config, layer) is None:
            wide, narrow = teacher.config["intermediate_size"], g.hidden_size
            shapes |= {"gate_proj": (wide, narrow), "up_proj": (wide, narrow), "down_proj": (narrow, wide)}
        total += sum(rank * sum(shapes[target]) for target in targets if target in shapes)
    return total


def _ffn(teacher: TeacherConfig, layer: int) -> tuple[int, int]:
    """Parameters of a layer's feed-forward block, and those of its matrices that one token is multiplied with."""
    hidden, matrices = teacher.config["hidden_size"], 3 if teacher.family.gated else 2
    experts = teacher.family.experts(teacher.config, layer)
    if experts is not None:
        expert, router = matrices * hidden * experts.width, hidden * experts.number
        return experts.number * expert + router, experts.active * expert + router
    width = teacher.config["intermediate_size"]
    biases = (matrices - 1) * width + hidden if teacher.family.has_mlp_bias(teacher.config) else 0
    return matrices * hidden * width + biases, matrices * hidden * width


def _ffn_width(teacher: TeacherConfig, layer: int) -> int:
    """Feed-forward channels that one token passes in a layer."""
    experts = teacher.family.experts(teacher.config, layer)
    return teacher.config["intermediate_size"] if experts is None else experts.active * experts.width


def flops_per_token(
    teacher: TeacherConfig, layers: LayerMap, kind: str, seq_len: int, needs_teacher: bool, lora: bool = False
) -> float:
    """FLOPs that a stage spends per token.

    Args:
        teacher: geometry.
        layers: what is converted.
        kind: of the stage.
        seq_len: window; attention over it costs half its square, over a sliding window no more than that.
        needs_teacher: glue and extend: the loss has a KL part.
        lora: adapters alone train: no weight has a gradient, so a backward pass costs as much as a forward pass.
    """
    g = teacher.geometry(0)

    def attention(held: int) -> float:
        seen = held * (1 - held / (2 * seq_len))  # the mean over positions of min(position, window)
        return 4 * g.hidden_size * (g.inner_size + g.kv_size) + 4 * g.inner_size * seen

    blocks = 2 * sum(_ffn(teacher, layer)[1] for layer in range(teacher.num_layers))
    head = 2 * g.hidden_size * teacher.config["vocab_size"]
    mixers = 0
    for layer, (name, options) in layers.converted.items():
        spec = registry.spec(name)
        mixers += spec.flops_per_token(teacher.geometry(layer), spec.options.parse(options))
    body = sum(map(attention, held_tokens(teacher, seq_len))) + blocks
    if kind == "matrix":  # the teacher's queries, keys and scores once more, and values as wide as the window
        again = 2 * g.hidden_size * (g.inner_size + g.kv_size) + 2 * g.inner_size * seq_len
        return body + 3 * mixers + len(layers.converted) * (again + 3 * 4 * g.inner_size * seq_len)
    if kind == "align":
        return body + 3 * mixers
    held = held_tokens(teacher, seq_len, layers.attention)
    student = sum(attention(held[layer]) for layer in layers.kept) + blocks + mixers + head
    return (2 if lora else 3) * student + (body + head if needs_teacher else 0)


def held_tokens(teacher: TeacherConfig, length: int, changes: dict[str, Any] | None = None) -> list[int]:
    """Tokens that each layer's attention sees at the end of a sequence of `length`, with what is changed in it."""
    own = teacher.family.values(teacher.config).get("sliding_window") or length
    longest = min(length, (changes or {}).get("window") or length)
    return [min(longest, own) if kind == "sliding_attention" else longest for kind in teacher.layer_types]


def memory(
    teacher: TeacherConfig,
    counts: Counts,
    kind: str,
    trained: int,
    tokens: int,
    dtype: str,
    precision: str,
    needs_teacher: bool,
    seq_len: int,
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
        seq_len: window.
    """
    g, config = teacher.geometry(0), teacher.config
    size = 2 if precision == "bf16" else 4
    mixer = _MIXER_FLOATS * g.inner_size * tokens
    widths = [_ffn_width(teacher, layer) for layer in range(counts.layers)]
    rest = [(_HIDDEN_FLOATS * g.hidden_size + _FFN_FLOATS * width) * tokens for width in widths]
    if kind in PER_LAYER:  # one layer's graph at a time, beside one layer of the teacher
        student, activations = counts.all_mixers, mixer + max(rest)
        if kind == "matrix":
            activations += _MATRICES * g.num_heads * seq_len * tokens * (4 // size)  # fp32 whatever the precision
    else:
        kept = counts.layers - len(counts.mixers)
        student = counts.student
        activations = len(counts.mixers) * mixer + kept * _ATTENTION_FLOATS * g.inner_size * tokens + sum(rest)
        # Both models' logits, their probabilities: fp32 whatever the precision.
        activations += 4 * min(tokens * config["vocab_size"], _LOGITS) * (4 // size)
    return {
        "teacher": BYTES[dtype] * counts.teacher if kind in PER_LAYER or needs_teacher else 0,
        "student": 4 * student,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": size * activations,
    }


def calibrate_memory(
    teacher: TeacherConfig, layers: LayerMap, counts: Counts, tokens: int, dtype: str
) -> dict[str, int]:
    """Estimated bytes of the calibrate stage on one device: one layer's samples and Gram matrices at a time.

    Args:
        teacher: geometry.
        layers: what is converted.
        counts: parameters.
        tokens: that are fitted; an eighth as many are held out.
        dtype: of the teacher's weights.
    """
    g = teacher.geometry(0)
    lowest = min(layers.converted, default=0)
    shared = g.inner_size if len(layers.converted) > 1 and layers.converted[lowest][0] == "rwkv7" else 0
    return {
        "teacher": BYTES[dtype] * counts.teacher,
        "student": 4 * counts.all_mixers,
        # Features x features and features x outputs of the fitted and of the held-out tokens, and a factor: fp64.
        "gram": 8 * (3 * g.inner_size**2 + 3 * g.inner_size * g.hidden_size),
        # Layer input, wanted output, cos and sin, fp32; held-out tokens on both models' streams.
        "activations": 4 * (tokens + 2 * tokens // 8) * (2 * g.hidden_size + 2 * g.head_dim + shared),
    }


def calibrate_flops(teacher: TeacherConfig, layers: LayerMap, tokens: int, seq_len: int, student: bool) -> float:
    """FLOPs of the calibrate stage: for every layer the teacher up to there, and the student; then its candidates."""
    g, passes = teacher.geometry(0), 2 if student else 1
    per_layer = flops_per_token(teacher, layers, "align", seq_len, True) / teacher.num_layers
    total = 0.0
    for layer, (name, options) in layers.converted.items():
        spec = registry.spec(name)
        mixer = spec.flops_per_token(teacher.geometry(layer), spec.options.parse(options))
        fits = mixer + 2 * g.inner_size * (g.inner_size + g.hidden_size)
        total += tokens * 9 / 8 * (passes * (layer + 1) * per_layer + 3 * fits) + _CANDIDATES * mixer
    return total


def gpu_hours(flops: float, gpu: str, mfu: float) -> float:
    """Hours on one GPU of that name at that share of its peak."""
    return flops / (GPUS[gpu][0] * 1e12 * mfu) / 3600


def cache_bytes(teacher: TeacherConfig, layers: LayerMap, length: int, dtype: str) -> tuple[int, int]:
    """Bytes that one sequence of `length` tokens keeps for decoding, (teacher, student)."""
    before = after = 0
    kept = held_tokens(teacher, length, layers.attention)
    for layer, held in enumerate(held_tokens(teacher, length)):
        g = teacher.geometry(layer)
        before += 2 * g.kv_size * held * BYTES[dtype]
        if layer in layers.converted:
            name, options = layers.converted[layer]
            spec = registry.spec(name)
            after += spec.state_bytes(g, spec.options.parse(options))
        else:
            after += 2 * g.kv_size * kept[layer] * BYTES[dtype]
    return before, after
