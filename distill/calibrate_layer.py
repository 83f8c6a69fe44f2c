"""Calibrating one layer: knobs of each head by a small grid, then the output projection by ridge least squares."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..mixers.base import Mixer
from ..mixers.calibration import AttentionStats
from ..mixers.heads import AttentionMixer
from .calibrate_streams import Sample
from .ridge import Gram

SWEEPS = 2
"""How often each knob is tried, with the others as they are by then."""
SEARCHED = 4_096
"""Tokens on which knobs are chosen."""
GATE_DAMPING = 1e-2
"""Relative damping of the gates' slopes."""
DAMPING = 1e-6
"""Relative damping of the d x d fits by which a head's candidates are compared."""
SPREAD = 16.0
"""Of heads' half-lives, up and down."""
SCALES = (0.1, 10.0)
"""Bounds of a head's output scale (Taylor-Calibrate, iii)."""


@dataclass
class LayerReport:
    """What calibrate did to a layer.

    Attributes:
        kept: `transfer` where nothing helped; `knobs`; `full`, with the output projection; `gates`, with gates too;
            `transfer+ridge`: the output projection alone.
        errors: |made - wanted| / |wanted| on held-out tokens, of each of these that was tried.
        ridge: relative damping of the fit that was kept, or None.
        knobs: name -> value of each head.
    """

    kept: str
    errors: dict[str, float]
    ridge: float | None = None
    knobs: dict[str, list[float]] = field(default_factory=dict)


@torch.no_grad()
def output_error(mixer: Mixer, samples: list[Sample]) -> float:
    """|made - wanted| / |wanted| over all samples."""
    wrong = norm = 0.0
    for one in samples:
        wanted = one.rows(one.target).double()
        wrong += float((one.rows(one.run(mixer)).double() - wanted).square().sum())
        norm += float(wanted.square().sum())
    return math.sqrt(wrong / norm) if norm else 0.0 if wrong == 0.0 else math.inf


def features(mixer: Any, one: Sample) -> Tensor:
    """What the output projection receives, (n, H d)."""
    seen: list[Tensor] = []
    handle = mixer.o_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        one.run(mixer)
    finally:
        handle.remove()
    return one.rows(seen[0])


@torch.no_grad()
def calibrate_layer(
    mixer: Mixer, stats: AttentionStats, fit: list[Sample], held: list[Sample], ridges: tuple[float, ...], method: str
) -> LayerReport:
    """Calibrate a mixer in place; it stays as it is where held-out tokens say that nothing helps.

    Args:
        mixer: transferred.
        stats: of its attention.
        fit: samples to fit; those with a context choose the knobs.
        held: other samples, which decide.
        ridges: relative dampings of the output projection, of which held-out tokens choose.
        method: `full`: fit the output projection and try knobs; `taylor`: decays, strengths and scales alone
            (Taylor-Calibrate); `spread`: decays alone, with each head's half-life times a factor of its own.

    Raises:
        ValueError: something is not finite.
    """
    full = method == "full"
    before = {name: value.clone() for name, value in mixer.state_dict().items()}
    report = LayerReport("transfer", {"transfer": output_error(mixer, held)})
    found: list[tuple[float, str, dict[str, Tensor], float | None]] = [
        (report.errors["transfer"], "transfer", before, None)
    ]
    if full and hasattr(mixer, "o_proj"):
        found.append(_fitted(mixer, fit, held, ridges, "transfer+ridge"))
        mixer.load_state_dict(before)
    if isinstance(mixer, AttentionMixer):
        contexts = [one for one in fit if one.context is not None]
        chosen = set_knobs(mixer, stats, contexts, search=full, spread=method == "spread")
        report.knobs = {name: [round(v, 6) for v in value.tolist()] for name, value in chosen.items()}
        found.append((output_error(mixer, held), "knobs", _copy(mixer), None))
        if full:
            found.append(_fitted(mixer, fit, held, ridges, "full"))
            mixer.load_state_dict(found[-2][2])
            if fit_gates(mixer, [one for one in fit if one.context is not None]):
                found.append(_fitted(mixer, fit, held, ridges, "gates"))
    report.errors |= {name: error for error, name, _, _ in found}
    if not all(math.isfinite(error) for error in report.errors.values()):
        raise ValueError(f"held-out errors are not finite: {report.errors}")
    _, report.kept, state, report.ridge = min(found, key=lambda entry: entry[0])
    mixer.load_state_dict(state)
    return report


