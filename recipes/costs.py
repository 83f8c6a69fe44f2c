"""What a conversion costs, counted from geometry alone: parameters, bytes, FLOPs. Memory and time are estimates.

FLOPs are those of matrix products (a multiply-add is two) as torch's counter sees them where attention is eager: masked
scores count in full, as the usual definition of MFU has it; a backward pass has those gradients that are needed. Peak
rates are dense bf16 tensor-core figures of the vendors' data sheets; the share of the peak that a run reaches (MFU) is
an assumption, 0.15 unless said otherwise: RADLADS' glue of a 7B model took 44 MI300X-hours for 500M tokens, 0.14 of the
peak. How tensors are divided among ranks is in `ranks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..mixers import registry
from ..mixers.specs.heads import activations
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
CPU_ALLOCATOR = {"align": 0.57, "glue": 0.26}
"""Of the activations, by stage: what glibc's heap does not give back between tensors of other sizes, measured in
docs/results/train.md. Tensors above 32 MiB, which it maps one by one, leave less."""
CPU_PROCESS = 25_000_000  # bytes of code and pools that first steps bring in, measured likewise
CACHE_LENGTHS = (4096, 32768, 131072)
# Floats kept for a backward pass, per token, counted from the tensors that plain torch saves at widths 128 to 512: by
# the rest of a layer 5 per hidden and 4 per feed-forward channel. Attention's 8 are q, k, v, their rotated copies and
# the output.
_ATTENTION_FLOATS, _HIDDEN_FLOATS, _FFN_FLOATS = 8, 5, 4
_ALIGN_HIDDEN = 3  # per hidden channel, while a mixer trains: residual stream, the attention's input and its output
_CANDIDATES = 40 * 4096  # knobs' values tried by calibrate in a layer, times the tokens that they are tried on
_MATRICES = 16  # matrices (tokens x tokens) held at once per row and head, counted likewise: 8 to 21
_LOGITS = {"cpu": 2**22, "cuda": 2**26}  # of one model held at once, as `distill.losses.CHUNK_ELEMENTS` says
_LOGIT_TENSORS = 7  # of them at once: both models' logits, their logarithms, probabilities, two gradients


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


def mixer_flops(teacher: TeacherConfig, layers: LayerMap, layer: int) -> tuple[int, int, int]:
    """FLOPs per token of a converted layer's mixer: forward; backward; its part for the layer input's gradient."""
    name, values = layers.converted[layer]
    spec, g = registry.spec(name), teacher.geometry(layer)
    options, position = spec.options.parse(values), layer / max(1, teacher.num_layers - 1)
    forward, backward = spec.flops_per_token(g, options), spec.backward_flops(g, options)
    inputs = spec.input_flops(g, options)
    if layer == min(layers.layers_of(name)):  # it may lack low-rank maps that the others have
        rows = [spec.tensors(g, options, first=first, position=position) for first in (False, True)]
        own = {row.name for row in rows[1]}
        lacking = [row for row in rows[0] if row.name not in own and len(row.shape) > 1]
        less = 2 * sum(row.numel for row in lacking)
        forward, backward = forward - less, backward - 2 * less
        inputs -= 2 * sum(row.numel for row in lacking if row.name in spec.reads)
    return forward, backward, inputs


def weight_flops(teacher: TeacherConfig, layers: LayerMap, layer: int, new: bool = True) -> int:
    """FLOPs per token of the gradients of a mixer's matrices; without `new` of those that come from attention."""
    name, values = layers.converted[layer]
    spec, first = registry.spec(name), layer == min(layers.layers_of(name))
    options, position = spec.options.parse(values), layer / max(1, teacher.num_layers - 1)
    rows = spec.tensors(teacher.geometry(layer), options, first=first, position=position)
    return 2 * sum(row.numel for row in rows if (new or row.source != "new") and len(row.shape) == 2)


def forward_flops(teacher: TeacherConfig, seq_len: int, layers: int | None = None) -> float:
    """FLOPs per token of the teacher's forward, without the output head; of an align step where `layers` is given.

    Args:
        teacher: geometry.
        seq_len: window.
        layers: so many attention layers, and the feed-forward blocks between them.
    """
    count = teacher.num_layers if layers is None else layers
    held = held_tokens(teacher, seq_len)
    blocks = count if layers is None else max(0, count - 1)
    return sum(sum(_attention_flops(teacher, layer, held[layer])) for layer in range(count)) + sum(
        2 * _ffn(teacher, layer)[1] for layer in range(blocks)
    )


