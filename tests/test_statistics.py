"""The metrics against plain arithmetic over all tokens, whatever rank holds them."""

import math

import pytest
import torch
from helpers import advantages_of

from gndpo_trl.objective.statistics import (
    score_metrics,
    score_statistics,
    spread_metrics,
    spread_statistics,
    tail_metrics,
)


CLIP = 2.0


def make_batch(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    teacher = -3 * torch.rand(8, 6, dtype=torch.float64, generator=generator)
    student = -3 * torch.rand(8, 6, dtype=torch.float64, generator=generator)
    mask = (torch.arange(6) < torch.tensor([6, 1, 3, 0, 2, 6, 4, 5]).unsqueeze(1)).long()
    is_eos = (torch.arange(6) == mask.sum(1, keepdim=True) - 1) & (torch.arange(8).unsqueeze(1) % 2 == 0)
    return teacher, student, mask, is_eos


def statistics_of(teacher, student, mask, is_eos):
    scores = teacher - student
    advantages, undefined = advantages_of(scores, mask, score_clip=CLIP, normalization="sequence")
    unknown = (mask == 0) & (torch.arange(scores.size(1)) == 5)
    return score_statistics(scores, teacher, student, advantages, undefined, is_eos, unknown, mask, CLIP)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])  # with 8 ranks, one has no valid token at all
def test_metrics_are_those_of_all_tokens(ranks):
    teacher, student, mask, is_eos = make_batch()
    parts = zip(*(tensor.chunk(ranks) for tensor in (teacher, student, mask, is_eos)), strict=True)
    metrics = score_metrics(torch.stack([statistics_of(*part) for part in parts]))

    valid = mask.bool()
    scores = (teacher - student)[valid]
    advantages, _ = advantages_of(teacher - student, mask, score_clip=CLIP, normalization="sequence")
    expected = {
        "score/mean": scores.mean(),
        "score/std": scores.std(),
        "score/min": scores.min(),
        "score/max": scores.max(),
        "score/clamped_low": (scores < -CLIP).double().mean(),
        "score/clamped_high": (scores > CLIP).double().mean(),
        "score/eos": (teacher - student)[valid & is_eos].mean(),
        "reverse_kl": -scores.mean(),
        "reverse_kl_k3": (scores.exp() - 1 - scores).mean(),
        "teacher/mean_logp": teacher[valid].mean(),
        "teacher/unknown_tokens": 6,
        "student/mean_logp": student[valid].mean(),
        "advantages/std": advantages[valid].std(),
        "advantages/num_tokens": 27,
        "advantages/undefined": 2,  # the completions of length 0 and 1
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), abs=1e-12), name


