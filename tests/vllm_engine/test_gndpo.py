"""The package's trainers with a colocated vLLM."""

import warnings

import pytest
import torch
from peft import LoraConfig
from trainers import agrees, logged, some_reward
from transformers import AutoModelForCausalLM

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.grpo.vllm_engine import ExactVLLMGeneration
from gndpo_trl.gspo import GSPOConfig, GSPOTrainer


@pytest.fixture
def make(make_config, checkpoints, text_dataset, image_dataset):
    def make(family: str = "qwen3", peft_config=None, eval_dataset=None, **options) -> GNDPOTrainer:
        return GNDPOTrainer(
            model=checkpoints[f"{family}-student"],
            teacher_model=checkpoints[f"{family}-teacher"],
            args=make_config(GNDPOConfig, use_vllm=True, vllm_mode="colocate", **options),
            train_dataset=text_dataset if family == "qwen3" else image_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
        )

    return make


@pytest.mark.parametrize("family", ["qwen3", "qwen25vl", "internvl"])
def test_two_steps(make, family):
    trainer = make(family)
    trainer.train()
    assert agrees(trainer)
    assert logged(trainer, "score/std") and logged(trainer, "advantages/std")[0] == pytest.approx(1, abs=1e-3)


def test_the_importance_sampling_correction(make):
    trainer = make(vllm_importance_sampling_correction=True)
    trainer.train()
    assert agrees(trainer)
    assert logged(trainer, "sampling/importance_sampling_ratio/max") == pytest.approx([1, 1], abs=1e-4)


@pytest.mark.parametrize("level", ["token", "sequence_token"])
def test_use_sampling_logps(make, level):
    trainer = make(use_sampling_logps=True, importance_sampling_level=level, temperature=0.7)
    trainer.train()
    assert agrees(trainer)
    assert logged(trainer, "advantages/std")[0] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    "options", [{"score_baseline": "expected"}, {"estimator": "exact"}], ids=["baseline", "exact"]
)
def test_the_whole_vocabulary(make, options):
    trainer = make("qwen25vl", vllm_importance_sampling_correction=True, **options)
    trainer.train()
    assert agrees(trainer)
    assert all(expected < 0 for expected in logged(trainer, "score/expected"))
    assert min(logged(trainer, "grad_norm")) > 0


def test_lora(make):
    trainer = make(peft_config=LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    trainer.train()
    assert agrees(trainer)


@pytest.mark.parametrize("steps_with_weights, is_warned", [(10, True), (21, False)])
def test_an_engine_that_gets_no_more_weights_is_warned_about(make, monkeypatch, steps_with_weights, is_warned):
    trainer = make(max_steps=21)
    sync_weights = ExactVLLMGeneration.sync_weights

    def sync_for_a_while(generation):
        if trainer.state.global_step < steps_with_weights:
            sync_weights(generation)

    monkeypatch.setattr(ExactVLLMGeneration, "sync_weights", sync_for_a_while)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train()
    assert sum("the two drift apart" in str(warning.message) for warning in caught) == is_warned


def test_greedy_evaluation(make, checkpoints, text_dataset, monkeypatch):
    trainer = make(eval_temperature=0.0, eval_dataset=text_dataset.select(range(8)), per_device_eval_batch_size=4)
    sampled = []
    single_turn = GNDPOTrainer._generate_single_turn

    def remember(trainer, prompt_ids, *args, **kwargs):
        completions = single_turn(trainer, prompt_ids, *args, **kwargs)
        sampled.extend(zip(prompt_ids, completions[0], strict=True))
        return completions

    monkeypatch.setattr(GNDPOTrainer, "_generate_single_turn", remember)
    trainer.evaluate()
    assert len(sampled) == 8
    model = AutoModelForCausalLM.from_pretrained(checkpoints["qwen3-student"])
    for prompt, completion in sampled:
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=8)[0, len(prompt) :]
        assert list(completion) == expected.tolist()
    assert not logged(trainer, "eval_sampling/logp_difference/mean")  # of two different distributions


@pytest.mark.parametrize("correction", [False, True])
def test_gspo(make_config, checkpoints, image_dataset, correction):
    options = {"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_correction": correction}
    trainer = GSPOTrainer(
        checkpoints["internvl-student"],
        some_reward,
        make_config(GSPOConfig, **options, gradient_accumulation_steps=2),
        train_dataset=image_dataset,
    )
    trainer.train()
    assert agrees(trainer)


# What stops a run


def test_a_first_batch_that_is_far_off_stops_the_run(make):
    masked = {"allowed_token_ids": list(range(20, 30))}
    with pytest.raises(ValueError, match=r"nats from the training engine's on average.*(?s:.)*allowed_token_ids"):
        make(generation_kwargs=masked).train()
    trainer = make(generation_kwargs=masked, sampling_logp_threshold=float("inf"))
    trainer.train()
    assert min(logged(trainer, "sampling/logp_difference/mean")) > 0.05


def test_sampling_logps_of_another_distribution_are_refused(make):
    with pytest.raises(ValueError, match="`use_sampling_logps` is True, but `allowed_token_ids`"):
        make(use_sampling_logps=True, generation_kwargs={"allowed_token_ids": [20, 21]})


def test_a_prompt_too_long_for_the_engine(make_config, checkpoints, text_dataset):
    rows = text_dataset.to_list()
    rows[3] = {"prompt": [{"role": "user", "content": "what is the sum ? " * 70}]}
    with pytest.raises(ValueError, match=r"prompt of row 3 of the data has \d+ tokens, but vLLM holds 256"):
        GNDPOTrainer(
            model=checkpoints["qwen3-student"],
            teacher_model=checkpoints["qwen3-teacher"],
            args=make_config(GNDPOConfig, use_vllm=True, vllm_mode="colocate"),
            train_dataset=type(text_dataset).from_list(rows),
        )
