"""What forward passes say of a choice of layers: KL on held-out text, recall; each choice is measured once and kept.

The teacher reads the text once: its last hidden states at every position that predicts a target are written down, and
its logits are made of them again where they are needed. Every measurement is kept document by document in a small JSON
file whose folder is named by its content (teacher, mixers, documents), so that another method, another command or a
resumed one takes it up, and so that differences between two choices have paired errors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ...distill import files
from ...distill.data.tokenise import Tokens
from ...distill.data.windows import eval_batches
from ...distill.errors import RunFailed
from ...distill.fingerprints import fingerprints
from ...distill.hybrid import Hybrid
from ...distill.precision import autocast
from ...eval.fidelity import clustered_mean
from ...eval.tasks.document import Document
from ...eval.tasks.likelihood import score

BATCH = 8
"""Windows of full length, or recall documents, in one forward pass."""

HELD_ELEMENTS = 2**26
"""The teacher's log-probabilities stay in memory up to so many numbers; beyond, they are made again."""

CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}
TOKENS, LOSS, KL, RIGHT = range(4)
"""Columns of a measurement on text, sums over a document's targets: their number, the model's losses in nats,
KL(teacher || model) in nats, and arg-maxes that are the target."""


@dataclass
class Evaluator:
    """Measures choices of layers on one text and one set of recall documents.

    Attributes:
        hybrid: teacher and aligned mixers.
        tokens: held-out documents.
        window: positions of a forward pass, at most the teacher's context.
        recall_documents: recall's, none where no such document fits the teacher.
        folder: where measurements are kept.
        precision: `fp32` or `bf16`.
        tick: called after every forward pass over everything, with what it was.
    """

    hybrid: Hybrid
    tokens: Tokens
    window: int
    recall_documents: list[Document]
    folder: Path
    precision: str = "fp32"
    tick: Callable[[str], None] = lambda what: None
    passes: int = 0
    _held: dict[Path, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        teacher = self.hybrid.teacher
        self.layers = range(teacher.num_layers)
        self.device = next(teacher.model.parameters()).device
        self.teacher_key = content_key(fingerprints(teacher.model.state_dict()), teacher.values)
        mixers = {str(layer): mixer for layer, mixer in self.hybrid.mixers.items()}
        about = {layer: [m.spec.name, m.options.to_dict()] for layer, m in mixers.items()}
        tensors = {f"{layer}.{name}": value for layer, m in mixers.items() for name, value in m.state_dict().items()}
        self.student_key = content_key(self.teacher_key, about, fingerprints(tensors), self.precision)
        text = [self.tokens.ids.tolist(), self.tokens.offsets.tolist(), self.tokens.scored.tolist(), self.window]
        self.text_key = content_key(*text)
        self.recall_key = content_key([[d.ids, [[a.start, a.end] for a in d.answers]] for d in self.recall_documents])
        self.targets = sum(int(batch.targets.sum()) for batch, _ in eval_batches(self.tokens, self.window, BATCH))
        self._log_probs: list[Tensor] | None = None
        self._teacher: list[Tensor] | None = None

    def text(self, converted: Collection[int]) -> Tensor:
        """(documents, 4) fp64: the columns above, of the teacher with these layers converted.

        Raises:
            RunFailed: a loss that is not finite.
        """
        return self._kept(converted, "text", self.text_key, self._measure_text)

    def recall(self, converted: Collection[int]) -> Tensor:
        """(documents, 2) fp64: answers that are right, every token the arg-max, and answers asked for."""
        return self._kept(converted, "recall", self.recall_key, self._measure_recall)

    def _kept(self, converted: Collection[int], what: str, key: str, measure: Callable[..., Tensor]) -> Tensor:
        drawing = "".join("L" if layer in converted else "A" for layer in self.layers)
        path = self.folder / f"{what}-{content_key(self.student_key, key)}" / f"{drawing}.json"
        if path not in self._held and path.exists():
            rows = json.loads(path.read_text(encoding="utf-8"))
            self._held[path] = torch.tensor(rows, dtype=torch.float64)
        if path not in self._held:
            made = measure(converted)
            if not bool(made.isfinite().all()):
                raise RunFailed(f"select: layers {drawing} (A attention, L mixer): a loss is not finite")
            files.write_json(path, made.tolist())
            self._held[path] = made
            self.passes += 1
            self.tick(f"{what} {drawing}")
        return self._held[path]

    @torch.no_grad()
    def student_text(self, student: Any) -> Tensor:
        """As `text`, of a student that stands by itself; not kept."""
        backbone = student.base_model
        with autocast(self.device.type, self.precision):
            return self._sums(self._hidden(backbone), student.get_output_embeddings())

    @torch.no_grad()
    def _measure_text(self, converted: Collection[int]) -> Tensor:
        self._teacher_hidden()  # before layers are switched
        with self.hybrid.converting(converted) as model, autocast(self.device.type, self.precision):
            return self._sums(self._hidden(self.hybrid.teacher.backbone), model.get_output_embeddings())

    def _sums(self, read: Iterable[tuple[Tensor, Tensor, Tensor]], head: Any) -> Tensor:
        sums = torch.zeros(len(self.tokens), 4, dtype=torch.float64)
        wanted = self._teacher_log_probs()
        for hidden, labels, documents in read:
            for rows in self._chunks(len(labels)):
                log_q = self._log_softmax(hidden[rows], head)
                log_p = next(wanted).to(log_q.device)
                values = torch.zeros(len(log_q), 4, dtype=torch.float64)
                values[:, TOKENS] = 1
                values[:, LOSS] = -log_q.gather(-1, labels[rows, None])[:, 0].cpu()
                values[:, KL] = (log_p.exp() * (log_p - log_q)).sum(-1).cpu()
                values[:, RIGHT] = (log_q.argmax(-1) == labels[rows]).cpu()
                sums.index_add_(0, documents[rows].cpu(), values)
        return sums[sums[:, TOKENS] > 0]

    def _hidden(self, backbone: Any) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
        """Batch by batch: last hidden states (n, D) that predict a target, the targets' ids and documents, (n,)."""
        for batch, documents in eval_batches(self.tokens, self.window, BATCH):
            rows, columns = batch.targets.nonzero(as_tuple=True)
            # One document per row, padded on the right: to a causal model the padding does not exist.
            ids = batch.input_ids.to(self.device)
            hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
            yield hidden[rows, columns - 1], ids[rows, columns], documents[rows, columns]

    def _teacher_log_probs(self) -> Iterator[Tensor]:
        """The teacher's log-probabilities, chunk by chunk in the order of `_sums`."""
        if self._log_probs is not None:
            return iter(self._log_probs)
        head, hidden = self.hybrid.teacher.model.get_output_embeddings(), self._teacher_hidden()
        made = (self._log_softmax(one[rows].to(self.device), head) for one in hidden for rows in self._chunks(len(one)))
        if self.targets * head.weight.shape[0] > HELD_ELEMENTS:
            return made
        self._log_probs = list(made)
        return iter(self._log_probs)

    def _teacher_hidden(self) -> list[Tensor]:
        """The teacher's hidden states by batch, from the file where it has read this text before."""
        if self._teacher is None:
            path = self.folder / f"teacher-{content_key(self.teacher_key, self.text_key, self.precision)}.safetensors"
            if path.exists():
                held = load_file(path)
                self._teacher = [held[str(number)] for number in range(len(held))]
            else:
                with torch.no_grad(), self.hybrid.converting(()), autocast(self.device.type, self.precision):
                    read = self._hidden(self.hybrid.teacher.backbone)
                    self._teacher = [hidden.cpu().contiguous() for hidden, _, _ in read]
                files.write_bytes(path, save({str(number): one for number, one in enumerate(self._teacher)}))
        return self._teacher

    def _log_softmax(self, hidden: Tensor, head: Any) -> Tensor:
        """fp32 log-probabilities of hidden states (n, D)."""
        logits = head(hidden.to(head.weight.dtype)).float()
        scale, softcap = self.hybrid.teacher.head
        logits = logits if scale == 1.0 else logits * scale
        return (logits if softcap is None else torch.tanh(logits / softcap) * softcap).log_softmax(-1)

    def _chunks(self, count: int) -> Iterable[slice]:
        vocabulary = self.hybrid.teacher.model.get_output_embeddings().weight.shape[0]
        size = max(1, CHUNK_ELEMENTS.get(self.device.type, 2**24) // vocabulary)
        return (slice(start, min(start + size, count)) for start in range(0, count, size))

    @torch.no_grad()
    def _measure_recall(self, converted: Collection[int]) -> Tensor:
        results: list[list[float]] = []
        tokenizer = self.hybrid.teacher.tokenizer
        with self.hybrid.converting(converted) as model, autocast(self.device.type, self.precision):
            for start in range(0, len(self.recall_documents), BATCH):
                part = self.recall_documents[start : start + BATCH]
                for answers in score(model, tokenizer, part, choices=False):
                    results.append([float(sum(one.exact for one in answers)), float(len(answers))])
        return torch.tensor(results, dtype=torch.float64)


def content_key(*values: Any) -> str:
    """Sixteen digits that differ where the values, which JSON can hold, differ."""
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def estimate(sums: Tensor, counts: Tensor) -> tuple[float, float | None]:
    """Mean of a quantity summed by document, and its standard error with documents as clusters."""
    return clustered_mean(sums, counts)
