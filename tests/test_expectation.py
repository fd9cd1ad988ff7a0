"""`score_baseline="expected"` and `estimator="exact"` in the trainer, against ten lines over full logits in float64."""

import copy

import pytest
import tiny_models
import torch
from helpers import Forgetful, assert_resumes_in_the_middle, gradients, make_rollout, reward
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PreTrainedModel
from trl import DistillationConfig, DistillationTrainer

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.grpo.rollouts import valid_tokens
from gndpo_trl.grpo.trl_hooks import MULTIMODAL_KEYS
from gndpo_trl.objective import distributions
from gndpo_trl.objective.advantages import Population
from gndpo_trl.objective.scores import Score
from gndpo_trl.teachers import Teacher


BOTH = {"baseline": {"score_baseline": "expected"}, "exact": {"estimator": "exact"}}
BOTH["exact with baseline"] = BOTH["baseline"] | BOTH["exact"]


def all_log_probs(model: PreTrainedModel, rollout: dict) -> torch.Tensor:
    """`(B, T, V)` log-probs of the whole vocabulary, from full logits in float64."""
    names = [key for key in MULTIMODAL_KEYS if key in rollout and key not in ("num_images", "num_tiles")]
    inputs = {name: rollout[name] for name in names}
    inputs["input_ids"] = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
    inputs["attention_mask"] = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    logits = model(**inputs).logits[:, :-1]
    return logits[:, -rollout["completion_ids"].size(1) :].log_softmax(-1)


def plain(model: PreTrainedModel, teacher: PreTrainedModel, rollout: dict, args: GNDPOConfig):
    """Advantages `(B, T)` of the sampled tokens and the loss `"grpo"` on policy, from the definitions."""
    ours = all_log_probs(model, rollout)
    with torch.no_grad():
        theirs = all_log_probs(teacher, rollout)
    mask, ids = valid_tokens(rollout), rollout["completion_ids"].unsqueeze(-1)
    probs, scores = ours.detach().exp(), (theirs - ours.detach()).clamp(-args.score_clip, args.score_clip)
    expected = (probs * scores).sum(-1, keepdim=True)
    if args.score_baseline == "expected":
        scores = scores - expected
    sampled = scores.gather(-1, ids).squeeze(-1)
    weights = probs * mask.unsqueeze(-1) if args.estimator == "exact" else mask.double().unsqueeze(-1)
    population = scores if args.estimator == "exact" else sampled.unsqueeze(-1)
    mean = (weights * population).sum() / mask.sum()
    std = ((weights * (population - mean).square()).sum() / (mask.sum() - 1) + 1e-8).sqrt()
    if args.advantage_normalization == "none":
        mean, std = 0.0, 1.0
    shift = 0.0 if args.score_baseline == "expected" else mean
    if args.estimator == "exact":
        per_token = (probs * ((scores - shift) / std) * ours).sum(-1)
    else:
        per_token = (sampled - shift) / std * ours.gather(-1, ids).squeeze(-1)
    loss = -((per_token * mask).sum(-1) / mask.sum(-1).clamp(min=1)).mean()
    return ((sampled - shift) / std) * mask, loss


