"""The same completions give the same advantages and the same gradients, however they are spread over processes."""

import pytest
import torch
from helpers import SPREAD_COMPLETIONS
from safetensors.torch import load_file

from gndpo_trl.grpo.vllm_adapter import NAME


END = 2  # <|im_end|>, the tiny tokenizers' end token
# The first process's completions end, and the second one's are all truncated.
HALF_ENDED = [ids + [END] if row < 4 else ids for row, ids in enumerate(SPREAD_COMPLETIONS)]

CASES = {
    "text": {"completions": SPREAD_COMPLETIONS},
    "one rank masked": {"completions": HALF_ENDED, "config": {"mask_truncated_completions": True}},
    "images": {"completions": SPREAD_COMPLETIONS, "family": "internvl"},
    "mixed": {"completions": SPREAD_COMPLETIONS, "family": "internvl", "images": "some"},
    "mixed, grids": {"completions": SPREAD_COMPLETIONS, "family": "qwen25vl", "images": "some"},
    "exact, mixed": {
        "completions": SPREAD_COMPLETIONS,
        "family": "internvl",
        "images": "some",
        "config": {"estimator": "exact"},
    },
    # The two processes' own lengths would need different numbers of forward passes.
    "token budget": {"completions": SPREAD_COMPLETIONS, "config": {"scoring_token_budget": 30}},
    # The first teacher has three rows of the first process and none of the second.
    "routed": {"completions": SPREAD_COMPLETIONS, "routed": True, "family": "internvl"},
    "routed apart": {
        "completions": SPREAD_COMPLETIONS,
        "routed": True,
        "config": {"advantage_normalization": "teacher"},
    },
    "own prompts": {"completions": SPREAD_COMPLETIONS, "family": "internvl", "own_prompts": True},
    "other family": {
        "completions": SPREAD_COMPLETIONS,
        "own_prompts": True,
        "teacher": "other-teacher",
        "config": {"teacher_alignment": "text"},
    },
    "teacher offloaded": {"completions": SPREAD_COMPLETIONS, "config": {"teacher_offload": True}},
    "none": {"completions": SPREAD_COMPLETIONS, "config": {"advantage_normalization": "none"}},
    "baseline": {"completions": SPREAD_COMPLETIONS, "config": {"score_baseline": "expected"}},
    "exact": {"completions": SPREAD_COMPLETIONS, "config": {"estimator": "exact"}},
    "exact, one rank masked": {
        "completions": HALF_ENDED,
        "config": {"estimator": "exact", "mask_truncated_completions": True},
    },
    "exact, routed": {
        "completions": SPREAD_COMPLETIONS,
        "routed": True,
        "config": {"estimator": "exact", "advantage_normalization": "teacher"},
    },
    "exact, own prompts": {
        "completions": SPREAD_COMPLETIONS,
        "own_prompts": True,
        "config": {"estimator": "exact"},
    },
    "exact, top 4": {"completions": SPREAD_COMPLETIONS, "config": {"estimator": "exact", "teacher_top_k": 4}},
    "exact, top 4, routed": {
        "completions": SPREAD_COMPLETIONS,
        "routed": True,
        "config": {"estimator": "exact", "teacher_top_k": 4},
    },
    "exact, images": {"completions": SPREAD_COMPLETIONS, "family": "internvl", "config": {"estimator": "exact"}},
}


def run_case(launch, case: str, accelerate_config: str | None, batch_size: int, accumulation: int, **spec):
    options = CASES[case]
    config = {
        **options.get("config", {}),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
    }
    spec.update({key: value for key, value in options.items() if key not in ("config", "family", "teacher")})
    if "teacher" in options:
        spec["teacher"] = launch.checkpoints[options["teacher"]]
    run = launch(accelerate_config, options.get("family", "qwen3"), config, **spec)
    assert run.returncode == 0, run.output
    return run


@pytest.fixture(scope="module")
def one_process(launch):
    """Each case on one process with four accumulation steps, read before the loss."""
    runs = {}

    def get(case: str):
        if case not in runs:
            runs[case] = run_case(launch, case, None, 2, 4, in_one_pass=False)
        return runs[case]

    return get


