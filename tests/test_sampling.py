"""What the student samples from: its own distribution, whatever its checkpoint says, and what the configuration adds."""

import copy
import logging

import pytest
import tiny_models
import torch
from helpers import make_rollout
from peft import LoraConfig
from transformers import GenerationConfig

from gndpo_trl.grpo.sampling import leftovers


END, OTHER_END = 2, 20  # the tiny tokenizers' end token, and another that a student or teacher may end with

LEFTOVERS = {"no_repeat_ngram_size": 1, "min_new_tokens": 8, "bad_words_ids": [[7], [9]], "min_p": 0.5}


def sample(trainer) -> list[list[int]]:
    """Completions of one prompt as in training, always with the same seed."""
    trainer.model.train()
    torch.manual_seed(0)
    return trainer._generate_single_turn([[3, 4, 5]] * 16, None, {}, 2)[0]


@pytest.fixture
def student(tmp_path):
    """A student whose generation config has options that nobody asked for, and some that have no effect."""
    model, tokenizer = tiny_models.build_qwen3()
    model.generation_config.update(do_sample=True, temperature=0.1, top_k=1, num_beams=1, use_cache=True, **LEFTOVERS)
    return tiny_models.save(model, tokenizer, tmp_path / "student")


@pytest.mark.parametrize("peft_config", [None, LoraConfig(target_modules=["q_proj"])], ids=["all weights", "lora"])
def test_the_checkpoints_own_options_are_left_out_and_named(make_trainer, student, caplog, peft_config):
    options = {"trainer_options": {"peft_config": peft_config}}
    expected = sample(make_trainer(**options))  # from the same weights
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(model=student, **options)
    (message,) = [record.message for record in caplog.records if "generation config has" in record.message]
    assert all(name in message for name in LEFTOVERS)
    assert not any(name in message for name in ("temperature", "top_k", "num_beams", "use_cache"))
    kept = copy.deepcopy(trainer.model.generation_config)
    assert sample(trainer) == expected
    assert any(7 in row for row in expected) and min(map(len, expected)) < 8
    with pytest.raises(IndexError):
        trainer._generate_single_turn([[10**6]], None, {}, 1)  # no such token
    assert trainer.model.generation_config == kept and kept.no_repeat_ngram_size == 1  # what is saved


@pytest.mark.parametrize(
    "name, value",
    [
        ("no_repeat_ngram_size", 1),
        ("min_new_tokens", 8),
        ("bad_words_ids", [[7], [9]]),
        ("num_beams", 3),
        ("typical_p", 0.2),
        ("guidance_scale", 3.0),
        ("stop_strings", ["one", "two"]),
        ("num_return_sequences", 2),
        ("repetition_penalty", 5.0),
        ("top_k", 1),
        ("sequence_bias", [[[7], 9.0]]),
        ("begin_suppress_tokens", [7, 8, 9, 10, 11, 12, 13]),
        ("forced_eos_token_id", 9),
        ("max_time", 1e-9),
    ],
)
def test_each_option_of_a_checkpoint_is_neutral(make_trainer, tmp_path, caplog, name, value):
    """And named, but for those that TRL's own options replace."""
    expected = sample(make_trainer())
    model, tokenizer = tiny_models.build_qwen3()
    model.generation_config.update(do_sample=True, **{name: value})
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(model=tiny_models.save(model, tokenizer, tmp_path / "student"))
    assert getattr(trainer.model.generation_config, name) == value
    named = [record.message for record in caplog.records if "generation config has" in record.message]
    assert sample(trainer) == expected
    assert name in ("repetition_penalty", "top_k") or f"{name}={value!r}" in named[0]


@pytest.mark.parametrize("name", ["num_return_sequences", "n"])
def test_more_completions_than_prompts_are_refused(make_config, name):
    make_config(generation_kwargs={name: 1})
    with pytest.raises(ValueError, match=f"`generation_kwargs` has `{name}` = 2.*Set `num_generations`"):
        make_config(generation_kwargs={name: 2})


