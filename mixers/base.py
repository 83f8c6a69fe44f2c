"""What all mixers share: the call that stands where attention stood, padding, packing and the cache."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from .calibration import AttentionStats
from .specs.base import Geometry, MixerSpec, TensorSpec

State = tuple[torch.Tensor, ...]


class MixerInputs:
    """What the model computes once per forward and every mixer of it reads.

    Passed by keyword through the decoder layers. A plain object on purpose: sharding wrappers rebuild dicts and tuples
    among a module's inputs, which would cut the link between layers that `shared` is there to make.

    Attributes:
        padding: (B, T) bool, True at real tokens, or None where every token is real.
        segments: (B, T) integer document numbers, non-decreasing along T, or None where a row is one document. The
            state is reset where the number changes.
        cache: with a recurrent layer at each mixer's index (the model sees to it), or None. It comes this way because
            the keyword by which decoder layers hand it on has changed its name in transformers more than once, and a
            mixer that missed it would start anew at every token.
        shared: values that one layer hands to later ones in the same forward (RWKV-7's `v_first`).
        record: the states after each of so many last tokens are wanted, so that tokens can be taken back; 0 for the
            state after the last one alone.
    """

    def __init__(
        self,
        padding: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        cache: Any = None,
        record: int = 0,
    ) -> None:
        self.padding = padding
        self.segments = segments
        self.cache = cache
        self.record = record
        self.shared: dict[str, torch.Tensor] = {}
        self._versions: dict[int, list[torch.Tensor]] = {}

    def note(self, versions: list[torch.Tensor]) -> None:
        """Record a tensor of a state as it was after each of the last tokens; the last of `versions` is that tensor."""
        self._versions[id(versions[-1])] = versions

    def history(self, state: State, tokens: int) -> list[State]:
        """The states after each of the last `record` of `tokens` tokens, the last being `state`; forgets them.

        Raises:
            RuntimeError: a tensor of the state was not noted.
        """
        try:
            versions = [self._versions.pop(id(part)) for part in state]
        except KeyError:
            raise RuntimeError("a mixer made a state that was not recorded: use kernels.run and recorded.py") from None
        return list(zip(*versions, strict=True)) if state else [()] * min(self.record, tokens)


class Mixer(nn.Module):
    """Token mixing with a state of constant size, called exactly as transformers calls attention.

    A subclass sets `spec` and implements `initial` and `mix`. Its parameters are the rows of
    `spec.tensors`, by name and shape.
    """

    spec: ClassVar[type[MixerSpec]]
    couples_layers: ClassVar[bool] = False
    """True where a layer reads in `MixerInputs.shared` what the layer with `first=True` wrote in the same forward."""

    def __init__(self, geometry: Geometry, options: Any, layer_idx: int, num_layers: int, first: bool) -> None:
        """Build it for the layer `layer_idx` of `num_layers`; `first` at the lowest that it takes.

        Raises:
            ValueError: the spec refuses this geometry.
        """
        super().__init__()
        reason = self.spec.refusal(geometry, options)
        if reason is not None:
            raise ValueError(f"layer {layer_idx}: {self.spec.name} cannot replace this attention: {reason}")
        self.geometry = geometry
        self.options = options
        self.layer_idx = layer_idx
        self.num_layers = num_layers
        self.first = first

    @property
    def position(self) -> float:
        """Depth of this layer between 0 and 1."""
        return self.layer_idx / max(1, self.num_layers - 1)

    def table(self) -> list[TensorSpec]:
        """The spec's rows for this very layer: its parameters by name and shape."""
        return self.spec.tensors(self.geometry, self.options, first=self.first, position=self.position)

    def fp32_parameter_names(self) -> list[str]:
        """Parameters to keep in fp32 whatever the model's dtype, by their name inside the mixer."""
        return [row.name for row in self.table() if row.fp32]

    def initial(self, row: TensorSpec, generator: torch.Generator | None) -> torch.Tensor:
        """The fp32 value on the CPU that a `new` row of the spec names."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Give every parameter the value that its row of the spec names when its source is `new` (in place).

        Rows that transfer would copy or derive get the usual initialisation (normal of standard deviation 0.02, biases
        0, norms 1), so that a module built without a teacher is finite. Called when the module is built, by
        transfer, and by the model's `_init_weights`.

        Args:
            generator: a CPU generator for reproducible values; torch's own by default.
        """
        for row in self.table():
            if row.source == "new":
                value = self.initial(row, generator)
            elif len(row.shape) == 2:
                value = torch.empty(row.shape).normal_(0.0, 0.02, generator=generator)
            else:
                value = torch.full(row.shape, float(row.name.endswith("norm.weight")))
            self.get_parameter(row.name).copy_(value)

    def knobs(self) -> dict[str, tuple[float, ...]]:
        """What calibrate can set without a gradient: name -> the values it tries in each head, the first to begin with.

        The names are those of the arguments of `calibrate`. Empty where there is nothing to set.
        """
        return {}

    def calibrate(self, stats: AttentionStats, knobs: dict[str, torch.Tensor]) -> None:
        """Set decays, strengths and their like (in place, in no_grad) from what the attention looks at.

        Args:
            stats: of the attention that this mixer replaces.
            knobs: one value per head, (H,) fp64, for every name in `self.knobs()`.
        """

    def mix(
        self,
        x: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor] | None,
        inputs: MixerInputs,
        state: State | None,
    ) -> tuple[torch.Tensor, State]:
        """Mix tokens.

        Args:
            x: (B, T, D) layer input.
            rotary: (cos, sin), each (B or 1, T, rotary_dim), or None where the layer has no rotary embedding.
            inputs: padding, document borders and shared values.
            state: fp32 tensors, batch first, from the previous call; None at the start of a sequence.

        Returns:
            (B, T, D) layer output and the new state.
        """
        raise NotImplementedError

    def matrix(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor] | None, inputs: MixerInputs
    ) -> torch.Tensor:
        """The mixing matrices: how much of each token's value each head's output holds, before norm and gate.

        Values that come from more than one place (RWKV-7's value residual) count as one; a window beside the recurrence
        is included by the head's share. Not to be called on a running generation: it starts without a state.

        Args:
            x: (B, T, D) layer input.
            rotary: see `mix`.
            inputs: padding and document borders.

        Returns:
            (B, H, T, T) in fp32 (fp64 for fp64 inputs), differentiable; query tokens are rows.

        Raises:
            ValueError: the spec's `no_matrix` says why there is none.
        """
        self.require_matrix()
        raise NotImplementedError

    def require_matrix(self) -> None:
        """Refuse where the mixing is no matrix per head.

        Raises:
            ValueError: with the spec's reason.
        """
        reason = self.spec.no_matrix(self.options)
        if reason is not None:
            raise ValueError(f"layer {self.layer_idx}: {self.spec.name} has no mixing matrix: {reason}")

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        mixer_inputs: MixerInputs | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """Stand where attention stood: same arguments, same (output, weights) pair; there are no weights to return.

        `attention_mask` is the one made for softmax attention and is not read, nor is the cache among the keywords:
        padding, packing and the cache arrive in `mixer_inputs`.
        """
        inputs = mixer_inputs if mixer_inputs is not None else MixerInputs()
        layer = inputs.cache.layers[self.layer_idx] if inputs.cache is not None else None
        state = layer.read() if layer is not None else None
        output, state = self.mix(hidden_states, position_embeddings, inputs, state)
        if layer is not None and inputs.record:
            layer.record(inputs.history(state, hidden_states.shape[1]), hidden_states.shape[1])
        elif layer is not None:
            layer.write(state, hidden_states.shape[1])
        return output, None
