"""What a cache of k logits loses: its loss and gradient against those over the whole vocabulary, on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..distill.data.corpus import read_tokens
from ..distill.data.windows import eval_batches
from ..distill.logit_cache import sizes
from ..distill.teacher import load_model
from ..distill.topk_loss import TopK, outcomes, topk_terms
from ..eval.fidelity import check_same_vocabulary, clustered_mean
from ..eval.logits import ChosenLogits
from .teacher_config import locate

_CHUNK = 2**22  # logits of one model at once


@torch.no_grad()
def logit_errors(
    student: str,
    teacher: str,
    text: str,
    ks: Sequence[int],
    *,
    tokens: int = 20_000,
    seq_len: int = 512,
    batch: int = 8,
) -> dict[str, Any]:
    """How far the KL over k + 1 outcomes is from the KL over all tokens, for several k.

    With s_d the loss that is missed in document d and f_d its full KL, a share missed is Σ s_d / Σ f_d, and its
    standard error that of a ratio estimator clustered by document (`eval.fidelity`).

    Args:
        student: folder or Hub id.
        teacher: likewise, or `embedded`.
        text: held-out text, a local file.
        ks: tokens kept; those beyond the vocabulary are left out.
        tokens: of the text, at least.
        seq_len: window.
        batch: windows per forward pass.

    Returns:
        `kl` and `kl_stderr` in nats per token, `tokens`, `documents`, `vocab`, and `rows`: for every k `tail_mass`
        (mean, with `_stderr`), `missed` (share of the full KL, with `_stderr`), `gradient` (root mean square of the
        difference of the gradients by the logits over that of the full one) and `rounding` (share by which half
        precision changes the loss), and `bytes` per position in float16.

    Raises:
        UserError: a model or text that cannot be read, or vocabularies that differ.
    """
    models = [load_model(locate(name)) for name in (student, teacher)]
    check_same_vocabulary(student, teacher, *models)
    vocab = models[0][0].get_output_embeddings().weight.shape[0]
    wanted = [k for k in ks if k <= vocab]
    held = read_tokens(text, tokenizer=models[1][1]).head(tokens)
    window = min(seq_len, *(model.config.max_position_embeddings for model, _ in models))
    sums = torch.zeros(len(held), 2 + 3 * len(wanted), dtype=torch.float64)
    squares = torch.zeros(1 + len(wanted), dtype=torch.float64)
    sources: list[ChosenLogits] = []
    for part, documents in eval_batches(held, window, batch):
        sources = sources or [ChosenLogits(model, part) for model, _ in models]
        for source in sources:
            source.run(part)
        rows, columns = part.targets.nonzero(as_tuple=True)
        for chunk in torch.arange(len(rows)).split(max(1, _CHUNK // vocab)):
            z, y = (source.at(rows[chunk], columns[chunk] - 1) for source in sources)
            values, added = _per_token(z, y, wanted)
            sums.index_add_(0, documents[rows[chunk], columns[chunk]], values.double())
            squares += added
    sums = sums[sums[:, 0] > 0]
    count, full = sums[:, 0], sums[:, 1]
    kl, kl_stderr = clustered_mean(full, count)
    table = []
    for i, k in enumerate(wanted):
        tail, loss, half = (sums[:, 2 + 3 * i + j] for j in range(3))
        missed, stderr = clustered_mean(full - loss, full)
        mass, mass_stderr = clustered_mean(tail, count)
        table.append(
            {
                **{"k": k, "tail_mass": mass, "tail_mass_stderr": mass_stderr, "missed": missed},
                **{"missed_stderr": stderr, "gradient": float((squares[1 + i] / squares[0]).sqrt())},
                "rounding": float((half - loss).sum() / full.sum()),
                "bytes": sizes.position_bytes(k, "float16", vocab),
            }
        )
    found = {"kl": kl, "kl_stderr": kl_stderr, "tokens": int(count.sum()), "documents": len(sums), "vocab": vocab}
    return {**found, "rows": table}


def _per_token(z: Tensor, y: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(n, 2 + 3 per k): one, the full KL, and tail mass, loss and loss in half precision; squares of gradients."""
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    columns = [torch.ones(len(z)), (log_q.exp() * (log_q - log_p)).sum(-1)]
    whole = log_p.exp() - log_q.exp()
    squares = [whole.square().sum()]
    for k in ks:
        exact = outcomes(y, k)
        loss, grad = topk_terms(log_p.clone(), exact.normalised(z.dtype), True)
        assert grad is not None
        squares.append((grad - whole).square().sum())
        rounded = TopK(exact.ids, exact.log_probs.half(), exact.log_tail).normalised(z.dtype)
        columns += [exact.log_tail.exp(), loss, topk_terms(log_p.clone(), rounded, False)[0]]
    return torch.stack(columns, 1), torch.stack(squares).double()
