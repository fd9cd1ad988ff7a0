"""Scores of a whole vocabulary instead of one sampled token, from the last hidden states of student and teacher.

At a position, π is the student's distribution over tokens `a`, and `c(a) = clamp(log π_teacher(a) - log π(a))` the
clamped score that token `a` would have. Logits are formed for a few positions at a time, with both LM heads side by
side, and never for a batch. Ids that only one of the two vocabularies has carry no score: sums run over the common ones.

What is known of a teacher at a position is a row of *states*, and its *head* makes scores of them. An [`LMHead`] makes them
of hidden states; whatever else has its `on`, `scores` and `parameters` may stand in its place.

`N` is the number of positions, in any order; `H` and `H'` are the hidden sizes of student and teacher.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields

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

    def scores(
        self, states: torch.Tensor, log_probs: torch.Tensor, score_clip: float | None, ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        A teacher with this head beside a student, at `n` positions.

        Args:
            states (`torch.Tensor` of shape `(n, ...)`): What is known of the teacher; here its last hidden states `(n, H)`.
            log_probs (`torch.Tensor` of shape `(n, V)`): The student's of all tokens, in nats.
            score_clip (`float` or `None`): Bound of the clamp, in nats.
            ids (`torch.Tensor` of shape `(n,)`, *optional*): Sampled tokens, known to both.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: clamped scores `(n, V)`, or of the common ids alone, in memory of their
            own; and the teacher's log-probs `(n,)` of the sampled tokens.
        """
        teacher_log_probs = self.logits(states).log_softmax(-1)
        teacher_logps = None if ids is None else teacher_log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        num_common = min(log_probs.size(-1), teacher_log_probs.size(-1))
        scores = teacher_log_probs[:, :num_common].sub_(log_probs[:, :num_common])
        return scores if score_clip is None else scores.clamp_(-score_clip, score_clip), teacher_logps

    def coverage(self, states: torch.Tensor, log_probs: torch.Tensor, score_clip: float | None) -> torch.Tensor:
        """What [`~objective.likeliest.LikeliestTokens`] says of how much is looked at `(n, 3)`: NaN, since that is everything."""
        return log_probs.new_full((len(log_probs), 3), torch.nan)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """Weights that have to be whole for `on`."""
        return [weight for weight in (self.weight, self.bias) if weight is not None]

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
        entropy (`torch.Tensor`): The student's, `-Σ_a π(a) log π(a)`.
        known_mass (`torch.Tensor`): The student's probability of the tokens whose log-probs are known of the teacher.
        rest_clamped (`torch.Tensor`): 1 where the clamp of the others' common score is active, and else 0.
        overlap (`torch.Tensor`): Of as many likeliest tokens of the teacher's as are known, the share that are the student's. NaN,
            as are the two before, where all of the teacher's are known.
    """

    student_logps: torch.Tensor
    teacher_logps: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    foreign_mass: torch.Tensor
    entropy: torch.Tensor
    known_mass: torch.Tensor
    rest_clamped: torch.Tensor
    overlap: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> "Comparison":
        """From `(..., NUM_FIELDS)`, in the order of the fields."""
        return cls(*values.unbind(-1))


NUM_FIELDS = len(fields(Comparison))


def chunks(num_positions: int, device: torch.device) -> list[slice]:
    size = CHUNK_CPU if device.type == "cpu" else CHUNK
    return [slice(start, start + size) for start in range(0, num_positions, size)]


class Positions:
    """
    Both models at `n` positions, of which all tokens' log-probs and scores are held.

    Args:
        states (`torch.Tensor` of shape `(n, H)`): Last hidden states of the student.
        head ([`LMHead`]): The student's, on the device of the hidden states.
        teacher_states (`torch.Tensor` of shape `(n, ...)`): What is known of the teacher.
        teacher_head ([`LMHead`]): What makes scores of that.
        score_clip (`float` or `None`): Bound of the clamp, in nats.
        ids (`torch.Tensor` of shape `(n,)`, *optional*): Sampled tokens, known to both, where log-probs are asked for.

    Attributes:
        logits, probs (`torch.Tensor` of shape `(n, V)`): The student's.
        scores (`torch.Tensor` of shape `(n, C)`): Clamped, of the `C` common ids.
        common (`torch.Tensor` of shape `(n, C)`): The student's probabilities of these.
        logps, teacher_logps (`torch.Tensor` of shape `(n,)` or `None`): Log-probs of the sampled tokens.
    """

    def __init__(
        self,
        states: torch.Tensor,
        head: LMHead,
        teacher_states: torch.Tensor,
        teacher_head: LMHead,
        score_clip: float | None,
        ids: torch.Tensor | None = None,
    ):
        self.logits = head.logits(states)
        log_probs = self.logits.log_softmax(-1)
        self.scores, self.teacher_logps = teacher_head.scores(teacher_states, log_probs, score_clip, ids)
        self.logps, self.coverage = None, None
        if ids is not None:
            self.logps = log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
            self.coverage = teacher_head.coverage(teacher_states, log_probs, score_clip)
        self.log_normalizer = self.logits[:, 0] - log_probs[:, 0]
        self.probs = log_probs.exp_()
        self.common = self.probs[:, : self.scores.size(-1)]

    def mean(self) -> torch.Tensor:
        """`(n,)` expected scores."""
        return torch.linalg.vecdot(self.common, self.scores)

    def comparison(self, mean: torch.Tensor) -> torch.Tensor:
        """`(n, NUM_FIELDS)` fields of a [`Comparison`]; leaves in `scores` the scores less their `mean`."""
        centred = self.scores.sub_(mean.unsqueeze(-1))
        variance = torch.linalg.vecdot(self.common, centred.square())
        foreign_mass = self.probs[:, centred.size(-1) :].sum(-1)
        entropy = self.log_normalizer - torch.linalg.vecdot(self.probs, self.logits)
        found = torch.stack([self.logps, self.teacher_logps, mean, variance, foreign_mass, entropy], dim=-1)
        return torch.cat([found, self.coverage], dim=-1)


@torch.no_grad()
def compare_distributions(
    hidden: torch.Tensor,
    head: LMHead,
    teacher_states: torch.Tensor,
    teacher_head: LMHead,
    ids: torch.Tensor,
    score_clip: float | None,
) -> Comparison:
    """
    Compare two models at the same positions.

    Args:
        hidden (`torch.Tensor` of shape `(N, H)`): Last hidden states of the student.
        head ([`LMHead`]): The student's, on the device of the hidden states.
        teacher_states (`torch.Tensor` of shape `(N, ...)`): What is known of the teacher.
        teacher_head ([`LMHead`]): What makes scores of that.
        ids (`torch.Tensor` of shape `(N,)`): Sampled tokens, known to both.
        score_clip (`float` or `None`): Bound of the clamp, in nats.

    Returns:
        [`Comparison`]
    """
    parts = [torch.zeros(0, NUM_FIELDS, device=hidden.device)]
    for chunk in chunks(len(ids), hidden.device):
        here = Positions(hidden[chunk], head, teacher_states[chunk], teacher_head, score_clip, ids[chunk])
        parts.append(here.comparison(here.mean()))
    return Comparison.of(torch.cat(parts))


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


def gradients_through_heads(
    needed: tuple[bool, ...],
    leaves: tuple[torch.Tensor | None, ...],
    head: LMHead,
    teacher_states: torch.Tensor,
    teacher_head: LMHead,
    score_clip: float | None,
    dtype: torch.dtype,
    gather: Callable[[], AbstractContextManager],
    of_logits: Callable[[Positions, slice], torch.Tensor],
    ids: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """
    Gradients of what an LM head multiplies, summed up a few positions at a time.

    Args:
        needed (`tuple[bool, bool, bool]`): Which are asked for: those of hidden states, weight and bias.
        leaves (`tuple[torch.Tensor | None, ...]`): The three.
        head ([`LMHead`]), teacher_states (`torch.Tensor`), teacher_head ([`LMHead`]), score_clip (`float` or `None`),
            ids (`torch.Tensor`, *optional*): See [`Positions`]; of all `N` positions.
        dtype (`torch.dtype`): Sums are in it.
        gather (`Callable`): Context in which both heads' weights are whole.
        of_logits (`Callable`): `of_logits(here, chunk)` gives the gradient `(n, V)` of the logits of a chunk, which may be in
            memory of `here`.
    """
    hidden = leaves[0]
    with gather():
        of_hidden, of_weight, of_bias = sums = [
            torch.zeros(leaf.shape, device=leaf.device, dtype=dtype) if needs else None
            for leaf, needs in zip(leaves, needed, strict=True)
        ]
        head, teacher_head = head.on(hidden.device), teacher_head.on(hidden.device)
        for chunk in chunks(len(hidden), hidden.device):
            states = hidden[chunk].to(head.dtype)
            sampled = None if ids is None else ids[chunk]
            here = Positions(states, head, teacher_states[chunk], teacher_head, score_clip, sampled)
            of_projection = head.projection_gradient(of_logits(here, chunk), here.logits).to(head.dtype)
            if of_hidden is not None:
                of_hidden[chunk] = of_projection @ head.weight
            if of_weight is not None:
                add_product(of_weight, of_projection.T, states)
            if of_bias is not None:
                of_bias += of_projection.sum(0)
    return [None if found is None else found.to(leaf.dtype) for found, leaf in zip(sums, leaves, strict=True)]


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
        teacher_states: torch.Tensor,  # (N, ...)
        teacher_head: LMHead,
        score_clip: float | None,
        weighting: Weighting,
        gather: Callable[[], AbstractContextManager],
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, teacher_states)
        ctx.constants = head, teacher_head, score_clip, weighting, gather
        return torch.zeros(len(hidden), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        *leaves, teacher_states = ctx.saved_tensors
        head, teacher_head, score_clip, weighting, gather = ctx.constants

        def of_logits(here, chunk):
            advantages = weighting(here.scores, here.common, chunk)
            expected = torch.linalg.vecdot(here.common, advantages).unsqueeze(-1)
            # d/dz_a of Σ_b π(b) A(b) log π(b), with π(b) A(b) constant: π(a) (A(a) - Σ_b π(b) A(b))
            found = here.probs.mul_(gradient[chunk].unsqueeze(-1))
            found[:, : advantages.size(-1)].mul_(advantages.sub_(expected))
            found[:, advantages.size(-1) :].mul_(-expected)
            return found

        teacher = (teacher_states, teacher_head, score_clip)
        gradients = gradients_through_heads(
            ctx.needs_input_grad[:3], leaves, head, *teacher, gradient.dtype, gather, of_logits
        )
        return *gradients, *[None] * 6


class ComparedInBackward(torch.autograd.Function):
    """
    Zero at each of `N` positions, with the gradient of the student's scores before they are scaled, each less the expected
    score of its position: of all tokens, `Σ_a π(a) (c(a) - mean) ∇log π(a)`, or of the sampled one, `(c - mean) ∇log π`.

    The backward pass compares the two models at the same time, so that their heads are applied once: it writes the fields of
    a [`Comparison`] into `found` `(N, NUM_FIELDS)`. Ids that the teacher does not have are not provided for: there may be none.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,  # (N, H)
        weight: torch.Tensor,  # (V, H), of the head
        bias: torch.Tensor | None,  # (V,)
        head: LMHead,
        teacher_states: torch.Tensor,  # (N, ...)
        teacher_head: LMHead,
        ids: torch.Tensor,  # (N,)
        score_clip: float | None,
        of_all_tokens: bool,
        found: torch.Tensor,  # (N, NUM_FIELDS)
        gather: Callable[[], AbstractContextManager],
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden, weight, bias, teacher_states, ids)
        ctx.constants = head, teacher_head, score_clip, of_all_tokens, found, gather
        return torch.zeros(len(hidden), device=hidden.device, dtype=torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        *leaves, teacher_states, ids = ctx.saved_tensors
        head, teacher_head, score_clip, of_all_tokens, found, gather = ctx.constants

        def of_logits(here, chunk):
            found[chunk] = here.comparison(here.mean())
            weights, sampled = gradient[chunk].unsqueeze(-1), ids[chunk].unsqueeze(-1)
            if of_all_tokens:
                return here.probs.mul_(here.scores).mul_(weights)
            # d log π(s) / dz_a = 1[a = s] - π(a)
            weights = weights * here.scores.gather(-1, sampled)
            return here.probs.mul_(-weights).scatter_add_(-1, sampled, weights)

        teacher = (teacher_states, teacher_head, score_clip)
        gradients = gradients_through_heads(
            ctx.needs_input_grad[:3], leaves, head, *teacher, gradient.dtype, gather, of_logits, ids
        )
        return *gradients, *[None] * 8
