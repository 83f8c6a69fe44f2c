"""The teacher's prediction as k + 1 outcomes, its k likeliest tokens and "any other", and the KL over them.

With q the teacher's probabilities and p the student's, K the k tokens, q_t and p_t what is left of each (the tail):

    L = Σ_{i in K} q_i (log q_i - log p_i) + q_t (log q_t - log p_t)

is the forward KL of the two distributions after all tokens outside K are made one outcome. The chain rule of the KL
says what is lost by that:

    KL(q || p) = L + q_t KL(q given "not in K" || p given "not in K")

so L is a lower bound, exact for k = vocabulary, and the error is the tail's own KL times its mass. The gradient
with respect to the student's logits z, where p = softmax(z), is

    dL/dz_j = p_j - q_j               for j in K
    dL/dz_j = p_j - q_t p_j / p_t     for all others

that is p - r with r the teacher's prediction whose tail is spread as the student's own. Logits enter divided by the
temperature τ and the loss is multiplied by τ² (Hinton et al., arXiv 1503.02531), which makes the gradient τ (p - r).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TopK:
    """What a teacher predicts at n positions.

    Attributes:
        ids: (n, k) integer, the k likeliest tokens; each at most once in a row.
        log_probs: (n, k) natural logarithms of their probabilities.
        log_tail: (n,) of the probability of all other tokens together; -inf where k is the vocabulary.
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor

    def __len__(self) -> int:
        """Positions."""
        return self.ids.shape[0]

    def rows(self, rows: slice) -> TopK:
        """Those positions."""
        return TopK(self.ids[rows], self.log_probs[rows], self.log_tail[rows])

    def to(self, device: torch.device | str) -> TopK:
        """The same on `device`."""
        return TopK(self.ids.to(device), self.log_probs.to(device), self.log_tail.to(device))

    def normalised(self, dtype: torch.dtype) -> TopK:
        """int64 and `dtype`, the probabilities of the k + 1 outcomes summing to one: half precision rounds them."""
        every = torch.cat([self.log_probs.to(dtype), self.log_tail.to(dtype)[:, None]], 1).log_softmax(1)
        return TopK(self.ids.to(torch.int64), every[:, :-1], every[:, -1])


def outcomes(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The k + 1 outcomes of logits.

    The tail is the logarithm of a sum over the other tokens, never one minus the sum over the k.

    Args:
        logits: (n, V), as the model gives them, in the dtype to compute in.
        k: at most V.
        temperature: τ.
    """
    log_q = torch.log_softmax(logits / temperature, -1)
    log_probs, ids = log_q.topk(k, -1)
    return TopK(ids, log_probs, log_q.scatter(1, ids, -torch.inf).logsumexp(-1))


def topk_terms(log_p: Tensor, teacher: TopK, with_grad: bool) -> tuple[Tensor, Tensor | None]:
    """(n,) L at every position, and its gradient p - r with respect to the logits that `log_p` is the softmax of.

    Nothing overflows or becomes NaN where a tail is empty or the student gives it next to nothing: both parts of its
    gradient are exponentials of something negative.

    Args:
        log_p: (n, V) the student's log-probabilities; overwritten.
        teacher: of the n positions, `normalised` to the dtype of `log_p`.
        with_grad: the gradient is wanted.
    """
    chosen = log_p.gather(1, teacher.ids)
    others = log_p.scatter_(1, teacher.ids, -torch.inf)
    log_tail = others.logsumexp(-1)
    q, q_tail = teacher.log_probs.exp(), teacher.log_tail.exp()
    # An outcome that the teacher gives no probability adds nothing, whatever the student gives it.
    known = torch.where(q > 0, q * (teacher.log_probs - chosen), 0.0).sum(-1)
    tail = torch.where(q_tail > 0, q_tail * (teacher.log_tail - log_tail), 0.0)
    if not with_grad:
        return known + tail, None
    shift = torch.where(q_tail > 0, log_tail - teacher.log_tail, torch.inf)
    grad = others.exp()
    grad.sub_(others.sub_(shift[:, None]).exp_())
    grad.scatter_(1, teacher.ids, chosen.exp().sub_(q))
    return known + tail, grad
