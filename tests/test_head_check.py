"""Log-probs from a head that is not the model's are refused, and students that have nothing to train."""

import pytest
import tiny_models
import torch
from helpers import make_rollout, reward
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3ForCausalLM

from gndpo_trl.gspo import GSPOConfig, GSPOTrainer


REFUSED = "this is not what .*does: on a few tokens of the first batch they .* and by its own logits .* nats"


def load(checkpoints, name: str):
    return Qwen3ForCausalLM.from_pretrained(checkpoints[f"qwen3-{name}"])


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 2 * logits)
    return model


def scaled(model):
    """Divides its logits in its own forward pass, as some architectures do."""
    original = type(model).forward

    def forward(self, *args, **kwargs):
        outputs = original(self, *args, **kwargs)
        outputs.logits = outputs.logits / 3
        return outputs

    model.__class__ = type("Scaled", (type(model),), {"forward": forward})
    return model


def int8(model):
    """A head whose weights mean something together with their scales alone."""

    class Int8Head(torch.nn.Linear):
        def forward(self, hidden):
            return hidden @ (self.weight * self.scales).T

    head, weight = Int8Head(*reversed(model.lm_head.weight.shape), bias=False), model.lm_head.weight.data
    head.scales = weight.abs().amax(1, keepdim=True) / 127
    head.weight.data = (weight / head.scales).round()
    model.lm_head = head
    return model


@pytest.mark.parametrize("change", [hooked, scaled, int8])
def test_heads_that_do_more_than_to_multiply_are_refused(make_trainer, checkpoints, change):
    student, teacher = load(checkpoints, "student"), load(checkpoints, "teacher")
    with pytest.raises(ValueError, match=REFUSED):
        make_trainer(teacher_model=change(teacher)).train()
    with pytest.raises(ValueError, match="what the student"):
        make_trainer(model=change(student)).train()


def test_adapters_on_the_head_are_refused_and_whole_heads_are_not(make_trainer, checkpoints):
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM", init_lora_weights=False)
    with pytest.raises(ValueError, match="`teacher_model` has an adapter on its LM head.*merge_and_unload"):
        make_trainer(teacher_model=get_peft_model(load(checkpoints, "teacher"), config))
    with pytest.raises(ValueError, match="adapter to `lm_head`"):
        make_trainer(model=get_peft_model(load(checkpoints, "student"), config))
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    teacher = get_peft_model(load(checkpoints, "teacher"), config)
    trainer = make_trainer(teacher_model=teacher, trainer_options={"peft_config": config}, beta=0.1, temperature=0.5)
    trainer.train()
    # Student, teacher, and the base under the adapters.
    assert len(trainer._checked_heads) == 3


def test_positions_that_count_padding_are_refused(make_trainer, checkpoints, tmp_path):
    tokenizer = tiny_models.build_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**ids, **sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3)
    path = tiny_models.save(model, tokenizer, tmp_path / "gpt2")
    make_trainer(model=path, teacher_model=path, max_steps=1).train()
    with pytest.raises(ValueError, match=f"{REFUSED}.*`pad_to_multiple_of` is 64"):
        make_trainer(model=path, teacher_model=path, pad_to_multiple_of=64).train()
    make_trainer(pad_to_multiple_of=64, max_steps=1).train()
    with pytest.raises(ValueError, match="The teacher has a context of 64 tokens.*`max_completion_length` is 64"):
        make_trainer(model=path, teacher_model=path, max_completion_length=64)
    trainer = make_trainer(model=path, teacher_model=path)
    rollout = make_rollout(trainer)
    rollout["prompt_mask"] = torch.ones(len(rollout["prompt_ids"]), 60)
    with pytest.raises(ValueError, match="The teacher has a context of 64 tokens.*a row .prompt and completion. has"):
        trainer.teacher.per_token_logps(rollout)


@pytest.mark.parametrize("precision", [{"bf16": True}, {"model_init_kwargs": {"dtype": "bfloat16"}}], ids=str)
def test_rounding_is_no_reason(make_trainer, precision):
    make_trainer(**precision, temperature=0.1, max_steps=1).train()


# Students that have nothing to train


@pytest.mark.parametrize("options", [{}, {"beta": 0.1}, {"extrapolation": 1.5}], ids=str)
def test_a_frozen_student_is_refused(make_trainer, make_config, checkpoints, text_dataset, options):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", inference_mode=True)
    students = {
        "loaded for inference.*is_trainable=True": get_peft_model(load(checkpoints, "student"), config),
        "all of its parameters are frozen": load(checkpoints, "student").requires_grad_(False),
    }
    for message, model in students.items():
        with pytest.raises(ValueError, match=f"`model` has nothing to train.*{message}"):
            make_trainer(model=model, **options)
    if "extrapolation" not in options:
        with pytest.raises(ValueError, match="`model` has nothing to train"):
            GSPOTrainer(
                model=load(checkpoints, "student").requires_grad_(False),
                reward_funcs=reward,
                args=make_config(GSPOConfig, **options),
                train_dataset=text_dataset,
            )


def test_tokens_of_a_tied_head_are_named(make_trainer, checkpoints, tmp_path):
    model = load(checkpoints, "student")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", trainable_token_indices=[3, 4])
    with pytest.raises(ValueError, match="`trainable_token_indices`"):
        make_trainer(model=get_peft_model(model, config))


def test_an_adapter_of_another_name_is_named(make_trainer, checkpoints):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="`beta` is 0.1, .*named 'policy'"):
        make_trainer(model=get_peft_model(load(checkpoints, "student"), config, adapter_name="policy"), beta=0.1)
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", bias="all")
    with pytest.raises(ValueError, match="`beta` is 0.1, .*`bias` is 'all'"):
        make_trainer(model=get_peft_model(load(checkpoints, "student"), config), beta=0.1)


def test_an_adapter_folder_is_called_that(make_trainer, checkpoints, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(load(checkpoints, "student"), config).save_pretrained(tmp_path / "adapter")
    for field in ("model", "teacher_model"):
        with pytest.raises(
            ValueError, match=f"`{field}` is .*holds an adapter and no model.*AutoPeftModelForCausalLM"
        ):
            make_trainer(**{field: str(tmp_path / "adapter")})
