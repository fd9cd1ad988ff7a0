"""Sampling with vLLM in the process that trains."""

import pytest
import tiny_models
import torch
from trainers import Trainer, agrees, logged, some_reward
from trl import GRPOConfig, GRPOTrainer, prepare_multimodal_messages
from trl.generation.vllm_generation import VLLMGeneration

from gndpo_trl.grpo.vllm import VLLMConfig
from gndpo_trl.grpo.vllm_engine import ExactVLLMGeneration


@pytest.fixture
def plain(make_config, checkpoints, text_dataset, image_dataset):
    """A trainer without a teacher; the correction has TRL score the completions too."""

    def make(trainer_class, family, config_class=VLLMConfig, train_dataset=None, **options) -> GRPOTrainer:
        defaults = {"use_vllm": True, "vllm_mode": "colocate", "vllm_importance_sampling_correction": True}
        return trainer_class(
            model=checkpoints[f"{family}-student"],
            reward_funcs=some_reward,
            args=make_config(config_class, **{**defaults, **options}),
            train_dataset=train_dataset or (text_dataset if family == "qwen3" else image_dataset),
        )

    return make


@pytest.mark.parametrize("family", ["qwen3", "qwen25vl", "internvl"])
def test_both_engines_agree_before_and_after_an_update(plain, family):
    trainer = plain(Trainer, family)
    trainer.train()
    assert agrees(trainer)


@pytest.mark.parametrize("family", ["qwen25vl", "internvl"])
def test_trl_alone_samples_from_another_prompt(plain, image_dataset, family):
    """Same engine, same prompts, with TRL's own sampler and with ours."""
    lengths, differences = {}, {}
    for name, trainer in {"theirs": plain(GRPOTrainer, family, GRPOConfig), "ours": plain(Trainer, family)}.items():
        prompts = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in image_dataset]
        prompt_ids, images, _ = trainer._tokenize_prompts(prompts[:4])
        sampled_from = trainer.vllm_generation.generate(prompt_ids, images, num_generations=1)[0]
        lengths[name] = [len(theirs) - len(ours) for theirs, ours in zip(sampled_from, prompt_ids, strict=True)]
        trainer.train()
        differences[name] = logged(trainer, "sampling/sampling_logp_difference/mean")
    assert min(lengths["theirs"]) > 0 and lengths["ours"] == [0, 0, 0, 0]
    assert min(differences["theirs"]) > 0.01 and max(differences["ours"]) < 1e-5


def test_new_weights_see_old_images_anew(plain, image_dataset, monkeypatch):
    """vLLM keeps what the vision tower made of an image; TRL alone samples the second step with the first one's."""
    dataset = image_dataset.select([1] * 8)
    trainer = plain(Trainer, "qwen25vl", train_dataset=dataset)
    trainer.train()
    assert agrees(trainer)

    monkeypatch.setattr(ExactVLLMGeneration, "sync_weights", VLLMGeneration.sync_weights)
    trainer = plain(Trainer, "qwen25vl", train_dataset=dataset, sampling_logp_threshold=float("inf"))
    trainer.vllm_generation.llm.llm_engine.reset_encoder_cache()
    trainer.train()
    first, second = logged(trainer, "sampling/logp_difference/max")
    assert first < 1e-5 and second > 1e-3


def test_images_that_a_tool_returns(plain, image_dataset):
    """They stand after what the model has sampled so far, as in TRL's loop of tool calls."""
    trainer = plain(Trainer, "qwen25vl")
    row = image_dataset[1]
    (prompt_ids,), (images,), _ = trainer._tokenize_prompts(
        [prepare_multimodal_messages(row["prompt"], images=row["images"])]
    )
    image = tiny_models.draw_image(5)
    answer = {"role": "tool", "name": "look", "content": [{"type": "image", "image": image}]}
    sampled = trainer.processing_class.tokenizer("the sum of two", add_special_tokens=False)["input_ids"]
    prompt_ids = prompt_ids + sampled + trainer._get_tool_suffix_ids([answer])
    images = [*images, image]
    (completion,), (logps,) = trainer._generate_single_turn([prompt_ids], [images], {}, 1, has_tool_images=True)

    ids = torch.tensor([[*prompt_ids, *completion]])
    placeholders = (ids == trainer.processing_class.image_token_id).int()
    features = trainer.processing_class.image_processor(images=images, return_tensors="pt")
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, mm_token_type_ids=placeholders, **features).logits
    expected = logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1).gather(-1, ids[0, len(prompt_ids) :, None])[:, 0]
    assert torch.tensor(logps) == pytest.approx(expected, abs=1e-5)
