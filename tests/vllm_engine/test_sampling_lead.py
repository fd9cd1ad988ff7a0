"""A real server that samples while the student learns."""

import os
import signal

import pytest
import torch
from helpers import plain_logps
from peft import LoraConfig
from trainers import logged
from transformers import TrainerCallback

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.grpo.checkpoints import RunCannotGoOn


pytestmark = pytest.mark.usefixtures("weights_by_file")


class Remembering(GNDPOTrainer):
    """Has the student of the step before score what was sampled, beside the student that learns."""

    def _watch_sampling_logps(self, rollout, logps):
        now = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.weights[-1] if self.weights else now)
        of_then = plain_logps(self.model, rollout)
        self.model.load_state_dict(now)
        self.weights.append(now)
        valid = rollout["completion_mask"].bool()
        self.differences.append((rollout["sampling_per_token_logps"] - of_then)[valid].abs().max().item())
        self.changes.append((logps - of_then)[valid].abs().mean().item())
        super()._watch_sampling_logps(rollout, logps)


@pytest.fixture
def make(make_config, checkpoints, text_dataset, image_dataset):
    def make(url: str, images: bool = True, peft_config=None, eval_dataset=None, **options) -> GNDPOTrainer:
        options = {"max_steps": 4, "sampling_lead": 1, "vllm_server_timeout": 420.0, **options}
        trainer = Remembering(
            model=checkpoints["qwen25vl-student"],
            teacher_model=checkpoints["qwen25vl-teacher"],
            args=make_config(GNDPOConfig, use_vllm=True, vllm_mode="server", vllm_server_base_url=url, **options),
            train_dataset=image_dataset if images else text_dataset,
            eval_dataset=eval_dataset,
            peft_config=peft_config,
        )
        trainer.weights, trainer.differences, trainer.changes = [], [], []
        return trainer

    return make


def is_of_the_policy_that_sampled(trainer: GNDPOTrainer) -> bool:
    assert logged(trainer, "sampling/staleness") == [0, 1, 1, 1]
    assert logged(trainer, "sampling/policy_change/mean") == pytest.approx(trainer.changes[1:], rel=1e-3)
    return max(trainer.differences) < 1e-5 and min(trainer.changes[1:]) > 1e-4


@pytest.mark.parametrize("images", [True, False])
def test_log_probs_are_of_the_weights_of_one_step_ago(make, servers, images):
    trainer = make(servers["qwen25vl"], images)
    trainer.train()
    assert is_of_the_policy_that_sampled(trainer)


def test_an_adapter_alone(make, image_server_with_adapters):
    adapter = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|down_proj)")
    trainer = make(image_server_with_adapters, peft_config=adapter, learning_rate=0.02)
    assert trainer.vllm_generation.adapter is not None
    trainer.train()
    assert is_of_the_policy_that_sampled(trainer)


def test_evaluation_in_between(make, servers, image_dataset):
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    trainer = make(servers["qwen25vl"], eval_dataset=image_dataset.select(range(2)), **options)
    trainer._watch_sampling_logps = super(Remembering, trainer)._watch_sampling_logps
    trainer.train()
    assert logged(trainer, "sampling/staleness") == [0, 1, 1, 1]
    assert max(logged(trainer, "eval_sampling/logp_difference/max")) < 1e-5
    assert torch.tensor(logged(trainer, "reverse_kl")).isfinite().all()


def test_a_server_that_is_killed_while_it_samples(make, checkpoints, serve):
    process, url = serve(checkpoints["qwen25vl-student"])
    trainer = make(url)

    class Kill(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.killpg(process.pid, signal.SIGKILL)

    trainer.add_callback(Kill())
    with pytest.raises(RunCannotGoOn, match=f"server at {url} samples no more.*ended after step 2, which is saved"):
        trainer.train()
