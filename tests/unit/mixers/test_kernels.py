"""Which form runs, whose kernels, what is said of it, and how a kernel that errs is caught."""

from __future__ import annotations

import logging
from importlib import import_module

import pytest
import torch

from relinear.mixers import kernels
from relinear.mixers.base import MixerInputs
from relinear.mixers.errors import KernelMissing, KernelRefused
from relinear.mixers.ops import check, fused
from relinear.mixers.ops.fused import Call, Kernel
from relinear.mixers.ops.gated_delta import OP
from relinear.mixers.ops.op import Op

CPU = torch.device("cpu")
CALL = Call("cpu", torch.float32, 2, 16, 24, "train")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """As in a new process without settings."""
    for name in ("_CHOICES", "_VERDICTS"):
        monkeypatch.setattr(kernels, name, {})
    monkeypatch.setattr(kernels, "_SAID", set())
    for name in ("RELINEAR_KERNELS", "TRITON_INTERPRET", "TRITON_F32_DEFAULT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def library(monkeypatch):
    """`library(**forms)`: fla as if it were installed and ran here, with our own functions for kernels."""

    def install(chunk=OP.recurrent, decode=OP.recurrent, refuse=lambda call: None):
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(kernels, "missing", lambda library: None)
        monkeypatch.setitem(kernels.KERNELS, "gated_delta", (Kernel("fla", chunk, decode, refuse),))

    return install


def choose(form="auto", call=CALL, op=OP):
    return kernels.choose(op, form, call, CPU)


def inputs(length, **changes):
    return check.sample("gated_delta", CALL._replace(**changes), length=length)


def test_plain_torch_by_length(monkeypatch):
    """One token with a state is a step in place, few are steps, many are chunks."""
    ran = []

    def spy(name, form):
        return lambda *args, **kwargs: (ran.append(name), form(*args, **kwargs))[1]

    op = Op("gated_delta", *(spy(name, getattr(OP, name)) for name in ("recurrent", "chunked", "step")))
    state = None
    with torch.no_grad():
        for length in (kernels.SHORT + 1, kernels.SHORT, 1):
            _, state = kernels.run(op, "auto", None, *inputs(length), where=MixerInputs(), state=state)
    assert ran == ["chunked", "recurrent", "step"]
    kernels.run(op, "recurrent", None, *inputs(9), where=MixerInputs(), state=None)
    kernels.run(op, "chunked", 4, *inputs(1), where=MixerInputs(), state=None)
    assert ran[3:] == ["recurrent", "chunked"]


def test_forms_are_named():
    assert choose("chunked").reason == "form: chunked"
    assert choose("recurrent").form == "recurrent"
    with pytest.raises(KernelRefused, match="form 'fast' is none of auto, chunked, recurrent, fused"):
        choose("fast")


def test_a_cpu_gets_plain_torch():
    choice = choose()
    assert choice.form == "plain" and "need a GPU" in choice.reason and "pip" not in choice.reason
    assert "no fused kernels for titans" in choose(call=None, op=OP._replace(name="titans")).reason


def test_asked_for_and_missing(monkeypatch):
    """By the recipe or by the variable: what is missing, and the command that brings it."""
    monkeypatch.setattr(fused.util, "find_spec", lambda name: None)
    fused.missing.cache_clear()
    for form, variable in (("fused", "auto"), ("auto", "fused"), ("auto", "fla"), ("fused", "mamba_ssm,fla")):
        monkeypatch.setenv("RELINEAR_KERNELS", variable)
        with pytest.raises(KernelMissing, match=r"fla and triton not installed \(pip install 'relinear\[gpu\]'\)"):
            choose(form)
    fused.missing.cache_clear()
    assert issubclass(KernelMissing, ImportError) and KernelMissing.exit_code == 3


def test_asked_for_where_there_are_none(monkeypatch):
    with pytest.raises(KernelRefused, match="no fused kernels for titans"):
        choose("fused", None, OP._replace(name="titans"))
    monkeypatch.setenv("RELINEAR_KERNELS", "mamba_ssm")
    with pytest.raises(KernelRefused, match="no fused kernels for gated_delta in mamba_ssm"):
        choose("fused")
    assert choose().reason == "no fused kernels for gated_delta in mamba_ssm"
    assert issubclass(KernelRefused, ValueError) and KernelRefused.exit_code == 2


def test_the_variable_forbids(monkeypatch, library):
    library()
    assert choose("fused").form == "fused"
    monkeypatch.setenv("RELINEAR_KERNELS", "torch")
    assert choose("fused") == ("plain", "RELINEAR_KERNELS=torch", None)
    monkeypatch.setenv("RELINEAR_KERNELS", "fla,tria")
    with pytest.raises(KernelRefused, match="'tria' is none of auto, torch, fused, fla, mamba_ssm"):
        choose()
    assert choose("chunked").form == "chunked"


def test_limits_of_a_kernel(library):
    library(refuse=fused.KERNELS["gated_delta"][0].refuse)
    big = CALL._replace(key=320)
    assert choose(call=big).reason == "fla takes heads of up to 256 channels, these have 320"
    with pytest.raises(KernelRefused, match="up to 256 channels, these have 320; or set form: chunked"):
        choose("fused", big)
    double = CALL._replace(dtype=torch.float64)
    assert "not float64" in choose(call=double).reason


def test_the_other_library_where_one_is_missing(monkeypatch):
    """Without fla mamba-ssm serves fixed decays, not the gradient of decays per token; it has none for a few tokens."""
    simple_gla = import_module("relinear.mixers.ops.simple_gla").OP
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "missing", lambda library: "fla not installed" if library == "fla" else None)
    monkeypatch.setattr(kernels, "verdict", lambda *args: (True, "no error"))
    fixed = CALL._replace(fixed=True)
    for form in ("auto", "fused"):
        assert kernels.choose(simple_gla, form, fixed, CPU).kernel.library == "mamba_ssm"
        assert kernels.choose(simple_gla, form, fixed._replace(mode="decode"), CPU).form == "plain"
    assert "fla not installed; mamba-ssm's gradient" in kernels.choose(simple_gla, "auto", CALL, CPU).reason
    with pytest.raises(KernelMissing, match="form: fused: no kernels for simple_gla here: fla not installed"):
        kernels.choose(simple_gla, "fused", CALL, CPU)


