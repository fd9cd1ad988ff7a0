"""What this package adds to `GRPOTrainer`, each part alone on a plain one, and all of it under GSPO."""

import math

import pytest
import torch
from helpers import LENGTHS, assert_same_gradients, gradients, reward
from peft import (
    CartridgeConfig,
    CPTConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    get_peft_model,
)
from transformers import Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import _ChunkedLogProbFunction

from gndpo_trl.grpo.checkpoints import CheckpointMixin
from gndpo_trl.grpo.config import ExtendedGRPOConfig
from gndpo_trl.grpo.loss_seam import SequenceTokenMixin
from gndpo_trl.grpo.real_tokens import RealTokensMixin, combine
from gndpo_trl.grpo.reward_stand_in import RewardStandInMixin
from gndpo_trl.grpo.sampling import SamplingMixin
from gndpo_trl.gspo import GSPOConfig, GSPOTrainer


def alone(mixin: type) -> type:
    return type(f"{mixin.__name__}Alone", (mixin, GRPOTrainer), {})


def padded_tokens(trainer: GRPOTrainer) -> list[int]:
    """Padded tokens of every forward pass from now on."""
    passes = []
    getattr(trainer, "_checked_heads", set()).add((trainer.model, ()))  # without the passes of that comparison
    trainer.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["attention_mask"].numel()), with_kwargs=True
    )
    return passes


# Forward passes


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_real_tokens_alone_give_the_gradient_of_grpo(make, level, loss_type):
    options = {"loss_type": loss_type, "importance_sampling_level": level}
    theirs = make(GRPOTrainer, **options)
    their_passes, expected = padded_tokens(theirs), gradients(theirs)
    ours = make(alone(RealTokensMixin), **options)
    our_passes, found = padded_tokens(ours), gradients(ours)
    assert_same_gradients(found, expected)
    assert len(our_passes) == len(their_passes) == 4 and sum(our_passes) < 0.6 * sum(their_passes)


def test_gspo_gives_the_gradient_of_trls_gspo_with_fewer_tokens(make):
    theirs = make(GRPOTrainer, importance_sampling_level="sequence", weight_decay=0.01, lr_scheduler_type="constant")
    their_passes, expected = padded_tokens(theirs), gradients(theirs)
    ours = make(GSPOTrainer, GSPOConfig)
    our_passes, found = padded_tokens(ours), gradients(ours)
    assert ours.importance_sampling_level == "sequence"
    assert_same_gradients(found, expected)
    assert sum(our_passes) < 0.6 * sum(their_passes)


