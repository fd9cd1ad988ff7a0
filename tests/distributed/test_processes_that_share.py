"""Two processes whose rows share prompts take the steps of two processes with separate rows."""

import pytest
import tiny_models
import torch
from helpers import SPREAD_COMPLETIONS
from safetensors.torch import load_file
from transformers import MistralConfig, MistralForCausalLM


@pytest.mark.parametrize(
    "accelerate_config, family",
    [
        ("ddp", "qwen3"),
        ("ddp", "internvl"),
        ("zero2", "qwen3"),
        ("zero3", "qwen3"),
        ("zero3", "qwen25vl"),
        ("fsdp2", "qwen3"),
    ],
)
def test_gradients_are_those_of_separate_rows(launch, checkpoints, accelerate_config, family):
    """Each process has four rows of one prompt and two of another, one process in the other order than the other."""
    weights, runs = {}, {}
    for share_prompts in (False, True):
        runs[share_prompts] = launch(
            accelerate_config,
            family,
            {
                "num_generations": 4,
                "per_device_train_batch_size": 3,
                "gradient_accumulation_steps": 2,
                "gradient_checkpointing": True,
                "share_prompts": share_prompts,
            },
            completions=SPREAD_COMPLETIONS,
            fsdp=accelerate_config == "fsdp2",
        )
        assert runs[share_prompts].returncode == 0, runs[share_prompts].output
        weights[share_prompts] = load_file(runs[share_prompts].folder / "saved" / "model.safetensors")
    start = load_file(f"{checkpoints[f'{family}-student']}/model.safetensors")
    assert max((weights[False][name] - value).abs().max() for name, value in start.items()) > 1e-2
    for name, value in weights[False].items():
        torch.testing.assert_close(
            weights[True][name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    for report in runs[True].reports:
        assert report["reasons_against_sharing"] and not any(report["reasons_against_sharing"])
    # Every process makes as many forward passes, whatever prompts it has.
    assert len({report["teacher_forwards"] for report in runs[True].reports}) == 1
    logs = [runs[share_prompts].reports[0]["log_history"][0] for share_prompts in (False, True)]
    for name in ("loss", "entropy", "score/mean", "clip_ratio/region_mean"):
        assert logs[1][name] == pytest.approx(logs[0][name], abs=1e-5), name


@pytest.mark.parametrize("accelerate_config", ["zero3"])
def test_one_process_that_cannot_share_keeps_all_from_it(launch, accelerate_config):
    config = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    run = launch(accelerate_config, "qwen3", config, completions=SPREAD_COMPLETIONS, fail="sharing")
    assert run.returncode == 0, run.output
    first, last = (set(report["reasons_against_sharing"]) for report in run.reports)
    assert first == {"another process found a reason"} and last == {"it is told not to"}
    assert "Qwen3ForCausalLM computes each prompt again for every completion, because another process" in run.output


@pytest.mark.parametrize("accelerate_config", ["zero3"])
def test_a_model_that_is_found_out_in_its_forward_pass_trains_on_separate_rows(launch, accelerate_config, tmp_path):
    tokenizer = tiny_models.build_tokenizer()
    options = {"sliding_window": 4, "layer_types": ["full_attention"] * 2}  # hides it from a look at the structure
    config = MistralConfig(**tiny_models.text_options(tokenizer, 32, None), **options)
    student = tiny_models.save(MistralForCausalLM(config), tokenizer, tmp_path)
    config = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    run = launch(accelerate_config, "qwen3", config, completions=SPREAD_COMPLETIONS, model=student)
    assert run.returncode == 0, run.output
    line = "MistralForCausalLM computes each prompt again for every completion, because it uses `sliding_window`"
    assert line in run.output
    for report in run.reports:
        assert sorted(report["reasons_against_sharing"], key=str) == [None, "it uses `sliding_window`"]
