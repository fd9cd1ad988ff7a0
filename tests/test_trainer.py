"""GNDPOTrainer on tiny real models: what it computes, what of GRPOTrainer keeps working, what it logs."""

import inspect
import json
import math
import re
from pathlib import Path

import pytest
import tiny_models
import torch
from datasets import IterableDataset
from helpers import advantages_of, gradients, make_rollout, plain_logps
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
    Qwen3ForCausalLM,
)
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from gndpo_trl import GNDPOTrainer
from gndpo_trl.grpo.rollouts import valid_tokens
from gndpo_trl.gspo import GSPOConfig, GSPOTrainer


# What it computes


@pytest.mark.parametrize("family", ["qwen3", "internvl", "qwen25vl"])
def test_advantages_are_those_of_plain_forward_passes(make_trainer, checkpoints, family):
    trainer = make_trainer(family, per_device_train_batch_size=8)
    rollout = make_rollout(trainer)
    auto_model = Qwen3ForCausalLM if family == "qwen3" else AutoModelForImageTextToText
    teacher = auto_model.from_pretrained(checkpoints[f"{family}-teacher"])
    student = auto_model.from_pretrained(checkpoints[f"{family}-student"])
    mask = valid_tokens(rollout)
    teacher_logps, student_logps = plain_logps(teacher, rollout), plain_logps(student, rollout)
    found = trainer._per_token_logps(trainer.model, rollout)
    torch.testing.assert_close(found[mask], student_logps[mask], rtol=0, atol=1e-5)
    expected, _ = advantages_of(teacher_logps - student_logps, mask)
    torch.testing.assert_close(rollout["advantages"], expected, rtol=0, atol=2e-4)
    assert rollout["advantages"].shape == rollout["completion_ids"].shape
    assert not rollout["advantages"][~mask].any()
    if family != "qwen3":
        assert rollout["pixel_values"].abs().sum() > 0
        # The teacher really looked: without the images its log-probs are others.
        blind = plain_logps(teacher, {**rollout, "pixel_values": torch.zeros_like(rollout["pixel_values"])})
        assert (blind - teacher_logps)[mask].abs().max() > 1e-4


def test_scoring_never_forms_logits(make_trainer):
    trainer = make_trainer()
    rollout = make_rollout(trainer)
    calls = []
    for model in (trainer.model, trainer.teacher.model):
        model.lm_head.register_forward_hook(lambda *args: calls.append(args))
    trainer.teacher.per_token_logps(rollout)
    trainer._per_token_logps(trainer.model, rollout)
    trainer.current_gradient_accumulation_steps = 1  # set by `train`
    trainer._compute_loss(trainer.model, rollout).backward()
    assert not calls


class Table(torch.nn.Module):
    """A model whose log-probs are its parameters: puts given numbers into the trainer's own loss."""

    def __init__(self, prompt_length: int, logps: torch.Tensor):
        super().__init__()
        self.prompt_length = prompt_length
        self.logps = torch.nn.Parameter(logps.clone())

    def forward(self, labels, **kwargs):
        before = self.logps.new_zeros(len(self.logps), self.prompt_length - 1)
        log_probs = torch.cat([before, self.logps], dim=1)
        return FusedCausalLMOutput(log_probs=log_probs, entropy=torch.ones_like(log_probs))


@pytest.mark.parametrize("loss_type", ["grpo", "sapo", "cispo"])
def test_off_policy_loss_and_gradient_equal_the_reference(make_trainer, reference_vectors, loss_type):
    """Through the trainer's own code path, with log-probs of an older student as in `num_iterations=2`."""
    trainer = make_trainer(num_iterations=2, loss_type=loss_type)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by `train`
    for case in reference_vectors:
        rows, length = case["mask"].shape
        table = Table(3, case["current_logps"])
        table.config = trainer.model.config
        trainer._checked_heads.add((table, ()))  # which has no logits to be compared with
        inputs = {
            "prompt_ids": torch.ones(rows, 3, dtype=torch.long),
            "prompt_mask": torch.ones(rows, 3, dtype=torch.long),
            "completion_ids": torch.ones(rows, length, dtype=torch.long),
            "completion_mask": case["mask"].long(),
            "advantages": case["gndpo_advantages"],
            "old_per_token_logps": case["old_logps"],
            "num_items_in_batch": case["mask"].sum(),
        }
        trainer.epsilon_low = trainer.epsilon_high = case["epsilon"]
        loss = trainer._compute_loss(table, inputs)
        loss.backward()
        if loss_type == "grpo":
            assert abs(loss.item() - case["gspo_token_loss"]) < 1e-9
            torch.testing.assert_close(table.logps.grad, case["gspo_token_grad"], rtol=0, atol=1e-9)
        else:  # the same ratio reaches the other losses; every token keeps a gradient of its own
            valid = table.logps.grad[case["mask"].bool()]
            assert valid.isfinite().all() and valid.unique().numel() > rows
        assert torch.equal(inputs["old_per_token_logps"], case["old_logps"])  # the buffered batch is untouched


