"""The advantages against the paper's own numbers, and as properties of any scores."""

import pytest
import torch
from helpers import advantages_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode

from gndpo_trl.estimators import Reading, Sampled
from gndpo_trl.objective import advantages as advantages_module
from gndpo_trl.objective.advantages import (
    VARIANCE_EPSILON,
    Population,
    merge_moments,
    row_moments,
    whiten,
)
from gndpo_trl.objective.scores import Score, token_scores


def random_scores(seed: int, rows: int = 6, length: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores in float64 and a mask of prefixes, as completions of different lengths have."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(rows, length, dtype=torch.float64, generator=generator) * 3
    lengths = torch.randint(0, length + 1, (rows,), generator=generator)
    lengths[0] = length  # at least one row of many tokens
    return scores, (torch.arange(length) < lengths.unsqueeze(1)).long()


seeds = st.integers(0, 2**31 - 1)


@pytest.mark.parametrize("arm, normalization", [("opd_advantages", "none"), ("gndpo_advantages", "global")])
def test_the_objects_of_a_step_give_the_numbers_of_the_reference(reference_vectors, arm, normalization):
    for case in reference_vectors:
        reading = Reading(case["teacher_logps"], case["old_logps"])
        mask = case["mask"].bool()
        scores = Score(clip=case["score_clip"])(reading.teacher_logps, reading.student_logps, mask)
        advantages, _ = Sampled().advantages(scores, reading, mask, Population(normalization))
        torch.testing.assert_close(advantages, case[arm], rtol=0, atol=1e-9)


@settings(deadline=None)
@given(seeds, st.sampled_from(["global", "group", "sequence"]))
def test_whitened_populations_have_mean_zero_and_unit_variance(seed, normalization):
    scores, mask = random_scores(seed)
    advantages, undefined = advantages_of(
        scores, mask, score_clip=None, normalization=normalization, num_generations=2
    )
    size = {"global": len(scores), "group": 2, "sequence": 1}[normalization]
    for start in range(0, len(scores), size):
        rows = slice(start, start + size)
        population = advantages[rows][mask[rows].bool()]
        if population.numel() < 2:
            assert undefined[rows].all() and not population.any()
            continue
        assert not undefined[rows].any()
        assert population.mean().abs() < 1e-9
        variance = scores[rows][mask[rows].bool()].var().item()
        assert population.var().item() == pytest.approx(variance / (variance + VARIANCE_EPSILON))


@settings(deadline=None)
@given(seeds)
def test_permutation_changes_nothing(seed):
    scores, mask = random_scores(seed)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    advantages, _ = advantages_of(scores, mask)
    permuted, _ = advantages_of(scores[order], mask[order])
    torch.testing.assert_close(permuted, advantages[order], rtol=0, atol=1e-12)


@settings(deadline=None)
@given(seeds, st.sampled_from([1, 2, 3, 6]), st.sampled_from(["global", "group", "sequence", "none"]))
def test_any_split_over_ranks_changes_nothing(seed, ranks, normalization):
    scores, mask = random_scores(seed)
    whole, _ = advantages_of(scores, mask, normalization=normalization, num_generations=3)
    parts = list(zip(scores.chunk(ranks), mask.chunk(ranks), strict=True))
    for rank, (part_scores, part_mask) in enumerate(parts):
        sent = []

        def gather(moments, sent=sent, parts=parts, group=normalization == "group"):
            sent.append(moments)
            rows = [row_moments(s.clamp(-5, 5), m) for s, m in parts]
            return torch.cat(rows if group else [merge_moments(row).unsqueeze(0) for row in rows])

        advantages, _ = advantages_of(
            part_scores, part_mask, normalization=normalization, num_generations=3, gather=gather, process_index=rank
        )
        torch.testing.assert_close(advantages, whole.chunk(ranks)[rank], rtol=0, atol=1e-12)
        if normalization == "global":
            assert [list(moments.shape) for moments in sent] == [[1, 3]]  # three numbers, once


@settings(deadline=None)
@given(seeds, st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30]))
def test_masked_tokens_have_no_influence(seed, garbage):
    scores, mask = random_scores(seed)
    spoiled = scores.masked_fill(mask == 0, garbage)
    for normalization in ("global", "none", "group", "sequence"):
        clean, _ = advantages_of(scores, mask, normalization=normalization, num_generations=2)
        dirty, _ = advantages_of(spoiled, mask, normalization=normalization, num_generations=2)
        assert torch.equal(clean, dirty)
        assert not dirty[mask == 0].any()
    assert torch.equal(token_scores(spoiled, scores, mask)[mask == 0], torch.zeros_like(scores)[mask == 0])


