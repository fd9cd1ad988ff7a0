"""Sums over the vocabulary from hidden states, against the same sums over logits."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gndpo_trl.objective import distributions
from gndpo_trl.objective.advantages import Population, merge_moments, row_moments
from gndpo_trl.objective.distributions import (
    NUM_FIELDS,
    ComparedInBackward,
    Comparison,
    ExpectedAdvantage,
    LMHead,
    Weighting,
    compare_distributions,
)


POSITIONS = 7


def build(vocab_size: int, width: int, seed: int, dtype: torch.dtype = torch.float64, **options):
    """Hidden states, and a head for them."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias, hidden = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((vocab_size, width), (vocab_size,), (POSITIONS, width))
    )
    return hidden, LMHead(weight, bias, dtype, **options)


def log_probs(hidden: torch.Tensor, head: LMHead) -> torch.Tensor:
    logits = (hidden @ head.weight.T + head.bias) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return (logits / head.temperature).log_softmax(-1)


def probs_and_scores(hidden, head, teacher_hidden, teacher_head, score_clip):
    ours, theirs = log_probs(hidden, head), log_probs(teacher_hidden, teacher_head)
    common = min(ours.size(-1), theirs.size(-1))
    scores = theirs[:, :common] - ours[:, :common]
    return ours[:, :common].exp(), scores if score_clip is None else scores.clamp(-score_clip, score_clip)


HEADS = {
    "plain": ({}, {}),
    "another temperature": ({"temperature": 0.7}, {}),
    "scaled and capped": ({"softcap": 3.0, "scale": 0.5, "temperature": 1.3}, {"softcap": 5.0, "scale": 2.0}),
}


@pytest.mark.parametrize("sizes", [(20, 20), (20, 23), (23, 20)])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("score_clip", [None, 0.8])
def test_a_comparison_is_that_of_full_logits(monkeypatch, sizes, options, score_clip):
    monkeypatch.setattr(distributions, "CHUNK_CPU", 3)  # the last chunk is smaller
    hidden, head = build(sizes[0], 5, seed=0, **options[0])
    teacher_hidden, teacher_head = build(sizes[1], 6, seed=1, **options[1])
    ids = torch.arange(POSITIONS)
    found = compare_distributions(hidden, head, teacher_hidden, teacher_head, ids, score_clip)
    probs, scores = probs_and_scores(hidden, head, teacher_hidden, teacher_head, score_clip)
    mean = (probs * scores).sum(-1)
    expected = Comparison(
        student_logps=log_probs(hidden, head)[range(POSITIONS), ids],
        teacher_logps=log_probs(teacher_hidden, teacher_head)[range(POSITIONS), ids],
        mean=mean,
        variance=(probs * (scores - mean.unsqueeze(-1)).square()).sum(-1),
        foreign_mass=1 - probs.sum(-1),
        entropy=torch.distributions.Categorical(logits=log_probs(hidden, head)).entropy(),
        **dict.fromkeys(("known_mass", "rest_clamped", "overlap"), torch.full((POSITIONS,), torch.nan).double()),
    )
    for name, values in vars(expected).items():
        torch.testing.assert_close(vars(found)[name], values, rtol=0, atol=1e-12, equal_nan=True, msg=name)