def gradients(run, start: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    after = load_file(run.folder / "saved" / "model.safetensors")
    # ZeRO-2 and FSDP2 save a head that is tied to the embeddings by its own name, too.
    assert after.keys() - start.keys() <= {"lm_head.weight"} and start.keys() <= after.keys()
    return {name: start[name] - after[name] for name in start}


@pytest.mark.parametrize(
    "case, accelerate_config, batch_size, accumulation",
    [
        ("text", "ddp", 2, 2),
        ("text", "ddp", 4, 1),
        ("text", "zero1", 2, 2),
        ("text", "zero2", 2, 2),
        ("text", "zero3", 2, 2),
        ("text", "fsdp2", 2, 2),
        ("one rank masked", "ddp", 2, 2),
        ("one rank masked", "zero3", 2, 2),
        ("images", "ddp", 2, 2),
        ("images", "zero3", 2, 2),
        ("mixed", "ddp", 2, 2),
        ("mixed", "zero2", 1, 4),
        ("mixed", "zero3", 2, 2),
        ("mixed", "fsdp2", 2, 2),
        ("mixed, grids", "ddp", 2, 2),
        ("mixed, grids", "zero3", 2, 2),
        ("exact, mixed", "zero3", 2, 2),
        ("token budget", "zero3", 2, 2),
        ("routed", "zero3", 2, 2),
        ("routed apart", "ddp", 2, 2),
        ("routed apart", "zero3", 4, 1),
        ("own prompts", "zero3", 2, 2),
        ("other family", "ddp", 2, 2),
        ("other family", "zero3", 2, 2),
        ("teacher offloaded", "zero2", 2, 2),
        ("none", "zero3", 2, 2),
        ("baseline", "ddp", 2, 2),
        ("baseline", "zero3", 2, 2),
        ("exact", "zero1", 2, 2),
        ("exact", "ddp", 2, 2),
        ("exact", "zero2", 2, 2),
        ("exact", "zero3", 2, 2),
        ("exact", "fsdp2", 2, 2),
        ("exact, one rank masked", "zero3", 2, 2),
        ("exact, images", "zero3", 2, 2),
        ("exact, own prompts", "zero3", 2, 2),
        ("exact, routed", "zero3", 2, 2),
        ("exact, top 4", "fsdp2", 2, 2),
        ("exact, top 4, routed", "zero3", 2, 2),
    ],
)
def test_two_processes_equal_one(launch, one_process, checkpoints, case, accelerate_config, batch_size, accumulation):
    expected = one_process(case)
    found = run_case(launch, case, accelerate_config, batch_size, accumulation, fsdp=accelerate_config == "fsdp2")
    assert len(found.reports) == 2 and found.reports[0]["num_processes"] == 2
    kind = {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}.get(accelerate_config, "DEEPSPEED")
    assert kind in found.reports[0]["distributed_type"]

    advantages = {**found.reports[0]["advantages"], **found.reports[1]["advantages"]}
    assert advantages.keys() == expected.reports[0]["advantages"].keys()
    for word, row in expected.reports[0]["advantages"].items():
        assert advantages[word] == pytest.approx(row, abs=1e-5), word
    if case.endswith("one rank masked"):
        assert not any(any(row) for row in found.reports[1]["advantages"].values())

    family = CASES[case].get("family", "qwen3")
    start = load_file(f"{checkpoints[f'{family}-student']}/model.safetensors")
    one, two = gradients(expected, start), gradients(found, start)
    assert max(gradient.abs().max() for gradient in one.values()) > 1e-2
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")

    entries = [run.reports[0]["log_history"][0] for run in (expected, found)]
    for name, value in entries[0].items():
        if name.startswith(("score/", "top_k/", "advantages/", "teacher/", "student/", "reverse_kl", "reward")):
            assert entries[1][name] == (None if value is None else pytest.approx(value, abs=1e-5)), name

    in_one_pass = case.startswith(("none", "baseline", "exact")) and case != "exact, routed"
    assert ("time/student_scoring" in entries[1]) != in_one_pass

    # Every process runs the same number of forward passes, whatever the lengths of its completions.
    assert found.reports[0]["teacher_forwards"] == found.reports[1]["teacher_forwards"] > 0
    for report in found.reports:
        held, whole = report["teacher_parameters"]["held"], report["teacher_parameters"]["whole"]
        if accelerate_config in ("zero3", "fsdp2"):
            assert held <= 0.51 * whole, "the teacher is not sharded"
        else:
            assert held == whole
        if accelerate_config == "zero3":  # from the text configuration's hidden size
            assert report["teacher_buckets"] == [48 * 48, int(0.9 * 48 * 48), 10 * 48]


@pytest.mark.parametrize("family", ["internvl", "qwen25vl"])
@pytest.mark.parametrize("accelerate_config", ["ddp", "zero2", "zero3", "fsdp2"])
def test_rows_without_pictures_are_sampled_beside_rows_with_some(launch, accelerate_config, family):
    """Where models are in pieces, processes wait for each other at each of them, the vision tower's too."""
    config = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 0.1}
    config |= {"max_completion_length": 8, "log_completions": True, "optim": "adamw_torch", "scoring_token_budget": 64}
    if accelerate_config == "zero3" and family == "internvl":
        config["ds3_gather_for_generation"] = False
    run = launch(accelerate_config, family, config, images="some", fsdp=accelerate_config == "fsdp2")
    assert run.returncode == 0, run.output
    norms = [[entry["grad_norm"] for entry in report["log_history"] if "loss" in entry] for report in run.reports]
    assert norms[0] == norms[1] and len(norms[0]) == 2 and min(norms[0]) > 0