def _attention_flops(teacher: TeacherConfig, layer: int, held: int) -> tuple[int, int]:
    """Of an attention layer that sees so many tokens: projections, and scores with their read-out."""
    g = teacher.geometry(layer)
    return 4 * g.hidden_size * (g.inner_size + g.kv_size), 4 * g.inner_size * held


def flops_per_token(
    teacher: TeacherConfig,
    layers: LayerMap,
    kind: str,
    seq_len: int,
    needs_teacher: bool,
    train: str = "all",
    adapted: int = 0,
    align: bool = False,
) -> float:
    """FLOPs that a stage spends per token.

    Args:
        teacher: geometry.
        layers: what is converted.
        kind: of the stage.
        seq_len: window.
        needs_teacher: glue and extend: the loss has a KL part.
        train: of the stage. What does not train has no weight gradient, and what lies below all that trains none.
        adapted: parameters of adapters, with `train: lora`.
        align: glue and extend: the loss has a part for each layer.
    """
    if not layers.converted and kind in PER_LAYER:
        return 0.0
    mixers = {layer: mixer_flops(teacher, layers, layer) for layer in layers.converted}
    alone = sum(forward + backward - inputs for forward, backward, inputs in mixers.values())
    if kind in PER_LAYER:
        top = max(layers.converted) + 1
        g, walked = teacher.geometry(0), forward_flops(teacher, seq_len, top)
        if kind == "matrix":  # the teacher's queries, keys and scores once more, and values as wide as the window
            again = 2 * g.hidden_size * (g.inner_size + g.kv_size) + 2 * g.inner_size * seq_len
            return walked + alone + len(mixers) * (again + 3 * 4 * g.inner_size * seq_len)
        spared = sum(weight_flops(teacher, layers, layer, new=False) for layer in mixers) if train == "new" else 0
        return walked + alone - spared
    head = 2 * teacher.geometry(0).hidden_size * teacher.config["vocab_size"]
    everything = train in ("all", "no-ffn")
    # The lowest layer with something that trains, and whether its attention's input is such, or behind such.
    low = min(mixers, default=teacher.num_layers) if train == "mixers" else 0
    held = held_tokens(teacher, seq_len, layers.attention)
    total = head * (3 if everything else 2)
    for layer in range(teacher.num_layers):
        ffn = 2 * _ffn(teacher, layer)[1]
        if layer in mixers:
            forward, backward, inputs = mixers[layer]
            below = layer == low and train in ("mixers", "lora")
            total += forward + backward - (inputs if below else 0)
            total -= weight_flops(teacher, layers, layer) if train == "lora" else 0
        else:
            projections, scores = _attention_flops(teacher, layer, held[layer])
            total += projections + scores
            if layer > low or train not in ("mixers",):
                total += projections * (2 if everything else 1) + 2 * scores
        total += ffn * (1 + (layer >= low) + (train == "all"))
    total += 3 * 2 * adapted
    if needs_teacher:
        total += forward_flops(teacher, seq_len) + head
    return total + (alone if align else 0)


def held_tokens(teacher: TeacherConfig, length: int, changes: dict[str, Any] | None = None) -> list[int]:
    """Tokens that each layer's attention sees at the end of a sequence of `length`, with what is changed in it."""
    own = teacher.family.values(teacher.config).get("sliding_window") or length
    longest = min(length, (changes or {}).get("window") or length)
    return [min(longest, own) if kind == "sliding_attention" else longest for kind in teacher.layer_types]