def test_the_gradient_depends_on_the_teacher(make_trainer, tmp_path):
    other = tiny_models.save(*tiny_models.build_qwen3(seed=2, width=48), tmp_path / "other")
    one = gradients(make_trainer(max_steps=1))
    another = gradients(make_trainer(max_steps=1, teacher_model=other))
    again = gradients(make_trainer(max_steps=1))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any((one[name] - another[name]).abs().max() > 1e-3 for name in one)


def test_micro_batches_change_neither_metrics_nor_gradients(make_trainer):
    whole = make_trainer(max_steps=1, per_device_train_batch_size=8)
    expected = gradients(whole)
    split = make_trainer(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4)  # seeds again
    found = gradients(split)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5)
    for name, value in whole.state.log_history[0].items():
        if name.startswith(("score/", "advantages/", "teacher/", "student/", "reverse_kl", "reward")):
            assert split.state.log_history[0][name] == pytest.approx(value, abs=1e-5), name


def test_a_student_that_is_its_teacher_has_zero_scores(make_trainer, checkpoints):
    trainer = make_trainer(teacher_model=checkpoints["qwen3-student"], std_floor=0.1)
    rollout = make_rollout(trainer)
    metrics = trainer._metrics["train"]
    assert abs(metrics["score/mean"][0]) < 1e-6 and metrics["score/std"][0] < 1e-5
    assert rollout["advantages"].abs().max() < 1e-4


def test_the_temperature_is_the_students_alone(make_trainer, checkpoints):
    trainer = make_trainer(temperature=0.5)
    rollout = make_rollout(trainer)
    mask = valid_tokens(rollout)
    teacher = Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-teacher"])
    found = trainer.teacher.per_token_logps(rollout)
    torch.testing.assert_close(found[mask], plain_logps(teacher, rollout)[mask], rtol=0, atol=1e-5)
    student = Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-student"])
    student.lm_head.weight.data.mul_(2)  # dividing the logits by 0.5
    found = trainer._per_token_logps(trainer.model, rollout)
    torch.testing.assert_close(found[mask], plain_logps(student, rollout)[mask], rtol=0, atol=1e-5)


def test_training_brings_the_student_to_its_teacher(make_trainer):
    trainer = make_trainer(
        max_steps=60, per_device_train_batch_size=16, learning_rate=3e-3, advantage_normalization="global"
    )
    trainer.train()
    divergences = [entry["reverse_kl_k3"] for entry in trainer.state.log_history if "reverse_kl_k3" in entry]
    assert sum(divergences[-5:]) < 0.5 * sum(divergences[:5])


# What of GRPOTrainer keeps working


