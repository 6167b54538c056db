"""The losses over a vocabulary on a GPU: one kernel for a chunk of logits, which it replaces by their gradient.

A program takes one row. It reads the logits of student and teacher once for their log Σ exp, with a running maximum
(arXiv:1805.02867), and once more for the losses and the gradient. Each number of the gradient of reverse KL and
Jensen-Shannon divergence contains a sum over the row: they read the logits three times. The plain form is
`losses.Terms`.

liger-kernel 0.8.5 has no such loss: its kernels for distillation take no bias and no cross-entropy, and its compiled
losses, which do, have one mask for both terms and hold several float32 copies of a chunk.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _added(top, total, x):
    """The running maximum and Σ exp(x - maximum), with one more block of x."""
    higher = tl.maximum(top, tl.max(x, 0))
    return higher, total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)


@triton.jit
def _log_probabilities(logits, word, words, cold, log_sum):
    """log p of a block of words, and p, which is 0 past the last word."""
    log_p = tl.load(logits + word, mask=word < words, other=0.0).to(tl.float32) * cold - log_sum
    return log_p, tl.where(word < words, tl.exp(log_p), 0.0)


@triton.jit
def _log_mean(log_q, log_p):
    """log of (p + q) / 2."""
    return tl.maximum(log_q, log_p) + tl.log(0.5 + 0.5 * tl.exp(-tl.abs(log_q - log_p)))


@triton.jit
def _losses(
    student, teacher, following, matched, counted, factors, found, rows, words, temperature,
    OBJECTIVE: tl.constexpr, ENTROPY: tl.constexpr, HOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The losses of a row into `found` (term, row), the gradient of Σ factor · loss in place of the student's logits.

    HOT: the divergence's temperature is not 1, so that its softmax is not that of the cross-entropy.
    """
    ENTROPY_TERM: tl.constexpr = 0 if OBJECTIVE == "none" else 1
    row, cold = tl.program_id(0), 1.0 / temperature
    student += row.to(tl.int64) * words
    if OBJECTIVE != "none":
        teacher += row.to(tl.int64) * words
    if ENTROPY:
        target = tl.load(following + row)
        logit = tl.load(student + target).to(tl.float32)

    top_q, top_p, top = -3.4e38, -3.4e38, -3.4e38
    total_q, total_p, total = 0.0, 0.0, 0.0
    for start in range(0, words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        z = tl.load(student + word, mask=word < words, other=float("-inf")).to(tl.float32)
        top_q, total_q = _added(top_q, total_q, z * cold)
        if ENTROPY and HOT:
            top, total = _added(top, total, z)
        if OBJECTIVE != "none":
            t = tl.load(teacher + word, mask=word < words, other=float("-inf")).to(tl.float32)
            top_p, total_p = _added(top_p, total_p, t * cold)
    sum_q = top_q + tl.log(total_q)
    sum_p = sum_q
    if OBJECTIVE != "none":
        sum_p = top_p + tl.log(total_p)
    log_sum = sum_q
    if ENTROPY and HOT:
        log_sum = top + tl.log(total)

    divergence, centre = 0.0, 0.0  # the divergence of the row, and Σ q g of its gradient q ⊙ (g - Σ q g)
    if OBJECTIVE == "reverse_kl" or OBJECTIVE == "jensen_shannon":
        for start in range(0, words, BLOCK):
            word = start + tl.arange(0, BLOCK)
            log_q, q = _log_probabilities(student, word, words, cold, sum_q)
            log_p, p = _log_probabilities(teacher, word, words, cold, sum_p)
            if OBJECTIVE == "reverse_kl":
                centre += tl.sum(q * (log_q - log_p), 0)
                divergence = centre
            else:
                log_m = _log_mean(log_q, log_p)
                centre += tl.sum(q * (log_q - log_m), 0) / 2
                divergence += tl.sum(q * (log_q - log_m) + p * (log_p - log_m), 0) / 2

    tl.debug_barrier()  # `logit` is read before another thread writes there
    of_divergence, of_entropy = 0.0, 0.0
    if OBJECTIVE != "none":
        of_divergence = tl.load(factors) * tl.load(matched + row) * temperature  # T² for the loss, 1 / T for its slope
    if ENTROPY:
        of_entropy = tl.load(factors + ENTROPY_TERM) * tl.load(counted + row)
    for start in range(0, words, BLOCK):
        word = start + tl.arange(0, BLOCK)
        log_q, q = _log_probabilities(student, word, words, cold, sum_q)
        slope = tl.zeros((BLOCK,), tl.float32)
        if OBJECTIVE != "none":
            log_p, p = _log_probabilities(teacher, word, words, cold, sum_p)
            if OBJECTIVE == "forward_kl":
                divergence += tl.sum(p * (log_p - log_q), 0)
                slope = q - p
            elif OBJECTIVE == "reverse_kl":
                slope = q * (log_q - log_p - centre)
            else:
                slope = q * ((log_q - _log_mean(log_q, log_p)) / 2 - centre)
            slope *= of_divergence
        if ENTROPY:
            if HOT:
                log_q, q = _log_probabilities(student, word, words, 1.0, log_sum)
            slope += of_entropy * (q - tl.where(word == target, 1.0, 0.0))
        tl.store(student + word, slope.to(student.dtype.element_ty), mask=word < words)

    if OBJECTIVE != "none":
        tl.store(found + row, tl.load(matched + row) * temperature * temperature * divergence)
    if ENTROPY:
        tl.store(found + ENTROPY_TERM * rows + row, tl.load(counted + row) * (log_sum - logit))


def losses_and_slope_(
    student: Tensor,  # (row, vocabulary); replaced by the gradient
    teacher: Tensor | None,  # (row, vocabulary)
    following: Tensor | None,  # (row)
    matched: Tensor | None,  # (row), the weights of the divergence
    counted: Tensor | None,  # (row), those of the cross-entropy
    factors: Tensor,  # (term)
    objective: str,
    temperature: float,
) -> Tensor:  # (term, row)
    """The weighted divergence and cross-entropy of each row; the gradient of Σ factor · loss replaces `student`."""
    found = torch.empty(len(factors), len(student), dtype=torch.float32, device=student.device)
    with torch.cuda.device_of(student):
        _losses[(len(student),)](
            *(student, teacher, following, matched, counted, factors, found, *student.shape, temperature),
            OBJECTIVE="none" if teacher is None else objective,
            ENTROPY=counted is not None,
            HOT=temperature != 1,
            BLOCK=4096,  # words at a time, 16 for each thread
            num_warps=8,
        )
    return found
