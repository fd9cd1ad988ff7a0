"""The tiny models of the other tests, in the sizes and with the processors that vLLM needs."""

from pathlib import Path

import tiny_models
import torch
from transformers import InternVLProcessor, InternVLVideoProcessor, Qwen2_5_VLProcessor, Qwen2VLVideoProcessor


WIDTH = 64  # vLLM's attention on CPUs takes heads of 32 and more


def stock_processor(family: str, processor):
    """The processor as transformers has it, which the processes of a server can load too."""
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    parts["chat_template"] = processor.chat_template
    if family == "internvl":
        return InternVLProcessor(**parts, video_processor=InternVLVideoProcessor(), image_seq_length=4)
    return Qwen2_5_VLProcessor(**parts, video_processor=Qwen2VLVideoProcessor())


def forbid_placeholders(model, tokenizer) -> None:
    """
    Make a model all but unable to sample the placeholders of images, which no image would belong to.

    Masks would do it too, but vLLM renormalizes by them and the training engine knows nothing of them. So one dimension
    is much the same in every token's embedding, and the rows of the placeholders in the head read it alone.
    """
    if model.config.tie_word_embeddings:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(0.02 * torch.randn_like(model.lm_head.weight))
    placeholders = tokenizer.convert_tokens_to_ids(list(tiny_models.SPECIAL_TOKENS.values()))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(3)  # random weights are so small that what stands in the prompt would hardly matter
        model.get_input_embeddings().weight.mul_(7)
        model.get_input_embeddings().weight[:, 0] = 2.0
        model.get_output_embeddings().weight.mul_(2)
        model.get_output_embeddings().weight[:, 0] = 0
        model.get_output_embeddings().weight[placeholders] = 0
        model.get_output_embeddings().weight[placeholders, 0] = -10.0


def save(family: str, path: Path, seed: int = 0) -> str:
    """Save a tiny checkpoint of a family and return its path. InternVL's cuts wide images into several tiles."""
    options = {"max_patches": 4} if family == "internvl" else {}
    model, processor = tiny_models.BUILDERS[family](seed=seed, width=WIDTH, **options)
    tokenizer = getattr(processor, "tokenizer", processor)
    forbid_placeholders(model, tokenizer)
    return tiny_models.save(model, processor if family == "qwen3" else stock_processor(family, processor), path)
