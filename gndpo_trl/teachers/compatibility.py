"""Can this teacher score what this student samples? Checked once, before the first step.

The teacher reads the student's own token ids and image tensors, so an id must mean the same token to both, and an
image must become the same tensors and placeholders for both. Sizes of padded vocabularies need not agree. A teacher of text
may teach an image-text student where there are no images.
"""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from datasets import Dataset, Value
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    BaseImageProcessor,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from trl import prepare_multimodal_messages

from ..grpo.sampling import placeholder_ids
from ..grpo.trl_hooks import get_config_model_id


ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin

# How many conflicting ids an error names.
NUM_NAMED_IDS = 5

# Image backends differ by about a hundredth in normalized pixel values; other means, scales or crops differ by more.
PIXEL_TOLERANCE = 0.1

# Pixels (width, height) of the images that both processors are tried on: neither is square, and the second is large
# enough to be cut into tiles or scaled down.
PROBE_SIZES = ((96, 64), (1344, 896))

# Conversations that chat templates are tried on. Some templates refuse one without a system message.
PROBES = (
    [{"role": "user", "content": "?"}],
    [{"role": "system", "content": "?"}, {"role": "user", "content": "?"}],
)

T = TypeVar("T")

# What a teacher that cannot read the student's ids and image tensors is offered.
ANOTHER_READING = (
    'or set `teacher_alignment="text"`, with which a teacher of any family reads prompts, images and completions in a form of '
    "its own."
)

# A folder with a tokenizer has at least one of these.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


@dataclass
class ModelDescription:
    """
    What can be known of a model without its weights.

    Attributes:
        name (`str`): Name of its class.
        config ([`~transformers.PreTrainedConfig`]): Its configuration.
        generation_config ([`~transformers.GenerationConfig`] or `None`): Its generation configuration.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`] or `None`): Its
            tokenizer or processor; `None` if unknown.
        template_kwargs (`dict`): Of the student: options of the chat template for its prompts.
        teacher_template_kwargs (`dict`): Of the student: those for the prompts of its teacher.
        adopted_stop_ids (`set[int]` or `None`): Of the student: token ids that end a teacher's turn and that sampling has to
            stop at beside its own, as the checks find them; `None` where it is to sample on.
    """

    name: str
    config: PreTrainedConfig
    generation_config: GenerationConfig | None
    processing_class: ProcessingClass | None
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_template_kwargs: dict[str, Any] = field(default_factory=dict)
    adopted_stop_ids: set[int] | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        is_processor = isinstance(self.processing_class, ProcessorMixin)
        return self.processing_class.tokenizer if is_processor else self.processing_class

    @property
    def reads_images(self) -> bool:
        """Whether it is more than a model of text; one of which nothing is known may be."""
        return self.config is None or self.config.get_text_config() is not self.config

    @property
    def stop_ids(self) -> set[int]:
        """Token ids that end its turn: those of its generation configuration, and its tokenizer's."""
        ids = self.generation_config.eos_token_id if self.generation_config is not None else None
        return ({*(ids if isinstance(ids, list) else [ids])} | {self.tokenizer.eos_token_id}) - {None}


def describe(
    field: str,
    model: str | PreTrainedModel,
    processing_class: ProcessingClass | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> ModelDescription:
    """
    Describe a model, loaded or not.

    Args:
        field (`str`): The argument that the model was passed as, for error messages.
        model (`str` or [`~transformers.PreTrainedModel`]): Path, model id or loaded model.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Its tokenizer or processor. If `None`, it is loaded from where the model comes from; of a loaded model that
            does not say where, or that is no longer there, it stays unknown.
        revision (`str`, *optional*): Revision on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Whether to run code from the Hub.

    Raises:
        `ValueError`: if there is no model at the path, or no tokenizer beside it.
    """
    if not isinstance(model, str):
        if processing_class is None and (origin := get_config_model_id(model.config)):
            try:
                processing_class = AutoProcessor.from_pretrained(origin, trust_remote_code=trust_remote_code)
            except OSError:
                pass  # unknown, which `check_compatibility` warns about
        return ModelDescription(type(model).__name__, model.config, model.generation_config, processing_class)

    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    if os.path.exists(os.path.join(model, "adapter_config.json")) and not os.path.exists(
        os.path.join(model, "config.json")
    ):
        how = "is_trainable=True)" if field == "model" else "...).merge_and_unload()"
        raise ValueError(
            f"`{field}` is {model!r}, which holds an adapter and no model. Load both, and pass the result: "
            f"`AutoPeftModelForCausalLM.from_pretrained({model!r}, {how}`."
        )
    try:
        config = AutoConfig.from_pretrained(model, **options)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"`{field}` is {model!r}, but no model can be found there ({str(error).splitlines()[0]}). Give the folder of "
            "a saved model (one with a `config.json`), or an id on the Hub that this machine can reach."
        ) from error
    try:
        generation_config = GenerationConfig.from_pretrained(model, **options)
    except OSError:
        generation_config = GenerationConfig.from_model_config(config)
    if processing_class is None:
        if os.path.isdir(model) and not any(os.path.exists(os.path.join(model, name)) for name in TOKENIZER_FILES):
            raise ValueError(
                f"`{field}` is {model!r}, a folder without a tokenizer: it has none of {', '.join(TOKENIZER_FILES)}. "
                "Save the tokenizer or processor beside the model, or pass it to the trainer "
                "(`teacher_processing_class` for the teacher, `processing_class` for the student)."
            )
        processing_class = AutoProcessor.from_pretrained(model, **options)
    return ModelDescription(
        (config.architectures or [type(config).__name__])[0], config, generation_config, processing_class
    )


