"""Losses and gradients that are NaN on one rank: all of them skip the step, and count it."""

import math

import pytest
import torch
from helpers import SPREAD_COMPLETIONS
from safetensors.torch import load_file


def run(launch, accelerate_config: str, max_steps: int, **spec):
    config = {"max_steps": max_steps, "per_device_train_batch_size": 4}
    is_fsdp = accelerate_config == "fsdp2"
    found = launch(accelerate_config, config=config, completions=SPREAD_COMPLETIONS, fsdp=is_fsdp, **spec)
    assert found.returncode == 0, found.output
    return found, load_file(found.folder / "saved" / "model.safetensors")


@pytest.mark.parametrize(
    "accelerate_config, broken, scaler",
    [
        ("ddp", "loss", False),
        ("ddp", "gradient", False),
        ("ddp", "loss", True),
        ("fsdp2", "loss", False),
        ("fsdp2", "gradient", False),
    ],
)
def test_all_ranks_skip_what_is_not_finite_on_one(launch, accelerate_config, broken, scaler):
    _, expected = run(launch, accelerate_config, 1, scaler=scaler)
    found, weights = run(launch, accelerate_config, 2, broken=broken, scaler=scaler)
    assert [report["skipped_steps"] for report in found.reports] == [1, 1]
    assert [report["global_step"] for report in found.reports] == [2, 2]
    for report in found.reports:
        log = report["log_history"]
        assert [entry["skipped_steps"] for entry in log[:2]] == [0, 1]
        assert math.isnan(log[1]["loss"]) == (broken == "loss") and math.isfinite(log[0]["loss"])
    assert all(torch.equal(weights[name], values) for name, values in expected.items())