def _copy(mixer: Mixer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in mixer.state_dict().items()}


def _fitted(
    mixer: Any, fit: list[Sample], held: list[Sample], ridges: tuple[float, ...], name: str
) -> tuple[float, str, dict[str, Tensor], float | None]:
    """Fit the output projection: (held-out error, name, state, damping)."""
    layer = mixer.o_proj
    grams = []
    for samples in (fit, held):
        gram = Gram(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device)
        for one in samples:
            gram.add(features(mixer, one), one.rows(one.target))
        grams.append(gram)
    prior = grams[0].pack(layer.weight, layer.bias)
    solved = [(grams[0].solve(ridge, prior), ridge) for ridge in ridges]
    best, ridge = min(solved, key=lambda entry: grams[1].error(entry[0]))
    weight, bias = grams[0].unpack(best)
    layer.weight.copy_(weight)
    if bias is not None:
        layer.bias.copy_(bias)
    return grams[1].error(best), name, _copy(mixer), ridge


def set_knobs(
    mixer: AttentionMixer, stats: AttentionStats, samples: list[Sample], search: bool, spread: bool = False
) -> dict[str, Tensor]:
    """Set what the mixer can set, head by head, so that a linear map of each head's output meets the teacher's head.

    Args:
        mixer: changed in place.
        stats: of its attention.
        samples: with contexts.
        search: try all values that the mixer names; else take the first.
        spread: where a head has one decay, the heads' half-lives lie from 1 / `SPREAD` to `SPREAD` times what they look
            back, instead of at that (mean distances are alike where most attention is diffuse, and no head remembers).
            Strengths and scales stay as they are: least squares makes an untrained recurrence quiet, which slows its
            training, and strong writes make it forget.

    Returns:
        The values chosen, (H,) each.
    """
    heads, options = mixer.geometry.num_heads, mixer.knobs()
    best = {name: torch.full((heads,), values[0], dtype=torch.float64) for name, values in options.items()}
    if spread:
        best.pop("strength", None)
    if spread and mixer.decays == "head" and "reach" in best:
        ends = math.log(SPREAD)
        best["reach"] = best["reach"] * torch.linspace(-ends, ends, heads, dtype=torch.float64).exp()
    metric = _metric(mixer)
    if best:
        mixer.calibrate(stats, best)
    if search and options:
        some = _first(samples, SEARCHED)
        lowest = _head_errors(mixer, some, metric)
        for _ in range(SWEEPS):
            for name, values in options.items():
                for value in values:
                    trial = {**best, name: torch.full_like(best[name], value)}
                    mixer.calibrate(stats, trial)
                    errors = _head_errors(mixer, some, metric)
                    better = errors < lowest
                    lowest = torch.where(better, errors, lowest)
                    best[name] = torch.where(better, trial[name], best[name])
        mixer.calibrate(stats, best)
    if not spread or hasattr(mixer, "window_mix"):
        scale_heads(mixer, samples, metric)
    return best


def _first(samples: list[Sample], tokens: int) -> list[Sample]:
    """The first samples, with that many tokens at least."""
    seen = 0
    for number, one in enumerate(samples, 1):
        seen += int(one.real.sum())
        if seen >= tokens:
            return samples[:number]
    return samples


def _metric(mixer: AttentionMixer) -> Tensor:
    """(H, d, d): what an error of a head's output weighs once it has passed the output projection."""
    split = mixer.o_proj.weight.double().unflatten(1, (mixer.geometry.num_heads, -1))  # (D, H, d)
    return torch.einsum("xhi,xhj->hij", split, split)


def _head_errors(mixer: AttentionMixer, samples: list[Sample], metric: Tensor) -> Tensor:
    """(H,) fp64 on the CPU: squared error of each head's best linear map to the teacher's head."""
    if hasattr(mixer, "window_mix"):
        return _window_fit(mixer, samples, metric)[1]
    heads = mixer.geometry.num_heads
    ff, fc, cc = (metric.new_zeros(metric.shape) for _ in range(3))
    for one in samples:
        assert one.context is not None
        f = features(mixer, one).double().unflatten(-1, (heads, -1))
        c = one.rows(one.context).double()
        ff += torch.einsum("nhi,nhj->hij", f, f)
        fc += torch.einsum("nhi,nhj->hij", f, c)
        cc += torch.einsum("nhi,nhj->hij", c, c)
    damping = DAMPING * ff.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    factor = torch.linalg.cholesky(ff + damping[:, None, None] * torch.eye(ff.shape[-1], device=ff.device))
    rest = cc - fc.mT @ torch.cholesky_solve(fc, factor)
    return (metric * rest).sum((-1, -2)).cpu()


