"""Mixture-of-experts models whose configuration asks for router logits, with and without layers of experts."""

import pytest
import tiny_models
import torch
from helpers import make_rollout, plain_logps
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


@pytest.fixture
def save_moe(tmp_path):
    def save(name: str, seed: int = 0, **options) -> str:
        tokenizer = tiny_models.build_tokenizer()
        torch.manual_seed(seed)
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [0]}
        text = {**tiny_models.text_options(tokenizer, 32, None), "head_dim": 16, "output_router_logits": True}
        config = Qwen3MoeConfig(**{**text, **experts, **options})
        return tiny_models.save(Qwen3MoeForCausalLM(config), tokenizer, tmp_path / name)

    return save


def test_router_logits_keep_no_prompts_from_being_shared(make_trainer, save_moe):
    student, teacher = save_moe("student"), save_moe("teacher", seed=1)
    trainer = make_trainer(
        model=student, teacher_model=teacher, num_generations=4, share_prompts=True, router_aux_loss_coef=0.0
    )
    rollout = {**make_rollout(trainer), "rows": []}
    mask = rollout["completion_mask"].bool()
    for model in (trainer.model, trainer.teacher.model):
        found = trainer._per_token_logps(model, rollout)
        assert trainer._planner.reasons[model] is None
        torch.testing.assert_close(found[mask], plain_logps(model, rollout)[mask], rtol=0, atol=1e-4)
    trainer.train()


def test_an_auxiliary_loss_beside_shared_prompts_is_refused_before_the_run(make_trainer, save_moe):
    student = save_moe("student")
    with pytest.raises(ValueError, match="cannot share prompts: a router's auxiliary loss .`router_aux_loss_coef`."):
        make_trainer(model=student, teacher_model=student, share_prompts=True)


def test_models_without_experts(make_trainer, save_moe):
    student, dense = save_moe("student"), save_moe("dense", mlp_only_layers=[0, 1])
    with pytest.raises(
        ValueError, match=r"of 2 layers, `mlp_only_layers` leaves out \[0, 1\].*`router_aux_loss_coef`"
    ):
        make_trainer(model=dense, teacher_model=student)
    trainer = make_trainer(model=student, teacher_model=dense)
    trainer.train()
    assert "aux_loss" in trainer.state.log_history[0]
    make_trainer(model=dense, teacher_model=dense, router_aux_loss_coef=0.0, max_steps=1).train()
