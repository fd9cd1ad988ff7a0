"""Dropping the padding and grouping rows by length leaves the gradient of every loss as it is."""

import pytest
from helpers import SPREAD_COMPLETIONS


ALWAYS_SHUFFLED = (
    "bnpo",
    "entropy bonus",
    "several steps",
)  # which rows share a micro-batch would change the gradient


@pytest.mark.parametrize("family", ["qwen3", "internvl"])
@pytest.mark.parametrize("accelerate_config", [None, "ddp"])
def test_gradients_are_those_of_padded_micro_batches(launch, accelerate_config, family):
    steps = 4 if accelerate_config is None else 2
    run = launch(
        accelerate_config,
        family,
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": steps},
        task="losses",
        completions=SPREAD_COMPLETIONS,
    )
    assert run.returncode == 0, run.output
    assert len(run.reports) == (1 if accelerate_config is None else 2)
    for report in run.reports:
        for case, result in report.items():
            assert result["largest"] > 1e-2, case
            assert result["difference"] < 1e-5, case
            sizes = [len(lengths) for lengths in result["lengths"]]
            if case in ALWAYS_SHUFFLED:
                assert set(sizes) == {2}, case
            else:
                longest = [max(lengths) for lengths in result["lengths"]]
                assert sum(sizes) == 2 * steps and longest == sorted(longest, reverse=True), case
                assert accelerate_config or set(sizes) != {2}, "the rows were not regrouped"
