"""Teachers of a user's own: what the protocol gives them, and what the trainer makes of their answers."""

import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tiny_models
import torch
from helpers import gradients, make_rollout
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, Qwen3ForCausalLM
from trl.trainer.utils import _ChunkedLogProbFunction

from gndpo_trl.grpo.rollouts import valid_tokens
from gndpo_trl.teachers import LocalTeacher, Teacher, local
from gndpo_trl.teachers.offload import OffloadedWeights


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
    trainer._checked_heads.add((trainer.model, ()))  # likewise
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


# Where teachers come from


def test_weights_that_student_and_teacher_share_are_refused(make_trainer, checkpoints):
    base = Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-student"])
    student = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    with pytest.raises(
        ValueError, match=r"shares \d+ parameters with `model`.*scored through its adapters.*separately"
    ):
        make_trainer(model=student, teacher_model=base)
    assert any(parameter.requires_grad for parameter in student.parameters()), "the adapters can still be trained"
    wrapped = Qwen3ForCausalLM(base.config)
    wrapped.model = base.model
    with pytest.raises(ValueError, match=r"shares \d+ parameters"):
        make_trainer(model=base, teacher_model=wrapped)


def test_the_earlier_name_of_dtype_is_understood(make_trainer, checkpoints):
    for name in ("dtype", "torch_dtype"):
        trainer = make_trainer(teacher_model_init_kwargs={name: torch.bfloat16})
        assert trainer.teacher.model.dtype == torch.bfloat16


def test_the_students_code_is_trusted_alone(make_trainer, checkpoints):
    def is_trusted(**options) -> bool:
        return make_trainer(trust_remote_code=True, **options).teacher.init_kwargs["trust_remote_code"]

    assert not is_trusted()
    assert is_trusted(teacher_model_init_kwargs={"trust_remote_code": True})


def test_the_teacher_follows_the_students_attention_and_head(make_trainer):
    def settings(**options):
        trainer = make_trainer(share_prompts=False, **options)
        trainer.train()
        return trainer.teacher.model.config._attn_implementation

    assert settings(model_init_kwargs={"attn_implementation": "eager"}) == "eager"
    assert settings(model_init_kwargs={"attn_implementation": "sdpa"}) == "sdpa"
    own = {"attn_implementation": "eager"}
    assert settings(model_init_kwargs={"attn_implementation": "sdpa"}, teacher_model_init_kwargs=own) == "eager"


def test_the_teachers_head_computes_in_float32_where_the_students_does(make_trainer, monkeypatch):
    dtypes = []
    apply = _ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        _ChunkedLogProbFunction, "apply", lambda hidden, *args: dtypes.append(hidden.dtype) or apply(hidden, *args)
    )
    trainer = make_trainer(cast_lm_head_to_fp32=True, teacher_model_init_kwargs={"dtype": torch.bfloat16})
    rollout = make_rollout(trainer)
    dtypes.clear()
    trainer.teacher.per_token_logps(rollout)
    assert set(dtypes) == {torch.float32}


def test_a_teacher_folder_without_a_tokenizer_is_called_that(make_trainer, tmp_path):
    model, tokenizer = tiny_models.build_qwen3(seed=1)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="`teacher_model` is .*bare', a folder without a tokenizer"):
        make_trainer(teacher_model=str(tmp_path / "bare"))
    options = {"teacher_processing_class": tokenizer}
    make_trainer(teacher_model=str(tmp_path / "bare"), trainer_options=options)


def test_a_loaded_teacher_whose_origin_is_gone_is_warned_about(make_trainer, tmp_path):
    path = tiny_models.save(*tiny_models.build_qwen3(seed=1), tmp_path / "teacher")
    teacher = Qwen3ForCausalLM.from_pretrained(path)
    shutil.rmtree(path)
    with pytest.warns(UserWarning, match="no longer there.*NOT checked.*`teacher_processing_class`"):
        make_trainer(teacher_model=teacher)


@pytest.mark.parametrize("path", ["./runs/teecher", "/no/such/folder", "nobody/no-such-model"])
def test_a_mistyped_teacher_is_named(make_trainer, monkeypatch, path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries for a minute
    with pytest.raises(ValueError, match=f"`teacher_model` is '{path}', but no model can be found there.*config.json"):
        make_trainer(teacher_model=path)
    with pytest.raises(ValueError, match=f"`model` is '{path}', but no model"):
        make_trainer(model=path)


@dataclass
class Coin(Teacher):
    """Has no hash, and is false, as a container without entries is."""

    entries: list = field(default_factory=list)

    def __len__(self):
        return len(self.entries)

    def prepare(self, student, accelerator, score):
        self.is_prepared = True

    def per_token_logps(self, rollout):
        return torch.full(rollout["completion_ids"].shape, 0.5).log()


def test_a_teacher_may_be_any_object(make_trainer):
    trainer = make_trainer(teacher_model=Coin(), extrapolation=1.5)
    assert trainer.teacher.is_prepared
    trainer.train()
    assert make_trainer(teacher_model=Coin()).teacher.is_prepared
    with pytest.raises(ValueError, match="a Coin only knows the sampled tokens"):
        make_trainer(teacher_model={"coin": Coin()}, estimator="exact")


@pytest.mark.parametrize("teacher", [["a", "b"], 3, Teacher, {"math": None}])
def test_what_is_no_teacher_is_named(make_trainer, teacher):
    with pytest.raises(TypeError, match=r"`teacher_model` is .*, but a teacher is a path, .*dictionary"):
        make_trainer(teacher_model=teacher)


def test_paths_may_be_path_objects(make_trainer, checkpoints):
    trainer = make_trainer(model=Path(checkpoints["qwen3-student"]), teacher_model=Path(checkpoints["qwen3-teacher"]))
    assert trainer.teacher.model.config.hidden_size == 48
    trainer.train()


def test_offloaded_weights_lie_in_few_blocks_and_visit(checkpoints):
    model = Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-teacher"])
    tied = model.lm_head.weight
    inputs = torch.arange(10).view(1, 10)
    expected = model(inputs).logits
    weights = OffloadedWeights(model, torch.device("cpu"), block_bytes=2**14)
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert total / 2**14 <= len(weights.blocks) < 2 * total / 2**14
    assert sum(len(block) for block in weights.blocks) < 1.1 * total
    at_home = {parameter.data_ptr() for parameter in model.parameters()}
    with weights.on_device():
        assert torch.equal(model(inputs).logits, expected)
    assert {parameter.data_ptr() for parameter in model.parameters()} == at_home
    assert model.lm_head.weight is tied and torch.equal(model(inputs).logits, expected)
    with pytest.raises(RuntimeError), weights.on_device():
        raise RuntimeError
    assert {parameter.data_ptr() for parameter in model.parameters()} == at_home


def test_a_teacher_to_be_offloaded_is_never_loaded_onto_the_device(make_trainer, monkeypatch):
    asked = []
    load = local.create_model_from_path
    monkeypatch.setattr(
        local, "create_model_from_path", lambda path, **kwargs: asked.append(kwargs) or load(path, **kwargs)
    )
    make_trainer(teacher_offload=True)
    make_trainer()
    assert asked[0]["device_map"] is None and "device_map" not in asked[1]
