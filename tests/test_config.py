import ast
import dataclasses
import functools
import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trl import GRPOConfig, TrlParser

from gndpo_trl import GNDPOConfig, GNDPOTrainer


CPU = ["--output_dir", "out", "--use_cpu", "True", "--bf16", "False"]


def test_defaults_are_the_reference(make_config):
    config = GNDPOConfig("out", use_cpu=True, bf16=False)
    assert config.score_clip == 5.0
    assert config.advantage_normalization == "global"
    assert config.std_floor == 0.0
    assert config.importance_sampling_level == "sequence_token"
    assert config.loss_type == "grpo"
    assert config.beta == 0.0
    assert config.epsilon == 0.2 and config.epsilon_high is None
    assert config.learning_rate == 1e-6
    assert config.lr_scheduler_type == "constant"
    assert config.weight_decay == 0.01
    assert config.max_grad_norm == 1.0
    assert config.vllm_importance_sampling_correction is False
    assert config.temperature == 1.0 and config.top_p == 1.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"score_clip": 0.0}, r"`score_clip` is 0.0.*must be positive.*None"),
        ({"score_clip": -1.0}, r"`score_clip` is -1.0"),
        ({"score_clip": float("nan")}, r"`score_clip` is nan"),
        ({"std_floor": -0.1}, r"`std_floor` is -0.1"),
        ({"advantage_normalization": "batch"}, r"`advantage_normalization` is 'batch'.*'global', 'none', 'group'"),
        ({"importance_sampling_level": "sequence"}, r"same gradient.*\"sequence_token\""),
        ({"importance_sampling_level": "turn"}, r"`importance_sampling_level` is 'turn'"),
    ],
)
def test_bad_values_are_refused_with_a_remedy(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_everything_that_is_wrong_is_said_at_once(make_config):
    with pytest.raises(ValueError) as error:
        make_config(score_clip=-1.0, std_floor=-2.0, steps_per_generation=0, loss_type="ppo", estimator="topk")
    for field in ("score_clip", "std_floor", "steps_per_generation", "loss_type", "estimator"):
        assert f"`{field}` is " in str(error.value), field


@pytest.mark.parametrize(
    "field, value",
    [
        *[
            (name, 0)
            for name in ("gradient_accumulation_steps", "num_iterations", "num_generations", "pad_to_multiple_of")
        ],
        *[(name, -1) for name in ("steps_per_generation", "num_iterations", "num_generations")],
        *[(name, None) for name in ("std_floor", "extrapolation", "score_discount", "teacher_sync_steps", "beta")],
        *[
            ("score_clip", "5"),
            ("scoring_token_budget", "64"),
            ("learning_rate", "1e-4"),
            ("use_sampling_logps", "yes"),
        ],
        *[(name, float("inf")) for name in ("beta", "entropy_coef", "std_floor", "temperature", "learning_rate")],
        *[("score_clip", float("inf")), ("score_clip", 1e-40), ("learning_rate", float("nan")), ("temperature", 0.0)],
    ],
)
def test_values_that_no_comparison_bears_are_named(make_config, field, value):
    """Without words of Python's or of a library's: no division by zero, no comparison with None."""
    with pytest.raises(ValueError, match=rf"`{field}` is {value!r}"):
        make_config(**{field: value})


def test_values_of_other_types_that_are_meant_are_taken(make_config):
    config = make_config(score_clip=5, std_floor=np.float64(0.1), max_steps=np.int64(3), logging_steps=0.5)
    assert config.score_clip == 5 and config.max_steps == 3


def test_numbers_of_numpy_become_pythons(make_config):
    """Else a checkpoint, which is JSON and plain types, could not be written, or not be read again."""
    options = {
        "learning_rate": np.float32(0.5),
        "temperature": np.float64(0.5),
        "logging_steps": np.int64(3),
        "use_sampling_logps": np.bool_(False),
    }
    config = make_config(**options, per_device_train_batch_size=np.int64(4), gradient_accumulation_steps=np.int64(2))
    for name, value in options.items():
        assert getattr(config, name) == value and not isinstance(getattr(config, name), np.generic)
    assert type(config.generation_batch_size) is int


def test_the_default_batch_holds_several_prompts():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        config = GNDPOConfig("out", use_cpu=True, bf16=False)
    assert config.generation_batch_size // config.num_generations >= 8


def test_power_scores_bring_their_own_defaults(make_config):
    config = make_config(score_power=1.0)
    assert config.score_clip is None and config.advantage_normalization == "none"
    assert make_config(score_power=1.0, advantage_normalization="global").advantage_normalization == "global"
    with pytest.raises(ValueError, match=r"`score_power` is 1.0.*`score_clip` \(2.0\).*to None"):
        make_config(score_power=1.0, score_clip=2.0)
    assert make_config().score_clip == 5.0 and make_config().advantage_normalization == "global"


def test_one_generation_is_allowed_and_trl_still_checks_the_rest(make_config):
    config = make_config(num_generations=1, per_device_train_batch_size=3)
    assert config.num_generations == 1 and type(config.num_generations) is int
    with pytest.raises(ValueError, match="divisible by num_generations"):
        make_config(num_generations=2, per_device_train_batch_size=3)
    with pytest.raises(ValueError, match="vllm_importance_sampling_clip_min"):
        make_config(num_generations=1, vllm_importance_sampling_clip_min=4.0)


def test_the_command_line_and_recipes_reach_every_field(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("score_clip: null\nteacher_model_init_kwargs:\n  dtype: bfloat16\nnum_generations: 1\n")
    (config,) = TrlParser((GNDPOConfig,)).parse_args_and_config(["--config", str(recipe), *CPU])
    assert config.score_clip is None
    assert config.teacher_model_init_kwargs == {"dtype": "bfloat16"}
    assert config.num_generations == 1
    recipe.write_text("teacher_server_url: http://one:8000\n")
    (config,) = TrlParser((GNDPOConfig,)).parse_args_and_config(["--config", str(recipe), *CPU])
    assert config.teacher_server_url == "http://one:8000"
    recipe.write_text("teacher_server_url: [http://one:8000, http://two:8000]\n")
    (config,) = TrlParser((GNDPOConfig,)).parse_args_and_config(["--config", str(recipe), *CPU])
    assert config.teacher_server_url == ["http://one:8000", "http://two:8000"]
    (config,) = TrlParser((GNDPOConfig,)).parse_args_and_config(
        [*CPU, "--teacher_server_url", "http://one", "http://two"]
    )
    assert config.teacher_server_url == ["http://one", "http://two"]
    (config,) = TrlParser((GNDPOConfig,)).parse_args_and_config(
        [*CPU, "--score_clip", "2.5", "--teacher_model_init_kwargs", '{"dtype": "float16"}']
    )
    assert config.score_clip == 2.5
    assert config.teacher_model_init_kwargs == {"dtype": "float16"}
    (config,) = TrlParser((GNDPOConfig,)).parse_args_and_config([*CPU, "--score_clip", "None"])
    assert config.score_clip is None


def own_fields() -> list[dataclasses.Field]:
    inherited = {field.name: field for field in dataclasses.fields(GRPOConfig)}
    return [field for field in dataclasses.fields(GNDPOConfig) if inherited.get(field.name) is not field]


def test_docstring_and_help_say_the_same():
    docstring = " ".join(GNDPOConfig.__doc__.split())
    for field in own_fields():
        help_text = " ".join(field.metadata["help"].split())
        assert help_text in docstring, f"the docstring does not contain the help of `{field.name}`"
        assert re.search(rf"{field.name} \(`", docstring), f"`{field.name}` is not in the docstring"


def configs_in(code: str) -> list[GNDPOConfig]:
    """The configurations that a piece of code builds, on one device."""
    build = functools.partial(GNDPOConfig, use_cpu=True, bf16=False)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [
        eval(ast.unparse(call), {"GNDPOConfig": build}) for call in calls if ast.unparse(call.func) == "GNDPOConfig"
    ]


def test_the_first_examples_show_the_method():
    """With one prompt in a generation batch, the normalization over all of it is that over a group."""
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    first = re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1]
    diff = re.search(r"```diff\n(.*?)```", readme, re.DOTALL)[1]
    after = "\n".join(line[1:] for line in diff.splitlines() if not line.startswith("-"))
    docstring = textwrap.dedent(re.search(r"```python\n(.*?)```", GNDPOTrainer.__doc__, re.DOTALL)[1])
    docstring = re.sub(r"^(>>>|\.\.\.) ?", "", docstring, flags=re.MULTILINE)
    for code in (first, after, docstring):
        (config,) = configs_in(code)
        assert config.generation_batch_size / config.num_generations >= 8


def test_texts_lists_and_dictionaries_are_checked_as_numbers_are(make_config):
    """A recipe's slip of one line: a dtype in the place of arguments, one number for a list of them."""
    options = {
        "model_init_kwargs": "float32",
        "teacher_model_init_kwargs": "bf16",
        "teacher_server_url": 3,
        "reward_weights": "1.0",
        "eval_strategy": "never",
        "score_clip": -1.0,
    }
    with pytest.raises(ValueError, match="6 settings cannot be so") as error:
        make_config(**options)
    for name, value in options.items():
        assert f"`{name}` is {value!r}" in str(error.value)


def test_paths_and_other_types_that_are_meant_are_taken(make_config, tmp_path):
    config = make_config(
        output_dir=tmp_path, teacher_server_url="http://one:8000", scale_rewards=False, reward_weights=(1,)
    )
    assert config.output_dir == str(tmp_path) and config.scale_rewards == "none"

    @dataclasses.dataclass
    class Own(GNDPOConfig):
        anything: Any = None

    assert Own("out", use_cpu=True, bf16=False, anything=object).anything is object


@pytest.mark.parametrize(
    "options, message",
    [
        ({"generation_batch_size": 6}, r"`generation_batch_size` is 6, but has to be divisible by `per_device_train"),
        ({"generation_batch_size": 8, "steps_per_generation": 2}, "each follows from the other"),
        ({"save_strategy": "steps", "save_steps": 0}, "`save_steps` is 0. Give a positive integer, or a share"),
        ({"logging_steps": 2.5}, "`logging_steps` is 2.5"),
        ({"load_best_model_at_end": True, "metric_for_best_model": "kl"}, '`eval_strategy` is "no". Set that to'),
        ({"fp16": True}, "`fp16` is True, but a CPU"),
        ({"optim": "paged_lion_64bit"}, "`optim` is 'paged_lion_64bit'. Choose one of"),
        ({"optim_args": "momentum"}, "`optim_args` 'momentum', which cannot be made"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"cycles": 2}}, "'cosine' does not take"),
        ({"dataloader_persistent_workers": True}, "`dataloader_num_workers` is 0. Raise the latter"),
        (
            {"accelerator_config": {"a": 1}},
            r"TypeError: .*'a'.*Look at what is set: .*`accelerator_config` \(\{'a': 1\}\)",
        ),
    ],
)
def test_what_the_libraries_would_refuse_is_said_with_its_field(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_ranks_may_wait_for_one_another_for_less_than_a_teacher_that_nobody_serves(make_config):
    assert make_config(ddp_timeout=60).ddp_timeout == 60
    with pytest.raises(
        ValueError, match="`teacher_server_timeout` is 600.0, but it must be .*shorter than `ddp_timeout`"
    ):
        make_config(ddp_timeout=60, teacher_server_url=["http://localhost:1"])