def check_compatibility(student: ModelDescription, teacher: ModelDescription) -> None:
    """
    Raise if the teacher cannot score the student's rollouts, warn where it can but the run will suffer.

    Args:
        student ([`ModelDescription`]): Student.
        teacher ([`ModelDescription`]): Teacher. An unknown processing class is warned about.

    Raises:
        `ValueError`: if a token id means different tokens, or if the two prepare images differently.
    """
    if student.processing_class is None:
        return  # TRL refuses the student
    is_vlm = isinstance(student.processing_class, ProcessorMixin)
    if teacher.processing_class is None:
        warnings.warn(
            "The teacher's tokenizer is unknown, because `teacher_model` is a loaded model that does not say where it "
            "came from, or that is no longer there: whether its token ids mean the same as the student's is NOT "
            "checked. Pass `teacher_processing_class` to have it checked.",
            stacklevel=2,
        )
        return
    # A teacher of text has rows without images alone, and need not know the tokens around them.
    check_vocabularies(student.tokenizer, teacher.tokenizer, knows_special=not is_vlm or teacher.reads_images)
    if is_vlm and teacher.reads_images:
        check_images(student, teacher)
    warn_on_special_tokens(student, teacher)
    warn_on_chat_template(student, teacher)


def check_vocabularies(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, knows_special: bool = True
) -> None:
    """
    Raise `ValueError`, naming the first ids, if a token id of the student is another token to the teacher. Unless the teacher
    `knows_special`, it may lack special tokens that were added to the student's.
    """
    student_tokens = {id: token for token, id in student.get_vocab().items()}
    teacher_tokens = {id: token for token, id in teacher.get_vocab().items()}
    conflicts = [id for id in sorted(student_tokens) if teacher_tokens.get(id) != student_tokens[id]]
    if not knows_special:
        added = student.added_tokens_decoder
        conflicts = [id for id in conflicts if id in teacher_tokens or id not in added or not added[id].special]
    if conflicts:
        named = "; ".join(
            f"id {id} is {student_tokens[id]!r} to the student and "
            + (f"{teacher_tokens[id]!r} to the teacher" if id in teacher_tokens else "unknown to the teacher")
            for id in conflicts[:NUM_NAMED_IDS]
        )
        raise ValueError(
            f"The tokenizers of student and teacher disagree on {len(conflicts)} of the student's "
            f"{len(student_tokens)} token ids: {named}. The teacher scores the student's token ids, so each must mean "
            f"the same token to both: choose a `teacher_model` of the student's model family, {ANOTHER_READING}"
        )


def check_images(student: ModelDescription, teacher: ModelDescription) -> None:
    """Raise `ValueError` if the two processors turn an image into other tensors or another number of tokens."""
    student_processor, teacher_processor = student.processing_class, teacher.processing_class
    if not hasattr(teacher_processor, "image_processor"):
        raise ValueError(
            f"The student reads images, but the teacher's processing class ({type(teacher_processor).__name__}) has "
            "no image processor. Pass the teacher's processor (`AutoProcessor.from_pretrained`) as "
            "`teacher_processing_class`."
        )
    image_token_id = student.config.image_token_id
    if getattr(teacher.config, "image_token_id", None) != image_token_id:
        raise ValueError(
            f"The image placeholder is token id {image_token_id} for the student and "
            f"{getattr(teacher.config, 'image_token_id', None)} for the teacher (`config.image_token_id`). Choose a "
            f"`teacher_model` of the student's model family, {ANOTHER_READING}"
        )
    for size in PROBE_SIZES:
        image = Image.linear_gradient("L").resize(size).convert("RGB")  # not the same upside down
        check_image_tensors(student_processor.image_processor, teacher_processor.image_processor, image)
        prompt = try_probes(
            lambda probe, image=image: render(student_processor, probe, [image], **student.template_kwargs)
        )
        if prompt is None:
            warnings.warn(
                "The student's chat template refuses every question that it was tried on, so that it is NOT checked "
                "whether an image takes as many tokens for the teacher as for the student.",
                stacklevel=3,
            )
            return
        student_count, teacher_count = (
            list(processor(text=[prompt], images=[[image]])["input_ids"][0]).count(image_token_id)
            for processor in (student_processor, teacher_processor)
        )
        if student_count != teacher_count:
            raise ValueError(
                f"An image of {size} pixels takes {student_count} placeholder tokens for the student and "
                f"{teacher_count} for the teacher. The teacher reads the student's token ids, so its image features "
                "would not fit: choose a `teacher_model` of the same model family, make the processors equal, "
                f"{ANOTHER_READING}"
            )