@pytest.mark.parametrize("accelerate_config", ["zero2", "zero3", "fsdp2"])
def test_a_vision_tower_that_sees_nothing_stays_as_it_is(launch, checkpoints, accelerate_config):
    """DeepSpeed has a gradient for every parameter, of zeros for those of no use, and would have them decay."""
    config = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 1.0, "per_device_train_batch_size": 4}
    is_fsdp = accelerate_config == "fsdp2"
    run = launch(accelerate_config, "internvl", config, completions=SPREAD_COMPLETIONS, images=False, fsdp=is_fsdp)
    assert run.returncode == 0, run.output
    start = load_file(f"{checkpoints['internvl-student']}/model.safetensors")
    moved = {name: bool(change.any()) for name, change in gradients(run, start).items()}
    of_text = {name for name in moved if "language_model" in name or "lm_head" in name}
    assert len(of_text) < len(moved) and {name for name, has_moved in moved.items() if has_moved} == of_text


@pytest.mark.parametrize("accelerate_config", ["ddp"])
def test_a_function_sees_groups_that_are_split_over_processes(launch, checkpoints, accelerate_config):
    """Three pairs of completions over two processes: both have one of the second pair, and see the other."""

    def run(accelerate_config: str | None, batch_size: int):
        config = {"num_generations": 2, "per_device_train_batch_size": batch_size}
        run = launch(accelerate_config, "qwen3", config, completions=SPREAD_COMPLETIONS[:3], prompt_fn=True)
        assert run.returncode == 0, run.output
        return run

    one, two = run(None, 6), run(accelerate_config, 3)
    expected, found = one.reports[0], two.reports
    assert [len(report["groups"]) for report in found] == [3, 3]
    assert found[0]["groups"] + found[1]["groups"] == expected["groups"]
    assert all(len(group) == 2 and len(text) == reward > 0 for group in expected["groups"] for text, reward in group)
    advantages = {**found[0]["advantages"], **found[1]["advantages"]}
    assert advantages.keys() == expected["advantages"].keys() == {"one", "two", "three"}
    for word, row in expected["advantages"].items():
        assert advantages[word] == pytest.approx(row, abs=1e-5), word
    assert found[0]["log_history"][0]["teacher/own_prompts"] == 0.5

    start = load_file(f"{checkpoints['qwen3-student']}/model.safetensors")
    gradient_of_two = gradients(two, start)
    for name, gradient in gradients(one, start).items():
        torch.testing.assert_close(gradient_of_two[name], gradient, rtol=0, atol=1e-5)


SELF_TAUGHT = {"teacher_weights": "ema", "teacher_ema_decay": 0.5, "max_steps": 3, "learning_rate": 0.1}