def test_fp32_stays_exact_on_a_gpu(monkeypatch, library):
    library()
    kernel, gpu = kernels.KERNELS["gated_delta"][0], CALL._replace(device="cuda")
    assert "TF32" in kernels._refusal(kernel, gpu, False).why
    assert kernels._refusal(kernel, gpu, True) is None
    for call in (gpu._replace(dtype=torch.bfloat16), gpu._replace(mode="decode")):
        assert kernels._refusal(kernel, call, False) is None
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    assert kernels._refusal(kernel, gpu, False) is None


def test_a_kernel_runs_as_our_own_form(library):
    """Training by the chunk kernel, few tokens without gradients by the other, with padding and borders."""
    ran = []

    def named(name):
        return lambda *args, **kwargs: (ran.append(name), OP.recurrent(*args, **kwargs))[1]

    library(named("chunk"), named("decode"))
    padding = torch.ones(1, 70, dtype=torch.bool)
    padding[:, :3] = False
    where = MixerInputs(padding, torch.arange(70)[None] // 40)
    found = {}
    for form in ("auto", "recurrent"):
        leaves = [x.requires_grad_() for x in inputs(70)]
        out, (state,) = kernels.run(OP, form, None, *leaves, where=where, state=None)
        found[form] = torch.autograd.grad(out.sum() + state.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))
    assert set(ran) == {"chunk"}
    with torch.no_grad():
        kernels.run(OP, "auto", None, *inputs(kernels.FEW), where=where_of(kernels.FEW), state=None)
        assert ran[-1] == "decode"
        kernels.run(OP, "auto", None, *inputs(kernels.FEW + 1), where=where_of(kernels.FEW + 1), state=None)
        assert ran[-1] == "chunk"


def where_of(length):
    return MixerInputs(None, torch.zeros(1, length, dtype=torch.long))


def test_no_kernel_for_few(library):
    library(decode=None)
    assert choose(call=CALL._replace(mode="decode")).form == "plain"
    assert choose("fused", call=CALL._replace(mode="decode")).form == "plain"


def wrong_output(*args, **kwargs):
    out, state = OP.recurrent(*args, **kwargs)
    return out * 1.1, state


class HalfGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad / 2


def wrong_gradient(q, *args, **kwargs):
    return OP.recurrent(HalfGradient.apply(q), *args, **kwargs)


