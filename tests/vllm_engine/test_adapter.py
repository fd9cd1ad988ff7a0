"""A LoRA student whose adapter alone goes to a vLLM server."""

import pytest
from peft import LoraConfig
from trainers import Trainer, agrees, some_reward

from gndpo_trl.grpo.vllm import VLLMConfig
from gndpo_trl.grpo.vllm_adapter import NAME


pytestmark = pytest.mark.usefixtures("weights_by_file")


@pytest.fixture(scope="module")
def lora_server(checkpoints, serve) -> str:
    return serve(checkpoints["qwen3-student"], max_lora_rank=8)[1]


@pytest.fixture
def make(make_config, checkpoints, lora_server, text_dataset):
    def make(**adapter) -> Trainer:
        options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": lora_server}
        options.update(vllm_server_timeout=420.0, vllm_importance_sampling_correction=True)
        adapter = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **adapter}
        return Trainer(
            model=checkpoints["qwen3-student"],
            reward_funcs=some_reward,
            args=make_config(VLLMConfig, **{**options, "max_steps": 3, "learning_rate": 0.1}),
            train_dataset=text_dataset,
            peft_config=LoraConfig(**adapter),
        )

    return make


@pytest.mark.parametrize("adapter", [{}, {"use_rslora": True, "lora_alpha": 3}], ids=["lora", "rslora"])
def test_the_server_samples_from_the_adapter_of_now(make, adapter):
    trainer = make(**adapter)
    assert trainer.vllm_generation.adapter is not None
    trainer.train()
    client = trainer.vllm_generation.vllm_client
    assert client.model == NAME and trainer.vllm_generation._weight_metadata is None, "no other weight was sent"
    weights = [weight for key, weight in trainer.model.named_parameters() if "lora_B" in key]
    assert max(weight.abs().max() for weight in weights) > 0.05, "the adapter has learned something"
    assert agrees(trainer, steps=3)


@pytest.mark.parametrize(
    "adapter, why",
    [
        ({"r": 16}, "its rank is 16, and the server takes 8"),
        ({"use_dora": True}, "`use_dora` is True"),
        ({"rank_pattern": {"q_proj": 2}}, "`rank_pattern` is"),
        ({"modules_to_save": ["lm_head"]}, "`modules_to_save` is"),
    ],
)
def test_what_the_server_would_read_wrong_is_merged(make, caplog, adapter, why):
    trainer = make(**adapter)
    assert trainer.vllm_generation.adapter is None
    assert f"gets all weights with the student's merged into them: {why}" in caplog.text


def test_a_folder_that_the_server_does_not_find_ends_the_run(make, tmp_path):
    trainer = make()
    session = trainer.vllm_generation.vllm_client.session
    post = session.post

    def as_seen_from_elsewhere(url, json=None, **options):
        here = url.endswith("load_lora_adapter")
        return post(url, json={**json, "lora_path": str(tmp_path / "nowhere")} if here else json, **options)

    session.post = as_seen_from_elsewhere
    with pytest.raises(
        ValueError, match="did not take the student's adapter from .*find `output_dir` under the same path"
    ):
        trainer.train()


@pytest.fixture
def make_with_images(make_config, checkpoints, image_server_with_adapters, image_dataset):
    def make(modules: str) -> Trainer:
        options = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": image_server_with_adapters}
        options.update(vllm_server_timeout=420.0, vllm_importance_sampling_correction=True)
        return Trainer(
            model=checkpoints["qwen25vl-student"],
            reward_funcs=some_reward,
            args=make_config(VLLMConfig, **options, max_steps=3, learning_rate=0.1),
            train_dataset=image_dataset,
            peft_config=LoraConfig(r=4, target_modules=modules),
        )

    return make


def test_an_image_text_model_whose_decoder_is_adapted(make_with_images):
    trainer = make_with_images(r".*language_model.*(q_proj|v_proj|down_proj)")
    assert trainer.vllm_generation.adapter is not None
    trainer.train()
    assert agrees(trainer, steps=3)


def test_a_vision_tower_that_vllm_would_not_adapt_is_merged(make_with_images, caplog):
    trainer = make_with_images("all-linear")
    assert trainer.vllm_generation.adapter is None
    assert "visual" in caplog.text and "is trained, and vLLM would leave it as it is" in caplog.text


def test_what_a_server_silently_leaves_out_is_found_with_the_first_new_weights(make_with_images, monkeypatch):
    monkeypatch.setattr("gndpo_trl.grpo.vllm.why_not_alone", lambda model, rank: None)
    trainer = make_with_images("all-linear")
    with pytest.raises(ValueError, match="nats from the training engine's on average.*the weights that vLLM got"):
        trainer.train()
    assert trainer.state.global_step == 1
