"""Time: causality, the cache, padding, packed documents."""

from __future__ import annotations

import pytest
import torch

EXACT = 1e-11  # fp64 throughout: any leak is many orders larger


def pieces(stack, cache, x, sizes, **places):
    """Feed x in pieces of the given sizes."""
    out, start = [], 0
    positions = places.pop("positions", None)
    if positions is None:
        positions = torch.arange(x.shape[1]).expand(x.shape[:2])
    for size in sizes:
        part = slice(start, start + size)
        cut = {key: value[:, part] for key, value in places.items()}
        out.append(stack(x[:, part], positions[:, part], cache=cache, **cut))
        start += size
    assert start == x.shape[1]
    return torch.cat(out, 1)


def test_the_future_does_not_change_the_past(name, options, small, make_stack, make_tokens):
    stack = make_stack(name, options, small).double()
    x = make_tokens(2, 70, small.hidden_size)
    before = stack(x)
    for t in (1, 16, 31, 32, 69):
        changed = x.clone()
        changed[:, t:] += 1.0
        after = stack(changed)
        # Not bit-equal: a triangular solve may block its sums differently.
        assert torch.allclose(after[:, :t], before[:, :t], rtol=0, atol=1e-12)
        assert not torch.allclose(after[:, t], before[:, t])
        assert not torch.allclose(after[:, -1], before[:, -1])


def test_the_past_reaches_the_future(name, gqa, make_stack, make_tokens):
    """Across several chunk limits: a state that is dropped on the way would pass a causality test.

    As far as the spec says, and no further.
    """
    stack = make_stack(name, {}, gqa).double()
    x = make_tokens(1, 120, gqa.hidden_size).requires_grad_()
    gradient = torch.autograd.grad(stack(x)[:, -1].square().sum(), x)[0]
    mixer = stack.mixers()[0]
    reach = mixer.spec.reach(mixer.options)
    seen = 120 if reach is None else min(120, 1 + len(stack.layers) * reach)
    assert (gradient.abs().amax(-1)[0] > 0).tolist() == [False] * (120 - seen) + [True] * seen


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [33, 27], [2, 1, 30, 1, 16, 10], [59, 1]], ids=str)
def test_cache_equals_no_cache(name, sizes, small, make_stack, make_cache, make_tokens, close):
    stack = make_stack(name, {}, small).double()
    x = make_tokens(2, 60, small.hidden_size)
    cache = make_cache(2)
    close(pieces(stack, cache, x, sizes), stack(x), EXACT, "output")
    whole = make_cache(2)
    stack(x, cache=whole)
    for found, expected in zip(cache.layers, whole.layers, strict=True):
        assert found.tokens == 60
        for a, b in zip(found.state, expected.state, strict=True):
            close(a, b, EXACT, "state")


def test_cache_equals_no_cache_in_every_option(name, options, small, make_stack, make_cache, make_tokens, close):
    stack = make_stack(name, options, small).double()
    x = make_tokens(2, 40, small.hidden_size)
    close(pieces(stack, make_cache(2), x, [20, 1, 1, 2, 16]), stack(x), EXACT, "output")


@torch.no_grad()
def test_recorded_states_are_those_of_fewer_tokens(name, options, small, make_stack, make_cache, make_tokens, close):
    """What a draft's verification goes back to: the state after each of the last tokens, and none before touched."""
    stack = make_stack(name, options, small).double()
    length = stack.beyond(20)
    x = make_tokens(2, length + 7, small.hidden_size)
    positions = torch.arange(length + 7).expand(2, -1)
    cache, out, seen = make_cache(2), [], 0
    for size, record in ((length, 2), (6, 6), (1, 1)):
        before = [[part.clone() for part in layer.state or ()] for layer in cache.layers]
        held = [layer.state or () for layer in cache.layers]
        part = slice(seen, seen + size)
        out.append(stack(x[:, part], positions[:, part], cache=cache, record=record))
        seen += size
        assert all(torch.equal(a, b) for layers in zip(held, before, strict=True) for a, b in zip(*layers, strict=True))
        for back in range(record):
            alone = make_cache(2)
            stack(x[:, : seen - back], cache=alone)
            for layer, expected in zip(cache.layers, alone.layers, strict=True):
                for a, b in zip(layer.history[-1 - back], expected.state, strict=True):
                    close(a, b, EXACT, f"state {back} tokens before {seen}")
    close(torch.cat(out, 1), stack(x), EXACT, "output")


