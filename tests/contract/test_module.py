"""The module as a torch module: gradients, save and load, refusal of what it cannot do."""

from __future__ import annotations

import copy

import pytest
import torch

from relinear.mixers import registry
from relinear.mixers.base import MixerInputs


@pytest.fixture
def trainable(name, options, small):
    """Leave out a variant without any parameter, as its table says: it has nothing to train."""
    parsed = registry.spec(name).options.parse(options)
    if not registry.spec(name).tensors(small, parsed, first=False, position=1.0):
        pytest.skip("no parameters")


@pytest.mark.usefixtures("trainable")
def test_every_parameter_receives_a_gradient(name, options, small, make_stack, make_tokens):
    stack = make_stack(name, options, small)
    stack(make_tokens(2, stack.beyond(40), small.hidden_size).float()).square().sum().backward()
    for key, parameter in stack.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, f"{key} is not used"


@pytest.mark.usefixtures("trainable")
def test_gradients_are_slopes(name, options, small, make_stack, make_tokens):
    """Autograd against a finite difference, one direction per parameter: nothing is cut off on the way."""
    stack = make_stack(name, options, small).double()
    x, target = (make_tokens(2, stack.beyond(20), small.hidden_size, seed=seed) for seed in (0, 1))

    def value():
        return (stack(x) * target).sum()

    parameters = dict(stack.named_parameters())
    grads = torch.autograd.grad(value(), list(parameters.values()))
    with torch.no_grad():
        for (key, parameter), grad in zip(parameters.items(), grads, strict=True):
            start, step = parameter.clone(), 1e-5 * grad / grad.norm()
            ends = [float(value()) for sign in (1, -1) if parameter.copy_(start + sign * step) is not None]
            parameter.copy_(start)
            slope = (ends[0] - ends[1]) / (2 * float(step.norm()))
            assert abs(slope / float(grad.norm()) - 1) < 1e-4, key


@pytest.mark.usefixtures("trainable")
def test_parameters_can_leave_their_first_values(name, options, small, make_tokens):
    """After one optimiser step from the initial values every parameter can move: no product of two zeros."""
    parsed = registry.spec(name).options.parse(options)
    mixers = [registry.module(name)(small, parsed, i, 2, i == 0) for i in range(2)]
    torch.manual_seed(0)
    length = 40 + getattr(parsed, "window", 0)
    x = make_tokens(2, length, small.hidden_size).float()
    rotary = (torch.ones(1, length, small.head_dim), torch.zeros(1, length, small.head_dim))
    optimizer = torch.optim.Adam([p for m in mixers for p in m.parameters()], 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        inputs = MixerInputs()
        loss = sum(m(x, position_embeddings=rotary, mixer_inputs=inputs)[0].sub(x).square().sum() for m in mixers)
        loss.backward()
        optimizer.step()
    for mixer in mixers:
        for key, parameter in mixer.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@pytest.mark.usefixtures("trainable")
def test_save_and_load(name, options, small, make_stack, make_tokens, tmp_path):
    stack, other = make_stack(name, options, small), make_stack(name, options, small, seed=1)
    x = make_tokens(2, 30, small.hidden_size).float()
    torch.save(stack.state_dict(), tmp_path / "weights.pt")
    assert not torch.equal(stack(x), other(x))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(stack(x), other(x))
    assert torch.equal(copy.deepcopy(stack)(x), stack(x))


def test_calls_do_not_change_each_other(name, gqa, make_stack, make_cache, make_tokens):
    """A call must not write into the state that it was given, unless it decodes one token without gradients."""
    stack = make_stack(name, {}, gqa)
    x = make_tokens(2, 12, gqa.hidden_size).float()
    cache = make_cache(2)
    with torch.no_grad():
        stack(x, cache=cache)
    kept = [[part.clone() for part in layer.state] for layer in cache.layers]
    held = [layer.state for layer in cache.layers]
    with torch.no_grad():
        stack(x, cache=copy.deepcopy(cache))
    stack(x[:, :1], cache=copy.copy(cache))
    for before, now in zip(kept, held, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, now, strict=True))


def test_decoding_equals_the_whole_and_keeps_branches_apart(name, options, gqa, make_stack, make_cache, make_tokens):
    """Steps without gradients overwrite the state in place: a copied cache must go its own way."""
    stack = make_stack(name, options, gqa).double()
    x, other = make_tokens(2, 45, gqa.hidden_size), make_tokens(2, 45, gqa.hidden_size, seed=1)
    other[:, :30] = x[:, :30]
    positions = torch.arange(45).expand(2, -1)
    with torch.no_grad():
        cache = make_cache(2)
        stack(x[:, :30], cache=cache)
        caches = {id(row): copy.deepcopy(cache) for row in (x, other)}
        for t in range(30, 45):
            for row in (x, other):
                step = stack(row[:, t : t + 1], positions[:, t : t + 1], cache=caches[id(row)])
                if t == 44:
                    assert torch.allclose(step[:, 0], stack(row)[:, -1], rtol=0, atol=1e-10)


def test_a_missing_rotary_embedding_is_an_error(name, gqa, make_stack, make_tokens):
    """Where the mixer rotates; where it does not, none is needed."""
    mixer = make_stack(name, {}, gqa).mixers()[0]
    x = make_tokens(1, 3, gqa.hidden_size).float()
    if getattr(mixer.options, "rope", False) or getattr(mixer.options, "window", 0):
        with pytest.raises(ValueError, match="position_embeddings"):
            mixer(x)
    else:
        assert mixer(x)[0].shape == x.shape
