"""Several teachers: whose rows are whose, what is logged and whitened apart, and which names are refused."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import advantages_of, make_rollout, plain_logps
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, Qwen3ForCausalLM

from gndpo_trl.grpo.rollouts import valid_tokens
from gndpo_trl.objective.advantages import row_moments
from gndpo_trl.teachers import LocalTeacher, RoutedTeacher, Teacher


NAMES = ["math", "charts", "charts", "math", "charts"]


def with_teachers(dataset: Dataset, names: list[str]) -> Dataset:
    return dataset.add_column("teacher", [names[index % len(names)] for index in range(len(dataset))])


class Halves(Teacher):
    """Finds every token as likely as a coin."""

    def per_token_logps(self, rollout):
        self.num_rows = len(rollout["completion_ids"])
        assert all(row["teacher"] == "coin" for row in rollout["rows"])
        return torch.full(rollout["completion_ids"].shape, 0.5).log()


@pytest.mark.parametrize("normalization", ["global", "teacher"])
@pytest.mark.parametrize("family", ["qwen3", "internvl", "qwen25vl"])
def test_each_row_is_scored_by_its_teacher(make_trainer, checkpoints, request, family, normalization):
    dataset = with_teachers(request.getfixturevalue("text_dataset" if family == "qwen3" else "image_dataset"), NAMES)
    paths = {"math": checkpoints[f"{family}-teacher"], "charts": checkpoints[f"{family}-student"]}
    trainer = make_trainer(
        family,
        teacher_model=paths,
        trainer_options={"train_dataset": dataset},
        per_device_train_batch_size=8,
        advantage_normalization=normalization,
    )
    rollout = make_rollout(trainer)
    mask = valid_tokens(rollout)
    auto_model = Qwen3ForCausalLM if family == "qwen3" else AutoModelForImageTextToText
    logps = {name: plain_logps(auto_model.from_pretrained(path), rollout) for name, path in paths.items()}
    mine = [dataset[index // 2]["teacher"] for index in range(8)]
    teacher_logps = torch.stack([logps[name][row] for row, name in enumerate(mine)])
    scores = teacher_logps - logps["charts"]  # the student's too
    # The student's own teacher has scores of rounding errors, which whitening apart would blow up.
    is_math = torch.tensor([name == "math" for name in mine])
    of_teacher = scores[is_math][mask[is_math]] if normalization == "teacher" else scores[mask]
    expected = (scores - of_teacher.mean()) / of_teacher.std()
    rows = is_math if normalization == "teacher" else torch.ones(8, dtype=torch.bool)
    torch.testing.assert_close(rollout["advantages"][rows][mask[rows]], expected[rows][mask[rows]], rtol=0, atol=1e-3)

    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    for name in paths:
        part = torch.tensor([other == name for other in mine])
        assert metrics[f"teacher/{name}/score/mean"] == pytest.approx(scores[part][mask[part]].mean().item(), abs=1e-5)
        assert metrics[f"teacher/{name}/reverse_kl"] == pytest.approx(
            -scores[part][mask[part]].mean().item(), abs=1e-5
        )
        assert metrics[f"teacher/{name}/advantages/num_tokens"] == mask[part].sum().item()
    if normalization == "teacher":
        assert metrics["teacher/math/advantages/std"] == pytest.approx(1, abs=1e-3)
    trainer.train()


def test_teachers_of_all_kinds_share_a_run(make_trainer, checkpoints, text_dataset, tmp_path):
    dataset = with_teachers(text_dataset, ["coin", "mean", "own"])
    prompts = [
        [{"role": "user", "content": "one plus one is two"}] if row["teacher"] == "mean" else None for row in dataset
    ]
    dataset = dataset.add_column("teacher_prompt", prompts)

    def make(folder: str, steps: int):
        coin = Halves()
        teachers = {"own": LocalTeacher(checkpoints["qwen3-teacher"]), "mean": "self", "coin": coin}
        trainer = make_trainer(
            teacher_model=teachers,
            trainer_options={"train_dataset": dataset},
            teacher_weights="ema",
            teacher_ema_decay=0.5,
            per_device_train_batch_size=6,
            save_strategy="steps",
            save_steps=2,
            max_steps=steps,
            output_dir=str(tmp_path / folder),
        )
        return trainer, coin

    whole, coin = make("whole", 4)
    whole.train()
    assert 0 < coin.num_rows < 6  # its own rows alone
    make("part", 2)[0].train()
    resumed, _ = make("part", 4)
    resumed.train(resume_from_checkpoint=True)
    one, two = (
        load_file(tmp_path / f"{name}/checkpoint-4/teacher-mean/teacher.safetensors") for name in ("whole", "part")
    )
    assert one and all(torch.equal(value, two[name]) for name, value in one.items())
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_whitening_apart_equals_whitening_each_part():
    torch.manual_seed(0)
    scores, mask = torch.randn(6, 5, dtype=torch.float64), torch.rand(6, 5) > 0.3
    teachers = torch.tensor([0, 2, 0, 2, 2, 0])  # none has the teacher 1
    scores[teachers == 2] *= 10
    options = {"score_clip": None, "teachers": teachers, "num_teachers": 3}
    found, undefined = advantages_of(scores, mask, normalization="teacher", **options)
    for number in (0, 2):
        part = teachers == number
        expected, _ = advantages_of(scores[part], mask[part], score_clip=None)
        torch.testing.assert_close(found[part], expected, rtol=0, atol=1e-12)
    assert not undefined.any() and row_moments(found, mask)[:, 0].sum() == mask.sum()
    with pytest.raises(ValueError, match="`teachers` does not say whose each completion is"):
        advantages_of(scores, mask, normalization="teacher")


# What is refused


def test_names_are_compared_before_the_run(make_trainer, checkpoints, text_dataset):
    paths = {"math": checkpoints["qwen3-teacher"], "charts": checkpoints["qwen3-student"]}

    def make(dataset, **options):
        options = {"teacher_model": paths, **options}
        return make_trainer(trainer_options={"train_dataset": dataset}, **options)

    routed = with_teachers(text_dataset, NAMES)
    with pytest.raises(
        ValueError, match="Row 3 of `train_dataset` names the teacher 'chart' .* only 'math', 'charts'"
    ):
        make(with_teachers(text_dataset, ["math", "charts", "math", "chart"]))
    with pytest.raises(ValueError, match="Row 1 of `train_dataset` names the teacher None"):
        make(with_teachers(text_dataset, ["math", None]))
    with pytest.raises(ValueError, match="`train_dataset` has no column `teacher`.*only \\['prompt'\\]"):
        make(text_dataset)
    with pytest.raises(ValueError, match="`remove_unused_columns` is True, which removes the column `teacher`"):
        make(routed, remove_unused_columns=True)
    with pytest.raises(ValueError, match='`advantage_normalization` is "teacher", but there is one teacher only'):
        make(routed, teacher_model=paths["math"], advantage_normalization="teacher")
    with pytest.raises(ValueError, match="`teacher_model_revision` is set, but `teacher_model` has several"):
        make(routed, teacher_model_revision="main")
    with pytest.raises(ValueError, match="no row of `train_dataset` has a `teacher_prompt`"):
        make(routed, teacher_model={"math": "self", "charts": paths["charts"]}, teacher_weights="live")
    for wrong, message in (
        ({}, "is an empty dictionary"),
        ({"a/b": Halves()}, "has the name 'a/b', which cannot stand"),
    ):
        with pytest.raises(ValueError, match=message):
            RoutedTeacher(wrong)
    with pytest.warns(UserWarning, match="a teacher 'charts', but no row of `train_dataset` names it: it stays idle"):
        trainer = make(with_teachers(text_dataset, ["math"]))
    trainer.train()
    rows = [{"prompt": "one", "teacher": "chart"}] * 8
    with pytest.raises(ValueError, match="A row .prompt: 'one'. names the teacher 'chart'"):
        make(IterableDataset.from_generator(lambda: iter(rows))).train()