@torch.no_grad()
def test_recorded_states_with_padding(name, small, make_stack, make_cache, make_tokens, close):
    stack = make_stack(name, {}, small).double()
    x = make_tokens(1, 20, small.hidden_size)
    padding, positions = torch.arange(20)[None] >= 4, (torch.arange(20)[None] - 4).clamp(min=0)
    cache, alone = make_cache(2), make_cache(2)
    stack(x, positions, padding, cache=cache, record=18)
    stack(x[:, 4:], cache=alone, record=16)
    for layer, expected in zip(cache.layers, alone.layers, strict=True):
        assert len(layer.history) == 18
        for found, wanted in zip(layer.history[2:], expected.history, strict=True):
            for a, b in zip(found, wanted, strict=True):
                close(a, b, EXACT)


def test_left_padding_is_exact(name, options, small, make_stack, make_cache, make_tokens, close):
    """Rows of a padded batch equal the rows alone, also alone at batch 1, whole or in pieces, then decoding."""
    stack = make_stack(name, options, small).double()
    lengths, total = [50, 17, 33, 1], 50
    x = make_tokens(4, total + 2, small.hidden_size)
    start = torch.tensor([total - n for n in lengths])[:, None]
    padding = torch.arange(total + 2) >= start
    positions = (torch.arange(total + 2) - start).clamp(min=0)
    batches = [slice(0, 4)] + [slice(i, i + 1) for i in range(4)]
    alone = [stack(x[i : i + 1, total - lengths[i] :])[0] for i in range(4)]
    for sizes in ([total + 2], [total, 1, 1], [10, 40, 2]):
        for rows in batches:
            places = {"positions": positions[rows], "padding": padding[rows]}
            out = pieces(stack, make_cache(2), x[rows], sizes, **places)
            for row, i in zip(out, range(4)[rows], strict=True):
                close(row[total - lengths[i] :], alone[i], EXACT, f"row {i} in pieces {sizes}")


def test_padding_holds_nothing_back(name, small, make_stack, make_cache, make_tokens, close):
    """Padding may hold anything finite: neither outputs nor state nor gradients depend on it."""
    stack = make_stack(name, {}, small).double()
    padding = torch.ones(2, 45, dtype=torch.bool)
    padding[0, :20], padding[1, 30:] = False, False
    results = []
    for junk in (0.0, 1e4):
        x = make_tokens(2, 45, small.hidden_size).masked_fill(~padding[..., None], junk).requires_grad_()
        cache = make_cache(2)
        out = stack(x, padding=padding, cache=cache)
        states = [part for layer in cache.layers for part in layer.state]
        loss = out[padding].square().sum() + sum(part.sum() for part in states)
        results.append([out[padding], *states, *torch.autograd.grad(loss, list(stack.parameters()), allow_unused=True)])
    for a, b in zip(*results, strict=True):
        if a is not None:
            close(a, b, EXACT)


def test_right_padding_leaves_the_state(name, options, small, make_stack, make_cache, make_tokens, close):
    stack = make_stack(name, options, small).double()
    lengths, total = [40, 13, 1], 40
    x = make_tokens(3, total, small.hidden_size)
    padding = torch.arange(total) < torch.tensor(lengths)[:, None]
    cache = make_cache(2)
    stack(x, padding=padding, cache=cache)
    for i, length in enumerate(lengths):
        alone = make_cache(2)
        stack(x[i : i + 1, :length], cache=alone)
        for found, expected in zip(cache.layers, alone.layers, strict=True):
            for a, b in zip(found.state, expected.state, strict=True):
                close(a[i], b[0], EXACT, f"row {i}")


