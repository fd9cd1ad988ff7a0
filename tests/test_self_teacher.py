"""The student as its own teacher: which weights score, what that leaves of the student, and what a checkpoint keeps."""

import copy
import shutil

import pytest
import torch
from datasets import Dataset, IterableDataset
from helpers import make_rollout, plain_logps
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import Qwen3ForCausalLM, TrainerCallback

from gndpo_trl.teachers import LocalTeacher, SelfTeacher


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)  # not the base from the beginning


@pytest.fixture
def briefed(text_dataset) -> Dataset:
    prompts = [[{"role": "user", "content": f"one plus two ? {row['prompt'][0]['content']}"}] for row in text_dataset]
    return text_dataset.add_column("teacher_prompt", prompts)


@pytest.fixture
def make_self(make_trainer, briefed):
    def make(weights: str, trainer_options=None, **options):
        trainer_options = {"train_dataset": briefed, **(trainer_options or {})}
        options = {"per_device_train_batch_size": 8, "teacher_model": "self", "teacher_weights": weights, **options}
        return make_trainer(trainer_options=trainer_options, **options)

    return make


def question_of(trainer, rollout: dict) -> dict:
    return trainer._teacher_prompts.exchange({**rollout, "rows": [trainer.train_dataset[k // 2] for k in range(8)]})


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


class Watch(TrainerCallback):
    """The student's trained weights before the first step and after every step."""

    def __init__(self):
        self.history = []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.history.append(weights_of(model))

    def on_step_end(self, args, state, control, model, **kwargs):
        self.on_train_begin(args, state, control, model)


def with_weights(model, values: dict[str, torch.Tensor]):
    model = copy.deepcopy(model)
    model.__dict__.pop("forward", None)  # TRL's fused head
    model.load_state_dict({**model.state_dict(), **values})
    return model.eval()


def without_head(model):
    """A copy of a model with adapters, without TRL's fused head."""
    forward = model.get_base_model().__dict__.pop("forward")
    found = copy.deepcopy(model).eval()
    model.get_base_model().forward = forward
    return found


@pytest.mark.parametrize(
    "weights, offload",
    [("ema", False), ("ema", True), ("periodic", False), ("periodic", True), ("live", False), ("initial", False)],
)
def test_which_weights_score(make_self, checkpoints, weights, offload):
    watch = Watch()
    options = {"teacher_ema_decay": 0.7, "teacher_sync_steps": 2, "teacher_offload": offload, "max_steps": 3}
    trainer = make_self(weights, {"callbacks": [watch]}, **options)
    trainer.train()
    start, _, second, third = watch.history
    expected = {"initial": start, "live": third, "periodic": second}.get(weights)
    if weights == "ema":
        expected = {name: value.double() for name, value in start.items()}
        for after in watch.history[1:]:
            expected = {name: 0.7 * value + 0.3 * after[name] for name, value in expected.items()}
    assert any((third[name] - value).abs().max() > 1e-4 for name, value in start.items())

    rollout = make_rollout(trainer)
    question = question_of(trainer, rollout)
    before = weights_of(trainer.model)
    found = trainer.teacher.per_token_logps(question)
    assert all(torch.equal(value, before[name]) for name, value in weights_of(trainer.model).items())
    mask = rollout["completion_mask"].bool()
    plain = plain_logps(with_weights(trainer.model, expected), question)
    torch.testing.assert_close(found[mask], plain[mask], rtol=0, atol=1e-5)
    if weights in ("ema", "periodic"):
        other = plain_logps(with_weights(trainer.model, third), question)
        assert (other - plain)[mask].abs().max() > 1e-4


@pytest.mark.parametrize("weights", ["ema", "periodic", "initial"])
def test_adapters_alone_are_exchanged(make_self, checkpoints, weights):
    trainer = make_self(weights, {"peft_config": LORA}, teacher_ema_decay=0.5, teacher_sync_steps=3, max_steps=2)
    trainer.train()
    rollout = make_rollout(trainer)
    question, trained = question_of(trainer, rollout), weights_of(trainer.model)
    learns = {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert all("lora_" in name for name in learns)
    found = trainer.teacher.per_token_logps(question)
    assert learns == {name for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert all(torch.equal(value, trained[name]) for name, value in trainer.model.named_parameters())
    mask = rollout["completion_mask"].bool()
    assert trainer.teacher.values.keys() == learns
    with_adapters = get_peft_model(Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-student"]), LORA)
    with_adapters.load_state_dict({**with_adapters.state_dict(), **trainer.teacher.values})
    expected = plain_logps(with_adapters, question)
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "adapter",
    [
        {"init_lora_weights": False},  # as one that was trained before
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 4, 5]},
    ],
    ids=["continued", "biases", "whole modules", "tokens"],
)
def test_the_start_is_the_student_when_training_begins(make_self, make_trainer, checkpoints, adapter):
    """As teacher, and as the reference of `extrapolation`, whatever `beta` has TRL load."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **adapter})
    beta = 0.1 if config.bias == "none" else 0.0
    torch.manual_seed(0)
    base = Qwen3ForCausalLM.from_pretrained(checkpoints["qwen3-student"], attention_bias=True)
    trainers = [
        make_self("initial", model=get_peft_model(copy.deepcopy(base), config), learning_rate=0.05, max_steps=1),
        make_trainer(
            model=get_peft_model(copy.deepcopy(base), config),
            extrapolation=1.5,
            beta=beta,
            learning_rate=0.05,
            max_steps=1,
        ),
    ]
    for trainer in trainers:
        start = without_head(trainer.model)
        scorer = trainer.reference or trainer.teacher
        trainer.train()
        rollout = {**make_rollout(trainer), "rows": trainer.train_dataset.select(range(8)).to_list()}
        mask = rollout["completion_mask"].bool()
        expected, moved = (
            plain_logps(start, rollout)[mask],
            plain_logps(without_head(trainer.model), rollout)[mask],
        )
        assert (moved - expected).abs().max() > 1e-3
        torch.testing.assert_close(scorer.per_token_logps(rollout)[mask], expected, rtol=0, atol=1e-4)


def test_a_start_with_adapters_takes_the_memory_of_adapters(make_self):
    def size(trainer) -> int:
        tensors = {value.data_ptr(): value for value in trainer.model.parameters()}
        if isinstance(trainer.teacher, LocalTeacher):
            tensors.update({value.data_ptr(): value for value in trainer.teacher.model.parameters()})
        else:
            tensors.update({value.data_ptr(): value for value in trainer.teacher.values.values()})
        return sum(value.numel() * value.element_size() for value in tensors.values())

    full, adapters = make_self("initial"), make_self("initial", {"peft_config": LORA}, max_steps=1)
    adapters.train()
    learns = sum(value.numel() * 4 for value in adapters.model.parameters() if value.requires_grad)
    student = sum(value.numel() * 4 for value in adapters.model.parameters())
    assert size(adapters) == student + learns
    assert size(full) == 2 * (student - learns)


def test_the_average_of_bfloat16_weights_is_float32(make_self):
    trainer = make_self("ema", model_init_kwargs={"dtype": "bfloat16"}, learning_rate=1e-2, teacher_ema_decay=0.999)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    for name, value in trainer.teacher.values.items():
        start, first, second = (step[name].double() for step in watch.history)
        expected = 0.999 * (0.999 * start + 0.001 * first) + 0.001 * second
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weights", ["ema", "periodic", "initial", "live"])
@pytest.mark.parametrize("peft", [False, True])
def test_a_run_goes_on_exactly(make_self, checkpoints, tmp_path, weights, peft):
    def make(folder: str, steps: int):
        options = {"peft_config": LORA} if peft else {}
        schedule = {"save_strategy": "steps", "save_steps": 3, "max_steps": steps, "num_iterations": 2}
        own = {"teacher_ema_decay": 0.5, "teacher_sync_steps": 5, "output_dir": str(tmp_path / folder)}
        return make_self(weights, options, **schedule, **own)

    whole = make("whole", 6)
    whole.train()
    make("part", 3).train()
    resumed = make("part", 6)
    resumed.train(resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    file = "start.safetensors" if weights == "initial" else "teacher.safetensors"
    if weights in ("ema", "periodic") or (weights == "initial" and peft):
        states = [load_file(tmp_path / folder / "checkpoint-6" / file) for folder in ("whole", "part")]
        assert states[0].keys() == states[1].keys() and states[0]
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
        student = dict(whole.model.named_parameters())
        assert any(not torch.equal(value, student[name]) for name, value in states[0].items())
    else:
        assert not (tmp_path / "whole/checkpoint-6" / file).exists()


def test_checkpoints_without_such_weights_are_refused(make_self, tmp_path):
    schedule = {"save_strategy": "steps", "save_steps": 1}
    make_self("live", **schedule, max_steps=1).train()
    with pytest.raises(ValueError, match="`teacher_weights` is 'ema', but the checkpoint .* has no such weights"):
        make_self("ema", **schedule, max_steps=2).train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "out")


def test_a_student_teaches_itself_before_training_and_learns_nothing_twice(make_self, briefed):
    """Evaluation before training; and a second `train` goes on with the average of the first."""
    trainer = make_self("ema", {"eval_dataset": briefed.select(range(4))}, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    assert metrics["eval_score/std"] > 0
    trainer.train()
    before = {name: value.clone() for name, value in trainer.teacher.values.items()}
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.teacher.values.items())


# What is refused


def test_a_student_that_reads_the_same_prompt_is_refused(make_trainer, make_self, briefed, text_dataset):
    message = '`teacher_model` is "self", but no row of `train_dataset` has a `teacher_prompt`.*nothing to teach it'
    nothing = text_dataset.add_column("teacher_prompt", [None] * len(text_dataset))
    for weights in ("initial", "live", "ema"):
        for dataset in (text_dataset, nothing):
            with pytest.raises(ValueError, match=message):
                make_self(weights, {"train_dataset": dataset})
    stream = IterableDataset.from_generator(lambda: iter(text_dataset))
    for weights in ("initial", "live"):
        with pytest.raises(ValueError, match=message):
            make_self(weights, {"train_dataset": stream}).train()


def test_options_without_a_meaning_are_refused(make_trainer, make_self, checkpoints):
    for options, message in (
        ({"teacher_weights": "ema"}, "`teacher_weights` is 'ema', but the teacher is a model of its own"),
        ({"teacher_weights": "mean"}, "`teacher_weights` is 'mean'. Choose one of 'initial', 'ema'"),
        ({"teacher_ema_decay": 1.0}, "`teacher_ema_decay` is 1.0.*up to, but not including, 1"),
        ({"teacher_sync_steps": 0}, "`teacher_sync_steps` is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(**options)
    for weights, options, message in (
        (
            "ema",
            {"temperature": 0.7},
            "`temperature` is 0.7, but this teacher is scored through the student's own LM head",
        ),
        ("live", {"teacher_offload": True}, "`teacher_offload` is True, but with `teacher_weights='live'`"),
        ("ema", {"teacher_model_revision": "main"}, '`teacher_model_revision` is set, but `teacher_model` is "self"'),
    ):
        with pytest.raises(ValueError, match=message):
            make_self(weights, **options)


def test_a_copy_of_the_start_may_have_another_temperature_and_be_offloaded(make_self, checkpoints):
    path = checkpoints["qwen3-student"]
    for model in (path, Qwen3ForCausalLM.from_pretrained(path)):
        trainer = make_self("initial", model=model, temperature=0.7, teacher_offload=True)
        trainer.train()
        expected = Qwen3ForCausalLM.from_pretrained(path).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in trainer.teacher.model.state_dict().items())


def test_the_command_line_can_say_so(make_self, make_trainer, briefed):
    options = {"teacher_model_name_or_path": "self", "teacher_weights": "periodic"}
    trainer = make_trainer(trainer_options={"train_dataset": briefed}, **options)
    assert isinstance(trainer.teacher, SelfTeacher) and trainer.teacher.sync_steps == 50
