"""Models with random weights, and the prompts and completions of a step."""

import argparse
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)


sys.path.append(str(Path(__file__).parents[2] / "tests"))
import tiny_models  # noqa: E402  the image-text pair's processor, which needs no torchvision


TEXT_TOKENS = 8000

# Hidden size, intermediate size, layers, heads, of student and teacher. The LM head is half of the small student, and a
# quarter of the deep one, as of Qwen3-0.6B; then Qwen3-0.6B and 1.7B themselves, and the text models of InternVL3.5-1B
# and 2B, which have the same shapes.
SIZES = {
    "small": ((128, 384, 4, 4), (256, 768, 4, 4)),
    "small-deep": ((128, 384, 12, 4), (192, 576, 12, 6)),
    "small-wide": ((256, 768, 4, 4), (768, 2304, 4, 12)),
    "small-vocabulary": ((128, 384, 4, 4), (256, 768, 4, 4)),  # of 150,000
    "small-internvl": ((128, 384, 4, 4), (256, 768, 4, 4)),
    "small-whole-internvl": ((128, 384, 4, 4), (256, 768, 4, 4)),  # images of 256 tokens
    "qwen3": ((1024, 3072, 28, 16), (2048, 6144, 28, 16)),
    "internvl": ((1024, 3072, 28, 16), (2048, 6144, 28, 16)),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "<eos>", *(f"w{index}" for index in range(TEXT_TOKENS - 2))]
    backend = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>", padding_side="left"
    )


def build_model(size: str, shape: tuple[int, int, int, int], dtype: torch.dtype, seed: int) -> PreTrainedModel:
    hidden_size, intermediate_size, layers, heads = shape
    is_small = size.startswith("small")
    text = {
        "vocab_size": {"small-vocabulary": 150_000}.get(size, TEXT_TOKENS) if is_small else 151_936,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // 2,
        "head_dim": hidden_size // heads if is_small else 128,
        "tie_word_embeddings": not size.endswith("internvl"),
        "max_position_embeddings": 32_768,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    if not size.endswith("internvl"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **text), dtype=dtype)
    tokenizer = tiny_models.build_tokenizer(image="<IMG_CONTEXT>")
    text.update(
        model_type="qwen3", vocab_size=max(text["vocab_size"], len(tokenizer)), pad_token_id=tokenizer.pad_token_id
    )
    vision = {"image_size": [448, 448], "patch_size": [14, 14]}  # 256 tokens per tile
    if is_small:
        vision.update(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
    if size == "small-internvl":
        vision["image_size"] = [56, 56]
    tokens_per_tile = 4 if size == "small-internvl" else 256
    config = AutoConfig.for_model(
        "internvl",
        text_config={**text, "eos_token_id": tokenizer.eos_token_id},
        vision_config=vision,
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=tokens_per_tile,
    )
    return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def build_processing_class(size: str):
    if not size.endswith("internvl"):
        return build_tokenizer()
    _, processor = tiny_models.build_internvl()
    edge = 56 if size == "small-internvl" else 448
    processor.image_processor.size = {"height": edge, "width": edge}
    processor.image_seq_length = 4 if size == "small-internvl" else 256
    return processor


def draw_completion_lengths(lengths: str, num_completions: int, longest: int, generator: torch.Generator) -> list[int]:
    """Log-normal lengths, of which the longest is `longest` and the mean 0.3 of it; or its mean for all of them."""
    if lengths == "constant":
        return [round(0.3 * longest)] * num_completions
    normal = torch.randn(num_completions, generator=generator)
    normal = (normal - normal.max()) / normal.std()
    # The mean shrinks as the spread grows: bisect for the spread that gives 0.3.
    low, high = 0.0, 10.0
    for _ in range(50):
        spread = (low + high) / 2
        low, high = (spread, high) if (spread * normal).exp().mean() > 0.3 else (low, spread)
    return (longest * (low * normal).exp()).round().clamp(min=1).long().tolist()


def draw_batch(size: str, lengths: str, args: argparse.Namespace) -> tuple[list[dict], list[list[int]]]:
    """Rows of a data set, and a completion for each of them that ends in the end token."""
    generator = torch.Generator().manual_seed(args.seed)
    rows = []
    for _ in range(args.completions // args.num_generations):
        num_words = 44 if lengths == "constant" else torch.randint(24, 65, (1,), generator=generator).item()
        num_words = args.prompt_words or num_words
        if size.endswith("internvl"):
            words = torch.randint(0, len(tiny_models.WORDS), (num_words,), generator=generator).tolist()
            prompt = [{"role": "user", "content": " ".join(tiny_models.WORDS[word] for word in words)}]
            row = {"prompt": prompt, "images": [tiny_models.draw_image(len(rows))]}
        else:
            words = torch.randint(0, TEXT_TOKENS - 2, (num_words,), generator=generator).tolist()
            row = {"prompt": " ".join(f"w{word}" for word in words)}
        rows += [row] * args.num_generations
    vocabulary = 40 if size.endswith("internvl") else TEXT_TOKENS
    completions = []
    for length in draw_completion_lengths(lengths, args.completions, args.max_completion_length, generator):
        # neither the end token nor an image's placeholders, which come first in the vocabularies
        completion = torch.randint(20, vocabulary, (length - 1,), generator=generator).tolist()
        completions.append([*completion, 2 if size.endswith("internvl") else 1])
    return rows, completions
