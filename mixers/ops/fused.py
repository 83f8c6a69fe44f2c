"""Fused kernels of other projects, called with the arguments of our own recurrences and held to the same results.

flash-linear-attention (fla) has Triton kernels: chunks with a backward for training and long prompts, a loop over
tokens inside one kernel, without a backward, for decoding. mamba-ssm has CUDA and Triton kernels for the state-space
recurrences. Neither knows our padding or our document numbers:

- Padding: the inputs of a padded step are zeroed, which leaves the state as it is and gives zero.
- Documents, for fla: the rows are laid end to end and `cu_seqlens` marks where each document begins. Every one starts
  from a state of its own: a row's first document from that of the row, the others from zero.
- Documents, for mamba-ssm: numbers counted from zero, or a step between two documents that forgets everything.

All callers scale their queries, so the kernels' own scale is 1. States, log-decays and write strengths go in as fp32,
the rest in the dtype of the values. fp32 values are multiplied in TF32 by the chunk kernels on devices that have it.

The libraries are imported when one of their kernels is first called, never before: a model runs without them.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from importlib import import_module, util
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch

from .chunks import continues, without_padding

RWKV7_DECAY_BOUND = -0.61
"""Below every log-decay of RWKV-7 (-0.6065): lets fla take chunks of 64 tokens on tensor cores, at 1e-5 in fp32."""

SMALL_STEP = 1e-6
"""Least step of mamba-ssm's Mamba-2 kernel, which takes a log-decay as a step of a state that decays at rate one."""

FORGETTING = 128.0
"""A step so long that e^-FORGETTING is zero in fp32."""

Result = tuple[torch.Tensor, torch.Tensor]


class Call(NamedTuple):
    """What the choice of a kernel depends on: everything about a call but its values and its length.

    Attributes:
        device: where the tensors are: cuda, cpu, …
        dtype: of the values.
        heads: of the recurrence; for the selective scan its groups of channels.
        key: channels of a key; for the selective scan the size of a channel's state.
        value: channels of a value; for the selective scan all channels.
        mode: `train` (gradients), `prefill` (many tokens without) or `decode` (few without).
        state: there is an incoming state.
        segments: rows may hold several documents.
        fixed: the decay is one number per head.
    """

    device: str
    dtype: torch.dtype
    heads: int
    key: int
    value: int
    mode: str
    state: bool = False
    segments: bool = False
    fixed: bool = False


class Refusal(NamedTuple):
    """Why kernels do not take a call.

    Attributes:
        kind: `machine` (a package or device is missing), `input` (what is computed does not suit them, at any call) or
            `call` (this call does not; others of the same model may).
        why: in words.
    """

    kind: str
    why: str


class Kernel(NamedTuple):
    """One library's kernels for one recurrence.

    Attributes:
        library: a key of `LIBRARIES`.
        chunk: for training and prefill: `chunk(*inputs, state=, padding=, segments=)`, as our own forms.
        decode: the same for few tokens without gradients; None where there is no such kernel.
        refuse: why a call does not suit, None where it does.
    """

    library: str
    chunk: Callable[..., Result]
    decode: Callable[..., Result] | None
    refuse: Callable[[Call], Refusal | None]

    def form(self, mode: str) -> Callable[..., Result]:
        """The function that serves a mode of `Call`."""
        return self.decode if mode == "decode" and self.decode is not None else self.chunk


class Library(NamedTuple):
    """A package that holds kernels.

    Attributes:
        package: as pip knows it.
        needs: modules that must be importable.
        least: the oldest version that was tried.
        install: the command that brings it.
    """

    package: str
    needs: tuple[str, ...]
    least: tuple[int, int]
    install: str


LIBRARIES = {
    "fla": Library("fla-core", ("fla", "triton"), (0, 6), "pip install 'relinear[gpu]'"),
    "mamba_ssm": Library(
        "mamba-ssm", ("mamba_ssm", "triton"), (2, 3), "pip install --no-build-isolation 'relinear[mamba]'"
    ),
}


@functools.cache
def missing(library: str) -> str | None:
    """What keeps a library of `LIBRARIES` from being used, with the command that mends it; None where nothing does."""
    package, needs, least, install = LIBRARIES[library]
    absent = [name for name in needs if util.find_spec(name) is None]
    try:
        found = version(package)
    except PackageNotFoundError:
        absent = absent or [package]
        found = ""
    if absent:
        return f"{' and '.join(absent)} not installed ({install})"
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < least:
        return f"{package} {found} is older than {'.'.join(map(str, least))} ({install} --upgrade)"
    return None


@functools.cache
def _function(module: str, name: str) -> Callable[..., Any]:
    return getattr(import_module(module), name)


