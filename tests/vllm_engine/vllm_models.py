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
    placeholders = tokenizer.convert_tokens_to_ids(list(tiny_models.SPECIAL_TOKENS.values()))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
        model.get_input_embeddings().weight[:, 0] = 2.0
        model.get_output_embeddings().weight.mul_(5)
        model.get_output_embeddings().weight[:, 0] = 0
        model.get_output_embeddings().weight[placeholders] = 0
        model.get_output_embeddings().weight[placeholders, 0] = -10.0


def save(family: str, path: Path, seed: int = 0, **options) -> str:
    """Save a tiny checkpoint of a family and return its path."""
    model, processor = tiny_models.BUILDERS[family](seed=seed, width=WIDTH, **options)
    tokenizer = getattr(processor, "tokenizer", processor)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    forbid_placeholders(model, tokenizer)
    return tiny_models.save(model, processor if family == "qwen3" else stock_processor(family, processor), path)
