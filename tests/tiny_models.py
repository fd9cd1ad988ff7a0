"""Tiny models of real architectures, built from configs and saved as ordinary checkpoints.

The vocabulary is so small that random models end some of their completions early. InternVL's and Qwen2.5-VL's stock
processors need torchvision for video; their subclasses here have no video processor and are otherwise the stock ones.
"""

import re
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoProcessor,
    GotOcr2ImageProcessorPil,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    Qwen3Config,
    Qwen3ForCausalLM,
)


SPECIAL_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<IMG_CONTEXT>",
    "start_turn_token": "<|im_start|>",
}
WORDS = "system user assistant what is the sum of a and b plus one two three four five six seven eight nine ?".split()

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<|im_end|> {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)


def build_tokenizer(extra_words: tuple[str, ...] = (), image: str = "") -> PreTrainedTokenizerFast:
    """Word-level tokenizer with every special token that the families here need; `image` is their placeholder."""
    tokens = ["<|pad|>", "<|unk|>", "<|im_end|>", *SPECIAL_TOKENS.values(), *WORDS, *extra_words]
    backend = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        extra_special_tokens=SPECIAL_TOKENS,
        chat_template=CHAT_TEMPLATE.replace("IMAGE", image),
        padding_side="left",
    )


class InternVLImageProcessor(InternVLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, image_seq_length=4, chat_template=None, **kwargs):
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
        self.image_seq_length = image_seq_length
        self.start_image_token, self.start_image_token_id = tokenizer.start_image_token, tokenizer.start_image_token_id
        self.end_image_token, self.end_image_token_id = tokenizer.end_image_token, tokenizer.end_image_token_id
        self.image_token, self.image_token_id = tokenizer.context_image_token, tokenizer.context_image_token_id
        self.video_token = tokenizer.video_token
        self.multimodal_pattern = re.compile(f"(?P<image>{re.escape(self.image_token)})")


class Qwen25VLImageProcessor(Qwen2_5_VLProcessor):
    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs):
        self.image_token, self.image_token_id = tokenizer.image_token, tokenizer.image_token_id
        self.video_token, self.video_token_id = tokenizer.video_token, tokenizer.video_token_id
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


AutoProcessor.register(InternVLConfig, InternVLImageProcessor, exist_ok=True)
AutoProcessor.register(Qwen2_5_VLConfig, Qwen25VLImageProcessor, exist_ok=True)


def text_options(tokenizer: PreTrainedTokenizerFast, width: int, vocab_size: int | None) -> dict:
    return {
        "vocab_size": vocab_size or len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }


def build_qwen3(seed: int = 0, width: int = 32, vocab_size: int | None = None, tokenizer=None):
    tokenizer = tokenizer or build_tokenizer()
    torch.manual_seed(seed)
    config = Qwen3Config(**text_options(tokenizer, width, vocab_size), head_dim=width // 2, tie_word_embeddings=False)
    return Qwen3ForCausalLM(config), tokenizer


def build_internvl(seed: int = 0, width: int = 32, image_mean: float = 0.5, max_patches: int = 1):
    tokenizer = build_tokenizer(image="<IMG_CONTEXT>")
    torch.manual_seed(seed)
    config = InternVLConfig(
        vision_config={
            "image_size": [16, 16],
            "patch_size": [4, 4],
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
        },
        text_config={"model_type": "qwen3", "head_dim": width // 2, **text_options(tokenizer, width, None)},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    image_processor = GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16},
        crop_to_patches=max_patches > 1,
        min_patches=1,
        max_patches=max_patches,
        image_mean=[image_mean] * 3,
        image_std=[0.5] * 3,
    )
    processor = InternVLImageProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)
    return InternVLForConditionalGeneration(config), processor


def build_qwen25vl(seed: int = 0, width: int = 32):
    tokenizer = build_tokenizer(image="<|vision_start|><|image_pad|><|vision_end|>")
    torch.manual_seed(seed)
    text = {"model_type": "qwen2_5_vl_text", **text_options(tokenizer, width, None)}
    third = width // 12  # the sections share half of a head's dimensions
    mrope_section = [width // 4 - 2 * third, third, third]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": mrope_section}
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": width,
            "patch_size": 4,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 16,
            "fullatt_block_indexes": [0],
        },
        text_config=text,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
        vision_end_token_id=tokenizer.vision_eos_token_id,
    )
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
    )
    processor = Qwen25VLImageProcessor(image_processor, tokenizer, chat_template=tokenizer.chat_template)
    return Qwen2_5_VLForConditionalGeneration(config), processor


BUILDERS = {"qwen3": build_qwen3, "internvl": build_internvl, "qwen25vl": build_qwen25vl}


def save(model: PreTrainedModel, processing_class, path: Path) -> str:
    """Save a checkpoint that `from_pretrained` loads, with its end and padding tokens, and return its path."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(path)
    processing_class.save_pretrained(path)
    return str(path)


def draw_image(index: int) -> Image.Image:
    """One of many small pictures of different sizes and contents."""
    image = Image.linear_gradient("L").rotate(90 * (index % 4)).resize((24 + 8 * (index % 3), 24))
    return Image.merge("RGB", [image, image.rotate(180), Image.new("L", image.size, 20 * (index % 12))])
