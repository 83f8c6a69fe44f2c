"""How far a student is from its teacher on text: perplexity of both, KL divergence, top-1 agreement.

Every figure is a mean over the counted target tokens of all documents, weighted by token. Standard errors treat
documents, not tokens, as the independent draws (tokens of one story are alike). With n_d counted tokens in document d,
sum s_d of a quantity over them, N = Σ n_d and G documents:

    mean    m = Σ s_d / N
    stderr  se(m) = sqrt(G / (G - 1) · Σ (s_d - m n_d)²) / N        (linearised ratio estimator, clustered by document)
    perplexity = exp(m), stderr = exp(m) · se(m)                                                      (delta method)
    perplexity ratio = exp(m), stderr = exp(m) · se(m), with s_d = Σ (student's loss - teacher's loss)

The last line is paired: a document that is hard for both models adds nothing to the ratio's error. With a single
document there is no standard error (None).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..distill.data.batch import Batch
from ..distill.data.documents import Fields, local_files, read_documents
from ..distill.data.tokenise import Tokens, tokenise
from ..distill.data.windows import eval_batches
from ..distill.errors import RunFailed, UserError
from ..distill.teacher import load_model
from . import store
from .logits import ChosenLogits, parts

Progress = Callable[[int, int | None], None]
EvalBatch = Batch | tuple[Batch, torch.Tensor]
Spread = Callable[[list[Any], Callable[[Any], Any]], list[Any]]

# Columns of the sums per document.
_TOKENS, _STUDENT, _TEACHER, _KL, _AGREE = range(5)
_CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**27}


@torch.no_grad()
def measure(
    student: Any,
    teacher: Any | None,
    batches: Iterable[EvalBatch],
    device: torch.device | str | None = None,
    *,
    progress: Progress | None = None,
    total: int | None = None,
    chunk_elements: int | None = None,
    spread: Spread | None = None,
) -> dict[str, Any]:
    """Perplexity of one or two models on the same batches, and how far apart their predictions are.

    Both models are called without an attention mask: positions say where documents start (see `Batch`). Logits exist
    for one chunk of target tokens at a time; log-softmax is fp32, sums are fp64.

    Args:
        student: a Hugging Face causal language model.
        teacher: another one with the same vocabulary, the same object again, or None.
        batches: `Batch`es, or pairs (batch, documents): documents (B, T) int64 numbers each position's document over
            the whole text, so that the pieces of a long document count as one. Without it every segment is a document.
        device: where the models are, and batches are moved to; by default the student's.
        progress: called after every batch with (target tokens done, `total`).
        total: target tokens in all, only passed on to `progress`.
        chunk_elements: most elements of one logits tensor; by default about 16 MB on a CPU, 512 MB on a GPU.
        spread: (batches, work) -> what the work gives for each, in their order, where several processes share it; the
            figures are those of one process, bit for bit.

    Returns:
        {"student": {"perplexity", "perplexity_stderr", "loss", "loss_stderr"}, "teacher": {likewise},
        "perplexity_ratio", "perplexity_ratio_stderr", "kl", "kl_stderr", "top1_agreement", "top1_agreement_stderr",
        "tokens", "documents"}. Losses and KL(teacher || student) are in nats per token, agreement is a share from 0 to
        1, tokens counts targets. Without a teacher only "student", "tokens" and "documents".

    Raises:
        RunFailed: a model gives a loss that is not finite.
        ValueError: no target token in the batches, or vocabularies of different size.
    """
    models = [student] if teacher is None else [student, teacher]
    training = [model.training for model in models]
    place = next(student.parameters()).device if device is None else torch.device(device)
    limit = chunk_elements or _CHUNK_ELEMENTS.get(place.type, 2**24)
    sources: list[ChosenLogits] = []
    done = 0

    def look(item: tuple[Batch, torch.Tensor]) -> tuple[Batch, torch.Tensor]:
        batch = item[0].to(place)
        if not sources:
            sources.extend(ChosenLogits(model, batch) for model in models[: 1 if teacher is student else 2])
        return batch, item[1].to(place)

    def of_batch(item: tuple[Batch, torch.Tensor]) -> dict[int, torch.Tensor]:
        nonlocal done
        batch, documents = look(item)
        made: dict[int, torch.Tensor] = {}
        for part, numbers in parts(batch, documents, sources):
            done += _accumulate(sources, teacher is not None, part, numbers, made, limit)
        if progress is not None:
            progress(done, total)
        return made

    try:
        for model in models:
            model.eval()
        if spread is None:
            found: Iterable[dict[int, torch.Tensor]] = map(of_batch, _with_documents(batches))
        else:
            numbered = list(_with_documents(batches))
            # Every process decides on the same batch how models are called, and is then as often in a forward pass.
            for item in numbered[:1]:
                look(item)
            even = all(source.packs and source.by_head for source in sources)
            found = spread(numbered, of_batch) if even else map(of_batch, numbered)
        sums: dict[int, torch.Tensor] = {}
        for made in found:
            for number, row in made.items():
                sums[number] = sums[number] + row if number in sums else row
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)
    return _summary(sums, teacher is not None)


def compare(
    student: str | Path,
    teacher: str | Path | None,
    text: str | Path | Sequence[str | Path],
    *,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    batch: int = 8,
    dtype: str = "float32",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Load one or two checkpoints and `measure` them on text files.

    Args:
        student: folder or Hub id of any causal language model, relinear's exports among them.
        teacher: likewise, with the same tokenizer; None measures the student alone.
        text: a file, folder or glob of plain text, jsonl or parquet, or several; see `distill.data.documents`.
        seq_len: length of the windows that documents are cut into, if shorter than both models' context.
        max_tokens: read only so many tokens; the document at which they end is cut there.
        batch: windows of full length per forward pass.
        dtype: of the weights: `float32`, `bfloat16` or `float16`.
        device: `cpu`, `cuda`, …
        trust_remote_code: run code from the folder of a foreign model.
        progress: see `measure`.

    Returns:
        What `measure` returns, and "seq_len" (the window used), "text" (the files), "models" (as given), "dtype",
        "versions".

    Raises:
        UserError: a model or text that cannot be read, tokenizers or vocabularies that differ, text without a target.
        RunFailed: a model's loss is not finite.
    """
    loaded = {"student": load_model(student, dtype=dtype, device=device, trust_remote_code=trust_remote_code)}
    if teacher is not None:
        loaded["teacher"] = load_model(teacher, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    tokenizer = loaded["student"][1]
    if teacher is not None:
        check_same_vocabulary(str(student), str(teacher), *loaded.values())
    sources = [str(text)] if isinstance(text, (str, Path)) else [str(source) for source in text]
    paths = _files(sources)
    result = measure_tokens(
        loaded["student"][0],
        loaded["teacher"][0] if teacher is not None else None,
        tokenise(read_documents(paths, Fields()), tokenizer),
        ", ".join(sources),
        seq_len=seq_len,
        max_tokens=max_tokens,
        batch=batch,
        progress=progress,
    )
    given = {"student": str(student)} | ({} if teacher is None else {"teacher": str(teacher)})
    about = {"text": [str(path) for path in paths], "models": given, "dtype": dtype}
    return {**result, **about, "versions": versions()}


def measure_tokens(
    student: Any,
    teacher: Any | None,
    tokens: Tokens,
    source: str,
    *,
    seq_len: int | None = None,
    max_tokens: int | None = None,
    batch: int = 8,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """`measure` on documents: cut into windows of min(contexts, seq_len).

    Args:
        student: a model.
        teacher: another one of the same vocabulary, or None.
        tokens: the documents.
        source: what they are, for errors.
        seq_len, max_tokens, batch, progress: see `compare`.

    Returns:
        What `measure` returns, and "seq_len": the window.

    Raises:
        UserError: no token to predict.
        RunFailed: a model's loss is not finite.
    """
    window = _window([model for model in (student, teacher) if model is not None], seq_len)
    if max_tokens is not None:
        tokens = _head(tokens, max_tokens)
    total = sum(int(part.targets.sum()) for part, _ in eval_batches(tokens, window, batch))
    if total == 0:
        raise UserError(
            f"{source}: no token to predict in {len(tokens)} documents; expected text of at least two tokens; look "
            "with: head FILE"
        )
    batches = eval_batches(tokens, window, batch)
    return {**measure(student, teacher, batches, progress=progress, total=total), "seq_len": window}


def versions() -> dict[str, str]:
    """What a figure was measured with."""
    return store.versions()


def vocabulary_hash(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's tokens with their ids and of its BOS."""
    content = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.bos_token_id])
    return hashlib.sha256(content.encode()).hexdigest()


_PROBE = 'Once upon a time, 1,024 naïve foxes\tsaid: "Don\'t panic!"\n\n  def f(x):  # 3.14 日本 é'


_COMPARE = "compare models of one family, e.g. an export with the teacher it was made from"


def check_same_vocabulary(
    student: str, teacher: str, ours: tuple[Any, Any], theirs: tuple[Any, Any], *, hint: str = _COMPARE
) -> None:
    """Refuse two (model, tokenizer) pairs, named as given, whose tokens are not the same.

    Raises:
        UserError: their tokenizers or vocabularies differ; it ends with `hint`.
    """
    first, second = (tokenizer for _, tokenizer in (ours, theirs))
    if vocabulary_hash(first) != vocabulary_hash(second):
        sizes = f"{len(first)} and {len(second)} tokens, BOS {first.bos_token_id} and {second.bos_token_id}"
        raise UserError(f"{student}: its tokenizer differs from that of {teacher} ({sizes}); {hint}")
    if first(_PROBE)["input_ids"] != second(_PROBE)["input_ids"]:
        raise UserError(f"{student}: has the tokens of {teacher}, but splits text differently; {hint}")
    sizes = [model.get_output_embeddings().weight.shape[0] for model, _ in (ours, theirs)]
    if sizes[0] != sizes[1]:
        raise UserError(f"{student}: predicts {sizes[0]} tokens, {teacher} {sizes[1]}; {hint}")


def _files(sources: list[str]) -> list[Path]:
    """The local files of all sources."""
    found: list[Path] = []
    for source in sources:
        files = local_files(source)
        if files is None:
            raise UserError(f"{source}: no such file or folder; evaluation reads local text, .jsonl or .parquet files")
        found += files
    return found


def _window(models: list[Any], seq_len: int | None) -> int:
    """min(context of every model, seq_len); 2048 where neither says anything."""
    limits = [getattr(model.config, "max_position_embeddings", None) for model in models]
    if seq_len is not None and seq_len < 2:
        raise UserError(f"seq_len: expected at least 2 (an input and a target), found {seq_len}; e.g. --seq-len 512")
    return min((limit for limit in (*limits, seq_len) if limit), default=2048)


def _head(tokens: Tokens, limit: int) -> Tokens:
    """The first `limit` tokens, the last document cut where they end."""
    if limit < 2:
        raise UserError(f"max_tokens: expected at least 2 (an input and a target), found {limit}; e.g. 100000")
    tokens = tokens.head(limit)
    return tokens.pieces(tokens.offsets[:-1], np.minimum(tokens.offsets[1:], limit))


def _with_documents(batches: Iterable[EvalBatch]) -> Iterator[tuple[Batch, torch.Tensor]]:
    """Every batch with the number of each position's document, which is its segment where none is given."""
    segments = 0
    for item in batches:
        if isinstance(item, tuple):
            yield item
        else:
            documents, segments = _number_segments(item, segments)
            yield item, documents


def _number_segments(batch: Batch, start: int) -> tuple[torch.Tensor, int]:
    """(B, T) numbers from `start` that differ between all segments of a batch, and the next free number."""
    width = int(batch.segments.max()) + 1
    rows = torch.arange(batch.shape[0], device=batch.segments.device)[:, None]
    return start + rows * width + batch.segments, start + batch.shape[0] * width


def _accumulate(
    sources: list[ChosenLogits],
    against: bool,
    batch: Batch,
    documents: torch.Tensor,
    sums: dict[int, torch.Tensor],
    limit: int,
) -> int:
    """Add a batch's targets to the sums per document; returns how many there were."""
    rows, columns = batch.targets.nonzero(as_tuple=True)
    if rows.numel() == 0:
        return 0
    if not bool(columns.all()):
        raise ValueError("a batch counts the first position of a row as a target: nothing predicts it")
    for source in sources:
        source.run(batch)
    labels, numbers = batch.input_ids[rows, columns], documents[rows, columns]
    # Not the weight itself: under ZeRO-3 that is empty until the module runs.
    size = max(1, limit // sources[0].model.get_output_embeddings().out_features)
    for start in range(0, rows.numel(), size):
        chunk = slice(start, start + size)
        logits = [source.at(rows[chunk], columns[chunk] - 1) for source in sources]
        values = _per_token(logits[0], logits[-1] if against else None, labels[chunk])
        present, index = torch.unique(numbers[chunk].cpu(), return_inverse=True)
        added = torch.zeros(len(present), values.shape[1], dtype=torch.float64).index_add_(0, index, values)
        for number, row in zip(present.tolist(), added, strict=True):
            sums[number] = sums[number] + row if number in sums else row
    return rows.numel()


def _per_token(student: torch.Tensor, teacher: torch.Tensor | None, labels: torch.Tensor) -> torch.Tensor:
    """(n, 5) fp64 on the CPU: one, both losses, KL(teacher || student) and agreement of every target token."""
    values = torch.zeros(len(labels), 5, dtype=torch.float64)
    values[:, _TOKENS] = 1
    log_q = student.log_softmax(-1)
    values[:, _STUDENT] = -log_q.gather(-1, labels[:, None])[:, 0].cpu()
    if teacher is not None:
        if teacher.shape != student.shape:
            sizes = f"{student.shape[-1]} and {teacher.shape[-1]}"
            raise ValueError(f"student and teacher have vocabularies of different size: {sizes}")
        log_p = teacher.log_softmax(-1)
        values[:, _TEACHER] = -log_p.gather(-1, labels[:, None])[:, 0].cpu()
        values[:, _KL] = (log_p.exp() * (log_p - log_q)).sum(-1).cpu()
        values[:, _AGREE] = (student.argmax(-1) == teacher.argmax(-1)).cpu()
    return values


def clustered_mean(sums: torch.Tensor, tokens: torch.Tensor) -> tuple[float, float | None]:
    """Mean per token and its standard error with documents as clusters (formulas: see this module's top).

    Args:
        sums: (G,) fp64, the quantity summed over each document.
        tokens: (G,) fp64, counted tokens of each document.
    """
    mean = sums.sum() / tokens.sum()
    documents = len(tokens)
    if documents < 2:
        return float(mean), None
    spread = (sums - mean * tokens).square().sum() * documents / (documents - 1)
    return float(mean), float(spread.sqrt() / tokens.sum())


def _exponential(mean: float, stderr: float | None) -> tuple[float, float | None]:
    """exp of an estimate, and its standard error by the delta method."""
    value = math.exp(mean) if mean < 700 else math.inf
    return value, None if stderr is None else value * stderr


def _summary(sums: dict[int, torch.Tensor], against: bool) -> dict[str, Any]:
    if not sums:
        raise ValueError("no target token in the batches: nothing to measure")
    table = torch.stack([sums[number] for number in sorted(sums)])
    if not bool(table.isfinite().all()):
        worst = sorted(sums)[int((~table.isfinite()).any(-1).nonzero()[0, 0])]
        raise RunFailed(f"evaluation: a model's loss on document {worst} is not finite (its weights or logits are NaN)")
    tokens = table[:, _TOKENS]

    def named(name: str, column: torch.Tensor, exponential: bool = False) -> dict[str, Any]:
        value, stderr = clustered_mean(column, tokens)
        if exponential:
            value, stderr = _exponential(value, stderr)
        return {name: value, f"{name}_stderr": stderr}

    def model(column: int) -> dict[str, Any]:
        return {**named("perplexity", table[:, column], exponential=True), **named("loss", table[:, column])}

    result: dict[str, Any] = {"student": model(_STUDENT)}
    if against:
        result["teacher"] = model(_TEACHER)
        result |= named("perplexity_ratio", table[:, _STUDENT] - table[:, _TEACHER], exponential=True)
        result |= named("kl", table[:, _KL])
        result |= named("top1_agreement", table[:, _AGREE])
    return {**result, "tokens": int(tokens.sum()), "documents": len(tokens)}
