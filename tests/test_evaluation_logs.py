"""Evaluations under names of their own, and the best model by a metric of theirs."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from gndpo_trl.gspo import GSPOConfig


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}


def test_the_best_model_of_one_of_several_sets_is_loaded(make_trainer, text_dataset):
    sets = {"math": text_dataset.select(range(2)), "code": text_dataset.select(range(8, 16))}
    trainer = make_trainer(
        max_steps=4,
        learning_rate=0.05,
        eval_steps=1,
        save_steps=1,
        per_device_eval_batch_size=8,
        num_generations_eval=1,
        metric_for_best_model="eval_code_reverse_kl",
        trainer_options={"eval_dataset": sets},
        **BEST,
    )
    trainer.train()
    found = {
        name: {
            entry["step"]: entry[f"eval_{name}_reverse_kl"]
            for entry in trainer.state.log_history
            if f"eval_{name}_reverse_kl" in entry
        }
        for name in sets
    }
    assert [*found["math"]] == [*found["code"]] == [1, 2, 3, 4]
    names = {name for entry in trainer.state.log_history for name in entry if name.startswith("eval_")}
    assert all(name.startswith(("eval_math_", "eval_code_")) for name in names)
    assert {"eval_math_score/p50", "eval_code_completions/mean_length", "eval_math_reward", "eval_math_loss"} <= names
    best = min(found["code"], key=found["code"].get)
    assert trainer.state.best_metric == found["code"][best]
    expected = load_file(Path(trainer.args.output_dir, f"checkpoint-{best}", "model.safetensors"))
    assert all(
        (expected[name] == value).all() for name, value in trainer.model.state_dict().items() if name in expected
    )


def test_an_evaluation_has_the_prefix_it_is_given_and_nothing_of_a_prediction(make_trainer, text_dataset):
    trainer = make_trainer(per_device_eval_batch_size=4, num_generations_eval=1)
    trainer.predict(text_dataset.select(range(8)))
    assert trainer._metrics["eval"]["reverse_kl"]
    metrics = trainer.evaluate(text_dataset.select(range(3)), metric_key_prefix="test")
    assert {"test_loss", "test_reverse_kl", "test_entropy"} <= metrics.keys()
    assert metrics["test_completions/mean_length"] <= 8 and not any(name.startswith("eval_") for name in metrics)
    alone = trainer.evaluate(text_dataset.select([0]))
    assert alone["eval_advantages/num_tokens"] == alone["eval_completions/mean_length"]  # of one completion


@pytest.mark.parametrize(
    "metric, is_better",
    [
        ("reverse_kl", False),
        ("eval_reverse_kl", False),
        ("eval_my_set_reverse_kl_k3", False),
        ("teacher/a b/reverse_kl", False),
        ("eval_math_completions/clipped_ratio", False),
        ("score/mean", True),
        ("eval_reward", True),
        ("math_rewards/minus_kl/mean", True),
    ],
)
def test_which_way_a_metric_is_better_is_known(make_config, metric, is_better):
    assert make_config(metric_for_best_model=metric).greater_is_better is is_better
    assert make_config(metric_for_best_model=metric, greater_is_better=is_better).greater_is_better is is_better
    with pytest.raises(ValueError, match=f"`greater_is_better` is {not is_better}.*Leave it out"):
        make_config(metric_for_best_model=metric, greater_is_better=not is_better)


@pytest.mark.parametrize(
    "options, message",
    [
        (BEST, "`load_best_model_at_end` is True, but `metric_for_best_model` is not set.*`reverse_kl`"),
        ({"save_strategy": "best", "eval_strategy": "steps"}, '`save_strategy` is "best", but'),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "`lr_scheduler_type` is 'reduce_lr_on_plateau', but"),
        ({**BEST, "metric_for_best_model": "eval_math_loss"}, "'eval_math_loss', which is no measure of progress"),
        ({**BEST, "metric_for_best_model": "completions/mean_length"}, "may be either. Set `greater_is_better`"),
    ],
)
def test_a_best_model_by_nothing_is_refused(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_what_only_the_user_knows_is_taken(make_config):
    config = make_config(metric_for_best_model="completions/mean_length", greater_is_better=False, **BEST)
    assert config.greater_is_better is False
    assert make_config().greater_is_better is None
    # Without a teacher there is no divergence from it.
    assert make_config(GSPOConfig, metric_for_best_model="rewards/accuracy/mean").greater_is_better is True
    with pytest.raises(ValueError, match="'score/mean', which may be either"):
        make_config(GSPOConfig, metric_for_best_model="score/mean")


def test_a_metric_of_none_of_several_sets_is_refused(make_trainer, text_dataset):
    with pytest.raises(ValueError, match=r"several sets \(math, code\).*'eval_math_reverse_kl'"):
        make_trainer(
            metric_for_best_model="reverse_kl",
            trainer_options={"eval_dataset": dict.fromkeys(("math", "code"), text_dataset)},
        )
