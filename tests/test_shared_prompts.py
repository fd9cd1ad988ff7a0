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

from gndpo_trl.grpo.branch_attention import IMPLEMENTATION, Branches, reason_against, shared_prompts_attention
from gndpo_trl.grpo.planning import PassPlanner, batch_of_forward
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
    dataset = Dataset.from_list([{"prompt": "one"}] * 8)
    assert isinstance(model, Qwen3ForCausalLM)
    return GSPOTrainer(
        model, lambda completions, **_: [0.0] * len(completions), args, dataset, processing_class=tokenizer
    )


def forward(trainer, model, batch: dict, shared: bool):
    """Log-probs and entropies `(B, T)` of one pass."""
    num_columns, batch_of_pass = batch["completion_ids"].size(1), batch_of_forward(batch)
    prompts = same_prompts([batch]) if shared else None
    return trainer._passes.run(model, batch_of_pass, num_columns, prompts, compute_entropy=True)[:2]


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
    assert trainer._planner.can_share(model, batch, in_loss=True), trainer._planner.reasons
    expected, found = forward(trainer, model, batch, shared=False), forward(trainer, model, batch, shared=True)
    assert expected[0].std() > 0.5, "log-probs that say something"
    for separate, shared in zip(expected, found, strict=True):
        torch.testing.assert_close(shared, separate, rtol=0, atol=1e-5)
        assert not shared[batch["completion_mask"] == 0].any()
    assert_same(gradients_of(model, some_loss(found[0])), gradients_of(model, some_loss(expected[0])))


ONE_COMPLETION_EACH = [(0, 3), (1, 7), (2, 2), (3, 0)]
EQUAL_LENGTHS = [(prompt, 4) for prompt in (0, 1) for _ in range(4)]