class Documents(NamedTuple):
    """Where documents lie when the rows of a batch are laid end to end.

    Attributes:
        starts: (N + 1,) first token of each document, then the number of tokens.
        first: (B,) number of the first document of each row.
        last: (B,) number of the last one.
    """

    starts: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor


def borders(segments: torch.Tensor, padding: torch.Tensor | None) -> torch.Tensor:
    """(B, T) bool, True at the first token of every document but the row's first. Padding opens and closes none."""
    same = continues(segments, padding)
    assert same is not None
    return ~same


def documents(segments: torch.Tensor, padding: torch.Tensor | None) -> Documents:
    """From (B, T) document numbers. The last answer is kept: all layers of a forward ask about the same tensors, and
    finding the borders waits for the device, as the number of documents is a shape."""
    tensors = [x for x in (segments, padding) if x is not None]
    if any(x.is_inference() for x in tensors):  # those do not count their changes
        return _documents.__wrapped__(segments, padding, ())
    return _documents(segments, padding, tuple(x._version for x in tensors))


@functools.lru_cache(maxsize=1)
def _documents(segments: torch.Tensor, padding: torch.Tensor | None, versions: tuple[int, ...]) -> Documents:
    fresh = borders(segments, padding)
    fresh[:, 0] = True
    begins = fresh.flatten().nonzero().flatten()
    count = fresh.sum(1).cumsum(0)
    starts = torch.cat([begins, begins.new_full((1,), fresh.numel())])
    return Documents(starts, torch.cat([count.new_zeros(1), count[:-1]]), count - 1)


def _run(
    kernel: Callable[..., Result],
    inputs: tuple[torch.Tensor, ...],
    state: torch.Tensor | None,
    padding: torch.Tensor | None,
    segments: torch.Tensor | None,
) -> Result:
    """Call one of fla's functions on (B, T, ...) inputs, with padding and documents as our recurrences have them.

    Args:
        kernel: takes the inputs and, by name, fla's `initial_state` and `cu_seqlens`.
    """
    batch, length = inputs[0].shape[:2]
    inputs = tuple(without_padding(x, padding) for x in inputs)
    state = None if state is None else state.float()
    with torch.autocast(inputs[0].device.type, enabled=False):
        if segments is None:
            return kernel(*inputs, initial_state=state, cu_seqlens=None)
        where = documents(segments, padding)
        flat = (x.reshape(1, batch * length, *x.shape[2:]) for x in inputs)
        if state is not None:
            fresh = state.new_zeros(len(where.starts) - 1, *state.shape[1:])
            state = fresh.index_copy(0, where.first, state)
        out, last = kernel(*flat, initial_state=state, cu_seqlens=where.starts)
        return out.view(batch, length, *out.shape[2:]), last[where.last]


def _fla(name: str, module: str = "fla.ops", **further: Any) -> Callable[..., Any]:
    """A function of fla, with what all of ours ask of it."""
    return functools.partial(_function(module, name), scale=1.0, output_final_state=True, **further)


def fla_simple_gla(form: str, q: Any, k: Any, v: Any, g: Any, **where: Any) -> Result:
    """ops/simple_gla.py by `chunk_simple_gla` and `fused_recurrent_simple_gla`."""
    kernel = _fla(f"{form}_simple_gla")
    q, k = q.to(v.dtype), k.to(v.dtype)
    if g.dim() == 1 and not g.requires_grad and where.get("padding") is None:
        return _run(functools.partial(kernel, g_gamma=g.float()), (q, k, v), **_places(where))
    decays = g.float().expand(v.shape[:3])
    return _run(lambda q, k, v, g, **places: kernel(q, k, v, g=g, **places), (q, k, v, decays), **_places(where))


def fla_gla(form: str, q: Any, k: Any, v: Any, g: Any, **where: Any) -> Result:
    """ops/gla.py by `chunk_gla` and `fused_recurrent_gla`."""
    kernel, name = _fla(f"{form}_gla"), "g" if form == "chunk" else "gk"
    inputs = (q.to(v.dtype), k.to(v.dtype), v, g.float())
    return _run(lambda q, k, v, g, **places: kernel(q, k, v, **{name: g}, **places), inputs, **_places(where))


def fla_gated_delta(form: str, q: Any, k: Any, v: Any, g: Any, beta: Any, **where: Any) -> Result:
    """ops/gated_delta.py by `chunk_gated_delta_rule` and `fused_recurrent_gated_delta_rule`.

    Without g (DeltaNet) too, with log-decays of zero: fla's `chunk_delta_rule` has no fp32.
    """
    kernel = _fla(f"{form}_gated_delta_rule")
    decays = torch.zeros_like(beta, dtype=torch.float32) if g is None else g.float()
    inputs = (q.to(v.dtype), k.to(v.dtype), v, decays, beta.float())
    return _run(lambda q, k, v, g, b, **places: kernel(q, k, v, g=g, beta=b, **places), inputs, **_places(where))


