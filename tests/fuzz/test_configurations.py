"""Configurations with several fields at once as they should not be: built, or refused in our words, all of it at once."""

import math
import os
import re
import shutil

import pytest
from hypothesis import assume, example, given
from profiles import tries
from strategies import configurations, trainable

from gndpo_trl import GNDPOConfig
from gndpo_trl.gspo import GSPOConfig


ORDINARY = {"output_dir": "out", "use_cpu": True, "bf16": False, "report_to": "none"}

REMEDY = re.compile(
    r"\b(give|set|use|choose|leave|raise|lower|make|write|unset|install|correct|change|take|look at|start|has to be)\b",
    re.I,
)


@pytest.fixture(autouse=True)
def environment():
    """transformers puts what some fields say into variables of the environment."""
    before = dict(os.environ)
    yield
    restore(before)


def restore(before: dict[str, str]) -> None:
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


def refusal(config_class: type, options: dict) -> str | None:
    """What is said against a configuration; `None` if it is built. Any other error than ours is raised."""
    before = dict(os.environ)
    try:
        config_class(**{**ORDINARY, **options})
    except ValueError as error:
        return str(error)
    finally:
        restore(before)


def names_in(text: str) -> set[str]:
    return set(re.findall(r"`(\w+)`", text))


def assert_in_our_words(text: str, options: dict) -> None:
    named = names_in(text) & set(options)
    assert named, f"no field that was set is named: {text}"
    assert REMEDY.search(text), f"no remedy: {text}"
    values = [options[name] for name in named]
    values += [bool(value) for value in values if isinstance(value, int) and value in (0, 1)]
    assert any(repr(value)[:150] in text or f"{value}"[:150] in text for value in values), f"no value: {text}"


@tries(ci=300, nightly=10_000)
@given(configurations(GNDPOConfig))
@example({"model_init_kwargs": "float32", "teacher_server_url": 3, "teacher_model_init_kwargs": "bf16"})
@example({"fsdp": "a"})
@example({"debug": "a word"})
@example({"deepspeed": '{"a": 1}'})
@example({"accelerator_config": {"a": 1}})
@example({"num_generations": None})
@example({"dataloader_persistent_workers": True})
@example({"distillation_coef": 0.0})
@example({"auto_find_batch_size": 1})
@example({"use_sampling_logps": True, "generation_batch_size": 16})
@example({"advantage_normalization": []})
@example({"lr_scheduler_type": "cosine_with_restarts", "lr_scheduler_kwargs": {"num_cycle": 2}})
@example({"optim": "galore_adamw"})
@example({"optim_args": "momentum"})
@example({"reward_weights": "1.0"})
@example({"bf16": None, "use_cpu": False})
def test_a_configuration_is_built_or_says_what_is_wrong(options):
    text = refusal(GNDPOConfig, options)
    if text is not None:
        assert_in_our_words(text, options)


@tries(ci=100, nightly=2_000)
@given(configurations(GSPOConfig))
def test_the_baseline_too(options):
    text = refusal(GSPOConfig, options)
    if text is not None:
        assert_in_our_words(text, options)


@tries(ci=50, nightly=2_000)
@given(configurations(GNDPOConfig))
@example({"optim": "adamw_torch_xla", "score_clip": 0.0})
@example({"score_clip": "5", "std_floor": -1.0, "eval_strategy": "never", "logging_steps": 0, "top_p": 2.0})
def test_what_is_wrong_is_said_at_once(options):
    """What a field is refused for by itself is said beside all that is wrong with the others."""
    alone = {name: refusal(GNDPOConfig, {name: value}) for name, value in options.items()}
    # What goes wrong between two fields may be right with a third.
    alone = {name: text for name, text in alone.items() if text is not None and names_in(text) == {name}}
    assume(len(alone) > 1)
    together = refusal(GNDPOConfig, options)
    for name in alone:
        assert f"`{name}`" in together, name


@tries(ci=12, nightly=400)
@given(options=trainable(GNDPOConfig))
def test_what_is_built_trains(make_trainer, text_dataset, tmp_path, options):
    shutil.rmtree(tmp_path, ignore_errors=True)  # of the example before, which another run may not write into
    before = dict(os.environ)
    try:
        trainer = make_trainer(
            **{"output_dir": str(tmp_path), **options}, trainer_options={"eval_dataset": text_dataset.select(range(4))}
        )
    except ValueError as error:
        assert_in_our_words(str(error), options)
        return
    finally:
        restore(before)
    trainer.train()
    assert trainer.state.global_step == 2
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    for entry in trainer.state.log_history:
        broken = {
            name: value for name, value in entry.items() if isinstance(value, float) and not math.isfinite(value)
        }
        assert not broken, entry
