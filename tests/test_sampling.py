"""What the student samples from: its own distribution, whatever its checkpoint says, and what the configuration adds."""

import copy
import logging

import pytest
import tiny_models
import torch
from peft import LoraConfig

from gndpo_trl.grpo.sampling import leftovers


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