def double(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it was loaded, without what the trainer has added to it, in float64."""
    return type(model).from_pretrained(model.config._name_or_path, dtype=torch.float64)


def check_against_plain(trainer: GNDPOTrainer, rollout: dict) -> None:
    student = double(trainer.model)
    advantages, loss = plain(student, double(trainer.teacher.model), rollout, trainer.args)
    loss.backward()
    torch.testing.assert_close(rollout["advantages"].double(), advantages, rtol=0, atol=1e-5)
    trainer.current_gradient_accumulation_steps = 1  # set by `train`
    trainer._compute_loss(trainer.model, rollout).backward()
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    for name, parameter in trainer.model.named_parameters():
        if expected[name] is not None:
            torch.testing.assert_close(parameter.grad.double(), expected[name], rtol=0, atol=1e-5, msg=name)
    assert any(gradient is not None and gradient.abs().max() > 1e-3 for gradient in expected.values())


# What they compute


@pytest.mark.parametrize("options", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("normalization", ["global", "none"])
def test_advantages_and_gradients_are_those_of_full_logits(make_trainer, options, normalization):
    trainer = make_trainer(per_device_train_batch_size=8, advantage_normalization=normalization, **options)
    check_against_plain(trainer, make_rollout(trainer))


@pytest.mark.parametrize("options", [BOTH["baseline"], BOTH["exact"]], ids=["baseline", "exact"])
@pytest.mark.parametrize("family", ["internvl", "qwen25vl"])
def test_image_text_models(make_trainer, family, options):
    trainer = make_trainer(family, per_device_train_batch_size=8, **options)
    check_against_plain(trainer, make_rollout(trainer))


def test_a_clamp_that_binds(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=8, score_clip=0.05, estimator="exact")
    check_against_plain(trainer, make_rollout(trainer))
    assert trainer._metrics["train"]["score/clamped_low"][0] > 0.1


@pytest.mark.parametrize("options", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("normalization", ["group", "sequence"])
def test_other_populations(make_trainer, options, normalization):
    """Every population by itself is normalized as the batch is."""
    trainer = make_trainer(per_device_train_batch_size=8, advantage_normalization=normalization, **options)
    rollout = make_rollout(trainer)
    args = copy.copy(trainer.args)
    args.advantage_normalization = "global"
    size = {"group": 2, "sequence": 1}[normalization]
    for start in range(0, 8, size):
        rows = {
            key: value[start : start + size]
            for key, value in rollout.items()
            if isinstance(value, torch.Tensor) and value.ndim > 0
        }
        if valid_tokens(rows).sum() < 2:  # no statistics
            assert not rows["advantages"].any()
            continue
        with torch.no_grad():
            model, teacher = double(trainer.model), double(trainer.teacher.model)
            expected, _ = plain(model, teacher, rows, args)
        torch.testing.assert_close(rows["advantages"].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [BOTH["baseline"], BOTH["exact"]], ids=["baseline", "exact"])
def test_the_temperature_is_the_students_alone(make_trainer, options):
    trainer = make_trainer(per_device_train_batch_size=8, temperature=0.5, **options)
    rollout = make_rollout(trainer)
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, rollout).backward()
    # Logits divided by 0.5 are those of a head twice as large.
    untied = double(trainer.model)
    untied.lm_head.weight = torch.nn.Parameter(2 * untied.lm_head.weight.detach().clone())
    advantages, loss = plain(untied, double(trainer.teacher.model), rollout, trainer.args)
    torch.testing.assert_close(rollout["advantages"].double(), advantages, rtol=0, atol=1e-5)
    loss.backward()
    norm = trainer.model.model.norm.weight.grad.double()
    torch.testing.assert_close(norm, untied.model.norm.weight.grad, rtol=0, atol=1e-5)


def test_the_exact_gradient_is_that_of_distillation_trainer(make_trainer, checkpoints, text_dataset, tmp_path):
    """Without clamp and normalization, on policy, as a mean over tokens: TRL's reverse KL over the whole vocabulary."""
    options = {"score_clip": None, "advantage_normalization": "none", "loss_type": "dapo", "estimator": "exact"}
    trainer = make_trainer(per_device_train_batch_size=8, **options)
    rollout = make_rollout(trainer)
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, rollout).backward()
    theirs = DistillationTrainer(
        model=checkpoints["qwen3-student"],
        teacher_model=checkpoints["qwen3-teacher"],
        args=DistillationConfig(str(tmp_path), beta=1.0, max_completion_length=8, use_cpu=True, bf16=False),
        train_dataset=text_dataset,
    )
    theirs.model.train()
    loss, _, _ = theirs._compute_loss(theirs.model, rollout, valid_tokens(rollout).sum())
    loss.backward()
    expected = dict(theirs.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-6, msg=name)
        assert parameter.grad.abs().max() > 0


# With an older student: the sequence ratio stands in front, and each token of the sum is clipped by its own sign


