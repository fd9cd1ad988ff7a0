"""Teachers of a user's own: what the protocol gives them, and what the trainer makes of their answers."""

import math

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from test_trainer import gradients, make_rollout
from transformers import AutoTokenizer, Qwen3ForCausalLM

from gndpo_trl.grpo.rollouts import valid_tokens
from gndpo_trl.teachers import LocalTeacher, Teacher


class ShortWords(Teacher):
    """The example of the docstring."""

    def __init__(self, tokenizer):
        lengths = [len(tokenizer.decode([id])) for id in range(len(tokenizer))]
        self.logps = (-torch.tensor(lengths, dtype=torch.float32)).log_softmax(-1)

    def per_token_logps(self, rollout):
        return self.logps.to(rollout["completion_ids"].device)[rollout["completion_ids"]]


@pytest.fixture
def tokenizer(checkpoints):
    return AutoTokenizer.from_pretrained(checkpoints["qwen3-student"])


def test_a_teacher_of_ten_lines_teaches(make_trainer, tokenizer):
    trainer = make_trainer(
        teacher_model=ShortWords(tokenizer), max_steps=30, per_device_train_batch_size=16, learning_rate=3e-3
    )
    trainer.train()
    means = [entry["teacher/mean_logp"] for entry in trainer.state.log_history if "teacher/mean_logp" in entry]
    assert sum(means[-5:]) > sum(means[:5]) + 1
    assert trainer.state.log_history[0]["teacher/unknown_tokens"] == 0


def test_a_teacher_decides_its_own_options(make_trainer, tokenizer):
    with pytest.raises(ValueError, match="`teacher_offload` is set, but `teacher_model` is a ShortWords.*Unset it"):
        make_trainer(teacher_model=ShortWords(tokenizer), teacher_offload=True)


class Forgetful(ShortWords):
    """Does not know every third token."""

    def per_token_logps(self, rollout):
        ids = rollout["completion_ids"]
        return super().per_token_logps(rollout).masked_fill(ids % 3 == 0, float("nan"))


def test_tokens_that_the_teacher_does_not_know_leave_loss_and_statistics(make_trainer, tokenizer):
    trainer = make_trainer(teacher_model=Forgetful(tokenizer), per_device_train_batch_size=8, max_steps=1)
    rollout = make_rollout(trainer)
    unknown = (rollout["completion_ids"] % 3 == 0) & rollout["completion_mask"].bool()
    mask = valid_tokens(rollout)
    assert unknown.any() and not (mask & unknown).any() and not rollout["advantages"][unknown].any()
    assert rollout["advantages"][mask].mean().abs() < 1e-5
    metrics = trainer._metrics["train"]
    assert metrics["teacher/unknown_tokens"] == [unknown.sum().item()]
    assert metrics["advantages/num_tokens"] == [mask.sum().item()]
    assert rollout["num_items_in_batch"] == mask.sum()

    # The loss is that of the known tokens: means over them, a ratio over them.
    trainer.current_gradient_accumulation_steps = 1  # set by `train`
    loss = trainer._compute_loss(trainer.model, rollout)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    inputs = [torch.cat([rollout[f"prompt_{kind}"], rollout[f"completion_{kind}"]], dim=1) for kind in ("ids", "mask")]
    log_probs = trainer.model(input_ids=inputs[0], attention_mask=inputs[1]).logits[:, :-1].log_softmax(-1)
    logps = log_probs.gather(-1, inputs[0][:, 1:, None]).squeeze(-1)[:, -mask.size(1) :]
    expected = -((logps - logps.detach()).exp() * rollout["advantages"] * mask).sum(-1) / mask.sum(-1).clamp(min=1)
    expected.mean().backward()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-5)
    trainer.train()


def test_infinite_log_probs_are_no_answer(make_trainer, tokenizer):
    teacher = ShortWords(tokenizer)
    teacher.logps[:] = -math.inf
    with pytest.raises(ValueError, match="The teacher gave non-finite log-probs.*infinite"):
        make_rollout(make_trainer(teacher_model=teacher))


class Briefed(LocalTeacher):
    """Reads a longer prompt than the student, from a column of its own."""

    def per_token_logps(self, rollout):
        prompts = [row["briefing"] for row in rollout["rows"]]
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        own = {"prompt_ids": inputs["input_ids"], "prompt_mask": inputs["attention_mask"]}
        return super().per_token_logps({**rollout, **own})


