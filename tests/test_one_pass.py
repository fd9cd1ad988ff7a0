"""Generation batches that the passes of their own loss read, against the same batches read before it."""

import math

import pytest
import torch
from helpers import Forgetful, gradients
from peft import LoraConfig
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, TrainerCallback

from gndpo_trl.objective import distributions


ESTIMATORS = {
    "exact": {"estimator": "exact"},
    "exact with baseline": {"estimator": "exact", "score_baseline": "expected"},
    "baseline": {"score_baseline": "expected"},
}
UNNORMALIZED = {"advantage_normalization": "none"}

# Metrics that are those of a pass before the loss; the others are of time and of tokens in a pass.
SAME_METRICS = ("score/", "teacher/", "advantages/", "reverse_kl", "entropy", "grad_norm", "reward", "completions/")


def both(make, **options) -> list[tuple[dict, dict]]:
    """Gradients and logs of the first step, in two passes and in one."""
    results = []
    for in_one_pass in (False, True):
        trainer = make(**{"max_steps": 1, **options})
        trainer.in_one_pass = in_one_pass
        unread = []
        leave = trainer._leave_to_the_loss
        trainer._leave_to_the_loss = lambda batch, leave=leave, unread=unread: (unread.append(batch), leave(batch))
        results.append((gradients(trainer), trainer.state.log_history[0]))
        assert len(unread) == in_one_pass
    return results


def assert_the_same(results: list[tuple[dict, dict]], tolerance: float = 1e-6) -> None:
    (expected, logs), (found, others) = results
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-4
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
    watched = [name for name in logs if name.startswith(SAME_METRICS)]
    assert {"score/mean", "entropy", "advantages/std", "reward", "grad_norm"} <= {*watched}
    for name in watched:
        if logs[name] is None:  # NaN, as transformers keeps it
            assert others[name] is None, name
            continue
        # TRL's entropy is a mean of means where rows are not regrouped, and here that of all tokens.
        rel = 1e-4 if name == "entropy" else 1e-5
        assert others[name] == pytest.approx(logs[name], abs=1e-5, rel=rel), name
    assert "time/student_scoring" in logs and "time/student_scoring" not in others


@pytest.mark.parametrize("options", ESTIMATORS.values(), ids=ESTIMATORS)
@pytest.mark.parametrize("family", ["qwen3", "internvl", "qwen25vl"])
def test_one_pass_leaves_the_gradient_and_the_logs_of_two(make_trainer, family, options):
    layout = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_the_same(both(make_trainer, family=family, **layout, **options))