def check_image_tensors(student: BaseImageProcessor, teacher: BaseImageProcessor, image: Image.Image) -> None:
    """Raise `ValueError`, naming the options that differ, if the two make other tensors of the same image."""
    student_inputs = student(images=[image], return_tensors="pt")
    teacher_inputs = teacher(images=[image], return_tensors="pt")
    for key in sorted(student_inputs.keys() | teacher_inputs.keys()):
        student_value, teacher_value = student_inputs.get(key), teacher_inputs.get(key)
        if isinstance(student_value, torch.Tensor) and isinstance(teacher_value, torch.Tensor):
            same = student_value.shape == teacher_value.shape and torch.allclose(
                student_value.double(), teacher_value.double(), rtol=0, atol=PIXEL_TOLERANCE
            )
            found = (
                f"shape {list(student_value.shape)} for the student and {list(teacher_value.shape)} for the teacher"
            )
        else:
            same = student_value == teacher_value
            found = f"{student_value} for the student and {teacher_value} for the teacher"
        if not same:
            student_options, teacher_options = student.to_dict(), teacher.to_dict()
            options = [
                f"`{name}` is {student_options.get(name)} and {teacher_options.get(name)}"
                for name in sorted(student_options.keys() | teacher_options.keys())
                if student_options.get(name) != teacher_options.get(name)
            ]
            raise ValueError(
                f"The image processors of student and teacher disagree: the same image gives other `{key}` ({found}). "
                f"Options that differ (student, teacher): {'; '.join(options) or 'none'}. The teacher is given the "
                "student's image tensors: choose a `teacher_model` of the same model family, make the image processors "
                f"equal, {ANOTHER_READING}"
            )


def placeholders_of(model: ModelDescription) -> frozenset[int]:
    """Token ids that stand for what is not text; of a model of text, none."""
    owners = [model.config, *([model.processing_class] if isinstance(model.processing_class, ProcessorMixin) else [])]
    return frozenset(placeholder_ids(*owners))


def warn_on_special_tokens(student: ModelDescription, teacher: ModelDescription) -> None:
    """
    Warn, saying what will happen, if the teacher ends its turns with other tokens, or pads with another one. Those of its ends
    that the student can sample become its `adopted_stop_ids`, unless that is `None`.
    """
    student_tokenizer, teacher_tokenizer = student.tokenizer, teacher.tokenizer
    student_stop_ids, teacher_stop_ids = student.stop_ids, teacher.stop_ids

    def named(ids: set[int]) -> str:
        return ", ".join(f"{id} ({student_tokenizer.convert_ids_to_tokens(id)!r})" for id in sorted(ids))

    only_teacher, only_student = teacher_stop_ids - student_stop_ids, student_stop_ids - teacher_stop_ids
    if student.adopted_stop_ids is not None:
        vocab_size = student.config.get_text_config().vocab_size
        known = {
            id for id in only_teacher if student_tokenizer.convert_ids_to_tokens(id) is not None and id < vocab_size
        }
        student.adopted_stop_ids |= known
        only_teacher -= known
    if only_teacher:
        warnings.warn(
            f"EOS MISMATCH: the teacher ends its turn with {named(only_teacher)}, but sampling from the student does "
            f"not stop there (it stops at {named(student_stop_ids)}). The teacher will push the student to say these "
            "tokens and the completion will run on, so expect completions to grow to `max_completion_length` within "
            "dozens of steps. Set `stop_at_teacher_eos`, if these are tokens of the student's, or give it the teacher's "
            "tokenizer, and watch `score/eos` and `completions/mean_length`.",
            stacklevel=3,
        )
    if only_student:
        warnings.warn(
            f"EOS MISMATCH: sampling from the student stops at {named(only_student)}, which the teacher never ends a "
            f"turn with (it uses {named(teacher_stop_ids)}). The teacher will find every such ending unlikely and push "
            "the student away from stopping, so expect longer completions. Give the student the teacher's ending in "
            "`generation_config.eos_token_id`, or fine-tune it on the teacher's chat template first; watch `score/eos`.",
            stacklevel=3,
        )
    student_pad, teacher_pad = student_tokenizer.pad_token_id, teacher_tokenizer.pad_token_id
    student_pad = student_tokenizer.eos_token_id if student_pad is None else student_pad  # TRL's rule
    if teacher_pad is not None and teacher_pad != student_pad:
        warnings.warn(
            f"PAD MISMATCH: the student pads with {named({student_pad})} and the teacher with {named({teacher_pad})}. "
            "Padding is masked by position here, so the scores are right, but a completion that ends with the "
            "student's pad token counts as ended, not as truncated. Set the same `pad_token` on both if you will use "
            "the student where the teacher is used now.",
            stacklevel=3,
        )