@pytest.mark.parametrize(
    "options",
    [
        *({"loss_type": loss} for loss in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")),
        {"importance_sampling_level": "token", "num_iterations": 2},
        {"num_iterations": 2},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 1},
        {"steps_per_generation": 2, "gradient_accumulation_steps": 4, "max_steps": 3},
        {"beta": 0.1, "num_iterations": 2},
        {"num_generations": 1, "per_device_train_batch_size": 3},
        {"num_generations": 1, "per_device_train_batch_size": 1},
        {"mask_truncated_completions": True},
        {"top_entropy_quantile": 0.5},
        {"off_policy_mask_threshold": 0.5, "num_iterations": 2},
        {"delta": 1.5, "epsilon_high": 0.28},
        {"entropy_coef": 0.01},
        {"gradient_checkpointing": True},
        {"disable_dropout": True, "scale_rewards": "batch"},
        {"advantage_normalization": "none"},
        {"advantage_normalization": "group"},
        {"advantage_normalization": "sequence"},
        {"score_clip": None, "advantage_normalization": "none"},
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_options_of_grpo_train_the_student(make_trainer, checkpoints, options):
    trainer = make_trainer(**options)
    trainer.train()
    before = load_file(f"{checkpoints['qwen3-student']}/model.safetensors")
    after = trainer.model.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.isfinite().all() for parameter in after.values())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses and all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("family", ["internvl", "qwen25vl"])
@pytest.mark.parametrize("options", [{}, {"beta": 0.1}, {"num_iterations": 2, "gradient_accumulation_steps": 2}])
def test_image_text_students_train(make_trainer, family, options):
    trainer = make_trainer(family, **options)
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["advantages/std"] == pytest.approx(1, abs=1e-3) and math.isfinite(entry["loss"])


def test_internvl_with_several_tiles_per_image(make_trainer, tmp_path):
    paths = [
        tiny_models.save(*tiny_models.build_internvl(seed=seed, max_patches=4), tmp_path / str(seed))
        for seed in (0, 1)
    ]
    trainer = make_trainer("internvl", model=paths[0], teacher_model=paths[1])
    rollout = make_rollout(trainer)
    assert "num_tiles" in rollout and rollout["advantages"].isfinite().all()
    trainer.train()


def test_lora_students_train_and_save_adapters(make_trainer, tmp_path):
    trainer = make_trainer(trainer_options={"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])})
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        if "lora" not in name:
            assert torch.equal(parameter, before[name])
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_truncated_completions_stay_out_of_the_statistics(make_trainer):
    trainer = make_trainer(mask_truncated_completions=True, per_device_train_batch_size=16, max_completion_length=20)
    rollout = make_rollout(trainer, 16)
    ended = (rollout["completion_ids"] == trainer._tokenizer.eos_token_id).any(1)
    assert ended.any() and not ended.all()  # the seed gives both kinds
    assert not rollout["advantages"][~ended].any()
    assert trainer._metrics["train"]["advantages/num_tokens"] == [rollout["completion_mask"].sum().item()]
    assert rollout["completion_mask"][~ended].sum() == 0


def test_tool_tokens_stay_out_of_the_statistics(make_trainer, text_dataset, checkpoints):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["qwen3-student"])
    completion = tokenizer("one two three four five six")["input_ids"] + [tokenizer.eos_token_id]
    env_mask = [1, 1, 0, 0, 1, 1, 1]  # the third and fourth token came from a tool

    def rollout_func(prompts, trainer):
        prompt_ids = [tokenizer.apply_chat_template(prompt, return_dict=True)["input_ids"] for prompt in prompts]
        many = len(prompts)
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [completion] * many,
            "logprobs": [[0.0] * len(completion)] * many,
            "env_mask": [env_mask] * many,
        }

    trainer = make_trainer(trainer_options={"rollout_func": rollout_func})
    rollout = make_rollout(trainer, 4)
    assert rollout["tool_mask"].tolist() == [env_mask] * 4
    assert not rollout["advantages"][:, 2:4].any()
    assert rollout["advantages"][:, [0, 1, 4, 5, 6]].mean().abs() < 1e-5
    assert trainer._metrics["train"]["advantages/num_tokens"] == [4 * sum(env_mask)]
    trainer.train()


def test_what_vllm_correction_drops_stays_out_of_the_statistics():
    """By row and by token, as TRL's `sequence_mask` and `token_mask` mark it in a rollout."""
    rollout = {"completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    by_row = valid_tokens({**rollout, "importance_sampling_ratio": torch.tensor([[0.0], [1.1]])})
    assert by_row.tolist() == [[False, False, False], [True, True, True]]
    ratio = torch.tensor([[1.0, 0.0, 1.0], [0.9, 1.0, 0.0]])
    by_token = valid_tokens({**rollout, "importance_sampling_ratio": ratio})
    assert by_token.tolist() == [[True, False, False], [True, True, False]]


def test_iterable_datasets(make_trainer, text_dataset):
    def stream():
        yield from text_dataset

    trainer = make_trainer(trainer_options={"train_dataset": IterableDataset.from_generator(stream)})
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2},
        {"steps_per_generation": 4, "save_steps": 2},
        {"steps_per_generation": 4, "save_steps": 3},  # in the middle of a generation batch
        {"num_iterations": 2, "save_steps": 1},  # between its two uses
    ],
    ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()),
)
def test_training_goes_on_from_a_checkpoint_as_if_never_interrupted(make_trainer, tmp_path, options):
    options = {"save_strategy": "steps", "save_steps": 2, **options}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), max_steps=6, **options)
    whole.train()
    parts = {"output_dir": str(tmp_path / "parts"), **options}
    make_trainer(max_steps=options["save_steps"], **parts).train()
    resumed = make_trainer(max_steps=6, **parts)
    resumed.train(resume_from_checkpoint=True)
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, resumed.model.state_dict()[name]), name
    means = [
        {entry["step"]: entry["score/mean"] for entry in trainer.state.log_history if "score/mean" in entry}
        for trainer in (whole, resumed)
    ]
    assert means[0] == means[1]