def _window_fit(mixer: AttentionMixer, samples: list[Sample], metric: Tensor) -> tuple[Tensor, Tensor]:
    """(H, 2) weights of window and linear part that come nearest to the teacher's heads, and (H,) what they leave."""
    heads = mixer.geometry.num_heads
    square, cross, norm = (metric.new_zeros(heads, *shape) for shape in ((2, 2), (2,), ()))
    for one in samples:
        assert one.context is not None
        parts = []
        for branch in ("window", "linear"):
            mixer.branches = branch
            parts.append(features(mixer, one).double().unflatten(-1, (heads, -1)))
        mixer.branches = "both"
        f, c = torch.stack(parts, 1), one.rows(one.context).double()  # (n, 2, H, d)
        weighed = torch.einsum("nbhi,hij->nbhj", f, metric)
        square += torch.einsum("nahi,nbhi->hab", weighed, f)
        cross += torch.einsum("nahi,nhi->ha", weighed, c)
        norm += torch.einsum("nhi,hij,nhj->h", c, metric, c)
    damping = DAMPING * square.diagonal(dim1=-2, dim2=-1).clamp(min=1e-30)
    found = torch.linalg.solve(square + damping.diag_embed(), cross)
    return found.cpu(), (norm - (found * cross).sum(-1)).cpu()


def scale_heads(mixer: AttentionMixer, samples: list[Sample], metric: Tensor) -> None:
    """Each head's share of the window and scale of its output by least squares, in place.

    The scale goes into the queries' where there is one, else into the output projection's columns.
    """
    scale = next((getattr(mixer, name) for name in ("q_scale", "r_scale") if hasattr(mixer, name)), None)
    if hasattr(mixer, "window_mix"):
        near, far = _window_fit(mixer, samples, metric)[0].unbind(-1)
        far = far.clamp(min=0.02)
        share = (near if scale is not None else near / (near + far)).clamp(0.02, 0.98)
        mixer.window_mix.copy_(torch.logit(share))
        if scale is not None:
            scale.mul_((far / (1 - share)).to(scale))
            return
    heads = mixer.geometry.num_heads
    ff, fc = metric.new_zeros(heads), metric.new_zeros(heads)
    for one in samples:
        assert one.context is not None
        f = features(mixer, one).double().unflatten(-1, (heads, -1))
        weighed = torch.einsum("nhi,hij->nhj", f, metric)
        ff += (weighed * f).sum((0, 2))
        fc += (weighed * one.rows(one.context)).sum((0, 2))
    factor = (fc / ff.clamp(min=1e-30)).clamp(*SCALES)
    if scale is not None:
        scale.mul_(factor.to(scale))
    else:
        mixer.o_proj.weight.mul_(factor.repeat_interleave(mixer.geometry.head_dim).to(mixer.o_proj.weight))


def fit_gates(mixer: AttentionMixer, samples: list[Sample]) -> bool:
    """Each head's gate by least squares, in place: how loud its output is to be, linear in the layer input.

    A recurrence's output grows and shrinks with what was written, where attention averages.

    Returns:
        False where the mixer has no gate that is open now.
    """
    if mixer.gate_inputs(samples[0].hidden[:1, :1]) is None:
        return False
    heads, metric = mixer.geometry.num_heads, _metric(mixer)
    square = cross = None
    for one in samples:
        assert one.context is not None
        given = mixer.gate_inputs(one.hidden)
        assert given is not None
        x, f = one.rows(given).double(), features(mixer, one).double().unflatten(-1, (heads, -1))
        if square is None or cross is None:
            square, cross = x.new_zeros(heads, x.shape[1], x.shape[1]), x.new_zeros(heads, x.shape[1])
        weighed = torch.einsum("nhi,hij->nhj", f, metric)
        loud = (weighed * f).sum(-1)  # (n, H)
        missing = (weighed * (one.rows(one.context) - f)).sum(-1)
        for head in range(heads):
            square[head].addmm_((x * loud[:, head, None]).mT, x)
        cross += missing.mT @ x
    assert square is not None and cross is not None
    damping = GATE_DAMPING * square.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    factor = torch.linalg.cholesky(square + damping[:, None, None] * torch.eye(square.shape[-1], device=square.device))
    mixer.set_gates(torch.cholesky_solve(cross[..., None], factor)[..., 0])
    return True