def memory(
    teacher: TeacherConfig,
    layers: LayerMap,
    counts: Counts,
    kind: str,
    trained: int,
    tokens: int,
    dtype: str,
    precision: str,
    needs_teacher: bool,
    seq_len: int,
    checkpointing: bool = False,
    align: bool = False,
    device: str = "cuda",
) -> dict[str, int]:
    """Estimated bytes of a training stage on one device that holds everything, by use.

    Args:
        teacher: geometry.
        layers: what is converted.
        counts: parameters.
        kind: of the stage.
        trained: parameters that it trains.
        tokens: of one forward pass (micro batch times window).
        dtype: of the teacher's weights.
        precision: of the student's compute.
        needs_teacher: glue and extend: the loss has a KL part.
        seq_len: window.
        checkpointing: glue and extend: of each block only the input is kept.
        align: glue and extend: the loss has a part for each layer.
        device: `cpu` or `cuda`; logits come in smaller chunks on the former.

    Returns:
        `teacher`, `student`, `gradients`, `optimizer`, `activations`.
    """
    config, depth = teacher.config, counts.layers
    size = 2 if precision == "bf16" else 4
    kept, most = {}, {}
    for layer, (name, values) in layers.converted.items():
        spec = registry.spec(name)
        # Recurrences and what they read are fp32 whatever the precision.
        kept[layer], most[layer] = (
            4 * n for n in activations(spec, teacher.geometry(layer), spec.options.parse(values))
        )
    rest = [
        size * (_HIDDEN_FLOATS * config["hidden_size"] + _FFN_FLOATS * _ffn_width(teacher, layer))
        for layer in range(depth)
    ]
    if kind in PER_LAYER:  # one layer's graph at a time, beside one layer of the teacher
        student = counts.all_mixers
        held = max(max(most.values(), default=0) + size * _ALIGN_HIDDEN * config["hidden_size"], max(rest))
        if kind == "matrix":
            held += 4 * _MATRICES * teacher.geometry(0).num_heads * seq_len  # fp32 whatever the precision
        held *= tokens
    else:
        student = counts.student
        own = [
            kept.get(layer, size * _ATTENTION_FLOATS * teacher.geometry(layer).inner_size) + rest[layer]
            for layer in range(depth)
        ]
        spare = max((most[layer] - kept[layer] for layer in kept), default=0)
        held = sum(own) + spare
        if checkpointing:
            held = max(own) + spare + size * config["hidden_size"] * depth
        if align:
            held += max(most.values(), default=0)
        # fp32 whatever the precision.
        held = held * tokens + 4 * _LOGIT_TENSORS * min(tokens * config["vocab_size"], _LOGITS[device])
    return {
        "teacher": BYTES[dtype] * counts.teacher if kind in PER_LAYER or needs_teacher else 0,
        "student": 4 * student,
        "gradients": 4 * trained,
        "optimizer": 8 * trained,
        "activations": round(held),
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


def calibrate_flops(
    teacher: TeacherConfig, layers: LayerMap, tokens: int, seq_len: int, student: bool, streamed: bool = False
) -> float:
    """FLOPs of the calibrate stage: for every layer the teacher up to there, and the student; then its candidates.

    Where it is streamed each layer is passed twice instead: for its attention, and on to the next one.
    """
    g, passes = teacher.geometry(0), 2 if student else 1
    per_layer = flops_per_token(teacher, layers, "align", seq_len, True) / teacher.num_layers  # mixers trained: bound
    total = 0.0
    if streamed and layers.converted:
        total = tokens * 9 / 8 * 2 * passes * (max(layers.converted) + 1) * per_layer
    for layer, (name, options) in layers.converted.items():
        spec = registry.spec(name)
        mixer = spec.flops_per_token(teacher.geometry(layer), spec.options.parse(options))
        fits = mixer + 2 * g.inner_size * (g.inner_size + g.hidden_size)
        total += tokens * 9 / 8 * ((not streamed) * passes * (layer + 1) * per_layer + 3 * fits) + _CANDIDATES * mixer
    return total


def gathered(teacher: TeacherConfig, counts: Counts, kind: str, dtype: str, needs_teacher: bool) -> int:
    """Bytes that an engine with sharded weights holds whole while it computes: one layer, embeddings and head.

    Args:
        teacher, counts: geometry and parameters.
        kind: of the stage; in one of `PER_LAYER` the student is its mixers.
        dtype: of the teacher's weights.
        needs_teacher: glue and extend: the loss has a KL part.
    """
    ffn = max(_ffn(teacher, layer)[0] for layer in range(counts.layers))
    mixer = max(counts.mixers.values(), default=0)
    layer = counts.attention + ffn
    frozen = BYTES[dtype] * (layer + counts.embeddings)
    if kind in PER_LAYER:
        return frozen + 4 * mixer
    student = 4 * (max(counts.attention * (len(counts.mixers) < counts.layers), mixer) + ffn + counts.embeddings)
    return student + (frozen if needs_teacher else 0)


def flops_per_second(gpu: str, mfu: float) -> float:
    """Of one GPU of that name at that share of its peak."""
    return GPUS[gpu][0] * 1e12 * mfu


def gpu_hours(flops: float, gpu: str, mfu: float) -> float:
    """Hours on one GPU of that name at that share of its peak."""
    return flops / flops_per_second(gpu, mfu) / 3600


def cpu_allocator(kind: str, activations: int) -> int:
    """Bytes that a process on a CPU holds beyond its tensors: see `CPU_ALLOCATOR`."""
    return round(CPU_ALLOCATOR["align" if kind in PER_LAYER else "glue"] * activations) + CPU_PROCESS


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
