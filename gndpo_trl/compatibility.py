"""Can this teacher score what this student samples? Checked once, before the first step.

The teacher reads the student's own token ids and image tensors, so an id must mean the same token to both, and an
image must become the same tensors and placeholders for both. Sizes of padded vocabularies need not agree.
"""

import warnings
from collections.abc import Iterable

import torch
from PIL import Image
from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


ProcessingClass = PreTrainedTokenizerBase | ProcessorMixin

# How many conflicting ids an error names.
NUM_NAMED_IDS = 5

# Image backends differ by about a hundredth in normalized pixel values; other means, scales or crops differ by more.
PIXEL_TOLERANCE = 0.1

# Pixels (width, height) of the images that both processors are tried on: neither is square, and the second is large
# enough to be cut into tiles or scaled down.
PROBE_SIZES = ((96, 64), (1344, 896))


def check_compatibility(
    student: PreTrainedModel,
    student_processing_class: ProcessingClass,
    student_stop_ids: Iterable[int],
    teacher: PreTrainedModel,
    teacher_processing_class: ProcessingClass | None,
) -> None:
    """
    Raise if the teacher cannot score the student's rollouts, warn where it can but the run will suffer.

    Args:
        student ([`~transformers.PreTrainedModel`]): Student.
        student_processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): Its
            tokenizer or processor.
        student_stop_ids (`Iterable[int]`): Token ids that end a completion while sampling.
        teacher ([`~transformers.PreTrainedModel`]): Teacher.
        teacher_processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`] or `None`):
            The teacher's; `None` if unknown, which is warned about.

    Raises:
        `ValueError`: if a token id means different tokens, if an image-text student has a text-only teacher, or if
            the two prepare images differently.
    """
    is_vlm = isinstance(student_processing_class, ProcessorMixin)
    if is_vlm and teacher.config.get_text_config() is teacher.config:
        raise ValueError(
            f"The student ({type(student).__name__}) reads images, but the teacher ({type(teacher).__name__}) is "
            "text-only and cannot score what the student says about them. Choose an image-text teacher as "
            "`teacher_model`, or pass a tokenizer as `processing_class` to train the student on text alone."
        )
    if teacher_processing_class is None:
        warnings.warn(
            "The teacher's tokenizer is unknown, because `teacher_model` is a loaded model that does not say where it "
            "came from: whether its token ids mean the same as the student's is NOT checked. Pass "
            "`teacher_processing_class` to have it checked.",
            stacklevel=2,
        )
        return
    student_tokenizer = get_tokenizer(student_processing_class)
    teacher_tokenizer = get_tokenizer(teacher_processing_class)
    check_vocabularies(student_tokenizer, teacher_tokenizer)
    if is_vlm:
        check_images(student, student_processing_class, teacher, teacher_processing_class)
    warn_on_special_tokens(student_tokenizer, set(student_stop_ids), teacher, teacher_tokenizer)
    warn_on_chat_template(student_tokenizer, teacher_tokenizer)


