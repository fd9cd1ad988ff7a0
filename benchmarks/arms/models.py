"""Data and models of the tasks, built once and kept, and what is measured of a student on questions it has not seen."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import digits_data
import digits_models
import torch
from datasets import load_from_disk
from digits_data import is_correct
from digits_models import build_model, save, tokenize
from filelock import FileLock
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BatchFeature,
    CLIPImageProcessorPil,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.image_utils import make_flat_list_of_images

from . import chain_data, chain_models
from .cells import Task


# Where the data and the models of a task are made, by functions of the same names.
SOURCES = {"digits": (digits_data, digits_models), "chain": (chain_data, chain_models)}

# Prompts for a reverse KL: enough that its error is a few percent, and as many samples.
KL_PROMPTS = 250


def build_once(name: str, task: Task, seed: int, which: str, output_dir: Path) -> Path:
    """
    The folder of a task's and a seed's `"data"`, `"teacher"` or `"student"`, built if it is not there.

    Others may ask for it at the same time: one builds, they wait. An interrupted build is never taken for a finished one.
    """
    data, models = SOURCES[name]
    path = output_dir / name / f"{which}-seed{seed}"
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if not path.exists():
            partial = path.with_name(f"{path.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            if which == "data":
                data.build_splits(seed, train_rows=task.train_rows, test_rows=task.test_rows).save_to_disk(partial)
            elif task.trained:
                splits = load_from_disk(build_once(name, task, seed, "data", output_dir))
                {"teacher": models.build_teacher, "student": models.build_student}[which](splits, partial, seed)
            else:
                processor = models.build_processor()
                save(build_model(processor, width=32, seed=seed + (which == "teacher")), processor, partial)
            partial.rename(path)
    return path


def load_model(path: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


@torch.no_grad()
def round_weights(model: PreTrainedModel) -> None:
    """Give a model the weights that it would have if it had been saved in bfloat16."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


