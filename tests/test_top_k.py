"""`teacher_top_k` with teachers in this process, against full logits in float64; behind a server: test_server_teacher.py."""

import pytest
import tiny_models
import torch
from helpers import (
    IN_THE_MIDDLE,
    assert_resumes_in_the_middle,
    assert_same_gradients,
    gradients,
    make_rollout,
    plain_log_probs,
)
from peft import LoraConfig

from gndpo_trl.grpo.rollouts import valid_tokens


BOTH = {"baseline": {"score_baseline": "expected"}, "exact": {"estimator": "exact"}}


def coarser(theirs: torch.Tensor, ours: torch.Tensor, ids: torch.Tensor, top_k: int) -> torch.Tensor:
    """The teacher's log-probs `(B, T, V)`, with the mass of the tokens that are not known spread as the student spreads it."""
    known = theirs.argsort(-1, descending=True)[..., : top_k + 1]
    missing = (known == ids.unsqueeze(-1)).any(-1).logical_not()
    known[..., -1][missing] = ids[missing]
    outside = torch.ones_like(theirs, dtype=torch.bool).scatter_(-1, known, False)
    rests = [(logps.exp() * outside).sum(-1, keepdim=True) for logps in (theirs, ours)]
    return torch.where(outside, ours + (rests[0] / rests[1]).log(), theirs)


def double(model):
    return type(model).from_pretrained(model.config._name_or_path, dtype=torch.float64)


@pytest.mark.parametrize("options", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("top_k", [1, 5])
def test_advantages_and_gradients_are_those_of_full_logits(make_trainer, options, top_k):
    trainer = make_trainer(per_device_train_batch_size=8, teacher_top_k=top_k, **options)
    rollout = make_rollout(trainer)
    student, mask, ids = double(trainer.model), valid_tokens(rollout), rollout["completion_ids"]
    ours = plain_log_probs(student, rollout)
    with torch.no_grad():
        theirs = coarser(plain_log_probs(double(trainer.teacher.model), rollout), ours, ids, top_k)
    probs, scores = ours.detach().exp(), (theirs - ours.detach()).clamp(-5, 5)
    is_exact = "estimator" in options
    values = scores if is_exact else (scores - (probs * scores).sum(-1, keepdim=True)).gather(-1, ids.unsqueeze(-1))
    weights = probs * mask.unsqueeze(-1) if is_exact else mask.double().unsqueeze(-1)
    mean = (weights * values).sum() / mask.sum()
    std = ((weights * (values - mean).square()).sum() / (mask.sum() - 1) + 1e-8).sqrt()
    logps = ours.gather(-1, ids.unsqueeze(-1))
    per_token = (probs * (scores - mean) / std * ours).sum(-1) if is_exact else (values / std * logps).squeeze(-1)
    (-((per_token * mask).sum(-1) / mask.sum(-1)).mean()).backward()
    sampled = (scores.gather(-1, ids.unsqueeze(-1)) - mean) / std if is_exact else values / std
    torch.testing.assert_close(rollout["advantages"].double(), sampled.squeeze(-1) * mask, rtol=0, atol=1e-5)
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, rollout).backward()
    assert_same_gradients(
        *({name: p.grad.double() for name, p in model.named_parameters()} for model in (trainer.model, student))
    )


@pytest.mark.parametrize("family", ["qwen3", "internvl", "qwen25vl"])
def test_with_all_tokens_it_is_the_whole_distribution(make_trainer, family):
    options = {"estimator": "exact", "max_steps": 1, "per_device_train_batch_size": 8}
    expected = gradients(make_trainer(family, **options))
    assert_same_gradients(gradients(make_trainer(family, teacher_top_k=10_000, **options)), expected)


def test_what_stays_with_the_rollout(make_trainer):
    """Of each token 17 ids and log-probs, of 8 bytes together; no row keeps more."""
    trainer = make_trainer(per_device_train_batch_size=8, estimator="exact", teacher_top_k=16)
    rollout = make_rollout(trainer)
    lengths = rollout["completion_mask"].sum(-1).tolist()
    states = rollout["teacher_states"] if "teacher_states" in rollout else rollout["teacher_hidden_states"]
    assert [len(row) for row in states] == lengths
    num_bytes = sum(row.untyped_storage().nbytes() for row in states)
    assert num_bytes == sum(lengths) * 17 * 8 <= sum(lengths) * 200