def get_tokenizer(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    return processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class


def check_vocabularies(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Raise `ValueError`, naming the first ids, if a token id of the student is another token to the teacher."""
    student_tokens = {id: token for token, id in student.get_vocab().items()}
    teacher_tokens = {id: token for token, id in teacher.get_vocab().items()}
    conflicts = [id for id in sorted(student_tokens) if teacher_tokens.get(id) != student_tokens[id]]
    if conflicts:
        named = "; ".join(
            f"id {id} is {student_tokens[id]!r} to the student and "
            + (f"{teacher_tokens[id]!r} to the teacher" if id in teacher_tokens else "unknown to the teacher")
            for id in conflicts[:NUM_NAMED_IDS]
        )
        raise ValueError(
            f"The tokenizers of student and teacher disagree on {len(conflicts)} of the student's "
            f"{len(student_tokens)} token ids: {named}. The teacher scores the student's token ids, so each must mean "
            "the same token to both: choose a `teacher_model` of the student's model family."
        )


def check_images(
    student: PreTrainedModel, student_processor: ProcessorMixin, teacher: PreTrainedModel, teacher_processor: object
) -> None:
    """Raise `ValueError` if the two processors turn an image into other tensors or another number of tokens."""
    if not hasattr(teacher_processor, "image_processor"):
        raise ValueError(
            f"The student reads images, but the teacher's processing class ({type(teacher_processor).__name__}) has "
            "no image processor. Pass the teacher's processor as `teacher_processing_class`."
        )
    image_token_id = student.config.image_token_id
    if getattr(teacher.config, "image_token_id", None) != image_token_id:
        raise ValueError(
            f"The image placeholder is token id {image_token_id} for the student and "
            f"{getattr(teacher.config, 'image_token_id', None)} for the teacher (`config.image_token_id`). Choose a "
            "`teacher_model` of the student's model family."
        )
    for size in PROBE_SIZES:
        image = Image.linear_gradient("L").resize(size).convert("RGB")  # not the same upside down
        check_image_tensors(student_processor.image_processor, teacher_processor.image_processor, image)
        student_count, teacher_count = (
            count_image_tokens(processor, image, image_token_id, student_processor.chat_template)
            for processor in (student_processor, teacher_processor)
        )
        if student_count != teacher_count:
            raise ValueError(
                f"An image of {size} pixels takes {student_count} placeholder tokens for the student and "
                f"{teacher_count} for the teacher. The teacher reads the student's token ids, so its image features "
                "would not fit: choose a `teacher_model` of the same model family, or make the processors equal."
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
                "student's image tensors: choose a `teacher_model` of the same model family, or make the image "
                "processors equal."
            )


def count_image_tokens(
    processor: ProcessorMixin, image: Image.Image, image_token_id: int, chat_template: str | None
) -> int:
    message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "?"}]}
    inputs = processor.apply_chat_template([[message]], chat_template=chat_template, tokenize=True, return_dict=True)
    return list(inputs["input_ids"][0]).count(image_token_id)


def warn_on_special_tokens(
    student_tokenizer: PreTrainedTokenizerBase,
    student_stop_ids: set[int],
    teacher: PreTrainedModel,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Warn, saying what will happen, if the teacher ends its turns with other tokens, or pads with another one."""
    generation_eos = teacher.generation_config.eos_token_id if teacher.generation_config is not None else None
    teacher_stop_ids = set(generation_eos if isinstance(generation_eos, list) else [generation_eos])
    teacher_stop_ids = (teacher_stop_ids | {teacher_tokenizer.eos_token_id}) - {None}

    def named(ids: set[int]) -> str:
        return ", ".join(f"{id} ({student_tokenizer.convert_ids_to_tokens(id)!r})" for id in sorted(ids))

    only_teacher, only_student = teacher_stop_ids - student_stop_ids, student_stop_ids - teacher_stop_ids
    if only_teacher:
        warnings.warn(
            f"EOS MISMATCH: the teacher ends its turn with {named(only_teacher)}, but sampling from the student does "
            f"not stop there (it stops at {named(student_stop_ids)}). The teacher will push the student to say these "
            "tokens and the completion will run on, so expect completions to grow to `max_completion_length` within "
            "dozens of steps. Add the ids to the student's `generation_config.eos_token_id`, and watch `score/eos` "
            "and `completions/mean_length`.",
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
    if teacher_pad is not None and teacher_pad != student_pad:
        warnings.warn(
            f"PAD MISMATCH: the student pads with {named({student_pad})} and the teacher with {named({teacher_pad})}. "
            "Padding is masked by position here, so the scores are right, but a completion that ends with the "
            "student's pad token counts as ended, not as truncated. Set the same `pad_token` on both if you will use "
            "the student where the teacher is used now.",
            stacklevel=3,
        )


def warn_on_chat_template(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
    """Warn if the teacher's own chat template renders a conversation, up to the answer, in another way."""
    if student.chat_template is None or teacher.chat_template is None:
        return
    messages = [{"role": "user", "content": "Hello"}]
    rendered = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for tokenizer in (student, teacher)
    ]
    if rendered[0] != rendered[1]:
        warnings.warn(
            f"The chat templates differ: a prompt ends as {rendered[0][-80:]!r} for the student and as "
            f"{rendered[1][-80:]!r} for the teacher. The teacher scores prompts in the student's template; its "
            "log-probs may be those of a model that does not know the format.",
            stacklevel=3,
        )
