"""Sampling with a vLLM server."""

import pytest
from trainers import Trainer, agrees, logged, some_reward

from gndpo_trl.grpo.vllm import VLLMConfig


pytestmark = pytest.mark.usefixtures("weights_by_file")


@pytest.fixture
def make(make_config, checkpoints, servers, text_dataset, image_dataset):
    def make(family: str, train_dataset=None, **options) -> Trainer:
        defaults = {
            "use_vllm": True,
            "vllm_mode": "server",
            "vllm_server_base_url": servers[family],
            "vllm_importance_sampling_correction": True,
        }
        return Trainer(
            model=checkpoints[f"{family}-student"],
            reward_funcs=some_reward,
            args=make_config(VLLMConfig, **{**defaults, **options}),
            train_dataset=train_dataset or image_dataset,
        )

    return make


@pytest.mark.parametrize("family", ["qwen25vl", "internvl"])
def test_images(make, family):
    trainer = make(family)
    trainer.train()
    print(logged(trainer, "sampling/logp_difference/max"))
    assert agrees(trainer)


def test_text(make, text_dataset):
    trainer = make("qwen25vl", text_dataset)
    trainer.train()
    assert agrees(trainer)


def test_new_weights_see_old_images_anew(make, image_dataset):
    trainer = make("qwen25vl", image_dataset.select([1] * 8))
    trainer.train()
    assert agrees(trainer)