@pytest.mark.parametrize("rows", [ONE_COMPLETION_EACH, EQUAL_LENGTHS, [(0, 0), (2, 1), (2, 0)]])
@pytest.mark.parametrize("family", ["qwen3", "internvl", "qwen2_5_vl"])
def test_however_many_completions_a_prompt_has(trainer, family, rows):
    model, batch = build(family), make_batch(family, rows)
    assert trainer._planner.can_share(model, make_batch(family), in_loss=True)
    expected, found = forward(trainer, model, batch, shared=False), forward(trainer, model, batch, shared=True)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    assert_same(gradients_of(model, some_loss(found[0])), gradients_of(model, some_loss(expected[0])))


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_moe", "internvl", "qwen2_5_vl"])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_two_passes_before_one_backward_with_gradient_checkpointing(trainer, family, use_reentrant):
    """Layers run again in the backward pass, when another pass has been planned in between."""
    model = build(family)
    first, second = make_batch(family), make_batch(family, [(3, 5), (3, 2), (1, 9)], seed=1)
    assert trainer._planner.can_share(model, first, in_loss=True)
    separate = [forward(trainer, model, batch, shared=False)[0] for batch in (first, second)]
    expected = gradients_of(model, *map(some_loss, separate))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    model.train()
    packed = [forward(trainer, model, batch, shared=True)[0] for batch in (first, second)]
    assert_same(gradients_of(model, *map(some_loss, packed)), expected)


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
def test_adapters(trainer, family):
    model = get_peft_model(
        build(family), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    model.eval()
    batch = make_batch(family)
    assert trainer._planner.can_share(model, batch, in_loss=True)
    expected, found = forward(trainer, model, batch, shared=False), forward(trainer, model, batch, shared=True)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    gradients = gradients_of(model, some_loss(found[0]))
    assert all("lora" in name for name in gradients)
    assert_same(gradients, gradients_of(model, some_loss(expected[0])))


@pytest.mark.parametrize("family", ["qwen3", "internvl", "llava", "qwen3_vl"])
def test_every_token_and_every_image_is_computed_once(trainer, family):
    model, batch = build(family), make_batch(family)
    assert trainer._planner.can_share(model, batch, in_loss=False)
    tokens, images = [], []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    if family != "qwen3":
        tower = model.get_encoder(modality="image")
        tower.register_forward_pre_hook(
            lambda module, args, kwargs: images.append(len([*args, *kwargs.values()][0])), with_kwargs=True
        )
    for shared in (False, True):
        forward(trainer, model, batch, shared)
    prompts = {prompt: row for row, (prompt, _) in enumerate(ROWS)}
    distinct = sum(int(batch["prompt_mask"][row].sum()) for row in prompts.values()) + sum(
        length for _, length in ROWS
    )
    # The last token of a prompt starts its branches, and the last one of a completion predicts nothing.
    assert tokens[1] == distinct - len(prompts) + sum(length == 0 for _, length in ROWS) <= distinct < tokens[0]
    if family in ("internvl", "llava"):
        assert images == [sum(batch["num_images"]), sum(NUM_IMAGES)]
    elif family == "qwen3_vl":
        assert images == [len(batch["pixel_values"]), sum(t * h * w for t, h, w in GRIDS)]


def test_the_layout_of_a_packed_row():
    batch = make_batch(rows=[(0, 2), (2, 1), (0, 3)])
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    shared = SharedPrompts(mask, 3, same_prompts([batch]))
    assert shared.first_rows == [0, 1]
    prompt, completions = batch["prompt_ids"][0, -5:].tolist(), batch["completion_ids"].tolist()
    short = batch["prompt_ids"][1, -1].item()  # a prompt of one token: nothing goes before its branches
    expected = [*prompt[:-1], prompt[-1], *completions[2][:2], prompt[-1], completions[0][0], short]
    assert shared.pack(input_ids).tolist() == [expected]
    labels = [-100] * 4 + completions[2] + completions[0][:2] + completions[1][:1]
    assert shared.labels(input_ids).tolist() == [labels]
    assert shared.positions().tolist() == [[0, 1, 2, 3, 4, 5, 6, 4, 5, 0]]
    columns = torch.arange(10.0).unsqueeze(0)
    assert shared.restore(columns).tolist() == [[7, 8, 0], [9, 0, 0], [4, 5, 6]]


def test_prompts_are_the_same_with_equal_tokens_and_equal_images():
    batch = make_batch("internvl", [(1, 2), (3, 2), (1, 3), (1, 1)])
    assert same_prompts([batch]) == [0, 1, 0, 0]
    images = batch["pixel_values"]  # 2, 1, 2 and 2 of them
    images[5] += 1
    assert same_prompts([batch]) == [0, 1, 0, 2], "the same question about another picture"
    halves = [{**batch, **{key: value[half] for key, value in batch.items()}} for half in (slice(0, 2), slice(2, 4))]
    halves[0]["pixel_values"], halves[1]["pixel_values"] = images[:3], images[3:]
    assert same_prompts(halves) == [0, 1, 0, 2]


# Refusals


SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 4, "use_sliding_window": True}
REFUSED = {
    "sliding window": ("mistral", {**TEXT, "sliding_window": 4}, "it has a sliding window"),
    "a window that its configuration hides": (
        "mistral",
        {**TEXT, "sliding_window": 4, "layer_types": ["full_attention"] * 2},
        "it uses `sliding_window`",
    ),
    "some sliding windows": ("qwen3", {**TEXT, **SLIDING}, "layers of type 'sliding_attention'"),
    "softcap": ("gemma2", {**TEXT, "layer_types": ["full_attention"] * 2}, "`attn_implementation` is 'eager'"),
    "sinks": (
        "gpt_oss",
        {**TEXT, "layer_types": ["full_attention"] * 2, "num_local_experts": 4, "num_experts_per_tok": 2},
        "`attn_implementation` is 'eager'",
    ),
    "recurrent": (
        "qwen3_next",
        {
            **TEXT,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "its attention cannot be exchanged",
    ),
    "linear attention": (
        "minimax",
        {**TEXT, "layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4, "block_size": 8},
        "layers of type 'linear_attention'",
    ),
    "mamba": ("mamba", {**TEXT, "state_size": 4}, "its attention cannot be exchanged"),
    "ALiBi": (
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "cannot be exchanged",
    ),
    "bidirectional image attention": (
        "paligemma",
        {
            "vision_config": {
                "model_type": "siglip_vision_model",
                **CLIP,
                "num_attention_heads": 2,
                "projection_dim": 32,
            },
            "text_config": {"model_type": "gemma", **TEXT},
            "image_token_id": IMAGE,
            "projection_dim": 32,
        },
        "its attention is not causal",
    ),
    "attention by kinds of tokens": (
        "gemma3",
        {
            "vision_config": {"model_type": "siglip_vision_model", **CLIP, "num_attention_heads": 2},
            "text_config": {**TEXT, "model_type": "gemma3_text", "layer_types": ["full_attention"] * 2},
            "mm_tokens_per_image": 4,
            "image_token_id": IMAGE,
        },
        "depends on which tokens are images",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_would_compute_something_else_keep_separate_rows(trainer, case, caplog):
    family, options, reason = REFUSED[case]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **options)
    auto_class = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = auto_class.from_config(config).eval()
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    with caplog.at_level(logging.WARNING, logger="gndpo_trl"):
        batch = make_batch()
        assert not trainer._planner.can_share(model, batch, in_loss=False)
        assert not trainer._planner.can_share(model, batch, in_loss=False)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("gndpo_trl")]
    assert len(messages) == 1 and type(model).__name__ in messages[0] and reason in messages[0], messages
    assert model.get_decoder().config._attn_implementation != IMPLEMENTATION
    forward(trainer, model, batch, shared=False)
    with pytest.raises(ValueError, match="`share_prompts` is True, but"):
        PassPlanner(trainer._passes, share_prompts=True, has_aux_loss=False).can_share(model, batch, in_loss=False)


class LooksBack(torch.nn.Module):
    """A layer that mixes every token with the one before it, whatever attention does."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states):
        return self.layer(hidden_states) + 0.1 * hidden_states.roll(1, dims=1)


def test_what_structure_does_not_tell_a_few_tokens_do(trainer, caplog):
    model = build("qwen3")
    model.model.layers[0].mlp = LooksBack(model.model.layers[0].mlp)
    assert reason_against(model) is None
    assert not trainer._planner.can_share(model, make_batch(), in_loss=False)
    assert "nats from those of separate rows" in caplog.text
    assert model.config._attn_implementation == "sdpa"

    model = build("qwen3")
    model.model.layers[1].self_attn.config = AutoConfig.for_model("qwen3", **TEXT, attn_implementation="sdpa")
    assert not trainer._planner.can_share(model, make_batch(), in_loss=False)
    assert "1 of its layers attended as they were told" in caplog.text


def test_adapters_that_learn_prompts_and_compiled_models_keep_separate_rows():
    model = build("qwen3")
    learned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    assert reason_against(learned) == "it has learned prompts of PEFT"
    assert reason_against(torch.compile(build("qwen3"))) == "it is compiled"
    assert reason_against(torch.nn.Linear(2, 2)) == "it is not a model of transformers"


def test_dropout_keeps_separate_rows_in_the_loss_alone(trainer, caplog):
    model, batch = build("qwen3", attention_dropout=0.1), make_batch()
    assert trainer._planner.can_share(model, batch, in_loss=False)
    assert not trainer._planner.can_share(model, batch, in_loss=True)
    line = "In the loss, Qwen3ForCausalLM computes each prompt again for every completion, because it drops out."
    assert line in caplog.text


def test_outside_the_comparison_a_layer_that_asks_for_more_raises():
    model = build("mistral", sliding_window=4)
    model.config._attn_implementation = IMPLEMENTATION
    branches = Branches([2], [[1]], torch.device("cpu"))
    for option in ("softcap", "s_aux", "position_bias"):
        with pytest.raises(ValueError, match=f"it uses `{option}`"):
            states = torch.randn(1, 2, 3, 8)
            shared_prompts_attention(
                torch.nn.Identity(), states, states, states, branches.no_mask(), branches, **{option: 1.0}
            )
    with pytest.raises(ValueError, match="MistralAttention cannot attend to shared prompts: it uses `sliding_window`"):
        model(torch.ones(1, 3).long(), attention_mask=branches.no_mask(), shared_prompts=branches)