# The 16 values of NF4, arXiv 2305.14314: quantiles of a normal distribution, between -1 and 1.
NF4 = torch.tensor(
    [-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0]
    + [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
)
NF4_BLOCK = 64


def to_four_bits(weight: torch.Tensor) -> torch.Tensor:
    """What is left of a weight in NF4: each run of `NF4_BLOCK` numbers, row by row, has its largest as its scale."""
    blocks = weight.reshape(-1, NF4_BLOCK)
    scales = blocks.abs().amax(-1, keepdim=True)
    nearest = (blocks / scales.clamp_min(1e-30)).unsqueeze(-1).sub(NF4).abs().argmin(-1)
    return (NF4[nearest] * scales).reshape(weight.shape)


@torch.no_grad()
def round_to_four_bits(model: PreTrainedModel) -> None:
    """Give the linear layers of a model, but not its LM head, the weights that 4-bit quantization leaves them."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            module.weight.copy_(to_four_bits(module.weight))


@torch.no_grad()
def swap_ends(model: PreTrainedModel, first: int, second: int) -> None:
    """Have a model say the token `second` wherever it said `first`, and the other way round; it reads both as before."""
    head = model.get_output_embeddings()
    weight = head.weight.clone()
    weight[[first, second]] = weight[[second, first]]
    # No longer the embedding's.
    head.weight = torch.nn.Parameter(weight)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


class RememberingImageProcessor(CLIPImageProcessorPil):
    """Processes an image once, however often the trainers hand it over: twice per step for each completion."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = {}

    def __call__(self, images, *args, **kwargs) -> BatchFeature:
        images = make_flat_list_of_images(images)
        keys = [image.tobytes() for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self.seen}
        if new:
            pixels = super().__call__(list(new.values()), return_tensors="pt")["pixel_values"]
            self.seen.update(zip(new, pixels, strict=True))
        return BatchFeature({"pixel_values": torch.stack([self.seen[key] for key in keys])})

    def to_dict(self):
        return {key: value for key, value in super().to_dict().items() if key != "seen"}


def load_processor(path: Path) -> ProcessorMixin:
    processor = AutoProcessor.from_pretrained(path)
    processor.image_processor = RememberingImageProcessor(**processor.image_processor.to_dict())
    return processor


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    questions: dict[str, torch.Tensor],
    end_id: int,
    max_new_tokens: int,
    *,
    repeats: int = 1,
    greedy: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Completions of prompts, by `generate`: at temperature 1 and without placeholders of images, as the trainers sample; or
    greedily, where nothing is suppressed, so that a model that says `<image>` is wrong on that row.

    Args:
        model ([`~transformers.PreTrainedModel`]): An image-text model.
        questions (`dict`): `input_ids` and `attention_mask` `(B, P)`, `pixel_values`.
        end_id (`int`): Token that ends a completion.
        max_new_tokens (`int`): Length after which a completion is cut off.
        repeats (`int`, *optional*, defaults to `1`): Completions of each prompt, next to each other in the result.
        greedy (`bool`, *optional*, defaults to `False`): Take the likeliest token.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: token ids `(B * repeats, T)`, and a mask of that shape that is True up to and
            including the token that ends the completion.
    """
    options = {"do_sample": False}
    if not greedy:
        options = {"do_sample": True, "top_k": 0, "suppress_tokens": [model.config.image_token_id]}
    repeated = {key: value.repeat_interleave(repeats, dim=0) for key, value in questions.items()}
    tokens = model.generate(**repeated, eos_token_id=end_id, max_new_tokens=max_new_tokens, **options)
    tokens = tokens[:, questions["input_ids"].shape[1] :]
    is_end = tokens == end_id
    return tokens, is_end.cumsum(-1) - is_end.long() == 0


@dataclass
class Evaluation:
    """
    What is measured of a student on test questions.

    Attributes:
        accuracy: Fraction of greedy completions that box the right sum, as `digits_models.greedy_accuracy` counts.
        reverse_kl: KL of the student's distribution from the teacher's, in nats per token: exact over the vocabulary at
            every position of completions that the student has just sampled, and averaged over their tokens.
        length: Mean number of tokens of these completions.
    """

    accuracy: float
    reverse_kl: float
    length: float


class Evaluator:
    """Evaluates models on the test questions of a task and seed, without touching the state of torch's generator."""

    def __init__(self, data: Path, processor: ProcessorMixin, teacher: PreTrainedModel, max_new_tokens: int):
        rows = load_from_disk(data)["test"]
        self.processor, self.teacher, self.solutions = processor, teacher, rows["solution"]
        self.max_new_tokens = max_new_tokens
        self.end_id = processor.tokenizer.eos_token_id
        self.questions = tokenize(processor, rows)

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel) -> Evaluation:
        training = model.training
        model.eval()
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                accuracy = self.greedy_accuracy(model)
                reverse_kl, length = self.reverse_kl(model)
        finally:
            model.train(training)
        return Evaluation(accuracy, reverse_kl, length)

    @torch.no_grad()
    def can_answer(self, model: PreTrainedModel) -> bool:
        """Whether a model still has a distribution, on the first question."""
        return bool(model(**{key: value[:1] for key, value in self.questions.items()}).logits.isfinite().all())

    def greedy_accuracy(self, model: PreTrainedModel) -> float:
        tokens, mask = sample(model, self.questions, self.end_id, self.max_new_tokens, greedy=True)
        texts = [
            self.processor.decode(ids[keep], skip_special_tokens=True) for ids, keep in zip(tokens, mask, strict=True)
        ]
        right = [is_correct(text, solution) for text, solution in zip(texts, self.solutions, strict=True)]
        return sum(right) / len(right)

    def reverse_kl(self, model: PreTrainedModel) -> tuple[float, float]:
        questions = {key: value[:KL_PROMPTS] for key, value in self.questions.items()}
        completions, mask = sample(model, questions, self.end_id, self.max_new_tokens)
        inputs = {
            **questions,
            "input_ids": torch.cat([questions["input_ids"], completions], dim=1),
            "attention_mask": torch.cat([questions["attention_mask"], mask.long()], dim=1),
        }
        # The distribution of the first completion token stands at the last token of the prompt.
        first = questions["input_ids"].shape[1] - 1
        student, teacher = (one(**inputs).logits[:, first:-1].log_softmax(-1) for one in (model, self.teacher))
        kl = (student.exp() * (student - teacher)).sum(-1)
        return kl[mask].mean().item(), mask.sum(-1).float().mean().item()
