"""`score_baseline="expected"` and `estimator="exact"` in the trainer, against ten lines over full logits in float64."""

import copy

import pytest
import torch
from test_trainer import make_rollout
from transformers import PreTrainedModel
from trl import DistillationConfig, DistillationTrainer

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.grpo.rollouts import valid_tokens
from gndpo_trl.grpo.trl_hooks import MULTIMODAL_KEYS


BOTH = {"baseline": {"score_baseline": "expected"}, "exact": {"estimator": "exact"}}
BOTH["exact with baseline"] = BOTH["baseline"] | BOTH["exact"]


def all_log_probs(model: PreTrainedModel, rollout: dict) -> torch.Tensor:
    """`(B, T, V)` log-probs of the whole vocabulary, from full logits in float64."""
    names = [key for key in MULTIMODAL_KEYS if key in rollout and key not in ("num_images", "num_tiles")]
    inputs = {name: rollout[name] for name in names}
    inputs["input_ids"] = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
    inputs["attention_mask"] = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    logits = model(**inputs).logits[:, :-1]
    return logits[:, -rollout["completion_ids"].size(1) :].log_softmax(-1)


def plain(model: PreTrainedModel, teacher: PreTrainedModel, rollout: dict, args: GNDPOConfig):
    """Advantages `(B, T)` of the sampled tokens and the loss `"grpo"` on policy, from the definitions."""
    ours = all_log_probs(model, rollout)
    with torch.no_grad():
        theirs = all_log_probs(teacher, rollout)
    mask, ids = valid_tokens(rollout), rollout["completion_ids"].unsqueeze(-1)
    probs, scores = ours.detach().exp(), (theirs - ours.detach()).clamp(-args.score_clip, args.score_clip)
    expected = (probs * scores).sum(-1, keepdim=True)
    if args.score_baseline == "expected":
        scores = scores - expected
    sampled = scores.gather(-1, ids).squeeze(-1)
    weights = probs * mask.unsqueeze(-1) if args.estimator == "exact" else mask.double().unsqueeze(-1)
    population = scores if args.estimator == "exact" else sampled.unsqueeze(-1)
    mean = (weights * population).sum() / mask.sum()
    std = ((weights * (population - mean).square()).sum() / (mask.sum() - 1) + 1e-8).sqrt()
    if args.advantage_normalization == "none":
        mean, std = 0.0, 1.0
    shift = 0.0 if args.score_baseline == "expected" else mean
    if args.estimator == "exact":
        per_token = (probs * ((scores - shift) / std) * ours).sum(-1)
    else:
        per_token = (sampled - shift) / std * ours.gather(-1, ids).squeeze(-1)
    loss = -((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    return ((sampled - shift) / std) * mask, loss


def double(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it was loaded, without what the trainer has added to it, in float64."""
    return type(model).from_pretrained(model.config._name_or_path, dtype=torch.float64)


def check_against_plain(trainer: GNDPOTrainer, rollout: dict) -> None:
    student = double(trainer.model)
    advantages, loss = plain(student, double(trainer.teacher.model), rollout, trainer.args)
    loss.backward()
    torch.testing.assert_close(rollout["advantages"].double(), advantages, rtol=0, atol=1e-5)
    trainer.current_gradient_accumulation_steps = 1  # set by `train`
    trainer._compute_loss(trainer.model, rollout).backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        if expected[name] is not None:
            torch.testing.assert_close(parameter.grad.double(), expected[name], rtol=0, atol=1e-5, msg=name)
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in expected.values())


# What they compute


@pytest.mark.parametrize("options", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("normalization", ["global", "none"])
def test_advantages_and_gradients_are_those_of_full_logits(make_trainer, options, normalization):
    trainer = make_trainer(per_device_train_batch_size=8, advantage_normalization=normalization, **options)
    check_against_plain(trainer, make_rollout(trainer))


@pytest.mark.parametrize("options", [BOTH["baseline"], BOTH["exact"]], ids=["baseline", "exact"])
@pytest.mark.parametrize("family", ["internvl", "qwen25vl"])
def test_image_text_models(make_trainer, family, options):
    trainer = make_trainer(family, per_device_train_batch_size=8, **options)
    check_against_plain(trainer, make_rollout(trainer))


def test_a_clamp_that_binds(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=8, score_clip=0.05, estimator="exact")
    check_against_plain(trainer, make_rollout(trainer))
    assert trainer._metrics["train"]["score/clamped_low"][0] > 0.1


@pytest.mark.parametrize("options", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("normalization", ["group", "sequence"])
def test_other_populations(make_trainer, options, normalization):
    """Every population by itself is normalized as the batch is."""
    trainer = make_trainer(per_device_train_batch_size=8, advantage_normalization=normalization, **options)
    rollout = make_rollout(trainer)
    args = copy.copy(trainer.args)
    args.advantage_normalization = "global"
    size = {"group": 2, "sequence": 1}[normalization]
    for start in range(0, 8, size):
        rows = {
            key: value[start : start + size]
            for key, value in rollout.items()
            if isinstance(value, torch.Tensor) and value.ndim > 0
        }
        if valid_tokens(rows).sum() < 2:  # no statistics
            assert not rows["advantages"].any()
            continue
        with torch.no_grad():
            model, teacher = double(trainer.model), double(trainer.teacher.model)
            expected, _ = plain(model, teacher, rows, args)
        torch.testing.assert_close(rows["advantages"].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [BOTH["baseline"], BOTH["exact"]], ids=["baseline", "exact"])
def test_the_temperature_is_the_students_alone(make_trainer, options):
    trainer = make_trainer(per_device_train_batch_size=8, temperature=0.5, **options)
    rollout = make_rollout(trainer)
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, rollout).backward()
    # Logits divided by 0.5 are those of a head twice as large.
    untied = double(trainer.model)
    untied.lm_head.weight = torch.nn.Parameter(2 * untied.lm_head.weight.detach().clone())
    advantages, loss = plain(untied, double(trainer.teacher.model), rollout, trainer.args)
    torch.testing.assert_close(rollout["advantages"].double(), advantages, rtol=0, atol=1e-5)
    loss.backward()
    norm = trainer.model.model.norm.weight.grad.double()
    torch.testing.assert_close(norm, untied.model.norm.weight.grad, rtol=0, atol=1e-5)


def test_the_exact_gradient_is_that_of_distillation_trainer(make_trainer, checkpoints, text_dataset, tmp_path):
    """Without clamp and normalization, on policy, as a mean over tokens: TRL's reverse KL over the whole vocabulary."""
    options = {"score_clip": None, "advantage_normalization": "none", "loss_type": "dapo", "estimator": "exact"}
    trainer = make_trainer(per_device_train_batch_size=8, **options)
    rollout = make_rollout(trainer)
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, rollout).backward()
    theirs = DistillationTrainer(
        model=checkpoints["qwen3-student"],
        teacher_model=checkpoints["qwen3-teacher"],
        args=DistillationConfig(str(tmp_path), beta=1.0, max_completion_length=8, use_cpu=True, bf16=False),
        train_dataset=text_dataset,
    )
    theirs.model.train()
    loss, _, _ = theirs._compute_loss(theirs.model, rollout, valid_tokens(rollout).sum())
    loss.backward()
    expected = dict(theirs.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-6, msg=name)
        assert parameter.grad.abs().max() > 0
