"""The package's trainers with a colocated vLLM."""

import shutil
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trainers import agrees, logged, some_reward
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from trl import prepare_multimodal_messages

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.grpo.vllm_engine import ExactVLLMGeneration
from gndpo_trl.gspo import GSPOConfig, GSPOTrainer


@pytest.fixture
def make(make_config, checkpoints, text_dataset, image_dataset):
    def make(
        family: str = "qwen3",
        model=None,
        teacher_model=None,
        peft_config=None,
        eval_dataset=None,
        train_dataset=None,
        **options,
    ):
        return GNDPOTrainer(
            model=model or checkpoints[f"{family}-student"],
            teacher_model=teacher_model or checkpoints[f"{family}-teacher"],
            args=make_config(GNDPOConfig, **{"use_vllm": True, "vllm_mode": "colocate", **options}),
            train_dataset=train_dataset or (text_dataset if family == "qwen3" else image_dataset),
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


def completions(trainer, dataset, num_generations: int = 8) -> list[list[int]]:
    prompts = [prepare_multimodal_messages(row["prompt"], images=row.get("images")) for row in dataset]
    prompt_ids, images, fields = trainer._tokenize_prompts(
        [prompt for prompt in prompts for _ in range(num_generations)]
    )
    return trainer._generate_single_turn(prompt_ids, images, fields, num_generations)[0]


def test_sampling_stops_where_the_teacher_ends_its_turn(make, checkpoints, text_dataset, tmp_path):
    teacher = shutil.copytree(checkpoints["qwen3-teacher"], tmp_path / "teacher")
    GenerationConfig(eos_token_id=[2, 20, 21, 22]).save_pretrained(teacher)
    trainer = make(teacher_model=teacher, generation_kwargs={"stop_token_ids": [23]})
    rows = completions(trainer, text_dataset.select(range(4)))
    ends = {2, 20, 21, 22, 23}
    assert {row[-1] for row in rows} & {20, 21, 22} and not any(ends & set(row[:-1]) for row in rows)
    assert trainer.eos_token_ids == [2, 20, 21, 22]


@pytest.fixture
def mixed(image_dataset):
    """Questions of which some have images, and whole batches none."""
    rows = image_dataset.to_list()
    for index in (0, 2, 3, 4, 6, 7, 9, 11, 12):
        rows[index]["images"] = []
    return Dataset.from_list(rows, features=image_dataset.features)


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("family", ["qwen25vl", "internvl"])
def test_rows_with_and_without_images(make, mixed, servers, weights_by_file, family, mode):
    options = {"vllm_server_base_url": servers[family], "vllm_server_timeout": 420.0} if mode == "server" else {}
    trainer = make(family, train_dataset=mixed, vllm_mode=mode, max_steps=6, shuffle_dataset=False, **options)
    trainer.train()
    assert agrees(trainer, steps=6)


@pytest.mark.parametrize("logit, is_likely", [(-10.0, False), (2.0, True)])
def test_placeholders_of_images_are_not_sampled(make, checkpoints, image_dataset, tmp_path, logit, is_likely):
    """A student that would: unlikely ones change no log-prob, and those of a likely one are what it leaves to the others."""
    model = AutoModelForImageTextToText.from_pretrained(checkpoints["qwen25vl-student"])
    placeholder = model.config.image_token_id
    with torch.no_grad():
        model.lm_head.weight[placeholder, 0] = logit
    student = tmp_path / "student"
    model.save_pretrained(student)
    AutoProcessor.from_pretrained(checkpoints["qwen25vl-student"]).save_pretrained(student)
    options = (
        {"generation_kwargs": {"suppress_tokens": [20]}, "sampling_logp_threshold": float("inf")} if is_likely else {}
    )
    trainer = make("qwen25vl", model=str(student), **options)
    said = {token for row in completions(trainer, image_dataset.select(range(4))) for token in row}
    assert placeholder not in said and is_likely == (20 not in said)
    trainer.train()
    assert agrees(trainer) != is_likely
    assert is_likely == (min(logged(trainer, "sampling/logp_difference/mean")) > 1)


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