def clipped_loss(model: PreTrainedModel, teacher: PreTrainedModel, rollout: dict, args: GNDPOConfig) -> torch.Tensor:
    """The loss `"grpo"` of a student that has moved: a clipped surrogate for every token of the vocabulary."""
    ours = all_log_probs(model, rollout)
    with torch.no_grad():
        theirs = all_log_probs(teacher, rollout)
    mask = valid_tokens(rollout)
    probs, scores = ours.detach().exp(), (theirs - ours.detach()).clamp(-args.score_clip, args.score_clip)
    count, total, centred = rollout["score_moments"][0]
    advantages = (scores - total / count) / (centred / (count - 1) + 1e-8).sqrt()
    logps = ours.detach().gather(-1, rollout["completion_ids"].unsqueeze(-1)).squeeze(-1)
    log_ratio = ((logps - rollout["old_per_token_logps"]) * mask).sum(-1) / mask.sum(-1)
    ratio = log_ratio.exp()[:, None, None] * (ours - ours.detach()).exp()  # of each row, with each token's gradient
    clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
    per_token = (probs * torch.minimum(ratio * advantages, clipped * advantages)).sum(-1)
    if args.reward_coef != 0:
        ids, rewards = rollout["completion_ids"].unsqueeze(-1), rollout["reward_advantages"].unsqueeze(-1)
        sampled = torch.minimum(*(r.gather(-1, ids).squeeze(-1) * rewards for r in (ratio, clipped)))
        per_token = per_token + args.reward_coef * sampled
    return -((per_token * mask).sum(-1) / mask.sum(-1)).mean()


@pytest.mark.parametrize("reward_coef", [0.0, 0.7])
@pytest.mark.parametrize("epsilon", [10.0, 0.003])
def test_off_policy_gradients(make_trainer, epsilon, reward_coef):
    trainer = make_trainer(
        trainer_options={"reward_funcs": reward},
        per_device_train_batch_size=8, num_iterations=2, estimator="exact", reward_coef=reward_coef,
        epsilon=epsilon, epsilon_high=epsilon,
    )  # fmt: skip
    rollout = make_rollout(trainer)
    student = double(trainer.model)
    generator = torch.Generator().manual_seed(0)
    for parameter, other in zip(trainer.model.parameters(), student.parameters(), strict=True):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        other.data.copy_(parameter.data)
    clipped_loss(student, double(trainer.teacher.model), rollout, trainer.args).backward()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, rollout).backward()
    for (name, parameter), other in zip(trainer.model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=0, atol=1e-5, msg=name)
        assert parameter.grad.abs().max() > 0


@pytest.mark.parametrize("loss_type", ["dapo", "dr_grpo", "bnpo", "luspo", "cispo"])
def test_every_loss_that_goes_with_the_exact_estimator(make_trainer, loss_type):
    """On policy, with completions of one length, they are the gradient of "grpo" times a constant."""
    found = {}
    for kind in ("grpo", loss_type):
        trainer = make_trainer(
            max_steps=1, per_device_train_batch_size=8, loss_type=kind, estimator="exact", max_grad_norm=0.0,
            generation_kwargs={"min_new_tokens": 8, "max_new_tokens": 8},
        )  # fmt: skip
        found[kind] = gradients(trainer)
    constant = {"luspo": 8.0, "cispo": 0.2}.get(loss_type, 1.0)  # a sum over tokens; the bound of the ratio
    for name, gradient in found["grpo"].items():
        torch.testing.assert_close(found[loss_type][name], constant * gradient, rtol=0, atol=1e-5, msg=name)


# In the trainer's passes


@pytest.mark.parametrize("options", BOTH.values(), ids=BOTH)
def test_micro_batches_and_shared_prompts_change_nothing(make_trainer, options):
    def run(**more):
        trainer = make_trainer(max_steps=1, num_generations=4, **{**options, **more})
        return gradients(trainer), trainer.state.log_history[0]

    expected, metrics = run(per_device_train_batch_size=8, share_prompts=False)
    layouts = [
        {"per_device_train_batch_size": 8, "share_prompts": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "share_prompts": True},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "scoring_token_budget": 60},
        {"per_device_train_batch_size": 8, "pad_to_multiple_of": 8},
    ]
    for layout in layouts:
        found, others = run(**layout)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-5, msg=name)
        for name in ("score/expected", "score/mean", "score/std", "advantages/std", "teacher/mean_logp"):
            assert others[name] == pytest.approx(metrics[name], abs=1e-5), name