def fails(*args, **kwargs):
    raise RuntimeError("out of shared memory\nmore")


@pytest.mark.parametrize(
    ("kernel", "said"),
    [
        (wrong_output, "(output), limit"),
        (wrong_gradient, "(gradient 0), limit"),
        (fails, "RuntimeError: out of shared memory;"),
    ],
)
def test_a_kernel_that_errs_is_left_and_said(kernel, said, library, caplog):
    library(chunk=kernel)
    with caplog.at_level(logging.INFO, "relinear"):
        for form in ("auto", "fused", "auto"):
            assert choose(form).form == "plain"
    loud = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(loud) == 1 and "FAILED" in loud[0] and said in loud[0] and "plain torch instead" in loud[0]
    out, _ = kernels.run(OP, "auto", None, *inputs(9), where=MixerInputs(), state=None)
    assert torch.allclose(out, OP.recurrent(*inputs(9))[0], atol=1e-5)


def test_a_wrong_gradient_only_matters_where_there_are_gradients(library):
    library(chunk=wrong_gradient)
    assert choose(call=CALL._replace(mode="prefill")).form == "fused"


def test_the_choice_is_said_once(library, caplog):
    library()
    with caplog.at_level(logging.INFO, "relinear"):
        for _ in range(3):
            choose(call=CALL._replace(mode="prefill"))
            choose("recurrent")
    assert len(caplog.records) == 1
    text = caplog.records[0].getMessage()
    assert text.startswith(
        "gated_delta: fused (fla's kernels for float32 heads of 16 and 24 on cpu, prefill; largest error"
    )


def test_the_check_keeps_out_of_its_surroundings(library):
    """Checkpointing counts saved tensors, inference mode allows no gradients, autocast changes dtypes."""
    library()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert choose().form == "fused"
    kernels._CHOICES.clear()
    kernels._VERDICTS.clear()

    def layer(x):
        leaves = inputs(9)
        return kernels.run(OP, "auto", None, leaves[0] * x, *leaves[1:], where=MixerInputs(), state=None)[0]

    x = torch.ones((), requires_grad=True)
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert x.grad is not None


def test_run_has_no_graph_break():
    def layer(*leaves):
        return kernels.run(OP, "auto", None, *leaves, where=MixerInputs(), state=None)[0]

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    leaves = inputs(9)
    assert torch.allclose(compiled(*leaves), layer(*leaves), atol=1e-6)


def test_versions(monkeypatch):
    monkeypatch.setattr(fused.util, "find_spec", lambda name: object())
    for found, expected in (("0.5.9", "older than 0.6"), ("0.6.0", None), ("1.0rc1", None)):
        monkeypatch.setattr(fused, "version", lambda package, found=found: found)
        fused.missing.cache_clear()
        text = fused.missing("fla")
        assert text is None if expected is None else expected in str(text)
    fused.missing.cache_clear()


def test_documents_end_to_end():
    """By hand: a row of two documents with padding before, in and behind them, and a row of one."""
    segments = torch.tensor([[7, 7, 7, 8, 9, 9], [1, 1, 1, 1, 1, 2]])
    padding = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 1, 1, 1, 0]]).bool()
    where = fused.documents(segments, padding)
    assert where.starts.tolist() == [0, 4, 6, 12]
    assert where.first.tolist() == [0, 2] and where.last.tolist() == [1, 2]


def test_documents_are_found_once_and_again_after_a_change():
    segments = torch.tensor([[0, 0, 1]])
    first = fused.documents(segments, None)
    assert fused.documents(segments, None) is first
    segments[0, 1] = 1
    assert fused.documents(segments, None).starts.tolist() == [0, 1, 3]
    with torch.inference_mode():
        segments = torch.tensor([[0, 0, 1]])
        fused.documents(segments, None)
        segments[0, 1] = 1
        assert fused.documents(segments, None).starts.tolist() == [0, 1, 3]


@pytest.mark.parametrize("name", sorted(fused.KERNELS))
def test_samples_are_within_the_bounds(name):
    """What the check feeds is what the recurrences accept."""
    call = CALL._replace(heads=2, key=16, value=24)
    op = import_module(f"relinear.mixers.ops.{name}").OP
    for mode in ("train", "decode"):
        found = check.deviation(op, op.chunked, call._replace(mode=mode, state=True), CPU)
        assert max(found.values()) < 2e-5, found