@pytest.mark.parametrize("sizes", [(20, 20), (20, 23), (23, 20)])
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("shifted", [True, False])
@pytest.mark.parametrize("is_clipped", [True, False])
def test_the_gradient_is_that_of_full_logits(monkeypatch, sizes, options, shifted, is_clipped):
    monkeypatch.setattr(distributions, "CHUNK_CPU", 3)
    hidden, head = build(sizes[0], 5, seed=0, **options[0])
    teacher_hidden, teacher_head = build(sizes[1], 6, seed=1, **options[1])
    leaves = [tensor.requires_grad_() for tensor in (hidden, head.weight, head.bias)]
    scale, shift, upstream = torch.rand(3, POSITIONS, dtype=torch.float64)
    keeps = torch.rand(2, POSITIONS) > 0.5 if is_clipped else (None, None)
    weighting = Weighting(scale, shift if shifted else None, *keeps)

    probs, scores = (x.detach() for x in probs_and_scores(hidden, head, teacher_hidden, teacher_head, 0.8))
    shift = shift.unsqueeze(-1) if shifted else (probs * scores).sum(-1, keepdim=True)
    advantages = (scores - shift) * scale.unsqueeze(-1)
    if is_clipped:
        dropped = torch.where(
            advantages > 0, ~weighting.keeps_positive.unsqueeze(-1), ~weighting.keeps_negative.unsqueeze(-1)
        )
        advantages = advantages.masked_fill(dropped, 0.0)
    contribution = (probs * advantages * log_probs(hidden, head)[:, : probs.size(-1)]).sum(-1)
    expected = torch.autograd.grad(contribution @ upstream, leaves)

    found = ExpectedAdvantage.apply(*leaves, head, teacher_hidden, teacher_head, 0.8, weighting, nullcontext)
    assert not found.any()
    for gradient, value in zip(torch.autograd.grad(found @ upstream, leaves), expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("of_all_tokens", [True, False], ids=["all tokens", "the sampled one"])
def test_a_backward_pass_that_compares_gives_the_gradient_and_the_comparison(monkeypatch, options, of_all_tokens):
    monkeypatch.setattr(distributions, "CHUNK_CPU", 3)
    hidden, head = build(20, 5, seed=0, **options[0])
    teacher_hidden, teacher_head = build(23, 6, seed=1, **options[1])
    leaves = [x.requires_grad_() for x in (hidden, head.weight, head.bias)]
    upstream, ids = torch.linspace(-1, 2, POSITIONS, dtype=torch.float64), torch.arange(POSITIONS)
    probs, scores = (x.detach() for x in probs_and_scores(hidden, head, teacher_hidden, teacher_head, 0.8))
    scores = scores - (probs * scores).sum(-1, keepdim=True)
    weights = probs * scores if of_all_tokens else torch.nn.functional.one_hot(ids, 20) * scores
    expected = torch.autograd.grad((weights * log_probs(hidden, head)).sum(-1) @ upstream, leaves)

    found = torch.full((POSITIONS, NUM_FIELDS), torch.nan, dtype=torch.float64)
    values = ComparedInBackward.apply(
        *leaves, head, teacher_hidden, teacher_head, ids, 0.8, of_all_tokens, found, nullcontext
    )
    assert not values.any()
    for gradient, value in zip(torch.autograd.grad(values @ upstream, leaves), expected, strict=True):
        torch.testing.assert_close(gradient, value, rtol=0, atol=1e-12)
    compared = compare_distributions(hidden, head, teacher_hidden, teacher_head, ids, 0.8)
    for name, values in vars(compared).items():
        torch.testing.assert_close(
            vars(Comparison.of(found))[name], values, rtol=0, atol=1e-12, equal_nan=True, msg=name
        )


def test_without_clamp_and_normalization_it_is_the_reverse_kl():
    hidden, head = build(20, 5, seed=0)
    teacher_hidden, teacher_head = build(20, 6, seed=1)
    hidden.requires_grad_()
    ours, theirs = log_probs(hidden, head), log_probs(teacher_hidden, teacher_head)
    (expected,) = torch.autograd.grad((ours.exp() * (ours - theirs)).sum(), hidden)
    weighting = Weighting(torch.ones(POSITIONS, dtype=torch.float64), torch.zeros(POSITIONS, dtype=torch.float64))
    arguments = (hidden, head.weight, head.bias, head, teacher_hidden, teacher_head, None, weighting, nullcontext)
    (found,) = torch.autograd.grad(-ExpectedAdvantage.apply(*arguments).sum(), hidden)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    comparison = compare_distributions(
        hidden, head, teacher_hidden, teacher_head, torch.zeros(POSITIONS, dtype=torch.long), None
    )
    torch.testing.assert_close(-comparison.mean, (ours.exp() * (ours - theirs)).sum(-1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("baseline", [False, True])
def test_the_mean_over_all_tokens_of_the_sampled_gradient_is_the_exact_one(baseline):
    """Unbiased, with and without the baseline: each token of the vocabulary once, weighted by its probability."""
    hidden, head = build(20, 5, seed=0)
    teacher_hidden, teacher_head = build(20, 6, seed=1)
    hidden.requires_grad_()
    probs, scores = (x.detach() for x in probs_and_scores(hidden, head, teacher_hidden, teacher_head, 1.0))
    scores = scores - (probs * scores).sum(-1, keepdim=True) if baseline else scores
    gradients = []
    for token in range(20):
        logps = log_probs(hidden, head)[:, token]
        gradients.append(torch.autograd.grad((probs[:, token] * scores[:, token]) @ logps, hidden)[0])
    shift = None if baseline else torch.zeros(POSITIONS, dtype=torch.float64)
    weighting = Weighting(torch.ones(POSITIONS, dtype=torch.float64), shift)
    arguments = (hidden, head.weight, head.bias, head, teacher_hidden, teacher_head, 1.0, weighting, nullcontext)
    (exact,) = torch.autograd.grad(ExpectedAdvantage.apply(*arguments).sum(), hidden)
    torch.testing.assert_close(sum(gradients), exact, rtol=0, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 4))
def test_exact_moments_are_those_of_the_mixture_however_it_is_split(seed, rows, parts):
    """Moments of expectations and variances equal those of all tokens, weighted by probability; they merge over ranks."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.rand(parts, rows, 6, 9, generator=generator, dtype=torch.float64).softmax(-1)
    scores = torch.randn(probs.shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(probs.shape[:-1], generator=generator) > 0.3
    mean = (probs * scores).sum(-1)
    variance = (probs * (scores - mean.unsqueeze(-1)).square()).sum(-1)
    of_parts = [merge_moments(row_moments(part, mask[index])) for index, part in enumerate(mean)]
    for index in range(parts):
        of_parts[index][2] += (variance[index] * mask[index]).sum()
    population = Population(gather=lambda own: torch.stack([own[0], *of_parts[1:]]))
    moments = population.moments(mean[0], mask[0], variances=variance[0])
    count = mask.sum()
    if count == 0:
        assert not moments[0].any()
        return
    weights = probs * mask.unsqueeze(-1)
    mu = (weights * scores).sum() / count
    torch.testing.assert_close(moments[0, 1] / moments[0, 0], mu)
    torch.testing.assert_close(moments[0, 2], (weights * (scores - mu).square()).sum())


def test_a_baseline_leaves_the_mean_alone():
    scores, mask = torch.tensor([[1.0, 2.0, 6.0]]), torch.tensor([[1, 1, 0]])
    population = Population()
    advantages = population.whiten(scores, mask, population.moments(scores, mask), subtract_mean=False)
    std = torch.tensor([1.0, 2.0]).std()
    torch.testing.assert_close(advantages, torch.tensor([[1.0, 2.0, 0.0]]) / std, rtol=0, atol=1e-6)


def test_half_precision_accumulates_in_float32():
    hidden, head = build(50, 16, seed=0, dtype=torch.bfloat16)
    teacher_hidden, teacher_head = build(50, 8, seed=1, dtype=torch.bfloat16)
    comparison = compare_distributions(
        hidden, head, teacher_hidden, teacher_head, torch.zeros(POSITIONS, dtype=torch.long), 5.0
    )
    assert all(values.dtype == torch.float32 for values in vars(comparison).values())
    leaves = [tensor.requires_grad_() for tensor in (hidden, head.weight, head.bias)]
    weighting = Weighting(torch.ones(POSITIONS), torch.zeros(POSITIONS))
    found = ExpectedAdvantage.apply(*leaves, head, teacher_hidden, teacher_head, 5.0, weighting, nullcontext)
    gradients = torch.autograd.grad(found.sum(), leaves)
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    as_double = LMHead(exact[1], exact[2], torch.float64)
    of_teacher = LMHead(teacher_head.weight.double(), teacher_head.bias.double(), torch.float64)
    expected = torch.autograd.grad(
        ExpectedAdvantage.apply(
            *exact, as_double, teacher_hidden.double(), of_teacher, 5.0, weighting, nullcontext
        ).sum(),
        exact,
    )
    for gradient, value in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - value).abs().max() < 0.05 * value.abs().max()


@pytest.mark.parametrize("num_positions", [0, 1])
def test_few_positions(num_positions):
    hidden, head = build(20, 5, seed=0)
    teacher_hidden, teacher_head = build(20, 6, seed=1)
    ids = torch.zeros(num_positions, dtype=torch.long)
    comparison = compare_distributions(
        hidden[:num_positions], head, teacher_hidden[:num_positions], teacher_head, ids, 5.0
    )
    assert all(values.shape == (num_positions,) for values in vars(comparison).values())
    leaves = [tensor.requires_grad_() for tensor in (hidden[:num_positions], head.weight, head.bias)]
    weighting = Weighting(torch.ones(num_positions), None)
    found = ExpectedAdvantage.apply(
        *leaves, head, teacher_hidden[:num_positions], teacher_head, 5.0, weighting, nullcontext
    )
    for gradient in torch.autograd.grad(found.sum(), leaves):
        assert gradient.isfinite().all()