@pytest.mark.parametrize("family", ["qwen3", "internvl"])
def test_the_head_projects_nothing_but_completions(
    make_config, checkpoints, text_dataset, image_dataset, monkeypatch, family
):
    """Short and long prompts share a pass; TRL's head would project the long ones too."""
    rows = (text_dataset if family == "qwen3" else image_dataset).to_list()[:4]
    for row in rows[::2]:
        row["prompt"] = [{"role": "user", "content": "what is the sum ? " * 30}]
    trainer = alone(RealTokensMixin)(
        checkpoints[f"{family}-student"],
        reward_funcs=reward,
        args=make_config(GRPOConfig, beta=0.1, num_iterations=2, max_steps=1),
        train_dataset=type(text_dataset).from_list(rows) if family == "qwen3" else image_dataset.select(range(4)),
    )
    trainer.generation_kwargs["suppress_tokens"] = trainer.generation_config.suppress_tokens = list(range(3, 11))
    trainer._checked_heads |= {(trainer.model, ()), (trainer.ref_model, ())}  # without the passes of that comparison
    projected, completions = [], []
    apply = _ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        _ChunkedLogProbFunction, "apply", lambda hidden, *args: projected.append(len(hidden)) or apply(hidden, *args)
    )
    score = trainer._get_per_token_logps_and_entropies

    def watch(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        completions.append(int(attention_mask[:, -logits_to_keep:].sum()))
        return score(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    trainer._get_per_token_logps_and_entropies = watch
    trainer.train()
    assert len(projected) == 3, "old log-probs, reference model, loss"
    assert projected == completions


def test_a_token_budget_counts_the_padding_that_was_asked_for(make):
    trainer = make(
        alone(RealTokensMixin), ExtendedGRPOConfig, pad_to_multiple_of=16, scoring_token_budget=200, num_iterations=2
    )
    passes = padded_tokens(trainer)
    trainer.train()
    scoring = passes[:-4]
    assert scoring and max(scoring) <= 200


@pytest.mark.parametrize("trainer_class", [alone(RealTokensMixin), GSPOTrainer])
def test_scoring_drops_nothing_out_and_the_loss_does(make, trainer_class):
    config_class = GSPOConfig if trainer_class is GSPOTrainer else GRPOConfig
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    trainer = make(trainer_class, config_class, trainer_options={"peft_config": lora})
    trainer.model.train()
    rollout = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 8)
    first, second = (trainer._per_token_logps(trainer.model, rollout) for _ in range(2))
    assert torch.equal(first, second)
    assert trainer.model.training and all(
        module.training for module in trainer.model.modules() if isinstance(module, torch.nn.Dropout)
    )
    trainer.current_gradient_accumulation_steps = 1  # set by `train`
    losses = {trainer._compute_loss(trainer.model, rollout).item() for _ in range(3)}
    assert trainer._metrics["train"]["clip_ratio/region_mean"] == [0.0] * 3, "the ratio is 1"
    entropies = trainer._metrics["train"]["entropy"]
    assert len(losses) == 1 and len(set(entropies)) == 3, "dropout as usual, and an unchanged ratio"


@pytest.mark.parametrize("config_class", [PrefixTuningConfig, CartridgeConfig])
def test_prompts_learned_as_a_cache_train_where_layers_keep_it(make, config_class):
    learned = config_class(task_type="CAUSAL_LM", num_virtual_tokens=3)
    found = gradients(make(GSPOTrainer, GSPOConfig, trainer_options={"peft_config": learned}))
    assert found and all("prompt_encoder" in name and gradient.abs().max() > 0 for name, gradient in found.items())
    with pytest.raises(
        ValueError, match=f"`peft_config` has a {config_class.__name__}, .*`gradient_checkpointing: false`"
    ):
        make(GSPOTrainer, GSPOConfig, trainer_options={"peft_config": learned}, gradient_checkpointing=True)


def test_learned_prompts_that_no_pass_can_train_are_refused(make, checkpoints):
    tasks = MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2)
    context = CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[3, 4], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 2])
    with pytest.raises(ValueError, match="`peft_config` has a MultitaskPromptTuningConfig, .* `task_ids`"):
        make(GSPOTrainer, GSPOConfig, trainer_options={"peft_config": tasks})
    model = get_peft_model(Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-student"]), context)
    with pytest.raises(
        ValueError, match="`model` has a CPTConfig, which cannot be trained: it makes a loss of its own"
    ):
        make(GSPOTrainer, GSPOConfig, model=model)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.1},
        {"beta": 0.1, "importance_sampling_level": "sequence"},
        {"loss_type": "dapo"},
        {"loss_type": "cispo", "epsilon_high": 0.5},
        {"loss_type": "vespo"},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_logged_metrics_are_those_of_a_single_micro_batch(make, options):
    """With a clip range so small that tokens are clipped: old log-probs differ by rounding, on either side of 1."""

    def run(**split):
        trainer = make(alone(RealTokensMixin), epsilon=1e-9, **options, **split)
        prepare = trainer._prepare_inputs

        def off_policy(generation_batch):
            inputs = prepare(generation_batch)
            # Log-probs of an older student that depend on the completion alone.
            inputs["old_per_token_logps"] = -3 - (inputs["completion_ids"] % 3) * 0.2
            return inputs

        trainer._prepare_inputs = off_policy
        trainer.train()
        return trainer.state.log_history[0]

    whole, split = run(per_device_train_batch_size=8, gradient_accumulation_steps=1), run()
    names = {name for name in whole if name in ("kl", "entropy") or "clip" in name or "vespo" in name}
    assert len(names) >= 2
    for name in names:
        assert split[name] == pytest.approx(whole[name], abs=1e-5), name
    if options.get("loss_type") in (None, "dapo"):
        assert 0 < whole["clip_ratio/region_mean"] < 1


def test_parts_of_a_metric_combine_as_their_name_says():
    nan = float("nan")
    assert combine("entropy", [(1.0, 1), (2.0, 3), (nan, 5)]) == 1.75
    assert combine("clip_ratio/low_min", [(0.2, 1), (0.1, 3), (nan, 5)]) == 0.1
    assert combine("clip_ratio/high_max", [(0.2, 1), (0.1, 3)]) == 0.2
    assert math.isnan(combine("entropy", [(nan, 1)]))
    assert combine("entropy", [(0.0, 0)]) == 0.0