def test_k3_is_an_estimate_of_the_reverse_kl():
    """On many samples of the student, both estimators approach the divergence computed over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(10, dtype=torch.float64, generator=generator).log_softmax(-1)
    teacher = torch.randn(10, dtype=torch.float64, generator=generator).log_softmax(-1)
    exact = (student.exp() * (student - teacher)).sum().item()
    tokens = torch.multinomial(student.exp(), 200_000, replacement=True, generator=generator).view(1, -1)
    mask, no_eos = torch.ones_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    metrics = score_metrics(statistics_of(teacher[tokens], student[tokens], mask, no_eos).unsqueeze(0))
    assert metrics["reverse_kl"] == pytest.approx(exact, rel=0.02)
    assert metrics["reverse_kl_k3"] == pytest.approx(exact, rel=0.02)


def test_no_valid_token_gives_nan_and_no_error():
    teacher, student, mask, is_eos = make_batch()
    metrics = score_metrics(statistics_of(teacher, student, torch.zeros_like(mask), is_eos).unsqueeze(0))
    assert math.isnan(metrics["score/mean"]) and math.isnan(metrics["score/min"])
    assert metrics["advantages/num_tokens"] == 0
    assert metrics["advantages/undefined"] == 8


# Where the signal lies


def spread_of(teacher, student, mask):
    advantages, _ = advantages_of(teacher - student, mask, score_clip=CLIP, normalization="sequence")
    return spread_statistics((teacher - student).masked_fill(mask == 0, 0.0), student, advantages, mask, CLIP)


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_shares_are_those_of_all_tokens(ranks):
    teacher, student, mask, _ = make_batch()
    student[0, 0] = math.log(0.5)  # so that not all tokens are of one kind
    parts = zip(*(tensor.chunk(ranks) for tensor in (teacher, student, mask)), strict=True)
    metrics = spread_metrics(torch.stack([spread_of(*part) for part in parts]))

    valid = mask.bool()
    advantages, _ = advantages_of(teacher - student, mask, score_clip=CLIP, normalization="sequence")
    mass, is_clamped, is_improbable = advantages.abs(), (teacher - student).abs() > CLIP, student.exp() < 0.1
    assert 0 < (is_clamped & valid).sum() < valid.sum() and 0 < (is_improbable & valid).sum() < valid.sum()
    expected = {
        "advantages/share_clamped": mass[valid & is_clamped].sum() / mass[valid].sum(),
        "advantages/share_low_probability": mass[valid & is_improbable].sum() / mass[valid].sum(),
        "student/low_probability": is_improbable[valid].double().mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value.item(), abs=1e-12), name


def test_scores_by_position_are_means_of_tenths_of_the_valid_tokens():
    """A completion of 25 tokens, one of 4, and one whose third token is a tool's; none of another length disturbs them."""
    lengths, width = torch.tensor([25, 4, 5]), 30
    mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
    mask[2, 2] = 0
    scores = torch.arange(3 * width, dtype=torch.float64).view(3, width)
    zeros = torch.zeros_like(scores)
    found = spread_metrics(spread_statistics(scores.masked_fill(mask == 0, 0.0), zeros, zeros, mask, 5.0).unsqueeze(0))
    tenths = [[] for _ in range(10)]
    for row in range(3):
        valid = scores[row][mask[row].bool()].tolist()
        for place, score in enumerate(valid):
            tenths[10 * place // len(valid)].append(score)
    for number, values in enumerate(tenths, start=1):
        assert found[f"score/tenth_{number:02}"] == pytest.approx(sum(values) / len(values)), number
    only_short = spread_metrics(spread_statistics(scores[1:2], zeros[1:2], zeros[1:2], mask[1:2], 5.0).unsqueeze(0))
    assert [number for number in range(1, 11) if not math.isnan(only_short[f"score/tenth_{number:02}"])] == [
        1,
        3,
        6,
        8,
    ]


@pytest.mark.parametrize("count", [1, 2, 99, 100, 1001])
def test_quantiles_and_the_largest_hundredth(count):
    generator = torch.Generator().manual_seed(count)
    scores = torch.randn(count, generator=generator)
    advantages = torch.randn(count, generator=generator)
    metrics = tail_metrics(scores, advantages)
    for name, quantile in {"p01": 0.01, "p10": 0.1, "p50": 0.5, "p90": 0.9, "p99": 0.99}.items():
        expected = torch.quantile(scores.double(), quantile).item()
        assert metrics[f"score/{name}"] == pytest.approx(expected, abs=1e-6), name
    largest = sorted(advantages.abs().tolist(), reverse=True)[: {1: 1, 2: 1, 99: 1, 100: 1, 1001: 11}[count]]
    share = sum(largest) / advantages.abs().sum().item()
    assert metrics["advantages/share_top_1_percent"] == pytest.approx(share, abs=1e-6)


def test_nothing_to_divide_by_gives_nan_and_no_error():
    teacher, student, mask, _ = make_batch()
    nothing = spread_metrics(spread_of(teacher, student, torch.zeros_like(mask)).unsqueeze(0))
    assert all(math.isnan(value) for value in nothing.values())
    assert all(math.isnan(value) for value in tail_metrics(torch.zeros(0), torch.zeros(0)).values())
    no_mass = tail_metrics(torch.ones(3), torch.zeros(3))
    assert no_mass["score/p50"] == 1 and math.isnan(no_mass["advantages/share_top_1_percent"])
