"""Models of the digits task: a tiny native image-text teacher and student, trained here and saved as checkpoints.

Both are `LlavaForConditionalGeneration` (a CLIP vision tower, an MLP, a Qwen3 decoder) with the stock
`LlavaProcessor`, so `AutoProcessor` and `AutoModelForImageTextToText` load them like any other checkpoint. The teacher
learns from right answers. The student learns from answers half of which state a sum that is one too high: it reads the
digits, but adds badly.
"""

from pathlib import Path

import torch
from datasets import Dataset, DatasetDict
from digits_data import is_correct, with_wrong_sums
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3Config,
    set_seed,
)
from trl import SFTConfig, SFTTrainer, prepare_multimodal_messages


IMAGE_SIZE = 16  # pixels; the processor stretches the pair of scans to the square that CLIP wants
PATCH_SIZE = 4  # pixels, for 16 image tokens
MAX_NEW_TOKENS = 32  # an answer has 19 tokens, the end of turn included

SPECIAL_TOKENS = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>"]
WORDS = ["\n", "system", "user", "assistant", "What", " is", " the", " sum", " of", " digits", "?"]
WORDS += ["<think>", "I", " see", " and", ".", "+", "=", "</think>", "\\boxed", "{", "}"]
# A word keeps the space before it, as in byte-level vocabularies, so that joining the tokens gives the text back.
PATTERN = r"</?think>|\\boxed| ?[A-Za-z]+| ?[0-9]+|\s|."
VOCABULARY = SPECIAL_TOKENS + WORDS + [f" {digit}" for digit in range(10)] + [str(number) for number in range(20)]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}{{ '<image>' }}{%- else -%}{{ part['text'] }}{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}
"""


def build_processor(vocabulary: list[str] = VOCABULARY, pattern: str = PATTERN) -> LlavaProcessor:
    """
    The processor that teacher and student share: word-level tokenizer, chat template, 16 x 16 images. `pattern` is what a
    text is cut into.
    """
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<|im_end|>",
        extra_special_tokens={"image_token": "<image>", "turn_token": "<|im_start|>"},
        padding_side="left",  # what batched generation needs
        clean_up_tokenization_spaces=False,
    )
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        num_additional_image_tokens=1,  # CLIP's class token ...
        vision_feature_select_strategy="default",  # ... which this strategy drops again
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor, width: int, seed: int) -> LlavaForConditionalGeneration:
    """A randomly initialised model with two vision and two text layers of `width` (a multiple of 16)."""
    set_seed(seed)
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        projection_dim=width,
    )
    text = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.1,  # the usual 0.02 suits wide models; this narrow, some seeds then hardly learn to read
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=processor.image_token_id,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,  # LLaVA's default of -2 would leave the second of two layers unused
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    # At this size the plain implementation of attention is the fastest one on a CPU.
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def train_sft(
    model: PreTrainedModel,
    processor: LlavaProcessor,
    train_split: Dataset,
    output_dir: str | Path,
    seed: int,
    max_steps: int,
    learning_rate: float,
    batch_size: int = 32,
    **options,
) -> None:
    """Train `model` in place on the completions of `train_split`, with TRL's SFTTrainer; `options` are fields of its."""
    args = SFTConfig(
        output_dir=str(output_dir),
        max_steps=max_steps,
        per_device_train_batch_size=batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        weight_decay=1.0,  # strong: 1,297 scans are easily learned by heart
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,  # a model this small gains nothing from an accelerator
        max_length=None,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        seed=seed,
        **options,
    )
    SFTTrainer(model=model, args=args, train_dataset=train_split, processing_class=processor).train()


def tokenize(processor: ProcessorMixin, rows: Dataset | dict[str, list]) -> BatchFeature:
    """Prompts of the rows as a model takes them, padded on the left."""
    messages = [
        prepare_multimodal_messages(prompt, images=images)
        for prompt, images in zip(rows["prompt"], rows["images"], strict=True)
    ]
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


@torch.no_grad()
def greedy_accuracy(
    path: str | Path, split: Dataset, batch_size: int = 125, max_new_tokens: int = MAX_NEW_TOKENS
) -> float:
    """
    Fraction (0..1) of the rows of `split` whose greedy completion boxes the right sum.

    Nothing is suppressed: a model that says `<image>` or never ends its turn is wrong on that row.
    """
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(path)
    correct = 0
    for start in tqdm(range(0, len(split), batch_size), desc="greedy accuracy"):
        rows = split[start : start + batch_size]
        inputs = tokenize(processor, rows)
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        correct += sum(is_correct(text, solution) for text, solution in zip(texts, rows["solution"], strict=True))
    return correct / len(split)


def build_teacher(splits: DatasetDict, output_dir: Path, seed: int, processor: LlavaProcessor | None = None) -> None:
    """166k parameters, trained on right answers; a minute and a half on one core."""
    processor = processor or build_processor()
    model = build_model(processor, width=64, seed=seed)
    train_sft(model, processor, splits["train"], output_dir, seed, max_steps=1000, learning_rate=2e-3)
    save(model, processor, output_dir)


def build_student(splits: DatasetDict, output_dir: Path, seed: int, processor: LlavaProcessor | None = None) -> None:
    """95k parameters, trained on answers of which half state a sum that is one too high; half a minute on one core."""
    processor = processor or build_processor()
    model = build_model(processor, width=48, seed=seed)
    train_split = with_wrong_sums(splits["train"], seed)
    train_sft(model, processor, train_split, output_dir, seed, max_steps=400, learning_rate=3e-3)
    save(model, processor, output_dir)


def save(model: PreTrainedModel, processor: LlavaProcessor, output_dir: Path) -> None:
    model.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)
