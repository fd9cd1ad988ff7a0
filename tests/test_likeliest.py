"""Scores of a teacher of whom a few tokens and the mass of the rest are known, against loops over single tokens."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gndpo_trl.objective.likeliest import LikeliestTokens, keep_likeliest, pack


def one_position(
    teacher: list[float], student: list[float], sampled: int, top_k: int, clip: float | None
) -> list[float]:
    """Scores of the tokens that both have, of the teacher's and the student's probabilities."""
    order = sorted(range(len(teacher)), key=lambda id: -teacher[id])[: top_k + 1]
    known = order if sampled in order else [*order[:-1], sampled]
    common = range(min(len(teacher), len(student)))
    rests = [1 - sum(teacher[id] for id in known), sum(student[id] for id in common if id not in known)]
    shared = math.log(max(rests[0], 1e-300)) - math.log(max(rests[1], 1e-300))
    scores = [math.log(teacher[id]) - math.log(student[id]) if id in known else shared for id in common]
    return scores if clip is None else [min(max(score, -clip), clip) for score in scores]


def distributions(size: int, seed: int, spread: float, num_positions: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(num_positions, size, generator=generator, dtype=torch.float64)
    return logits.log_softmax(-1)


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    sizes=st.tuples(st.integers(2, 12), st.integers(2, 12)),
    top_k=st.integers(1, 14),
    spread=st.floats(0.5, 4.0),
    clip=st.sampled_from([None, 0.5, 5.0]),
)
def test_scores_are_those_of_a_loop(seed, sizes, top_k, spread, clip):
    teacher, student = (distributions(size, seed + place, spread) for place, size in enumerate(sizes))
    before, ids = student.clone(), torch.arange(4) % min(sizes)
    states, head = keep_likeliest(teacher, ids, top_k), LikeliestTokens(sizes[0])
    found, logps = head.scores(states, student, clip, ids)
    assert states.shape == (4, min(top_k + 1, sizes[0]), 2) and torch.equal(student, before)
    for place, id in enumerate(ids.tolist()):
        expected = one_position(teacher[place].exp().tolist(), student[place].exp().tolist(), id, top_k, clip)
        assert found[place].tolist() == pytest.approx(expected, abs=1e-6)
        assert len(states[place, :, 0].unique()) == states.size(1)
    torch.testing.assert_close(logps, teacher[range(4), ids], rtol=0, atol=0)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), spread=st.floats(0.0, 20.0), more=st.integers(0, 3))
def test_with_all_tokens_known_scores_are_the_exact_ones(seed, spread, more):
    teacher, student = distributions(9, seed, spread), distributions(9, seed + 1, spread)
    states = keep_likeliest(teacher, torch.arange(4), 8 + more)
    found, _ = LikeliestTokens(9).scores(states, student, 5.0)
    torch.testing.assert_close(found, (teacher - student).clamp(-5.0, 5.0), rtol=0, atol=1e-9)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), top_k=st.integers(1, 6))
def test_the_gradient_is_that_of_a_divergence_of_coarser_distributions(seed, top_k):
    """Of the known tokens and one for the rest, by autograd; with `Σ π(a) c(a) ∇log π(a)` as the vocabulary's sum has it."""
    teacher = distributions(9, seed, 2.0)
    logits = distributions(9, seed + 1, 2.0).requires_grad_()
    states = keep_likeliest(teacher, torch.arange(4), top_k)
    known = states[..., 0].long()
    ours, theirs = (
        torch.cat([probs.gather(-1, known), probs.scatter(-1, known, 0.0).sum(-1, keepdim=True)], dim=-1)
        for probs in (logits.softmax(-1), teacher.exp())
    )
    divergence = (ours * (ours.log() - theirs.log())).sum()
    (expected,) = torch.autograd.grad(divergence, logits)
    log_probs = logits.log_softmax(-1)
    scores, _ = LikeliestTokens().scores(states, log_probs.detach(), None)
    (found,) = torch.autograd.grad(-(log_probs.detach().exp() * scores * log_probs).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_how_much_of_the_student_is_looked_at():
    student = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.01, 0.01, 0.08, 0.9]]).log()
    ids, teacher_logps = torch.tensor([[3, 1, 0], [0, 1, 3]]), torch.tensor([[0.1, 0.6, 0.2], [0.5, 0.3, 0.199]]).log()
    found = LikeliestTokens().coverage(pack(ids, teacher_logps), student, 1.0)
    # The teacher's two likeliest: 1 and 0, as the student's; 0 and 1, of which the student's has none.
    torch.testing.assert_close(found, torch.tensor([[0.8, 0.0, 1.0], [0.92, 1.0, 0.0]]))
    assert not LikeliestTokens().coverage(pack(ids, teacher_logps), student, None)[:, 1].any()