@pytest.mark.parametrize("normalization", ["global", "group", "sequence"])
@pytest.mark.parametrize("num_valid", [0, 1])
def test_fewer_than_two_tokens_are_defined(normalization, num_valid):
    scores, mask = torch.full((2, 3), 4.0), torch.zeros(2, 3)
    mask.view(-1)[:num_valid] = 1
    advantages, undefined = advantages_of(scores, mask, normalization=normalization, num_generations=2)
    assert torch.equal(advantages, torch.zeros(2, 3))
    assert undefined.all()


@settings(deadline=None)
@given(st.floats(-20, 20), st.integers(2, 200))
def test_a_constant_score_gives_zero_advantages(value, count):
    scores = torch.full((1, count), value, dtype=torch.float64)
    advantages, undefined = advantages_of(scores, torch.ones(1, count), score_clip=None)
    assert advantages.abs().max() < 1e-9
    assert not undefined.any()


@pytest.mark.parametrize("splits", [1, 7, 1000])
def test_whitening_is_stable_for_a_variance_tiny_beside_the_mean(splits):
    generator = torch.Generator().manual_seed(0)
    scores = (4.9 + 1e-3 * torch.randn(1000, 10_000, generator=generator)).float()
    mask = torch.ones_like(scores)
    exact = (scores.double() - scores.double().mean()) / (scores.double().var() + 1e-8).sqrt()
    parts = torch.stack([merge_moments(row_moments(part, torch.ones_like(part))) for part in scores.chunk(splits)])
    advantages = whiten(scores, mask, merge_moments(parts))
    assert advantages.dtype == torch.float32
    # The float64 answer, rounded once to float32: relative to each advantage, not only to the largest.
    torch.testing.assert_close(advantages.double(), exact, rtol=1e-4, atol=1e-8)


class WithoutFloat64(TorchFunctionMode):
    """The CPU as a device that has no float64, and hands tensors to a CPU that has."""

    def __init__(self):
        super().__init__()
        self.handed_over = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.Tensor.cpu:
            result = result.clone()
            self.handed_over.append(result)
        elif function is torch.Tensor.double and not any(tensor is args[0] for tensor in self.handed_over):
            assert args[0].dtype in (torch.bool, torch.int64) or args[0].dtype == torch.float64, "no float64 here"
        return result


def test_devices_without_float64_get_the_same_accuracy(monkeypatch):
    scores = (4.9 + 1e-3 * torch.randn(100, 1000, generator=torch.Generator().manual_seed(0))).float()
    mask = torch.ones_like(scores)
    expected, _ = advantages_of(scores, mask)
    monkeypatch.setattr(advantages_module, "DEVICES_WITHOUT_FLOAT64", ("cpu",))
    with WithoutFloat64() as mode:
        found, undefined = advantages_of(scores, mask)
    assert torch.equal(found, expected) and not undefined.any() and len(mode.handed_over) >= 2
    monkeypatch.undo()
    with pytest.raises(AssertionError, match="no float64 here"), WithoutFloat64():
        advantages_of(scores, mask)


def test_std_floor_limits_the_blow_up_of_rounding_noise():
    noise = 1e-6 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(noise)
    floored, _ = advantages_of(noise, mask, std_floor=0.1)
    assert floored.abs().max() < 1e-4
    scores = noise * 1e6
    assert torch.equal(advantages_of(scores, mask, std_floor=0.1)[0], advantages_of(scores, mask)[0])


def test_the_clamp_comes_before_the_statistics_and_not_after():
    scores = torch.tensor([[100.0] + [0.0] * 99])
    advantages, _ = advantages_of(scores, torch.ones_like(scores), score_clip=5.0)
    clamped, _ = advantages_of(scores.clamp(-5, 5), torch.ones_like(scores), score_clip=None)
    assert torch.equal(advantages, clamped)
    assert advantages.max() > 5  # whitened outliers are not clipped again


def test_advantages_carry_no_gradient():
    scores = torch.randn(2, 4, requires_grad=True)
    assert not advantages_of(scores, torch.ones(2, 4))[0].requires_grad


def test_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="Unknown normalization 'batch'"):
        advantages_of(torch.zeros(1, 1), torch.ones(1, 1), normalization="batch")