def packed(documents):
    """Positions and segments of documents of the given lengths in one row."""
    positions = torch.cat([torch.arange(n) for n in documents])[None]
    segments = torch.cat([torch.full((n,), i) for i, n in enumerate(documents)])[None]
    return positions, segments


DOCUMENTS = [[1, 15, 16, 1, 1, 31, 5], [32, 32, 6], [70], [64, 6], [33, 37], [2] * 35]


@pytest.mark.parametrize("documents", DOCUMENTS, ids=str)
def test_packed_documents_equal_separate_ones(name, documents, small, make_stack, make_cache, make_tokens, close):
    """Outputs, gradients of inputs and parameters, and the final state."""
    stack = make_stack(name, {}, small).double()
    x = make_tokens(1, sum(documents), small.hidden_size)
    positions, segments = packed(documents)
    weights = make_tokens(1, sum(documents), small.hidden_size, seed=1)

    def gradients(out, leaf, weight):
        grads = torch.autograd.grad((out * weight).sum(), [leaf, *stack.parameters()], allow_unused=True)
        return [torch.zeros(()) if g is None else g for g in grads]

    together, cache = x.clone().requires_grad_(), make_cache(2)
    out = stack(together, positions, segments=segments + 3, cache=cache)
    found = gradients(out, together, weights)

    parts, inputs, total, alone = [], [], None, make_cache(2)
    for part, weight in zip(x.split(documents, 1), weights.split(documents, 1), strict=True):
        leaf, alone = part.clone().requires_grad_(), make_cache(2)
        parts.append(stack(leaf, cache=alone))
        grads = gradients(parts[-1], leaf, weight)
        inputs.append(grads[0])
        total = grads[1:] if total is None else [a + b for a, b in zip(total, grads[1:], strict=True)]
    close(out, torch.cat(parts, 1), EXACT, "output")
    close(found[0], torch.cat(inputs, 1), EXACT, "gradient of x")
    for (key, _), a, b in zip(stack.named_parameters(), found[1:], total, strict=True):
        close(a, b, EXACT, f"gradient of {key}")
    for a, b in zip(cache.layers, alone.layers, strict=True):
        for p, q in zip(a.state, b.state, strict=True):
            close(p, q, EXACT, "final state")


def test_packing_in_every_option_and_with_padding(name, options, small, make_stack, make_tokens, close):
    """Rows of different documents and padding at both ends, every padding token a document of its own."""
    stack = make_stack(name, options, small).double()
    rows = [[0, [20, 13, 17], 0], [7, [40], 3], [0, [1, 2, 30], 17]]
    total = 50
    x = make_tokens(3, total, small.hidden_size)
    positions, segments, padding = [], [], []
    for left, documents, right in rows:
        p, _ = packed([1] * left + documents + [1] * right)
        positions.append(p[0])
        segments.append(packed([1] * left + documents + [1] * right)[1][0])
        padding.append(torch.tensor([False] * left + [True] * sum(documents) + [False] * right))
    out = stack(x, torch.stack(positions), torch.stack(padding), torch.stack(segments))
    for i, (left, documents, _) in enumerate(rows):
        start = left
        for length in documents:
            part = slice(start, start + length)
            close(out[i : i + 1, part], stack(x[i : i + 1, part]), EXACT, f"row {i} at {start}")
            start += length


def test_continuing_across_a_call(name, options, small, make_stack, make_cache, make_tokens, close):
    """The incoming state belongs to the first token's document; a border later in the same call ends it."""
    stack = make_stack(name, options, small).double()
    x = make_tokens(2, 60, small.hidden_size)
    documents = [45, 15]
    positions, segments = (part.expand(2, -1) for part in packed(documents))
    found = pieces(stack, make_cache(2), x, [20, 40], positions=positions, segments=segments)
    expected = torch.cat([stack(part) for part in x.split(documents, 1)], 1)
    close(found, expected, EXACT, "output")
