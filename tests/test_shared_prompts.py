"""Rows that share their prompts: the same numbers as separate rows, for fewer tokens, and refusals where they would not be."""

import logging

import pytest
import tiny_models
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from trl.trainer.utils import add_fused_lm_head

from gndpo_trl.grpo.branch_attention import IMPLEMENTATION, Branches, reason_against
from gndpo_trl.grpo.shared_prompts import SharedPrompts, same_prompts


VOCABULARY, IMAGE = 60, 50  # 50: the image placeholder; prompts and completions hold smaller ids
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # logits that say something
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}
CLIP = {"image_size": 16, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "initializer_range": 0.3,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
TEXT_FAMILIES = {
    "qwen3": TEXT,
    "llama": TEXT,
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "initializer_range": 0.3,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
    },
    "qwen3_moe": {**TEXT, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
IMAGE_FAMILIES = {
    "internvl": {
        "vision_config": {**CLIP, "image_size": [16, 16], "patch_size": [4, 4], "num_attention_heads": 2},
        "text_config": {"model_type": "qwen3", **TEXT},
        "image_token_id": IMAGE,
        "image_seq_length": 4,
    },
    "llava": {
        "vision_config": {"model_type": "clip_vision_model", **CLIP, "num_attention_heads": 2},
        "text_config": {"model_type": "llama", **TEXT},
        "image_token_id": IMAGE,
        "image_seq_length": 4,
    },
    "qwen2_5_vl": {
        "vision_config": {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [0]},
        "text_config": {"model_type": "qwen2_5_vl_text", **TEXT, "rope_parameters": ROPE},
        "image_token_id": IMAGE,
        "video_token_id": 51,
        "vision_start_token_id": 52,
        "vision_end_token_id": 53,
    },
    "qwen3_vl": {
        "vision_config": {**QWEN_VISION, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
        "text_config": {"model_type": "qwen3_vl_text", **TEXT, "rope_parameters": {**ROPE, "mrope_interleaved": True}},
        "image_token_id": IMAGE,
        "video_token_id": 51,
        "vision_start_token_id": 52,
        "vision_end_token_id": 53,
    },
}
FAMILIES = {**TEXT_FAMILIES, **IMAGE_FAMILIES}


def build(family: str, seed: int = 0, **options) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, TEXT), **options})
    auto_class = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = auto_class.from_config(config, attn_implementation="sdpa").eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    return model


# Of each row: its prompt, the length of its completion. The rows of a prompt are not neighbours; 0: masked.
PROMPT_LENGTHS = [5, 11, 1, 7]
ROWS = [(1, 4), (0, 9), (1, 1), (3, 6), (0, 2), (1, 8), (2, 5), (1, 0)]
NUM_IMAGES = [1, 2, 0, 1]  # of each prompt
GRIDS = [(1, 4, 4), (1, 4, 8), (1, 8, 4), (1, 4, 4)]