def test_checkpoints_hold_the_student_alone_and_load_anywhere(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    model = Qwen3ForCausalLM.from_pretrained(tmp_path / "saved")
    for name, parameter in trainer.model.state_dict().items():
        assert torch.equal(parameter, model.state_dict()[name])
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").eos_token == "<|im_end|>"


def test_the_teacher_never_changes_and_never_asks_for_gradients(make_trainer):
    trainer = make_trainer(max_steps=3)
    before = {name: parameter.clone() for name, parameter in trainer.teacher.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.teacher.model.named_parameters():
        assert torch.equal(parameter, before[name]) and not parameter.requires_grad and parameter.grad is None
    assert not trainer.teacher.model.training
    optimized = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in trainer.teacher.model.parameters()}


def test_the_default_configuration_is_gndpo(checkpoints, text_dataset, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    models = {"model": checkpoints["qwen3-student"], "teacher_model": checkpoints["qwen3-teacher"]}
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="bf16"):  # transformers' own word about a machine without a GPU
            GNDPOTrainer(**models, train_dataset=text_dataset)
        return
    trainer = GNDPOTrainer(**models, train_dataset=text_dataset)
    assert trainer.args.output_dir.endswith("qwen3-student-GNDPO")
    assert trainer.args.importance_sampling_level == "sequence_token"


# What it logs

TEACHER_METRICS = [
    "score/mean",
    "score/std",
    "score/min",
    "score/max",
    "score/clamped_low",
    "score/clamped_high",
    "score/eos",
    "reverse_kl",
    "reverse_kl_k3",
    "teacher/mean_logp",
    "teacher/unknown_tokens",
    "student/mean_logp",
    "advantages/std",
    "advantages/num_tokens",
    "advantages/undefined",
    "advantages/share_top_1_percent",
    "advantages/share_clamped",
    "advantages/share_low_probability",
    "student/low_probability",
    *(f"score/p{percent:02}" for percent in (1, 10, 50, 90, 99)),
    *(f"score/tenth_{number:02}" for number in range(1, 11)),
    "time/teacher_scoring",
    "time/student_scoring",
]


def test_metrics_in_training_and_evaluation(make_trainer, text_dataset):
    trainer = make_trainer(
        per_device_train_batch_size=16,
        per_device_eval_batch_size=8,
        max_completion_length=20,
        eval_strategy="steps",
        eval_steps=1,
        trainer_options={"eval_dataset": text_dataset},
    )
    trainer.train()
    train_entry, eval_entry = trainer.state.log_history[:2]
    for name in TEACHER_METRICS:
        assert math.isfinite(train_entry[name]), name
        assert math.isfinite(eval_entry[f"eval_{name}"]), name
    assert train_entry["reverse_kl"] == -train_entry["score/mean"]
    assert train_entry["score/min"] < train_entry["score/mean"] < train_entry["score/max"]
    assert train_entry["score/min"] <= train_entry["score/p01"] <= train_entry["score/p50"] <= train_entry["score/max"]
    assert eval_entry["eval_loss"] is not None and eval_entry["eval_reward"] != 0


def test_every_metric_is_explained(make_trainer, text_dataset):
    rows = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text().splitlines()
    firsts = [row.split("|")[1] for row in rows if row.startswith("| `")]
    explained = {name for first in firsts for name in re.findall(r"`([^` ]+)`", first)}
    options = {"max_steps": 1, "trainer_options": {"eval_dataset": text_dataset}, "per_device_eval_batch_size": 8}
    logged = set()
    for more in ({"estimator": "exact", "teacher_top_k": 4}, {"extrapolation": 1.5}, {"entropy_coef": 0.1}):
        trainer = make_trainer(**options, **more)
        trainer.train()
        trainer.evaluate()
        logged |= {name.removeprefix("eval_") for entry in trainer.state.log_history for name in entry}
    source = inspect.getsource(GRPOTrainer)
    logged |= set(re.findall(r'self\._metrics\[(?:mode|"train")\]\["([^"]+)"\]', source))
    logged |= {f"sampling/logp_difference/{kind}" for kind in ("mean", "max")}
    names = {re.sub(r"tenth_\d\d", "tenth_01", name) for name in logged - {"step"}}
    names = {re.sub(r"^rewards/\w+/", "rewards/{name}/", name) for name in names}
    explained |= {name.removeprefix("eval_") for name in explained}
    assert not names - explained, f"docs/metrics.md lacks {names - explained}"
    assert "score/expected" in names and "time/reference_scoring" in names


def test_without_rewards_the_reward_is_the_teachers(make_trainer, caplog, capsys):
    trainer = make_trainer(per_device_train_batch_size=8, log_completions=True, max_steps=1)
    rollout = make_rollout(trainer)
    mask = valid_tokens(rollout)
    student_logps = trainer._per_token_logps(trainer.model, rollout)
    scores = (trainer.teacher.per_token_logps(rollout) - student_logps) * mask
    mean_scores = scores.sum(1) / mask.sum(1)
    metrics = trainer._metrics["train"]
    assert metrics["reward"] == [pytest.approx(mean_scores.mean().item(), abs=1e-6)]
    assert metrics["reward_std"] == [pytest.approx(mean_scores.std().item(), abs=1e-6)]
    assert metrics["rewards/teacher_score/mean"] == metrics["reward"]
    assert metrics["frac_reward_zero_std"] == [0.0]
    assert list(trainer._logs["rewards"]["teacher_score"]) == pytest.approx(mean_scores.tolist(), abs=1e-6)
    mean_advantages = (rollout["advantages"] * mask).sum(1) / mask.sum(1)
    assert list(trainer._logs["advantages"]) == pytest.approx(mean_advantages.tolist(), abs=1e-5)
    trainer.train()
    assert "teacher_score" in capsys.readouterr().out  # the printed sample
    assert not [record for record in caplog.records if "returned None" in record.message]


def test_rewards_are_logged_and_do_not_touch_the_advantages(make_trainer):
    def length(completion_ids, **kwargs):
        return [float(len(ids)) for ids in completion_ids]

    without = make_rollout(make_trainer(per_device_train_batch_size=8))
    trainer = make_trainer(per_device_train_batch_size=8, trainer_options={"reward_funcs": length})
    rollout = make_rollout(trainer)
    assert torch.equal(rollout["completion_ids"], without["completion_ids"])
    assert torch.equal(rollout["advantages"], without["advantages"])
    lengths = rollout["completion_mask"].sum(1).float()
    assert trainer._metrics["train"]["reward"] == [lengths.mean().item()]
    assert trainer._metrics["train"]["rewards/length/mean"] == [lengths.mean().item()]
    assert list(trainer._logs["rewards"]["length"]) == lengths.tolist()
    assert any(value != 0 for value in trainer._logs["rewards"]["teacher_score"])
    trainer.args.log_completions = True
    trainer.train()


def test_the_completions_table_is_written(make_trainer, tmp_path):
    import pandas

    trainer = make_trainer(log_completions=True, max_steps=1, output_dir=str(tmp_path / "run"))
    trainer.train()
    table = pandas.read_parquet(tmp_path / "run" / "completions" / "completions_00001.parquet")
    assert len(table) == 4
    assert (table["teacher_score"] != 0).all() and (table["advantage"] != 0).all()


def test_a_batch_without_valid_tokens_is_counted_and_trains_nothing(make_trainer, checkpoints):
    """`mask_truncated_completions` with a limit that no completion keeps: every row is masked."""
    end = AutoTokenizer.from_pretrained(checkpoints["qwen3-student"]).eos_token_id
    trainer = make_trainer(
        mask_truncated_completions=True, weight_decay=0.0, generation_kwargs={"suppress_tokens": [end, 0]}
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["advantages/num_tokens"] == 0 and entry["advantages/undefined"] == 4
    assert entry["loss"] == 0 and entry["score/mean"] is None
    before = load_file(f"{checkpoints['qwen3-student']}/model.safetensors")
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


def test_the_model_card_cites_gndpo(make_trainer, tmp_path):
    trainer = make_trainer(output_dir=str(tmp_path / "run"), save_strategy="steps", save_steps=2)
    trainer.train()
    card = (tmp_path / "run" / "README.md").read_text()
    assert "Stabilizing On-Policy Distillation for MLLM Reasoning with Global Normalization" in card
    assert "2606.09091" in card and re.search(r"tags:(.|\n)*- gndpo", card)
    state = json.loads((tmp_path / "run" / "checkpoint-2" / "trainer_state.json").read_text())
    assert "score/mean" in state["log_history"][0]


# What it refuses


def test_a_teacher_is_required_once(make_trainer, make_config, checkpoints, text_dataset):
    with pytest.raises(ValueError, match="No teacher.*`teacher_model_name_or_path`"):
        GNDPOTrainer(checkpoints["qwen3-student"], args=make_config(), train_dataset=text_dataset)
    with pytest.raises(ValueError, match="given twice"):
        make_trainer(teacher_model=checkpoints["qwen3-teacher"], teacher_model_name_or_path="elsewhere")
    trainer = make_trainer(teacher_model_name_or_path=checkpoints["qwen3-teacher"])
    assert trainer.teacher.model.config.hidden_size == 48
    loaded = Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-teacher"])
    with pytest.raises(ValueError, match="`teacher_model_init_kwargs` is set, but `teacher_model` is already loaded"):
        make_trainer(teacher_model=loaded, teacher_model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="shares .* parameters with `model`.*Load the teacher separately"):
        make_trainer(model=loaded, teacher_model=loaded)


def test_the_teacher_keeps_its_dtype_unless_told(make_trainer, tmp_path):
    model, tokenizer = tiny_models.build_qwen3(seed=1)
    path = tiny_models.save(model.bfloat16(), tokenizer, tmp_path / "bf16")
    assert make_trainer(teacher_model=path).teacher.model.dtype == torch.bfloat16
    trainer = make_trainer(teacher_model=path, teacher_model_init_kwargs={"dtype": "float32"})
    assert trainer.teacher.model.dtype == torch.float32
    trainer.train()


def test_a_quantized_teacher(make_trainer):
    quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    trainer = make_trainer(teacher_model_init_kwargs={"quantization_config": quantization_config, "dtype": "float32"})
    assert any(type(module).__name__ == "Linear8bitLt" for module in trainer.teacher.model.modules())
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["score/mean"])


def test_a_plain_grpo_config_is_refused(checkpoints, text_dataset):
    config = GRPOConfig("out", use_cpu=True, bf16=False)
    with pytest.raises(TypeError, match="GRPOConfig.*replace the class name"):
        GNDPOTrainer(
            checkpoints["qwen3-student"],
            args=config,
            teacher_model=checkpoints["qwen3-teacher"],
            train_dataset=text_dataset,
        )


@pytest.mark.parametrize("value, kind", [(float("nan"), "NaN: 32"), (float("inf"), "NaN: 32")])
def test_a_teacher_without_finite_log_probs_stops_the_run(make_trainer, value, kind):
    trainer = make_trainer(generation_kwargs={"suppress_tokens": [2]})
    trainer.teacher.model.lm_head.weight.data.fill_(value)
    with pytest.raises(
        ValueError, match=rf"teacher gave non-finite.*32 of 32 tokens.*{kind}.*First prompt: .*what is"
    ):
        trainer.train()


def test_padding_of_the_students_vocabulary_is_never_sampled(make_trainer, tmp_path):
    """Rows beyond the teacher's vocabulary are no tokens; random students would sample them all the time."""
    size = len(tiny_models.build_tokenizer())
    student = tiny_models.save(*tiny_models.build_qwen3(vocab_size=size + 64), tmp_path / "student")
    trainer = make_trainer(model=student)
    rollout = make_rollout(trainer)
    assert rollout["completion_ids"].max() < size
    trainer.train()
    with pytest.raises(ValueError, match=rf"token id {size + 3}, but the teacher has embeddings for {size}"):
        trainer.teacher.per_token_logps({**rollout, "completion_ids": rollout["completion_ids"] * 0 + size + 3})


def test_a_teacher_with_a_larger_padded_vocabulary_is_fine(make_trainer, tmp_path):
    size = len(tiny_models.build_tokenizer())
    teacher = tiny_models.save(*tiny_models.build_qwen3(seed=1, vocab_size=size + 64), tmp_path / "teacher")
    make_trainer(teacher_model=teacher).train()


def test_images_dropped_by_trl_stop_the_run(make_trainer, monkeypatch):
    """TRL marks a batch whose images it dropped by `num_images=None`; see its truncation safety for tool images."""
    trainer = make_trainer("qwen25vl")
    original = GRPOTrainer._generate_and_score_completions

    def dropping(self, inputs):
        rollout = original(self, inputs)
        del rollout["pixel_values"], rollout["image_grid_thw"]
        return {**rollout, "num_images": None}

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", dropping)
    with pytest.raises(ValueError, match="dropped all images.*`max_completion_length`"):
        trainer.train()


def test_images_are_not_ignored_by_a_text_student(make_trainer, image_dataset):
    with pytest.raises(ValueError, match="has the column 'images'.*no processor for images.*remove the column"):
        make_trainer("qwen3", trainer_options={"train_dataset": image_dataset})


def test_a_tokenizer_in_a_processors_place_is_refused(make_trainer, checkpoints, image_dataset):
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["qwen25vl-student"])
    options = {"processing_class": tokenizer, "train_dataset": image_dataset}
    with pytest.raises(ValueError, match="has the column 'images'.*is a tokenizer .*pass the processor"):
        make_trainer("qwen25vl", trainer_options=options)
    text = image_dataset.remove_columns("images")
    with pytest.raises(ValueError, match="`eval_dataset` has the column 'images'.*is a tokenizer"):
        make_trainer("qwen25vl", trainer_options={**options, "train_dataset": text, "eval_dataset": image_dataset})
    parts = [{"type": "image", "image": tiny_models.draw_image(0)}, {"type": "text", "text": "one"}]
    rows = [{"prompt": [{"role": "user", "content": parts}]}] * 8
    stream = IterableDataset.from_generator(lambda: iter(rows))
    with pytest.raises(ValueError, match="has pictures, but the student's .*is no processor .*pass the processor"):
        make_trainer("qwen25vl", trainer_options={**options, "train_dataset": stream}).train()


def test_a_processor_that_pads_on_the_right_pads_on_the_left(make_trainer, make, checkpoints, image_dataset):
    """What it says of each token (here: whether it is of an image) has to stand where the token stands."""
    processor = AutoProcessor.from_pretrained(checkpoints["qwen25vl-student"])
    processor.tokenizer.padding_side = "right"
    with pytest.warns(UserWarning, match="`padding_side` of `processing_class` is 'right'"):
        trainer = make_trainer("qwen25vl", trainer_options={"processing_class": processor})
    rollout = make_rollout(trainer)
    assert not rollout["prompt_mask"].all()
    types = rollout["mm_token_type_ids"][:, : rollout["prompt_ids"].size(1)]
    assert types.bool().equal(rollout["prompt_ids"] == trainer.model.config.image_token_id)

    tokenizer = AutoTokenizer.from_pretrained(checkpoints["qwen3-student"], padding_side="right")
    with pytest.warns(UserWarning, match="`padding_side` of `processing_class` is 'right'"):
        make(GSPOTrainer, GSPOConfig, trainer_options={"processing_class": tokenizer})
    assert tokenizer.padding_side == "left"