def fla_kda(form: str, q: Any, k: Any, v: Any, g: Any, beta: Any, **where: Any) -> Result:
    """ops/kda.py by `chunk_kda` and `fused_recurrent_kda`."""
    kernel = _fla(f"{form}_kda")
    inputs = (q.to(v.dtype), k.to(v.dtype), v, g.float(), beta.float())
    return _run(lambda q, k, v, g, b, **places: kernel(q, k, v, g=g, beta=b, **places), inputs, **_places(where))


def fla_rwkv7(form: str, r: Any, w: Any, k: Any, v: Any, kappa: Any, a: Any, **where: Any) -> Result:
    """ops/rwkv7.py by `chunk_rwkv7` and `fused_mul_recurrent_rwkv7`.

    In chunks fla's state obeys S_t = diag(e^w) S + b (a^T S) + k v^T, so its a is -kappa and its b is a * kappa.
    """
    dtype = v.dtype
    r, w, k = r.to(dtype), w.float(), k.to(dtype)
    if form != "chunk":
        kernel = _fla("fused_mul_recurrent_rwkv7", "fla.ops.rwkv7")
        return _run(kernel, (r, w, k, v, kappa.to(dtype), a.to(dtype)), **_places(where))
    removed = (kappa.float() * a.float()).to(dtype)
    with warnings.catch_warnings():
        # Said at every call with fp32; here the first use is checked on the very device.
        warnings.filterwarnings("ignore", "ChunkDeltaRuleFunction does not support float32", RuntimeWarning)
        # fp32 is asked for where digits count: without the bound fla keeps them all, in chunks of 16.
        kernel = _fla("chunk_rwkv7", lower_bound=None if dtype == torch.float32 else RWKV7_DECAY_BOUND)
        return _run(kernel, (r, w, k, v, -kappa.to(dtype), removed), **_places(where))


def _places(where: dict[str, Any]) -> dict[str, Any]:
    return {name: where.get(name) for name in ("state", "padding", "segments")}