@pytest.fixture(scope="module")
def self_taught(launch):
    """Three steps of a student and its average on one process; of its adapters, too."""
    runs = {}

    def get(lora: bool):
        if lora not in runs:
            runs[lora] = run_self_taught(launch, None, 4, lora=lora)
        return runs[lora]

    return get


def run_self_taught(launch, accelerate_config: str | None, accumulation: int, **spec):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation}
    saving = {"save_strategy": "steps", "save_steps": 2}
    config = {**SELF_TAUGHT, **saving, **options, **spec.pop("config", {})}
    options = {"teacher": "self", "completions": SPREAD_COMPLETIONS, "own_prompts": True, **spec}
    run = launch(accelerate_config, "qwen3", config, fsdp=accelerate_config == "fsdp2", **options)
    assert run.returncode == 0, run.output
    return run


@pytest.mark.parametrize(
    "accelerate_config, lora", [("ddp", False), ("zero3", False), ("zero3", True), ("fsdp2", False)]
)
def test_the_average_of_the_student_is_that_of_one_process(launch, self_taught, accelerate_config, lora):
    """Its weights are in pieces, the model that scores with them is whole again, and checkpoints hold all of them."""
    expected, found = self_taught(lora), run_self_taught(launch, accelerate_config, 2, lora=lora)
    for step in (2, 3):
        one, two = (load_file(run.folder / f"out/checkpoint-{step}/teacher.safetensors") for run in (expected, found))
        assert one.keys() == two.keys() and len(one) == (8 if lora else 25)
        for name, value in one.items():
            torch.testing.assert_close(two[name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    for one, two in zip(*(run.reports[0]["log_history"][:3] for run in (expected, found)), strict=True):
        assert two["score/std"] == pytest.approx(one["score/std"], abs=1e-5) != 0

    own = {}
    if accelerate_config == "fsdp2":  # torch loads no state of an optimizer that has none
        own = {"optim": "adamw_torch", "learning_rate": 1e-3}
        found = run_self_taught(launch, accelerate_config, 2, config=own)
    checkpoint = str(found.folder / "out/checkpoint-2")
    resumed = run_self_taught(
        launch, accelerate_config, 2, lora=lora, resume=checkpoint, config={**own, "save_steps": 3}
    )
    one, two = (load_file(run.folder / "out/checkpoint-3/teacher.safetensors") for run in (found, resumed))
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    if accelerate_config == "ddp":  # on another number of processes
        alone = run_self_taught(launch, None, 4, resume=checkpoint, config={"save_steps": 3})
        other = load_file(alone.folder / "out/checkpoint-3/teacher.safetensors")
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5)


@pytest.mark.parametrize("accelerate_config", ["zero2", "zero3", "fsdp2"])
def test_an_adapter_goes_to_a_vllm_server_as_it_is_saved(launch, accelerate_config):
    options = {"lora": True, "completions": SPREAD_COMPLETIONS, "fsdp": accelerate_config == "fsdp2"}
    run = launch(
        accelerate_config,
        config={"per_device_train_batch_size": 4, "learning_rate": 0.1},
        send_adapter=True,
        **options,
    )
    assert run.returncode == 0, run.output
    one, two = (load_file(run.folder / "saved" / path / "adapter_model.safetensors") for path in ("", NAME))
    assert one.keys() == two.keys() and max(value.abs().max() for name, value in one.items() if "lora_B" in name) > 0
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("accelerate_config", ["zero3", "fsdp2"])
def test_the_average_of_the_student_has_a_distribution_too(launch, checkpoints, accelerate_config):
    """Its LM head is put together from pieces, and kept as it was when it was read."""
    options = {"estimator": "exact", "max_steps": 2, "optim": "sgd", "learning_rate": 0.1}
    expected = run_self_taught(launch, None, 4, config=options)
    found = run_self_taught(launch, accelerate_config, 2, config={**options, "save_strategy": "no"})
    start = load_file(f"{checkpoints['qwen3-student']}/model.safetensors")
    one, two = gradients(expected, start), gradients(found, start)
    assert max(change.abs().max() for change in one.values()) > 1e-3
    for name, change in one.items():
        torch.testing.assert_close(two[name], change, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
