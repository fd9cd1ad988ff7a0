"""Sampling with a vLLM server."""

import pytest
from datasets import Dataset
from requests.adapters import HTTPAdapter
from trainers import Trainer, agrees, some_reward

from gndpo_trl.grpo.vllm import VLLMConfig
from gndpo_trl.grpo.vllm_engine import ExactVLLMClient


pytestmark = pytest.mark.usefixtures("weights_by_file")


@pytest.fixture
def make(make_config, checkpoints, servers, text_dataset, image_dataset):
    def make(family: str, train_dataset=None, **options) -> Trainer:
        defaults = {
            "use_vllm": True,
            "vllm_mode": "server",
            "vllm_server_base_url": servers[family],
            "vllm_server_timeout": 420.0,  # two servers and an engine start on two cores at once
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
    assert agrees(trainer)


def test_text(make, text_dataset):
    trainer = make("qwen25vl", text_dataset)
    trainer.train()
    assert agrees(trainer)


def test_new_weights_see_old_images_anew(make, image_dataset):
    trainer = make("qwen25vl", image_dataset.select([1] * 8))
    trainer.train()
    assert agrees(trainer)


# What it refuses


def test_a_truncated_prompt(make, text_dataset):
    trainer = make("qwen25vl", text_dataset, generation_kwargs={"truncate_prompt_tokens": 3})
    with pytest.raises(ValueError, match=r"row 0 from another prompt.*: 3 tokens instead of \d+, different from"):
        trainer.train()


def test_images_that_the_server_makes_other_tokens_of(make):
    trainer = make("qwen25vl")
    trainer.processing_class.image_processor.size = {"shortest_edge": 256, "longest_edge": 256}
    with pytest.raises(ValueError, match=r"server makes \d+ tokens of image 0 .* student's processor \d+"):
        trainer.train()


def test_more_images_than_the_server_takes(make, image_dataset):
    rows = image_dataset.to_list()
    rows[5]["images"] = 4 * rows[5]["images"][:1]
    with pytest.raises(ValueError, match="prompts with 4 images, but vLLM takes 3. Raise .*--limit-mm-per-prompt"):
        make("qwen25vl", Dataset.from_list(rows, features=image_dataset.features))


def test_a_prompt_longer_than_the_server_takes(make):
    prompt = [{"role": "user", "content": "what is the sum ? " * 70}]
    with pytest.raises(ValueError, match=r"row 0 of the data has \d+ tokens, but vLLM holds 256.*--max-model-len"):
        make("qwen25vl", Dataset.from_dict({"prompt": [prompt]}))


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("logprobs_mode", "raw_logprobs", "--logprobs-mode raw_logprobs.*Restart it with `--logprobs-mode processed"),
        ("version", "0.19.0", "The engine is vLLM 0.19.0.*Install a version from 0.22.0 to below 0.31.0"),
    ],
)
def test_a_server_that_runs_otherwise(make, monkeypatch, name, value, message):
    """A third server for each would take a minute; what it would say is put in the place of what this one says."""
    settings = ExactVLLMClient.settings
    monkeypatch.setattr(ExactVLLMClient, "settings", lambda *args: {**settings(*args), name: value})
    with pytest.raises(ValueError, match=message):
        make("qwen25vl")


def test_a_server_without_its_development_endpoints(make, servers):
    class Closed(HTTPAdapter):
        """A server without `VLLM_SERVER_DEV_MODE=1` answers 404 here."""

        def send(self, request, **kwargs):
            response = super().send(request, **kwargs)
            response.status_code = 404
            return response

    trainer = make("qwen25vl")
    trainer.vllm_generation.vllm_client.session.mount(f"{servers['qwen25vl']}/server_info", Closed())
    with pytest.raises(RuntimeError, match="Restart it with `VLLM_SERVER_DEV_MODE=1`"):
        trainer.vllm_generation.vllm_client.settings()
