"""The one place that chooses in which form, and by whose kernels, a recurrence runs."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any, NamedTuple

import torch

from .base import MixerInputs, State
from .errors import KernelMissing, KernelRefused
from .ops.check import LIMITS, verdict
from .ops.fused import KERNELS, LIBRARIES, Call, Kernel, Refusal, missing
from .ops.op import Op
from .recorded import recorded

SHORT = 4
"""Up to so many tokens, going step by step costs less than cutting chunks in plain torch."""

FEW = 64
"""Up to so many tokens without gradients, a fused loop over tokens costs less than fused chunks."""

FORMS = ("auto", "chunked", "recurrent", "fused")

logger = logging.getLogger(__name__)

_CHOICES: dict[tuple, Choice] = {}
_VERDICTS: dict[tuple, tuple[bool, str]] = {}
_SAID: set[str] = set()


class Choice(NamedTuple):
    """What runs and why.

    Attributes:
        form: recurrent, chunked or fused; `plain` for plain torch in the form that suits the length.
        reason: in words.
        kernel: where the form is fused.
    """

    form: str
    reason: str
    kernel: Kernel | None = None


def run(
    op: Op, form: str, chunk: int | None, *inputs: Any, where: MixerInputs, state: State | None
) -> tuple[torch.Tensor, State]:
    """Run a recurrence in the form that `choose` says.

    Args:
        op: the recurrence, `OP` of its file in mixers/ops.
        form: the mixer's option.
        chunk: tokens per chunk in plain torch; None for the recurrence's own choice.
        inputs: its arguments, as its forms take them; the first is a tensor (B, T, ...).
        where: padding, document borders and how many states to record.
        state: its tensors from the previous call. Without gradients a call of one token overwrites them, unless states
            are recorded.

    Returns:
        The output and the new state.

    Raises:
        KernelMissing, KernelRefused: see `choose`.
    """
    if where.record:
        return recorded(partial(run, op, form, chunk), inputs, where, state)
    past = None if state is None else state[0] if len(state) == 1 else state
    options = {"state": past, "padding": where.padding, "segments": where.segments}
    length = inputs[0].shape[1]
    call = describe(op.name, inputs, past, where)
    choice = choose(op, form, call, inputs[0].device)
    if choice.kernel is not None and call is not None:
        out, new = choice.kernel.form(call.mode)(*inputs, **options)
        return out, (new,)
    if choice.form == "plain" and past is not None and _one_step(inputs[0], state, where):
        return op.step(*inputs, past), state  # pyright: ignore[reportReturnType]
    if choice.form == "recurrent" or (choice.form == "plain" and length <= SHORT):
        out, new = op.recurrent(*inputs, **options)
    else:
        out, new = op.chunked(*inputs, **options, **({} if chunk is None else {"chunk": chunk}))
    return out, new if isinstance(new, tuple) else (new,)


def _one_step(first: torch.Tensor, state: State | None, where: MixerInputs) -> bool:
    """One token of a running generation: its state can be overwritten."""
    if first.shape[1] != 1 or torch.is_grad_enabled() or where.padding is not None or where.segments is not None:
        return False
    return torch.is_inference_mode_enabled() or not any(part.is_inference() for part in state or ())


def _learning(inputs: tuple, state: Any) -> bool:
    parts = (*inputs, *(state if isinstance(state, tuple) else (state,)))
    return torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in parts)


def describe(op: str, inputs: tuple, state: Any, where: MixerInputs) -> Call | None:
    """What the choice depends on in a call of a recurrence; None where no kernel exists for it."""
    if op not in KERNELS:
        return None
    first = inputs[0]
    learning = _learning(inputs, state)
    mode = "train" if learning else "decode" if first.shape[1] <= FEW else "prefill"
    scan = op == "selective_scan"
    v = first if scan else inputs[3 if op == "rwkv7" else 2]
    return Call(
        device=v.device.type,
        dtype=v.dtype,
        heads=inputs[3].shape[2] if scan else v.shape[2],
        key=inputs[2].shape[-1] if scan else first.shape[-1],
        value=v.shape[-1],
        mode=mode,
        state=state is not None,
        segments=where.segments is not None,
        fixed=op == "simple_gla" and inputs[3].dim() == 1,
    )


def choose(op: Op, form: str, call: Call | None, device: torch.device) -> Choice:
    """What runs a call, and why. Says so once, by this module's logger; a new choice is checked on the device first.

    Args:
        op: the recurrence.
        form: `auto`, `chunked`, `recurrent` or `fused`: the mixer's option.
        call: by `describe`.
        device: where the tensors are.

    Raises:
        KernelMissing: kernels were asked for by name, and a package or a device is not there.
        KernelRefused: they were asked for, and exist for no such recurrence, head size or dtype; or an unknown name.
    """
    if form in ("chunked", "recurrent"):
        return Choice(form, f"form: {form}")
    if form == "auto" and torch.compiler.is_compiling():
        return Choice("plain", "torch.compile")
    named = os.environ.get("RELINEAR_KERNELS", "auto")
    key = (op.name, form, named, call)
    choice = _CHOICES.get(key)
    if choice is None:
        choice = _CHOICES[key] = _choose(op, form, named, call, device)
        _say(op.name, choice)
    return choice


def _choose(op: Op, form: str, named: str, call: Call | None, device: torch.device) -> Choice:
    if form not in FORMS:
        raise KernelRefused(f"form {form!r} is none of {', '.join(FORMS)}")
    allowed, required = _libraries(named)
    if not allowed:
        return Choice("plain", f"RELINEAR_KERNELS={named}")
    asked = "form: fused" if form == "fused" else f"RELINEAR_KERNELS={named}" if required else ""
    kernels = [kernel for kernel in KERNELS.get(op.name, ()) if kernel.library in allowed]
    if call is None or not kernels:
        why = f"no fused kernels for {op.name}" + (f" in {' or '.join(allowed)}" if required else "")
        if form == "fused":
            raise KernelRefused(f"form: fused: there are {why}. Set form: auto or form: chunked")
        return Choice("plain", why)
    refusals = []
    for kernel in kernels:
        refusal = _refusal(kernel, call, bool(asked))
        if refusal is None:
            passed, figures = _checked(op, kernel, call, device)
            if passed:
                return Choice("fused", f"{kernel.library}'s kernels for {_words(call)}; {figures}", kernel)
            refusal = Refusal("call", f"{kernel.library}'s kernels failed their check here")
        refusals.append(refusal)
    why = "; ".join(dict.fromkeys(refusal.why for refusal in refusals))
    kinds = {refusal.kind for refusal in refusals}
    if asked and "call" not in kinds:
        error, mend = (KernelMissing, "") if "machine" in kinds else (KernelRefused, "; or set form: chunked")
        raise error(f"{asked}: no kernels for {op.name} here: {why}{mend}")
    return Choice("plain", why)


def _libraries(named: str) -> tuple[tuple[str, ...], bool]:
    """The libraries that RELINEAR_KERNELS allows, and whether it requires them."""
    if named in ("auto", "fused", "torch"):
        return (() if named == "torch" else tuple(LIBRARIES)), named == "fused"
    names = tuple(name.strip() for name in named.split(","))
    for name in names:
        if name not in LIBRARIES:
            known = ", ".join(("auto", "torch", "fused", *LIBRARIES))
            raise KernelRefused(f"RELINEAR_KERNELS={named}: {name!r} is none of {known}")
    return names, True


def _refusal(kernel: Kernel, call: Call, asked: bool) -> Refusal | None:
    """Why a library's kernels do not take a call; `asked`: they were asked for by name."""
    reasons = []
    if call.device != "cuda" and not (call.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        reasons.append(f"fused kernels need a GPU, the tensors are on {call.device}")
    absent = missing(kernel.library) if asked or not reasons else None
    if absent is not None:
        reasons.append(absent)
    if reasons:
        return Refusal("machine", "; ".join(reasons))
    if call.dtype not in LIMITS:
        return Refusal("input", f"fused kernels take fp32, fp16 and bf16, not {_dtype(call)}")
    if call.mode == "decode" and kernel.decode is None:
        return Refusal("call", f"{kernel.library} has no kernel for a few tokens")
    if not asked and call.mode != "decode" and call.dtype == torch.float32 and call.device == "cuda" and _exact():
        return Refusal("call", "fp32 stays exact: fused chunks multiply in TF32, which form: fused allows")
    return kernel.refuse(call)


def _exact() -> bool:
    """Whether torch may not round fp32 factors to TF32, while Triton would: its default, whatever torch is told."""
    if os.environ.get("TRITON_F32_DEFAULT", "tf32") != "tf32":
        return False
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", "none")
    # torch has two settings for this and refuses to read the older one where the newer was used.
    return precision == "ieee" or (precision == "none" and torch.get_float32_matmul_precision() == "highest")


def _checked(op: Op, kernel: Kernel, call: Call, device: torch.device) -> tuple[bool, str]:
    """The verdict of the self-check, made once for each shape; a failure is said loudly."""
    call = call._replace(segments=False)
    key = (op.name, kernel.library, call)
    if key not in _VERDICTS:
        _VERDICTS[key] = verdict(op, kernel.form(call.mode), call, device)
        passed, figures = _VERDICTS[key]
        if not passed:
            logger.warning(
                "%s: %s's kernels FAILED their check against the step-by-step form, plain torch instead (%s; %s)",
                op.name,
                kernel.library,
                figures,
                _words(call),
            )
    return _VERDICTS[key]


def _say(op: str, choice: Choice) -> None:
    what = "plain torch" if choice.kernel is None else "fused"
    text = f"{op}: {what} ({choice.reason})"
    if text not in _SAID:
        _SAID.add(text)
        logger.info(text)


def _dtype(call: Call) -> str:
    return str(call.dtype).removeprefix("torch.")


def _words(call: Call) -> str:
    return f"{_dtype(call)} heads of {call.key} and {call.value} on {call.device}, {call.mode}"


def survey(ops: list[Op], device: torch.device, dtype: torch.dtype, head_dim: int) -> list[dict[str, str]]:
    """What would run every recurrence on a device, with the kernels checked there.

    Returns:
        For each recurrence a row: `recurrence`, what runs in `train`, `prefill` and `decode`, and `why`.
    """
    return [_surveyed(op, device, dtype, head_dim) for op in ops]


def _surveyed(op: Op, device: torch.device, dtype: torch.dtype, head_dim: int) -> dict[str, str]:
    row, reasons = {"recurrence": op.name}, []
    named = os.environ.get("RELINEAR_KERNELS", "auto")
    for mode in ("train", "prefill", "decode"):
        call = Call(device.type, dtype, 2, head_dim, head_dim, mode, state=mode == "decode")
        try:
            choice = _choose(op, "auto", named, call if op.name in KERNELS else None, device)
        except (KernelMissing, KernelRefused) as error:
            row[mode], reason = "error", str(error)
        else:
            row[mode], reason = "torch" if choice.kernel is None else choice.kernel.library, choice.reason
        reasons.append(reason)
    return {**row, "why": "; ".join(dict.fromkeys(reasons))}