def test_what_is_looked_at_is_logged(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=8, estimator="exact", teacher_top_k=4, score_clip=0.05)
    rollout = make_rollout(trainer)
    found = {name: values[-1] for name, values in trainer._metrics["train"].items() if name.startswith("top_k/")}
    mask, ids = valid_tokens(rollout), rollout["completion_ids"]
    with torch.no_grad():
        ours, theirs = (plain_log_probs(double(one), rollout) for one in (trainer.model, trainer.teacher.model))
    scores = coarser(theirs, ours, ids, 4) - ours
    outside = theirs != coarser(theirs, ours, ids, 4)
    best = [logps.topk(4).indices for logps in (ours, theirs)]
    expected = {
        "top_k/student_mass": (ours.exp() * ~outside).sum(-1),
        "top_k/rest_clamped": ((scores * outside).abs().amax(-1) > 0.05).double(),
        "top_k/overlap": (best[0].unsqueeze(-1) == best[1].unsqueeze(-2)).any(-1).double().mean(-1),
    }
    assert found == {name: pytest.approx(values[mask].mean().item(), abs=1e-5) for name, values in expected.items()}
    assert 0 < found["top_k/rest_clamped"] < 1
    whole = make_trainer(per_device_train_batch_size=8, estimator="exact")
    make_rollout(whole)
    assert not [name for name in whole._metrics["train"] if name.startswith("top_k/")]


@pytest.fixture
def briefed(text_dataset):
    prompts = [[{"role": "user", "content": f"one plus two ? {row['prompt'][0]['content']}"}] for row in text_dataset]
    return text_dataset.add_column("teacher_prompt", prompts)


@pytest.mark.parametrize("options", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("weights", ["ema", "periodic", "live", "initial", "initial adapters"])
def test_the_student_as_its_own_teacher(make_trainer, briefed, weights, options):
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]) if "adapters" in weights else None
    found = {}
    for top_k in (None, 10_000, 4):
        trainer = make_trainer(
            trainer_options={"train_dataset": briefed, "peft_config": lora},
            teacher_model="self",
            teacher_weights=weights.split()[0],
            teacher_top_k=top_k,
            max_steps=2,
            learning_rate=1e-2,
            **options,
        )
        trainer.train()
        found[top_k] = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert found[10_000] == pytest.approx(found[None], rel=1e-3)
    assert found[4] != pytest.approx(found[None], rel=1e-3)


@pytest.mark.parametrize("options", BOTH.values(), ids=BOTH)
def test_several_teachers_of_which_one_is_known_whole(make_trainer, checkpoints, text_dataset, tmp_path, options):
    from gndpo_trl.teachers import LocalTeacher

    names = ["first" if row % 3 else "second" for row in range(len(text_dataset))]
    wide = tiny_models.save(*tiny_models.build_qwen3(seed=2, width=64), tmp_path / "wide")
    options = {
        "trainer_options": {"train_dataset": text_dataset.add_column("teacher", names)},
        "max_steps": 1,
        **options,
    }
    found = [
        gradients(
            make_trainer(teacher_model={"first": first, "second": wide}, per_device_train_batch_size=8, **options)
        )
        for first in (checkpoints["qwen3-teacher"], LocalTeacher(checkpoints["qwen3-teacher"], top_k=10_000))
    ]
    assert_same_gradients(found[1], found[0])


def test_a_run_goes_on_from_the_middle_of_a_generation_batch(make_trainer, tmp_path):
    assert_resumes_in_the_middle(make_trainer, tmp_path, estimator="exact", teacher_top_k=4)
    options = {**IN_THE_MIDDLE, "estimator": "exact", "teacher_top_k": 5}
    with pytest.warns(UserWarning, match="`teacher` was .*its likeliest 4 tokens.*They are left"):
        make_trainer(output_dir=str(tmp_path / "parts"), max_steps=5, **options).train(
            resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-1")
        )


def test_a_padded_vocabulary_on_either_side(make_trainer, tmp_path):
    size = len(tiny_models.build_tokenizer())
    larger = tiny_models.save(*tiny_models.build_qwen3(seed=1, vocab_size=size + 64), tmp_path / "larger")
    expected = gradients(make_trainer(teacher_model=larger, estimator="exact", max_steps=1))
    found = gradients(make_trainer(teacher_model=larger, estimator="exact", max_steps=1, teacher_top_k=size + 64))
    assert_same_gradients(found, expected)


def test_what_has_no_use_for_it_is_refused(make_trainer, checkpoints):
    from gndpo_trl.teachers import LocalTeacher

    with pytest.raises(ValueError, match="`teacher_top_k` is 0, but it is a number of tokens"):
        make_trainer(teacher_top_k=0)
    with pytest.raises(
        ValueError, match="`teacher_top_k` is set, but `teacher_model` is a LocalTeacher, which decides that"
    ):
        make_trainer(teacher_model=LocalTeacher(checkpoints["qwen3-teacher"]), teacher_top_k=4)


def test_tokens_that_nobody_looks_at_are_not_asked_for(make_trainer):
    with pytest.raises(ValueError, match="`teacher_top_k` is 4, but the sampled token is all that is looked at"):
        make_trainer(teacher_top_k=4)