def mamba_simple_gla(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    state: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> Result:
    """ops/simple_gla.py by mamba-ssm's `mamba_chunk_scan_combined`, S_t = e^{dt A} S + dt B x^T with y_t = S_t^T C.

    A decay per head: A is g and dt is 1. One per token: A is -1, dt is -g (at least `SMALL_STEP`, so a decay of one
    becomes 0.999999) and x is v / dt; right forward, but the gradient of dt is then the difference of two large terms.
    """
    fixed = g.dim() == 1
    if fixed:
        rates, steps = g.float(), torch.ones(v.shape[:3], device=v.device)
        values = v
    else:
        rates, steps = g.new_full(g.shape[2:], -1.0, dtype=torch.float32), (-g.float()).clamp(min=SMALL_STEP)
        values = (v.float() / steps[..., None]).to(v.dtype)
    numbers = None if segments is None else borders(segments, padding).cumsum(1).to(torch.int32)
    with torch.autocast(v.device.type, enabled=False):
        out, last = _function("mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined")(
            without_padding(values, padding),
            without_padding(steps, padding),
            rates,
            without_padding(k.to(v.dtype), padding),
            without_padding(q.to(v.dtype), padding),
            chunk_size=64,
            initial_states=None if state is None else state.float().mT.contiguous(),
            seq_idx=numbers,
            return_final_states=True,
        )
    return out.to(v.dtype), last.float().mT


class _Unlearnable(torch.autograd.Function):
    """mamba-ssm's last state, whose gradient its selective scan would drop in silence."""

    @staticmethod
    def forward(ctx: Any, last: torch.Tensor) -> torch.Tensor:
        return last.view_as(last)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError("mamba-ssm's selective scan has no gradient for its last state: set form: chunked")


def mamba_selective_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> Result:
    """ops/selective_scan.py by mamba-ssm's `selective_scan_fn`, all in fp32; without an incoming state.

    Between two documents stands one more step, without input and so long that the state is forgotten.

    Raises:
        ValueError: a state was given.
        RuntimeError: in the backward, where the loss depends on the last state.
    """
    if state is not None:
        raise ValueError("mamba-ssm's selective scan takes no incoming state: set form: chunked")
    rows = [x.float(), without_padding(dt.float(), padding), B.float(), without_padding(C.float(), padding)]
    place = None
    if segments is not None:
        fresh = borders(segments, padding)
        shift = fresh.cumsum(1)
        place = torch.arange(x.shape[1], device=x.device) + shift
        rows = [_spread(row, place, int(shift[:, -1].max())) for row in rows]
        row, column = fresh.nonzero(as_tuple=True)
        long = FORGETTING / float(A.detach().abs().min().clamp(min=1e-6))
        rows[1] = rows[1].index_put((row, place[row, column] - 1), rows[1].new_tensor(long))
    u, delta, B_, C_ = (row.movedim(1, -1).contiguous() for row in rows)
    with torch.autocast(x.device.type, enabled=False):
        scan = _function("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")
        out, last = scan(u, delta, A.float(), B_, C_, return_last_state=True)
    out = out.mT
    if place is not None:
        out = out.gather(1, place[..., None].expand(*place.shape, out.shape[-1]))
    return out.to(x.dtype), _Unlearnable.apply(last)  # pyright: ignore[reportReturnType]


def _spread(row: torch.Tensor, place: torch.Tensor, extra: int) -> torch.Tensor:
    """(B, T, ...) -> (B, T + extra, ...): every token at its `place` (B, T), zeros between."""
    index = place[(...,) + (None,) * (row.dim() - 2)].expand(row.shape)
    return row.new_zeros(row.shape[0], row.shape[1] + extra, *row.shape[2:]).scatter(1, index, row)


def mamba_selective_steps(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor | None = None,
    padding: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> Result:
    """The same for a few tokens by `selective_state_update`, one call a token; without segments."""
    if segments is not None:
        raise ValueError("mamba-ssm's decoding kernel knows no documents: set form: chunked")
    batch, length, channels = x.shape
    groups = B.shape[2]
    size = (batch, groups, channels // groups)
    h = x.new_zeros(*size, A.shape[1], dtype=torch.float32)
    if state is not None:
        h.copy_(state.view_as(h))
    rates = A.float().view(groups, -1, A.shape[1])
    # The kernel wants a bias and a skip weight, although it documents both as optional.
    zero = rates.new_zeros(1, 1).expand(groups, size[2])
    wide = (x.float(), without_padding(dt.float(), padding), B.float(), without_padding(C.float(), padding))
    update = _function("mamba_ssm.ops.triton.selective_state_update", "selective_state_update")
    out = [
        update(h, x_.reshape(size), dt_.reshape(size), rates, B_, C_, D=zero, dt_bias=zero)
        for x_, dt_, B_, C_ in zip(*(row.unbind(1) for row in wide), strict=True)
    ]
    return torch.stack(out, 1).view(batch, length, channels).to(x.dtype), h.view(batch, channels, -1)


def _refuse_delta(call: Call) -> Refusal | None:
    """The limits of fla's kernels that keep a state between chunks in one piece."""
    if call.key > 256:
        return Refusal("input", f"fla takes heads of up to 256 channels, these have {call.key}")
    return None


def _refuse_nothing(call: Call) -> Refusal | None:
    return None


def _refuse_mamba_gradients(call: Call) -> Refusal | None:
    if call.mode == "train" and not call.fixed:
        return Refusal("input", "mamba-ssm's gradient of a decay per token would lose its digits here; fla has it")
    return None


def _refuse_scan(call: Call) -> Refusal | None:
    if call.key > 256:
        return Refusal("input", f"mamba-ssm takes states of up to 256 numbers a channel, these have {call.key}")
    if call.mode == "decode":
        return Refusal("call", "mamba-ssm's decoding kernel knows no documents") if call.segments else None
    if call.device == "cpu":
        return Refusal("machine", "mamba-ssm's selective scan is CUDA code")
    return Refusal("call", "mamba-ssm's selective scan takes no incoming state") if call.state else None


def _by_fla(adaptor: Callable[..., Result], refuse: Callable[[Call], Refusal | None]) -> Kernel:
    return Kernel("fla", functools.partial(adaptor, "chunk"), functools.partial(adaptor, "fused_recurrent"), refuse)


KERNELS: dict[str, tuple[Kernel, ...]] = {
    "simple_gla": (
        _by_fla(fla_simple_gla, _refuse_nothing),
        Kernel("mamba_ssm", mamba_simple_gla, None, _refuse_mamba_gradients),
    ),
    "gla": (_by_fla(fla_gla, _refuse_nothing),),
    "gated_delta": (_by_fla(fla_gated_delta, _refuse_delta),),
    "kda": (_by_fla(fla_kda, _refuse_delta),),
    "rwkv7": (_by_fla(fla_rwkv7, _refuse_delta),),
    "selective_scan": (Kernel("mamba_ssm", mamba_selective_scan, mamba_selective_steps, _refuse_scan),),
}
"""Recurrence -> the kernels there are, the preferred first."""