# Sampling


def test_samples_are_drawn_without_dropout(make):
    def sample(trainer_class):
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.9, init_lora_weights=False)
        trainer = make(trainer_class, trainer_options={"peft_config": lora, "rollout_func": None}, temperature=1e-4)
        trainer.model.train()
        completions = trainer._generate_single_turn([[11, 12, 13]] * 8, None, {}, 8)[0]
        assert trainer.model.training
        return {tuple(ids) for ids in completions}

    assert len(sample(alone(SamplingMixin))) == 1
    assert len(sample(GRPOTrainer)) > 1


@pytest.mark.parametrize("training", [True, False])
def test_continuous_batching_leaves_the_mode_as_it_was(make, training):
    options = {
        "use_transformers_continuous_batching": True,
        "transformers_continuous_batching_config": {"num_blocks": 8, "max_batch_tokens": 64},
    }
    for trainer_class in (alone(SamplingMixin), GRPOTrainer):
        trainer = make(trainer_class, trainer_options={"rollout_func": None}, max_completion_length=4, **options)
        trainer.model.train(training)
        trainer._generate_single_turn([[11, 12, 13]] * 2, None, {}, 1)
        assert trainer.model.training == (training or trainer_class is GRPOTrainer)


# Checkpoints


@pytest.mark.parametrize(
    "trainer_class, config_class", [(alone(CheckpointMixin), GRPOConfig), (GSPOTrainer, GSPOConfig)]
)
def test_a_run_goes_on_exactly_from_the_middle_of_a_generation_batch(make, tmp_path, trainer_class, config_class):
    options = {
        "trainer_options": {"rollout_func": None},
        "gradient_accumulation_steps": 1,
        "num_iterations": 2,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = make(trainer_class, config_class, output_dir=str(tmp_path / "whole"), max_steps=6, **options)
    whole.train()
    part = {"output_dir": str(tmp_path / "part"), **options}
    make(trainer_class, config_class, max_steps=3, **part).train()
    resumed = make(trainer_class, config_class, max_steps=6, **part)
    resumed.train(resume_from_checkpoint=True)
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, resumed.model.state_dict()[name]), name


# Importance ratio and rewards


def test_sequence_token_alone_keeps_the_value_of_gspo_and_a_gradient_for_each_token(make):
    """Old log-probs that differ from the student's, so that the ratio is not 1."""
    losses, grads = {}, {}
    for level, trainer_class in (("sequence", GRPOTrainer), ("sequence_token", alone(SequenceTokenMixin))):
        trainer = make(trainer_class, importance_sampling_level=level, epsilon=10.0)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # set by `train`
        rollout = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 8)
        rollout["old_per_token_logps"] = -3 - (rollout["completion_ids"] % 3) * 0.2
        loss = trainer._compute_loss(trainer.model, rollout)
        loss.backward()
        losses[level] = loss.item()
        grads[level] = {name: parameter.grad for name, parameter in trainer.model.named_parameters()}
    assert losses["sequence_token"] == pytest.approx(losses["sequence"], abs=1e-6)
    # One advantage for each completion: the mean over tokens of token gradients is the sequence's gradient.
    assert_same_gradients(grads["sequence_token"], grads["sequence"])


class Unrewarded(RewardStandInMixin, GRPOTrainer):
    @staticmethod
    def stand_in(completions, **kwargs):
        return [0.0] * len(completions)

    def _generate_and_score_completions(self, inputs):
        rollout = super()._generate_and_score_completions(inputs)
        lengths = rollout["completion_mask"].sum(-1).float()
        self._log_stand_in("train", lengths, torch.zeros_like(lengths))
        return rollout


def test_a_trainer_without_rewards_logs_its_own_number(make):
    trainer = make(Unrewarded, trainer_options={"reward_funcs": None})
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["reward"] == entry["rewards/stand_in/mean"] == sum(LENGTHS) / len(LENGTHS)
    assert list(trainer._logs["rewards"]["stand_in"]) == LENGTHS
    trainer = make(Unrewarded)
    trainer.train()
    assert trainer.state.log_history[0]["reward"] != entry["reward"]
    assert list(trainer._logs["rewards"]["stand_in"]) == LENGTHS


def test_a_saved_model_is_one_that_loads(make, tmp_path):
    trainer = make(GSPOTrainer, GSPOConfig)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "saved").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in trainer.model.state_dict().items())
