"""Scores of a whole vocabulary instead of one sampled token, from the last hidden states of student and teacher.

At a position, π is the student's distribution over tokens `a`, and `c(a) = clamp(log π_teacher(a) - log π(a))` the
clamped score that token `a` would have. Logits are formed for a few positions at a time, with both LM heads side by
side, and never for a batch. Ids that only one of the two vocabularies has carry no score: sums run over the common ones.

`N` is the number of positions, in any order; `H` and `H'` are the hidden sizes of student and teacher.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor


# Positions of which both models' logits are held at once. On CPUs so few that they stay in the cache.
CHUNK, CHUNK_CPU = 256, 128


@dataclass
class LMHead:
    """
    What turns hidden states into log-probs: `log_softmax(softcap(hidden @ weight.T + bias) / temperature)`.

    Attributes:
        weight (`torch.Tensor` of shape `(V, H)`): Projection.
        bias (`torch.Tensor` of shape `(V,)` or `None`): Added to the logits.
        dtype (`torch.dtype`): The projection computes in it; all that follows in float32, or in float64 if it is that.
        temperature (`float`): Logits are divided by it.
        softcap (`float` or `None`): Logits are `softcap * tanh(logits / softcap)`, before the temperature.
        scale (`float`): Logits are multiplied by it, before the cap.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype
    temperature: float = 1.0
    softcap: float | None = None
    scale: float = 1.0

    def on(self, device: torch.device) -> "LMHead":
        """This head with whole weights on a device, in the dtype that it computes in; all processes that share them ask."""
        weight, bias = (x.full_tensor() if isinstance(x, DTensor) else x for x in (self.weight, self.bias))
        weight, bias = (None if x is None else x.detach().to(device, self.dtype) for x in (weight, bias))
        return LMHead(weight, bias, self.dtype, self.temperature, self.softcap, self.scale)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits `(n, V)` of hidden states `(n, H)`, divided by the temperature."""
        logits = torch.nn.functional.linear(hidden.to(self.dtype), self.weight, self.bias)
        logits = logits.to(torch.promote_types(self.dtype, torch.float32))
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.temperature == 1.0 else logits.div_(self.temperature)

    def projection_gradient(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """From the gradient with respect to [`logits`] to that with respect to the projection; changes both in place."""
        if self.softcap is not None:
            gradient.mul_(logits.mul_(self.temperature / self.softcap).square_().neg_().add_(1))
        factor = self.scale / self.temperature
        return gradient if factor == 1.0 else gradient.mul_(factor)


@dataclass
class Comparison:
    """
    Student and teacher at `N` positions, tensors of shape `(N,)` without gradient, in nats.

    Attributes:
        student_logps (`torch.Tensor`): Log-probs of the sampled tokens under the student.
        teacher_logps (`torch.Tensor`): The same under the teacher.
        mean (`torch.Tensor`): `Σ_a π(a) c(a)`, the expected clamped score; without a clamp, minus the reverse KL.
        variance (`torch.Tensor`): `Σ_a π(a) (c(a) - mean)²`.
        foreign_mass (`torch.Tensor`): The student's probability of ids that the teacher does not have.
    """

    student_logps: torch.Tensor
    teacher_logps: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    foreign_mass: torch.Tensor


def chunks(num_positions: int, device: torch.device) -> list[slice]:
    size = CHUNK_CPU if device.type == "cpu" else CHUNK
    return [slice(start, start + size) for start in range(0, num_positions, size)]


def clamped_scores(log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, score_clip: float | None) -> torch.Tensor:
    """`(n, min(V, V'))` clamped scores of the common ids, in the memory of `teacher_log_probs`."""
    num_common = min(log_probs.size(-1), teacher_log_probs.size(-1))
    scores = teacher_log_probs[:, :num_common].sub_(log_probs[:, :num_common])
    return scores if score_clip is None else scores.clamp_(-score_clip, score_clip)


@torch.no_grad()
def compare_distributions(
    hidden: torch.Tensor,
    head: LMHead,
    teacher_hidden: torch.Tensor,
    teacher_head: LMHead,
    ids: torch.Tensor,
    score_clip: float | None,
) -> Comparison:
    """
    Compare two models at the same positions.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`): Last hidden states of the student.
        head ([`LMHead`]): The student's, on the device of the hidden states.
        teacher_hidden (`torch.Tensor` of shape `(N, H')`): Last hidden states of the teacher.
        teacher_head ([`LMHead`]): The teacher's.
        ids (`torch.Tensor` of shape `(N,)`): Sampled tokens, known to both.
        score_clip (`float` or `None`): Bound of the clamp, in nats.

    Returns:
        [`Comparison`]
    """
    parts = []
    for chunk in chunks(len(ids), hidden.device):
        log_probs = head.logits(hidden[chunk]).log_softmax(-1)
        teacher_log_probs = teacher_head.logits(teacher_hidden[chunk]).log_softmax(-1)
        sampled = ids[chunk].unsqueeze(-1)
        logps, teacher_logps = log_probs.gather(-1, sampled), teacher_log_probs.gather(-1, sampled)
        scores = clamped_scores(log_probs, teacher_log_probs, score_clip)
        probs = log_probs.exp_()
        foreign_mass = probs[:, scores.size(-1) :].sum(-1, keepdim=True)
        probs = probs[:, : scores.size(-1)]
        mean = torch.linalg.vecdot(probs, scores).unsqueeze(-1)
        variance = torch.linalg.vecdot(probs, scores.sub_(mean).square_()).unsqueeze(-1)
        parts.append(torch.cat([logps, teacher_logps, mean, variance, foreign_mass], dim=-1))
    parts = parts or [torch.zeros(0, 5, device=hidden.device)]
    return Comparison(*torch.cat(parts).unbind(-1))


@dataclass(frozen=True)
class Weighting:
    """
    From clamped scores to the advantages of all tokens at a position, `(c(a) - shift) / std`, and which of them count.

    Attributes:
        scale (`torch.Tensor` of shape `(N,)`): `1 / std`, of each position; 0 leaves a position out.
        shift (`torch.Tensor` of shape `(N,)` or `None`): Subtracted from the scores; `None` subtracts their expectation
            at the position.
        keeps_positive (`torch.Tensor` of shape `(N,)` or `None`): True where tokens with a positive advantage count;
            `None`: everywhere.
        keeps_negative (`torch.Tensor` of shape `(N,)` or `None`): The same for the others.
    """

    scale: torch.Tensor
    shift: torch.Tensor | None
    keeps_positive: torch.Tensor | None = None
    keeps_negative: torch.Tensor | None = None

    def __call__(self, scores: torch.Tensor, probs: torch.Tensor, chunk: slice) -> torch.Tensor:
        """Advantages `(n, V)` of the scores `(n, V)` of a chunk, in their memory."""
        shift = torch.linalg.vecdot(probs, scores) if self.shift is None else self.shift[chunk]
        advantages = scores.sub_(shift.unsqueeze(-1)).mul_(self.scale[chunk].unsqueeze(-1))
        if self.keeps_positive is not None:
            keeps = torch.where(advantages > 0, self.keeps_positive[chunk, None], self.keeps_negative[chunk, None])
            advantages.mul_(keeps)
        return advantages


def add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """`total += left @ right`, without rounding the product to the dtype of its factors first."""
    if total.device.type == "cuda" and left.dtype in (torch.float16, torch.bfloat16):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype))


class ExpectedAdvantage(torch.autograd.Function):
    """
    Zero at each of `N` positions, with the gradient `Σ_a π(a) A(a) ∇log π(a)` of the student's expected advantage, in
    which `A(a)`, a [`Weighting`] of the clamped scores, is a constant.

    Logits are formed in the backward pass alone. `gather` is a context in which both heads' weights are whole, for
    weights that are sharded.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,  # (N, H)
        weight: torch.Tensor,  # (V, H), of the head
        bias: torch.Tensor | None,  # (V,)
        head: LMHead,
        teacher_hidden: torch.Tensor,  # (N, H')
        teacher_head: LMHead,
        score_clip: float | None,
        weighting: Weighting,
        gather: Callable[[], AbstractContextManager],
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, teacher_hidden)
        ctx.constants = head, teacher_head, score_clip, weighting, gather
        return torch.zeros(len(hidden), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        hidden, weight, bias, teacher_hidden = ctx.saved_tensors
        head, teacher_head, score_clip, weighting, gather = ctx.constants
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        with gather():
            shapes = (hidden.shape, weight.shape, None if bias is None else bias.shape)
            needed = (needs_hidden, needs_weight, needs_bias)
            of_hidden, of_weight, of_bias = (
                torch.zeros(shape, device=hidden.device, dtype=gradient.dtype) if needs else None
                for shape, needs in zip(shapes, needed, strict=True)
            )
            head, teacher_head = head.on(hidden.device), teacher_head.on(hidden.device)
            for chunk in chunks(len(hidden), hidden.device):
                states = hidden[chunk].to(head.dtype)
                logits = head.logits(states)
                log_probs = logits.log_softmax(-1)
                teacher_log_probs = teacher_head.logits(teacher_hidden[chunk]).log_softmax(-1)
                scores = clamped_scores(log_probs, teacher_log_probs, score_clip)
                probs = log_probs.exp_()
                common = probs[:, : scores.size(-1)]
                advantages = weighting(scores, common, chunk)
                expected = torch.linalg.vecdot(common, advantages).unsqueeze(-1)
                # d/dz_a of Σ_b π(b) A(b) log π(b), with π(b) A(b) constant: π(a) (A(a) - Σ_b π(b) A(b))
                of_logits = probs.mul_(gradient[chunk].unsqueeze(-1))
                of_logits[:, : scores.size(-1)].mul_(advantages.sub_(expected))
                of_logits[:, scores.size(-1) :].mul_(-expected)
                of_projection = head.projection_gradient(of_logits, logits).to(head.dtype)
                if needs_hidden:
                    of_hidden[chunk] = of_projection @ head.weight
                if needs_weight:
                    add_product(of_weight, of_projection.T, states)
                if needs_bias:
                    of_bias += of_projection.sum(0)
        pairs = zip((of_hidden, of_weight, of_bias), (hidden, weight, bias), strict=True)
        return *(None if found is None else found.to(of.dtype) for found, of in pairs), *[None] * 6