def warn_on_chat_template(student: ModelDescription, teacher: ModelDescription) -> None:
    """Warn if the teacher's own chat template, with its options, renders a conversation up to the answer in another way."""
    sides = [(student.processing_class, student.template_kwargs)]
    sides.append((teacher.processing_class, student.teacher_template_kwargs))
    templates = [getattr(processing_class, "chat_template", None) for processing_class, _ in sides]
    if None in templates:
        return
    is_one = templates[0] == templates[1]
    if is_one and sides[0][1] != sides[1][1]:  # whose options are there to change what comes before the answer
        rendered = [
            answer_opening(
                lambda probe, closed, which=which, kwargs=kwargs: render(which, probe, closed=closed, **kwargs)
            )
            for which, kwargs in sides
        ]
    else:
        rendered = try_probes(lambda probe: [render(which, probe, **kwargs) for which, kwargs in sides]) or [None]
    if None in rendered:
        if is_one:
            return
        warnings.warn(
            "The chat templates of student and teacher differ, and one of them refuses every question that both were "
            "tried on: whether prompts end alike for both is NOT checked. The teacher scores prompts in the student's "
            "template.",
            stacklevel=3,
        )
    elif rendered[0] != rendered[1]:
        warnings.warn(
            f"The chat templates differ: a prompt ends as {rendered[0][-80:]!r} for the student and as "
            f"{rendered[1][-80:]!r} for the teacher. The teacher scores prompts in the student's template; its "
            "log-probs may be those of a model that does not know the format.",
            stacklevel=3,
        )


def warn_on_text_prompts(field: str, dataset: Any, teacher: ModelDescription) -> None:
    """Warn if prompts of a data set are plain text, unlike what the teacher knows: its own chat template."""
    if getattr(teacher.processing_class, "chat_template", None) is None or not isinstance(dataset, Dataset):
        return
    if "teacher_prompt" in dataset.column_names:
        return
    if dataset.features.get("prompt") not in (Value("string"), Value("large_string")) or len(dataset) == 0:
        return
    opening = answer_opening(lambda probe, closed: render(teacher.processing_class, probe, closed=closed))
    if opening and dataset["prompt"][0].rstrip().endswith(opening.rstrip()):
        return  # rendered already
    warnings.warn(
        f"The prompts of `{field}` are plain text, but the teacher ({teacher.name}) has a chat template: it scores "
        "completions after a text that it may never have seen the like of. Write the prompts as messages; or, for a base "
        "student that reads text, give the teacher its own in the column `teacher_prompt`, rendered as text "
        "(`tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)`).",
        stacklevel=3,
    )


def try_probes(render: Callable[[list[dict[str, Any]]], T]) -> T | None:
    """What is made of the first of `PROBES` that the chat template takes; `None` where it takes none."""
    for probe in PROBES:
        try:
            return render(probe)
        except Exception:  # templates raise what they like, and what trains may refuse what is only tried
            continue
    return None


def answer_opening(render: Callable[[list[dict[str, Any]], bool], str]) -> str | None:
    """
    Text that a chat template opens the answer with, `None` if it takes no probe.

    Args:
        render (`Callable`): `render(messages, closed)` renders a conversation, without the opening if it is closed.
    """

    def open(probe: list[dict[str, Any]]) -> str:
        closed, opened = render(probe, True), render(probe, False)
        return opened[len(os.path.commonprefix([closed, opened])) :]

    return try_probes(open)


def render(
    processing_class: ProcessingClass,
    messages: list[dict[str, Any]],
    images: list | None = None,
    closed=False,
    **kwargs,
) -> str:
    """Messages in the chat template of a tokenizer or processor, up to the answer unless `closed`."""
    if isinstance(processing_class, ProcessorMixin):
        messages = prepare_multimodal_messages(messages, images=images)
    return processing_class.apply_chat_template(messages, add_generation_prompt=not closed, tokenize=False, **kwargs)
