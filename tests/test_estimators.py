"""An estimator of one's own, and which of them is taken."""

import pytest
import torch
from helpers import gradients, make_rollout, plain_logps
from transformers import Qwen3ForCausalLM

from gndpo_trl.estimators import Estimator, Sampled
from gndpo_trl.estimators.exact import Exact
from gndpo_trl.estimators.scored_in_loss import SamplerStatistics
from gndpo_trl.estimators.vocabulary import Baseline
from gndpo_trl.grpo.rollouts import valid_tokens


class SmoothClamp(Sampled):
    """The example of the documentation."""

    def advantages(self, scores, reading, mask, population):
        return 5.0 * torch.tanh(scores.raw / 5.0), None


def test_an_estimator_of_ten_lines_decides_the_gradient(make_trainer, checkpoints):
    trainer = make_trainer(per_device_train_batch_size=8, trainer_options={"estimator": SmoothClamp()})
    rollout = make_rollout(trainer)
    teacher, student = (
        Qwen3ForCausalLM.from_pretrained(checkpoints[f"qwen3-{who}"]) for who in ("teacher", "student")
    )
    scores = plain_logps(teacher, rollout) - plain_logps(student, rollout)
    expected = (5.0 * torch.tanh(scores / 5.0)).masked_fill(~valid_tokens(rollout), 0.0)
    torch.testing.assert_close(rollout["advantages"], expected, rtol=0, atol=1e-5)
    plain = gradients(make_trainer(max_steps=1, advantage_normalization="none", score_clip=None))
    found = gradients(make_trainer(max_steps=1, trainer_options={"estimator": SmoothClamp()}))
    # Scores of random models are small, and the clamp is smooth: nearly the same direction, and not the same.
    flat = [torch.cat([gradient.flatten() for gradient in of.values()]) for of in (plain, found)]
    assert 0.999 < torch.nn.functional.cosine_similarity(*flat, dim=0) and not torch.equal(*flat)


class Doubled(Sampled):
    """Has more in the loss than advantages: a number for each row, which it finds there again."""

    def for_the_loss(self, rollout, reading, moments):
        return {"doubled": torch.full((len(rollout["completion_ids"]),), 2.0)}

    def advantages_in_loss(self, logps, inputs):
        return inputs["advantages"] * inputs["doubled"].unsqueeze(-1)

    def metrics(self, reading, mask):
        return {"doubled": 2.0}


def test_what_an_estimator_puts_into_the_loss_it_finds_there_in_any_layout(make_trainer):
    options = {
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    }
    plain = gradients(make_trainer(**options))
    trainer = make_trainer(trainer_options={"estimator": Doubled()}, **options)
    for name, gradient in gradients(trainer).items():
        torch.testing.assert_close(gradient, 2 * plain[name], rtol=1e-5, atol=1e-6)
    assert trainer.state.log_history[0]["doubled"] == 2.0


@pytest.mark.parametrize(
    "options, kind",
    [({}, Sampled), ({"score_baseline": "expected"}, Baseline), ({"estimator": "exact"}, Exact)],
)
def test_the_configuration_names_estimators(make_trainer, options, kind):
    trainer = make_trainer(**options)
    assert type(trainer.estimator) is kind and isinstance(trainer.estimator, Estimator)


def test_the_samplers_statistics(make_trainer):
    def canned(prompts, trainer):
        prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [[11, 12]] * len(prompts),
            "logprobs": [[-3.0] * 2] * len(prompts),
        }

    trainer = make_trainer(use_sampling_logps=True, trainer_options={"rollout_func": canned})
    assert type(trainer.estimator) is SamplerStatistics


def test_mistaken_estimators_are_named(make_trainer):
    with pytest.raises(TypeError, match="`estimator` is 'exact'.*GNDPOConfig"):
        make_trainer(trainer_options={"estimator": "exact"})
    with pytest.raises(ValueError, match="given twice.*`score_baseline` is 'expected'"):
        make_trainer(score_baseline="expected", trainer_options={"estimator": SmoothClamp()})
    estimator = SmoothClamp()
    make_trainer(trainer_options={"estimator": estimator})
    # It would read the models of the second trainer in the steps of the first.
    with pytest.raises(ValueError, match=r"`estimator` \(SmoothClamp\) belongs to another trainer"):
        make_trainer(trainer_options={"estimator": estimator})


@pytest.mark.parametrize(
    "make_advantages, message",
    [
        (
            lambda scores: scores.raw.sum(-1),
            r"Mistaken.advantages returned advantages of shape \(8,\), .* needs \(8, \d+\)",
        ),
        (lambda scores: scores.raw / 0.0, "Mistaken.advantages returned NaN or infinity for a valid token"),
    ],
    ids=["one for a completion", "divided by zero"],
)
def test_advantages_that_are_none_are_refused(make_trainer, make_advantages, message):
    class Mistaken(Sampled):
        def advantages(self, scores, reading, mask, population):
            return make_advantages(scores), None

    trainer = make_trainer(trainer_options={"estimator": Mistaken()}, per_device_train_batch_size=8)
    with pytest.raises(ValueError, match=message):
        make_rollout(trainer)
