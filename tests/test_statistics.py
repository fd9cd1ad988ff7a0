"""The metrics against plain arithmetic over all tokens, whatever rank holds them."""

import math

import pytest
import torch

from gndpo_trl.objective.advantages import compute_advantages
from gndpo_trl.objective.statistics import score_metrics, score_statistics


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
    advantages, undefined = compute_advantages(scores, mask, score_clip=CLIP, normalization="sequence")
    unknown = (mask == 0) & (torch.arange(scores.size(1)) == 5)
    return score_statistics(scores, teacher, student, advantages, undefined, is_eos, unknown, mask, CLIP)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])  # with 8 ranks, one has no valid token at all
def test_metrics_are_those_of_all_tokens(ranks):
    teacher, student, mask, is_eos = make_batch()
    parts = zip(*(tensor.chunk(ranks) for tensor in (teacher, student, mask, is_eos)), strict=True)
    metrics = score_metrics(torch.stack([statistics_of(*part) for part in parts]))

    valid = mask.bool()
    scores = (teacher - student)[valid]
    advantages, _ = compute_advantages(teacher - student, mask, score_clip=CLIP, normalization="sequence")
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