def make_batch(family: str = "qwen3", rows=ROWS, seed: int = 0) -> dict:
    """Rows as TRL lays them out, with images where the family has them."""
    generator = torch.Generator().manual_seed(seed)
    prompts, pixels, grids = [], [], []
    is_grid = family.startswith("qwen") and family in IMAGE_FAMILIES
    for length, count in zip(PROMPT_LENGTHS, NUM_IMAGES, strict=True):
        ids = torch.randint(3, 40, (length,), generator=generator).tolist()
        of_prompt, images_of_prompt = GRIDS[len(grids) : len(grids) + count], []
        for t, h, w in reversed(of_prompt) if family in IMAGE_FAMILIES else ():
            size = (t * h * w, 96) if is_grid else (1, 3, 16, 16)
            images_of_prompt.insert(0, torch.randn(size, generator=generator))
            num_tokens = t * h * w // 4 if is_grid else 4
            ids[1:1] = [*([52, *[IMAGE] * num_tokens, 53] if is_grid else [IMAGE] * num_tokens), 5]
        prompts.append(ids)
        pixels += images_of_prompt
        grids += of_prompt
    width, longest = max(map(len, prompts)), max(length for _, length in rows)
    input_ids, mask = torch.zeros(len(rows), width + longest).long(), torch.zeros(len(rows), width + longest).long()
    for row, (prompt, length) in enumerate(rows):
        input_ids[row, width - len(prompts[prompt]) : width] = torch.tensor(prompts[prompt])
        mask[row, width - len(prompts[prompt]) : width + length] = 1
        input_ids[row, width:] = torch.randint(3, 40, (longest,), generator=generator)
    batch = {
        "prompt_ids": input_ids[:, :width],
        "prompt_mask": mask[:, :width],
        "completion_ids": input_ids[:, width:],
        "completion_mask": mask[:, width:],
    }
    if family in IMAGE_FAMILIES:
        first = [sum(NUM_IMAGES[:prompt]) for prompt in range(len(NUM_IMAGES))]
        images = [first[prompt] + k for prompt, _ in rows for k in range(NUM_IMAGES[prompt])]
        batch["pixel_values"] = torch.cat([pixels[image] for image in images])
        batch["num_images"] = [NUM_IMAGES[prompt] for prompt, _ in rows]
        if is_grid:
            batch["image_grid_thw"] = torch.tensor([GRIDS[image] for image in images])
            batch["mm_token_type_ids"] = (input_ids == IMAGE).int()
    return batch


@pytest.fixture(scope="module")
def trainer(tmp_path_factory):
    """A trainer whose forward passes are put to any model."""
    from datasets import Dataset
    from transformers import Qwen3ForCausalLM

    from gndpo_trl.gspo import GSPOConfig, GSPOTrainer

    folder = tmp_path_factory.mktemp("scorer")
    model, tokenizer = tiny_models.build_qwen3()
    args = GSPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", num_generations=4, share_prompts=None
    )
    dataset = Dataset.from_list([{"prompt": "one"}])
    assert isinstance(model, Qwen3ForCausalLM)
    return GSPOTrainer(model, lambda completions, **_: [0.0] * len(completions), args, dataset, processing_class=tokenizer)


def forward(trainer, model, batch: dict, shared: bool):
    """Log-probs and entropies `(B, T)` of one pass."""
    from gndpo_trl.grpo.sharing import batch_of_forward

    num_columns, batch_of_pass = batch["completion_ids"].size(1), batch_of_forward(batch)
    if not shared:
        return trainer._forward(model, batch_of_pass, num_columns, compute_entropy=True)[:2]
    prompts = same_prompts([batch])
    return trainer._forward_shared(model, batch_of_pass, num_columns, prompts, compute_entropy=True)[:2]


def gradients_of(model, *losses) -> dict[str, torch.Tensor]:
    model.zero_grad()
    sum(losses).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def some_loss(logps: torch.Tensor) -> torch.Tensor:
    weights = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1))
    return (weights * logps).mean()


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    assert max(gradient.abs().max() for gradient in expected.values()) > 1e-3
    for name, gradient in expected.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(
            found[name], gradient, rtol=0, atol=1e-5 * scale, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_entropies_and_gradients_are_those_of_separate_rows(trainer, family):
    model, batch = build(family), make_batch(family)
    assert trainer._can_share(model, batch, in_loss=True), trainer._reasons
    expected, found = forward(trainer, model, batch, shared=False), forward(trainer, model, batch, shared=True)
    assert expected[0].std() > 0.5, "log-probs that say something"
    for separate, shared in zip(expected, found, strict=True):
        torch.testing.assert_close(shared, separate, rtol=0, atol=1e-5)
        assert not shared[batch["completion_mask"] == 0].any()
    assert_same(gradients_of(model, some_loss(found[0])), gradients_of(model, some_loss(expected[0])))