def test_a_teacher_may_read_another_prompt_than_the_student(make_trainer, checkpoints, text_dataset):
    briefings = ["one plus one" if index % 2 else "what is the sum of one and two and three ?" for index in range(24)]
    dataset = text_dataset.add_column("briefing", briefings)
    trainer = make_trainer(
        teacher_model=Briefed(checkpoints["qwen3-teacher"]),
        trainer_options={"train_dataset": dataset},
        remove_unused_columns=False,
    )
    rollout = make_rollout(trainer)
    found = trainer.teacher.per_token_logps({**rollout, "rows": [dataset[index // 2] for index in range(8)]})
    teacher = Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-teacher"])
    for index in range(8):
        prompt = trainer._tokenizer(briefings[index // 2])["input_ids"]
        completion = rollout["completion_ids"][index][rollout["completion_mask"][index].bool()]
        ids = torch.tensor([prompt + completion.tolist()])
        with torch.no_grad():
            log_probs = teacher(ids).logits[0, :-1].log_softmax(-1)
        alone = log_probs.gather(-1, ids[0, 1:, None]).squeeze(-1)[len(prompt) - 1 :]
        torch.testing.assert_close(found[index, : len(completion)], alone, rtol=0, atol=1e-5)
    trainer.train()


class Elsewhere(ShortWords):
    """Answers only what it was asked before the student was scored, as one behind a server would."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.calls = []

    def check(self, student):
        self.calls.append("check")
        assert student.tokenizer.eos_token == "<|im_end|>" and student.config.hidden_size == 32

    def prepare(self, student, accelerator, score):
        self.calls.append("prepare")
        student.base_model.register_forward_pre_hook(lambda *args: self.calls.append("student"))

    def start(self, rollout):
        self.calls.append("start")
        self.answer = super().per_token_logps(rollout)

    def per_token_logps(self, rollout):
        self.calls.append("collect")
        return self.answer


def test_a_teacher_elsewhere_scores_while_the_student_does(make_trainer, tokenizer):
    teacher = Elsewhere(tokenizer)
    trainer = make_trainer(teacher_model=teacher, share_prompts=False)  # else it is tried out, in two passes more
    assert teacher.calls == ["check", "prepare"]
    trainer.generation_config.max_new_tokens = 1  # one forward pass for each batch that is sampled
    make_rollout(trainer)
    assert teacher.calls[2:] == ["student", "start", "student", "student", "collect"]


class Following(LocalTeacher):
    """The average of its own weights and the student's, moved after every step."""

    def prepare(self, student, accelerator, score):
        super().prepare(student, accelerator, score)
        self.student = student

    def on_step_end(self, args, state, control, **kwargs):
        with torch.no_grad():
            for mine, other in zip(self.model.parameters(), self.student.parameters(), strict=True):
                mine.lerp_(other, 0.1)

    def save_state(self, folder):
        save_file(self.model.state_dict(), f"{folder}/teacher.safetensors")

    def load_state(self, folder):
        self.model.load_state_dict(load_file(f"{folder}/teacher.safetensors"))


def test_what_a_teacher_knows_goes_into_checkpoints_and_comes_back(make_trainer, checkpoints, tmp_path):
    model = tiny_models.save(*tiny_models.build_qwen3(seed=3), tmp_path / "teacher")

    def make(**options):
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, **options}
        return make_trainer(teacher_model=Following(model), **options)

    whole = make(output_dir=str(tmp_path / "whole"))
    whole.train()
    make(output_dir=str(tmp_path / "part"), max_steps=2).train()
    resumed = make(output_dir=str(tmp_path / "part"))
    resumed.train(resume_from_checkpoint=True)
    for trainer in (whole, resumed):
        start = load_file(f"{model}/model.safetensors")
        assert any(not torch.equal(start[name], value) for name, value in trainer.teacher.model.state_dict().items())
    for one, other in ((whole.teacher.model, resumed.teacher.model), (whole.model, resumed.model)):
        for name, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[name]), name


def test_a_pair_that_does_not_fit_is_refused_before_weights_are_loaded(make_trainer, tmp_path, monkeypatch):
    other = tiny_models.build_tokenizer(("ten", "eleven"))
    student = tiny_models.save(*tiny_models.build_qwen3(tokenizer=other), tmp_path / "student")
    (tmp_path / "student" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="disagree on 2 of the student's"):
        make_trainer(model=student)


def test_the_student_is_that_of_a_plain_run_whatever_teaches(make_trainer, checkpoints):
    """A local teacher passed as a path, as a model and as a `LocalTeacher` are the same teacher."""
    path = checkpoints["qwen3-teacher"]
    expected = gradients(make_trainer(max_steps=1))
    for teacher in (Qwen3ForCausalLM.from_pretrained(path), LocalTeacher(path)):
        found = gradients(make_trainer(max_steps=1, teacher_model=teacher))
        assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