@pytest.mark.parametrize("options", ESTIMATORS.values(), ids=ESTIMATORS)
def test_in_float64_it_is_the_same_to_twelve_digits(make_trainer, checkpoints, options):
    """On a model that computes in float64 throughout: others do their norms in float32."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["qwen3-student"])

    def build(seed: int, width: int) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        sizes = {"n_embd": width, "n_layer": 2, "n_head": 2, "n_positions": 128, "initializer_range": 0.3}
        config = GPT2Config(vocab_size=len(tokenizer), resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **sizes)
        return GPT2LMHeadModel(config).double()

    def make(**options):
        trainer_options = {"processing_class": tokenizer, "teacher_processing_class": tokenizer}
        models = {"model": build(0, 16), "teacher_model": build(1, 24)}
        return make_trainer(**models, trainer_options=trainer_options, **options)

    # TRL's head, of which the baseline's two passes take the gradient, computes in float32.
    tolerance = 1e-12 if "estimator" in options else 1e-7
    assert_the_same(both(make, gradient_accumulation_steps=4, **options), tolerance)


@pytest.mark.parametrize(
    "more",
    [
        {"share_prompts": True, "num_generations": 4},
        {"share_prompts": False, "gradient_checkpointing": True},
        {"scoring_token_budget": 40, "per_device_train_batch_size": 4},
        {"pad_to_multiple_of": 8},
        {"loss_type": "dr_grpo", "temperature": 0.7},
        {"loss_type": "cispo", "std_floor": 2.0},
        {"loss_type": "bnpo", "max_grad_norm": 0.0},
        {"score_clip": 0.05, "importance_sampling_level": "sequence_token"},
        {"mask_truncated_completions": True},
        {"teacher_offload": True},
        {"teacher_top_k": 4, "teacher_offload": True},
        {"teacher_top_k": 4},
    ],
    ids=lambda more: ", ".join(more),
)
@pytest.mark.parametrize("options", [ESTIMATORS["exact"], ESTIMATORS["baseline"]], ids=["exact", "baseline"])
def test_layouts_losses_and_what_else_decides_a_gradient(make_trainer, options, more):
    layout = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_the_same(both(make_trainer, **{**layout, **options, **more}))


@pytest.mark.parametrize("loss_type", ["sapo", "vespo", "luspo"])
def test_losses_that_only_the_baseline_goes_with(make_trainer, loss_type):
    level = "sequence_token" if loss_type == "luspo" else "token"
    options = {"loss_type": loss_type, "importance_sampling_level": level, "gradient_accumulation_steps": 4}
    assert_the_same(both(make_trainer, **ESTIMATORS["baseline"], **options))


@pytest.mark.parametrize("options", [{}, *ESTIMATORS.values()], ids=["sampled", *ESTIMATORS])
def test_without_normalization_nothing_is_scaled(make_trainer, options):
    assert_the_same(both(make_trainer, gradient_accumulation_steps=4, **UNNORMALIZED, **options))


def test_the_sampled_form_without_normalization_with_all_that_goes_into_a_score(make_trainer):
    def make(**options):
        return make_trainer(
            trainer_options={"reward_funcs": lambda completion_ids, **kwargs: [1.0 * len(x) for x in completion_ids]},
            **options,
        )

    shaped = {"score_discount": 0.9, "score_power": 0.5, "reward_coef": 0.3, "distillation_coef": 0.5}
    assert_the_same(both(make, gradient_accumulation_steps=4, beta=0.1, num_generations=2, **UNNORMALIZED, **shaped))


def test_an_adapter_learns_the_same(make_trainer):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"], init_lora_weights=False)

    def make(**options):
        return make_trainer(trainer_options={"peft_config": lora}, **options)

    assert_the_same(both(make, gradient_accumulation_steps=4, seed=3, **ESTIMATORS["exact"]), tolerance=2e-6)


@pytest.mark.parametrize("kind", ["live", "ema", "two", "own prompts"])
@pytest.mark.parametrize("options", [ESTIMATORS["exact"], ESTIMATORS["baseline"]], ids=["exact", "baseline"])
def test_every_kind_of_teacher(make_trainer, checkpoints, text_dataset, kind, options):
    prompts = [[{"role": "user", "content": f"one plus two ? {row['prompt'][0]['content']}"}] for row in text_dataset]
    some = [prompt if row % 2 else None for row, prompt in enumerate(prompts)]
    teachers = {
        "live": ("self", "teacher_prompt", prompts, {"teacher_weights": "live"}),
        "ema": ("self", "teacher_prompt", prompts, {"teacher_weights": "ema"}),
        "two": (
            {"one": checkpoints["qwen3-teacher"], "other": checkpoints["qwen3-student"]},
            "teacher",
            ["one" if row % 3 else "other" for row in range(len(text_dataset))],
            {},
        ),
        "own prompts": (None, "teacher_prompt", some, {}),
    }
    teacher_model, column, values, more = teachers[kind]

    def make(**options):
        dataset = text_dataset.add_column(column, values)
        return make_trainer(teacher_model=teacher_model, trainer_options={"train_dataset": dataset}, **options)

    layout = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert_the_same(both(make, **layout, **more, **options))


def test_whole_runs_go_the_same_way(make_trainer):
    weights = []
    for in_one_pass in (False, True):
        trainer = make_trainer(estimator="exact", max_steps=4, gradient_accumulation_steps=2, learning_rate=1e-3)
        trainer.in_one_pass = in_one_pass
        trainer.train()
        weights.append({name: value.clone() for name, value in trainer.model.named_parameters()})
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=0, atol=1e-5, msg=name)


def test_both_heads_are_applied_once(make_trainer, monkeypatch):
    positions, of_steps = [], []
    logits = distributions.LMHead.logits

    def count(head, hidden):
        positions.append(len(hidden))
        return logits(head, hidden)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            of_steps.append(sum(positions))

    monkeypatch.setattr(distributions.LMHead, "logits", count)
    trainer = make_trainer(estimator="exact", max_steps=2, gradient_accumulation_steps=4)
    trainer.add_callback(Watch())
    trainer.train()
    # The first step also looks whether the heads are what the models say.
    assert of_steps[1] - of_steps[0] == 2 * trainer.state.log_history[1]["advantages/num_tokens"]


@pytest.mark.parametrize(
    "who, options",
    [(who, options) for options in ESTIMATORS.values() for who in ("teacher", "student")]
    + [("student", UNNORMALIZED)],
    ids=lambda value: value if isinstance(value, str) else ", ".join(value),
)
def test_nan_in_the_last_micro_batch_ends_the_run_before_a_weight_moves(make_trainer, who, options):
    trainer = make_trainer(gradient_accumulation_steps=4, **options)
    losses = []
    compute = trainer._compute_loss

    def count(*args):
        losses.append(args)
        return compute(*args)

    def spoil(module, inputs, hidden):
        if len(losses) < 4:
            return hidden
        hidden = hidden.clone()
        hidden[:, -2:] = math.nan
        return hidden

    trainer._compute_loss = count
    (trainer.teacher if who == "teacher" else trainer).model.get_decoder().norm.register_forward_hook(spoil)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=rf"The {who} gave non-finite log-probs for \d+ of \d+ tokens"):
        trainer.train()
    assert len(losses) == 4
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2},
        {"steps_per_generation": 1, "gradient_accumulation_steps": 2},
        {"num_iterations": 2},
        {"advantage_normalization": "sequence"},
        {"advantage_normalization": "group"},
        {"entropy_coef": 0.01, "score_baseline": "expected", "estimator": "sampled"},
        {"beta": 0.1, "score_baseline": "expected", "estimator": "sampled"},
        {"reward_coef": 0.5, "score_baseline": "expected", "estimator": "sampled"},
        {"top_entropy_quantile": 0.5, "score_baseline": "expected", "estimator": "sampled"},
        {"estimator": "sampled"},
    ],
    ids=lambda options: ", ".join(options),
)
def test_where_something_has_to_be_known_before_it_is_read_before(make_trainer, options):
    rewards = {"reward_funcs": lambda completion_ids, **kwargs: [1.0] * len(completion_ids)}
    trainer = make_trainer(trainer_options=rewards, **{"estimator": "exact", "max_steps": 1, **options})
    trainer.train()
    assert "time/student_scoring" in trainer.state.log_history[0]


@pytest.mark.parametrize("options", [*ESTIMATORS.values(), UNNORMALIZED], ids=[*ESTIMATORS, "none"])
def test_what_a_teacher_may_not_know_leaves_the_loss_before(make_trainer, checkpoints, options):
    def make(**options):
        trainer = make_trainer(teacher_model=Forgetful(checkpoints["qwen3-teacher"]), **options)
        score, read = trainer.teacher.per_token_logps, trainer.teacher.hidden_states

        def forget(rollout):
            return score(rollout).masked_fill(rollout["completion_ids"] % 5 == 0, math.nan)

        def forget_states(rollout, read_states):
            states = read(rollout, read_states)
            for row, ids in zip(states.rows, rollout["completion_ids"], strict=True):
                row[ids[: len(row)] % 5 == 0] = math.nan
            return states

        trainer.teacher.per_token_logps, trainer.teacher.hidden_states = forget, forget_states
        return trainer

    results = both(make, gradient_accumulation_steps=4, **options)
    assert_the_same(results)
    assert results[0][1]["teacher/unknown_tokens"] > 0


def test_evaluation_is_read_before(make_trainer, text_dataset):
    options = {"eval_dataset": text_dataset.select(range(4))}
    trainer = make_trainer(estimator="exact", max_steps=1, num_generations=2, trainer_options=options)
    trainer.train()
    metrics = trainer.evaluate()
    assert math.isfinite(metrics["eval_reverse_kl"]) and metrics["eval_entropy"] > 0