def test_what_the_configuration_asks_for_stays(make_trainer, student, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(model=student, generation_kwargs={"bad_words_ids": [[7]], "min_new_tokens": 6})
    (message,) = [record.message for record in caplog.records if "generation config has" in record.message]
    assert "bad_words_ids" not in message and "no_repeat_ngram_size" in message
    rows = sample(trainer)
    assert min(map(len, rows)) >= 6 and not any(7 in row for row in rows) and any(9 in row for row in rows)


def test_an_ordinary_checkpoint_leaves_nothing(make_trainer):
    trainer = make_trainer()
    assert not leftovers(trainer.model.generation_config, trainer.generation_config)


def test_tokens_that_the_user_suppresses_are_added_to_the_placeholder(make_trainer):
    trainer = make_trainer("internvl", generation_kwargs={"suppress_tokens": [20, 21]})
    placeholder = trainer.model.config.image_token_id
    assert {placeholder, 20, 21} <= set(trainer.generation_config.suppress_tokens)
    assert trainer.args.generation_kwargs == {"suppress_tokens": [20, 21]}


def that_ends_with(token: int, path) -> str:
    """Checkpoint of a model that says `token` three times in ten, whatever stands before it, and ends with it."""
    model, tokenizer = tiny_models.build_qwen3()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(token)
    with torch.no_grad():
        for (
            layer
        ) in model.model.layers:  # hidden states are those of the embeddings, which all have the same first number
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 10.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[[END, OTHER_END], 0] = -0.1
        model.lm_head.weight[token, 0] = 0.53
    return tiny_models.save(model, tokenizer, path)


@pytest.fixture
def base_and_instruct(make_trainer, tmp_path):
    """A run of a base student, which ends its turns with another token than its instruct teacher."""
    student, teacher = that_ends_with(OTHER_END, tmp_path / "base"), that_ends_with(END, tmp_path / "instruct")
    long = {"max_completion_length": 32, "learning_rate": 1e-2, "per_device_train_batch_size": 16}
    return lambda **options: make_trainer(model=student, teacher_model=teacher, **{**long, **options})


def lengths(trainer) -> list[float]:
    return [entry["completions/mean_length"] for entry in trainer.state.log_history if "loss" in entry]


def test_a_base_student_stops_where_its_instruct_teacher_does(base_and_instruct, caplog, tmp_path):
    with caplog.at_level(logging.WARNING):
        trainer = base_and_instruct(max_steps=25)
    (message,) = [record.message for record in caplog.records if "The teacher ends its turn" in record.message]
    assert f"{END} ('<|im_end|>')" in message and f"{OTHER_END} (" in message
    trainer.train()
    assert max(lengths(trainer)[-5:]) < 8
    assert trainer.state.log_history[-2]["completions/clipped_ratio"] < 0.2
    trainer.save_model(str(tmp_path / "saved"))
    assert set(GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id) == {END, OTHER_END}


def test_without_the_option_it_samples_on_to_the_limit(base_and_instruct):
    with pytest.warns(UserWarning, match=r"EOS MISMATCH: the teacher ends its turn with 2 .*`stop_at_teacher_eos`"):
        trainer = base_and_instruct(max_steps=25, stop_at_teacher_eos=False)
    trainer.train()
    found = lengths(trainer)
    assert found[0] < 6 and min(found[-5:]) > 18  # of 32
    assert trainer.eos_token_ids == [OTHER_END]


def test_masks_end_where_sampling_does(base_and_instruct):
    trainer = base_and_instruct(mask_truncated_completions=True, per_device_train_batch_size=32)
    rollout = make_rollout(trainer, 32)
    for ids, mask in zip(rollout["completion_ids"].tolist(), rollout["completion_mask"].tolist(), strict=True):
        said = ids[: sum(mask)]
        assert not said or said[-1] in (END, OTHER_END) and not {END, OTHER_END} & set(said[:-1])
    assert (rollout["completion_ids"] == END).any()


def test_a_teacher_with_the_students_end_changes_nothing(make_trainer, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer()
    assert not any("ends its turn" in record.message for record in caplog.records)
    assert trainer.eos_token_ids == [END] and trainer.model.generation_config.eos_token_id == END