def test_a_rest_of_nothing_is_at_the_bound_and_is_no_nan():
    ids = torch.tensor([[0, 1]])
    sure, unsure = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.3, 0.3]]).log()
    of_student = {
        name: torch.tensor([values]).log() for name, values in {"sure": [1, 0, 0, 0], "unsure": [0.25] * 4}.items()
    }

    def rest(*arguments) -> torch.Tensor:
        return LikeliestTokens().scores(*arguments)[0][0, 2:]

    assert rest(pack(ids, sure), of_student["unsure"], 5.0).tolist() == [-5.0, -5.0]
    assert rest(pack(ids, unsure), of_student["sure"], 5.0).tolist() == [5.0, 5.0]
    assert rest(pack(ids, sure), of_student["sure"], 5.0).tolist() == [0.0, 0.0]
    # More than everything, by rounding; and without a bound.
    above = torch.tensor([[1e-7, -math.inf]])
    assert rest(pack(ids, above), of_student["unsure"], 5.0).tolist() == [-5.0, -5.0]
    assert rest(pack(ids, above), of_student["unsure"], None).isfinite().all()


def test_a_known_token_that_the_teacher_rules_out_is_at_the_bound():
    states = pack(torch.tensor([[2, 1]]), torch.tensor([[math.log(0.5), -math.inf]]))
    student = torch.full((1, 4), 0.25).log()
    found, logps = LikeliestTokens().scores(states, student, 5.0, torch.tensor([1]))
    torch.testing.assert_close(found, torch.tensor([[0.0, -5.0, math.log(2), 0.0]]))
    assert logps.tolist() == [-math.inf]


@pytest.mark.parametrize("broken", [(0, 1), (1, 1), (0, 0), None])
def test_nan_is_that_of_its_position_alone(broken):
    ids, log_probs = torch.tensor([[2, 1], [2, 1]]), torch.full((2, 2), 0.25).log()
    states = pack(ids, log_probs)
    if broken is not None:
        states[0, broken[0], broken[1]] = math.nan
    states[0, broken[0] if broken else 0, 1] = math.nan
    student, head = torch.full((2, 4), 0.25).log(), LikeliestTokens()
    scores, logps = head.scores(states, student, 5.0, torch.tensor([1, 1]))
    assert scores[0].isnan().any() and logps[0].isnan()
    assert scores[1].isfinite().all() and logps[1] == log_probs[1, 1]


def test_a_token_that_is_not_known_has_no_log_prob():
    states = pack(torch.tensor([[2, 1]]), torch.full((1, 2), 0.25).log())
    _, logps = LikeliestTokens().scores(states, torch.zeros(1, 4), 5.0, torch.tensor([3]))
    assert logps.isnan().all()


def test_no_positions():
    states = keep_likeliest(torch.zeros(0, 9), torch.zeros(0, dtype=torch.long), 4)
    assert states.shape == (0, 5, 2)
    scores, logps = LikeliestTokens().scores(states, torch.zeros(0, 9), 5.0, torch.zeros(0, dtype=torch.long))
    assert scores.shape == (0, 9) and logps.shape == (0,)


def test_ids_stay_whole():
    ids = torch.tensor([[2**24 - 1, 2**24 - 2]])
    assert torch.equal(pack(ids, torch.zeros(1, 2))[..., 0].long(), ids)
    with pytest.raises(ValueError, match="Token id 16777216 cannot be kept in float32"):
        pack(ids + 1, torch.zeros(1, 2))


def test_it_is_its_own_copy_on_every_device():
    head = LikeliestTokens(9)
    assert head.on(torch.device("cpu")) is head and head.parameters == []