@pytest.mark.parametrize("options", BOTH.values(), ids=BOTH)
def test_nothing_of_the_size_of_a_batch_times_the_vocabulary_exists(make_trainer, options, monkeypatch):
    monkeypatch.setattr(distributions, "CHUNK_CPU", 16)
    trainer = make_trainer(per_device_train_batch_size=8, max_completion_length=64, **options)
    make_rollout(trainer)  # what a first batch finds out is found out
    vocab_size = trainer.model.config.vocab_size
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.ndim and tensor.size(-1) == vocab_size:
                    largest.append(tensor.numel() // vocab_size)
            return result

    rollout = make_rollout(trainer)
    tokens = rollout["completion_mask"].sum()
    question = {**rollout, "rows": []}
    with Watch():
        trainer.estimator.read(dict(rollout), question)
    if "teacher_hidden_states" in rollout:
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer._compute_loss(trainer.model, rollout)
        with Watch():
            loss.backward()
    chunk = max(size for size in largest if size not in (32, 48))  # not the heads
    assert chunk == 16 < tokens / 10


def test_adapters_and_quantized_teachers(make_trainer):
    options = {"load_in_8bit": True, "llm_int8_skip_modules": ["lm_head"]}
    trainer = make_trainer(
        estimator="exact",
        teacher_model_name_or_path=make_trainer().teacher.model.config._name_or_path,
        teacher_model_init_kwargs={"quantization_config": BitsAndBytesConfig(**options)},
        trainer_options={"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
    )
    trainer.train()
    assert all(entry["score/expected"] < 0 for entry in trainer.state.log_history if "score/expected" in entry)


@pytest.mark.parametrize("options", [BOTH["baseline"], BOTH["exact"]], ids=["baseline", "exact"])
def test_an_offloaded_teacher(make_trainer, options):
    expected = gradients(make_trainer(max_steps=1, **options))
    found = gradients(make_trainer(max_steps=1, teacher_offload=True, **options))
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


@pytest.mark.parametrize("options", [BOTH["baseline"], BOTH["exact"]], ids=["baseline", "exact"])
def test_a_batch_without_valid_tokens_trains_nothing(make_trainer, options):
    trainer = make_trainer(
        mask_truncated_completions=True,
        max_steps=1,
        weight_decay=0.0,
        generation_kwargs={"suppress_tokens": [2, 0]},
        **options,
    )
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


def test_tool_tokens_have_no_part(make_trainer, checkpoints):
    """What a tool wrote is read, and neither scored nor trained on."""
    trainer = make_trainer(per_device_train_batch_size=8, estimator="exact")
    rollout = make_rollout(trainer)
    tool_mask = torch.ones_like(rollout["completion_mask"])
    tool_mask[:, 1:3] = 0
    rollout["tool_mask"] = tool_mask
    _, loss = plain(student := double(trainer.model), double(trainer.teacher.model), rollout, trainer.args)
    loss.backward()
    mask = valid_tokens(rollout)
    reading = trainer.estimator.read({**rollout}, {**rollout, "rows": []})
    scores = Score()(reading.teacher_logps, reading.student_logps, mask)
    _, rollout["score_moments"] = trainer.estimator.advantages(scores, reading, mask, Population())
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, rollout).backward()
    for (name, parameter), other in zip(trainer.model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("options", BOTH.values(), ids=BOTH)
def test_a_run_goes_on_from_the_middle_of_a_generation_batch(make_trainer, tmp_path, options):
    assert_resumes_in_the_middle(make_trainer, tmp_path, **options)


def test_a_run_goes_on_with_the_head_that_its_teacher_had(make_trainer, text_dataset, tmp_path):
    """The teacher's weights move in the middle of a generation batch; what it said of the batch was said before."""
    prompts = [[{"role": "user", "content": f"one plus two ? {row['prompt'][0]['content']}"}] for row in text_dataset]
    options = {
        "teacher_model": "self",
        "trainer_options": {"train_dataset": text_dataset.add_column("teacher_prompt", prompts)},
        "teacher_weights": "live",
        "learning_rate": 1e-2,
        "num_iterations": 3,
        "estimator": "exact",
    }
    assert_resumes_in_the_middle(make_trainer, tmp_path, ended=2, max_steps=5, **options)


# What checkpoints compared before more was compared.
EARLIER = ("number of processes", "reference model", "per_device_train_batch_size", "num_iterations", "estimator")


@pytest.mark.parametrize("options", [{}, BOTH["baseline"], BOTH["exact"]], ids=["sampled", "baseline", "exact"])
def test_a_batch_that_an_earlier_version_has_saved_is_used(make_trainer, tmp_path, options):
    options = {"save_strategy": "steps", "save_steps": 1, "num_iterations": 2, **options}
    whole = make_trainer(output_dir=str(tmp_path / "whole"), max_steps=2, **options)
    whole.train()
    make_trainer(output_dir=str(tmp_path / "parts"), max_steps=1, **options).train()
    (path,) = tmp_path.glob("parts/checkpoint-1/generation_buffer_*.pt")
    saved = torch.load(path, weights_only=True)
    saved["depends_on"] = {name: saved["depends_on"][name] for name in EARLIER}
    torch.save(saved, path)
    resumed = make_trainer(output_dir=str(tmp_path / "parts"), max_steps=2, **options)
    resumed.train(resume_from_checkpoint=True)
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, resumed.model.state_dict()[name]), name


def test_a_batch_that_another_teacher_has_read_is_left(make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "estimator": "exact"}
    make_trainer(max_steps=1, **options).train()
    other = tiny_models.save(*tiny_models.build_qwen3(seed=3, width=48), tmp_path / "other")
    resumed = make_trainer(max_steps=2, teacher_model=other, **options)
    with pytest.warns(UserWarning, match="`teacher` was Qwen3ForCausalLM of .*They are left"):
        resumed.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("options", [BOTH["baseline"], BOTH["exact"]], ids=["baseline", "exact"])
def test_evaluation_and_half_precision(make_trainer, text_dataset, options):
    trainer = make_trainer(bf16=True, trainer_options={"eval_dataset": text_dataset.select(range(4))}, **options)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_score/expected"] < 0
    assert all(value == value for value in metrics.values() if isinstance(value, float))


# Which teachers, vocabularies and options


def test_vocabularies_that_are_padded_differently(make_trainer, tmp_path):
    size = len(tiny_models.build_tokenizer())
    larger = tiny_models.save(*tiny_models.build_qwen3(seed=1, vocab_size=size + 64), tmp_path / "larger")
    trainer = make_trainer(per_device_train_batch_size=8, teacher_model=larger, estimator="exact")
    rollout = make_rollout(trainer)
    comparison = trainer.estimator.read(dict(rollout), {**rollout, "rows": []}).distributions
    ours, theirs = (all_log_probs(double(model), rollout) for model in (trainer.model, trainer.teacher.model))
    scores = (theirs[..., : ours.size(-1)] - ours).clamp(-5, 5)
    expected = (ours.exp() * scores).sum(-1) * rollout["completion_mask"]
    torch.testing.assert_close(comparison.mean.double(), expected, rtol=0, atol=1e-5)
    make_trainer(teacher_model=larger, estimator="exact").train()


def test_a_student_that_believes_in_ids_the_teacher_does_not_have(make_trainer, tmp_path):
    size = len(tiny_models.build_tokenizer())
    student, processing_class = tiny_models.build_qwen3(vocab_size=size + 64)
    path = tiny_models.save(student, processing_class, tmp_path / "student")
    with pytest.raises(ValueError, match=rf"of its probability to token ids that the teacher.*\({size} and above\)"):
        make_trainer(model=path, score_baseline="expected").train()


@pytest.mark.parametrize("options", BOTH.values(), ids=BOTH)
def test_a_teacher_with_a_prompt_of_its_own(make_trainer, text_dataset, options):
    """The student as it was, from a longer prompt: distributions of the same completions after different prompts."""
    prompts = [[{"role": "user", "content": f"one plus two ? {row['prompt'][0]['content']}"}] for row in text_dataset]
    trainer = make_trainer(
        trainer_options={"train_dataset": text_dataset.add_column("teacher_prompt", prompts)},
        teacher_model="self",
        per_device_train_batch_size=8,
        **options,
    )
    rollout = make_rollout(trainer)
    rows = [trainer.train_dataset[row // 2] for row in range(8)]
    question = trainer._teacher_prompts.exchange({**rollout, "rows": rows})
    comparison = trainer.estimator.read(dict(rollout), question).distributions
    ours, theirs = (
        all_log_probs(double(trainer.model), rollout),
        all_log_probs(double(trainer.teacher.model), question),
    )
    scores = (theirs - ours).clamp(-5, 5)
    assert scores.abs().max() > 0.01
    expected = (ours.exp() * scores).sum(-1) * rollout["completion_mask"]
    torch.testing.assert_close(comparison.mean.double(), expected, rtol=0, atol=1e-5)
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("options", BOTH.values(), ids=BOTH)
@pytest.mark.parametrize("weights", ["ema", "periodic", "live", "initial"])
def test_the_students_own_earlier_weights_as_the_teacher(make_trainer, text_dataset, weights, options):
    """Also the head is that of the teacher, while the student's moves on within a generation batch."""
    prompts = [[{"role": "user", "content": f"one plus two ? {row['prompt'][0]['content']}"}] for row in text_dataset]
    lora = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]) if weights == "initial" else None
    trainer = make_trainer(
        trainer_options={"train_dataset": text_dataset.add_column("teacher_prompt", prompts), "peft_config": lora},
        teacher_model="self",
        teacher_weights=weights,
        per_device_train_batch_size=8,
        num_iterations=2,
        max_steps=3,
        learning_rate=1e-2,
        **options,
    )
    start = double(trainer.model.get_base_model() if lora else trainer.model)
    trainer.train()
    rollout = make_rollout(trainer)
    rows = [trainer.train_dataset[row // 2] for row in range(8)]
    question = trainer._teacher_prompts.exchange({**rollout, "rows": rows})
    reading = trainer.estimator.read(dict(rollout), question)
    theirs = copy.deepcopy(start)
    if weights == "live":
        theirs.load_state_dict({name: value.double() for name, value in trainer.model.state_dict().items()})
    elif weights == "ema":
        theirs.load_state_dict({name: value.double() for name, value in trainer.teacher.values.items()})
    found = all_log_probs(theirs, question).gather(-1, rollout["completion_ids"].unsqueeze(-1)).squeeze(-1)
    mask = valid_tokens(rollout)
    torch.testing.assert_close(reading.teacher_logps.double()[mask], found[mask], rtol=0, atol=1e-5)
    if options.get("estimator") != "exact":
        return
    # The student moves, and the teacher of the batch stays.
    head = trainer.estimator.heads[0].on(torch.device("cpu")).weight.clone()
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    assert torch.equal(trainer.estimator.heads[0].on(torch.device("cpu")).weight, head)


@pytest.mark.parametrize("options", BOTH.values(), ids=BOTH)
def test_several_teachers_give_the_gradient_of_each_row_s_own(
    make_trainer, checkpoints, text_dataset, tmp_path, options
):
    names = ["first" if row % 3 else "second" for row in range(len(text_dataset))]
    wide = tiny_models.save(*tiny_models.build_qwen3(seed=2, width=64), tmp_path / "wide")
    options = {"advantage_normalization": "none", "per_device_train_batch_size": 8, **options}
    trainer = make_trainer(
        teacher_model={"first": checkpoints["qwen3-teacher"], "second": wide},
        trainer_options={"train_dataset": text_dataset.add_column("teacher", names)},
        **options,
    )
    rollout = make_rollout(trainer)
    student = double(trainer.model)
    mask, expected = valid_tokens(rollout), torch.zeros(rollout["completion_ids"].shape, dtype=torch.float64)
    losses = []
    for name, teacher in trainer.teacher.teachers.items():
        rows = [row for row in range(8) if names[row // 2] == name]
        of_rows = {
            key: value[rows] for key, value in rollout.items() if isinstance(value, torch.Tensor) and value.ndim
        }
        expected[rows], loss = plain(student, double(teacher.model), of_rows, trainer.args)
        losses.append(loss * len(rows) / 8)
    sum(losses).backward()
    torch.testing.assert_close(rollout["advantages"].double(), expected * mask, rtol=0, atol=1e-5)
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, rollout).backward()
    for (name, parameter), other in zip(trainer.model.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), other.grad, rtol=0, atol=1e-5, msg=name)
    make_trainer(
        teacher_model={"first": checkpoints["qwen3-teacher"], "second": wide},
        trainer_options={"train_dataset": text_dataset.add_column("teacher", names)},
        **options,
    ).train()


# NaN


def spoil(teacher: Teacher, at_call: int = 1) -> None:
    """Have a local teacher compute NaN at its last position, from one of its forward passes on."""
    calls = []

    def spoiled(module, inputs, hidden):
        calls.append(hidden)
        if len(calls) < at_call:
            return hidden
        hidden = hidden.clone()
        hidden[:, -2:] = float("nan")
        return hidden

    teacher.model.get_decoder().norm.register_forward_hook(spoiled)


@pytest.mark.parametrize("options", [{}, *BOTH.values()], ids=["sampled", *BOTH])
def test_a_teacher_in_this_process_that_gives_nan_ends_the_run_before_the_student_is_touched(make_trainer, options):
    trainer = make_trainer(share_prompts=False, **options)
    spoil(trainer.teacher)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    with pytest.raises(ValueError, match=r"The teacher gave non-finite log-probs for \d+ of \d+ tokens"):
        trainer.train()
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


@pytest.mark.parametrize("options", [{}, *BOTH.values()], ids=["sampled", *BOTH])
def test_what_a_teacher_may_not_know_is_left_out_and_counted_and_gradients_stay_finite(
    make_trainer, checkpoints, options
):
    trainer = make_trainer(teacher_model=Forgetful(checkpoints["qwen3-teacher"]), share_prompts=False, **options)
    spoil(trainer.teacher)
    found = gradients(trainer)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert max(gradient.abs().max() for gradient in found.values()) > 1e-3
    assert trainer.state.log_history[0]["teacher/unknown_tokens"] > 0


class Uniform(Teacher):
    def per_token_logps(self, rollout):
        return torch.full(rollout["completion_ids"].shape, -3.0)


@pytest.mark.parametrize("options, field", [(BOTH["baseline"], "score_baseline"), (BOTH["exact"], "estimator")])
def test_teachers_without_a_distribution_are_refused(make_trainer, options, field):
    make_trainer(teacher_model=Uniform())
    with pytest.raises(ValueError, match=rf"`{field}` is .*Uniform only knows the sampled tokens"):
        make_trainer(teacher_model=Uniform(), **options)
    both = {"local": make_trainer().teacher, "uniform": Uniform()}
    with pytest.raises(ValueError, match=rf"`{field}` is .*Uniform only knows the sampled tokens"):
        make_trainer(teacher_model=both, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"score_baseline": "mean"}, "`score_baseline` is 'mean'. Choose None or one of 'expected'"),
        ({"estimator": "topk"}, "`estimator` is 'topk'. Choose one of 'sampled', 'exact'"),
        (BOTH["exact"] | {"beta": 0.1}, "`beta` is 0.1, which does not go with"),
        (BOTH["exact"] | {"importance_sampling_level": "token"}, '`importance_sampling_level` is .*"sequence_token"'),
        (BOTH["exact"] | {"loss_type": "sapo"}, "`loss_type` is 'sapo'.*choose one of 'grpo', 'dapo'"),
        (BOTH["exact"] | {"off_policy_mask_threshold": 0.5}, "`off_policy_mask_threshold` is 0.5"),
        (BOTH["baseline"] | {"use_sampling_logps": True, "use_vllm": True}, "`use_sampling_logps` is True"),
        (BOTH["baseline"] | {"torch_compile": True}, "`torch_compile` is True"),
        (BOTH["baseline"] | {"extrapolation": 1.2}, "`extrapolation` is 1.2, which does not go with"),
        (BOTH["baseline"] | {"score_discount": 0.5}, "`score_discount` is 0.5, which does not go with"),
        (BOTH["baseline"] | {"score_power": 1.0, "score_clip": None}, "`score_power` is 1.0, which does not go with"),
        (BOTH["exact"] | {"distillation_coef": 0.5}, "`distillation_coef` is 0.5, which does not go with"),
    ],
)
def test_options_that_do_not_go_together(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


@pytest.mark.parametrize("loss_type", ["grpo", "sapo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence_token"])
def test_the_baseline_goes_with_every_loss_and_level(make_trainer, loss_type, level):
    trainer = make_trainer(score_baseline="expected", loss_type=loss_type, importance_sampling_level=level)
    trainer.train()
    assert trainer.state.global_step == 2
