"""Teachers that cannot score the student, and teachers that can but will harm it."""

import copy

import pytest
import tiny_models
from datasets import Dataset

from gndpo_trl.teachers import LocalTeacher, ServerTeacher
from gndpo_trl.teachers.compatibility import check_compatibility, describe, warn_on_chat_template


END = 2  # <|im_end|>, the tiny tokenizers' end token


def check(student, teacher, stop_ids=(END,)):
    """Each side is (model, processing class), as the builders return them."""
    for model, processing_class in (student, teacher):
        if processing_class is not None and model.generation_config.eos_token_id is None:
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            model.generation_config.eos_token_id = tokenizer.eos_token_id
    descriptions = [describe(name, *side) for name, side in (("model", student), ("teacher_model", teacher))]
    if stop_ids is not None:
        descriptions[0].generation_config = copy.deepcopy(descriptions[0].generation_config)
        descriptions[0].generation_config.eos_token_id = list(stop_ids)
    check_compatibility(*descriptions)


@pytest.mark.parametrize("family", tiny_models.BUILDERS)
def test_a_pair_of_one_family_passes_without_a_word(family, recwarn):
    build = tiny_models.BUILDERS[family]
    check(build(seed=0), build(seed=1, width=48))
    assert not [
        warning for warning in recwarn if "gndpo_trl" in warning.filename or "MISMATCH" in str(warning.message)
    ]


def test_padded_vocabularies_may_differ():
    check(tiny_models.build_qwen3(), tiny_models.build_qwen3(vocab_size=500))
    check(tiny_models.build_qwen3(vocab_size=500), tiny_models.build_qwen3())


def test_a_teacher_with_more_tokens_is_fine():
    check(tiny_models.build_qwen3(), tiny_models.build_qwen3(tokenizer=tiny_models.build_tokenizer(("ten", "eleven"))))


def test_conflicting_ids_are_named():
    swapped = tiny_models.build_tokenizer(("ten", "eleven"))
    student = tiny_models.build_tokenizer(("eleven", "ten"))
    first = len(tiny_models.build_tokenizer())
    with pytest.raises(ValueError, match="disagree on 2 of the student's.*of the student's model family") as error:
        check(tiny_models.build_qwen3(tokenizer=student), tiny_models.build_qwen3(tokenizer=swapped))
    assert f"id {first} is 'eleven' to the student and 'ten' to the teacher" in str(error.value)
    assert f"id {first + 1} is 'ten' to the student and 'eleven' to the teacher" in str(error.value)


def test_ids_that_the_teacher_does_not_know_are_named():
    student = tiny_models.build_tokenizer(("ten",))
    with pytest.raises(ValueError, match="'ten' to the student and unknown to the teacher"):
        check(tiny_models.build_qwen3(tokenizer=student), tiny_models.build_qwen3(vocab_size=500))


def test_an_unknown_tokenizer_is_said_loudly():
    model, _ = tiny_models.build_qwen3()
    with pytest.warns(UserWarning, match="NOT checked.*`teacher_processing_class`"):
        check(tiny_models.build_qwen3(), (model, None))


def test_an_image_text_student_may_have_a_teacher_of_text():
    """For rows without images, which `check_data` looks at; it need not know the special tokens around images."""
    teacher, tokenizer = tiny_models.build_qwen3()
    check(tiny_models.build_internvl(), (teacher, tokenizer))
    student, processor = tiny_models.build_internvl()
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<seen>"]})
    check((student, processor), (teacher, tokenizer))
    processor.tokenizer.add_tokens(["word"])
    with pytest.raises(ValueError, match="disagree on 1 of .*'word' to the student and unknown to the teacher"):
        check((student, processor), (teacher, tokenizer))


def test_the_processor_of_an_image_text_teacher_has_to_read_images():
    teacher, processor = tiny_models.build_internvl()
    with pytest.raises(ValueError, match="no image processor.*`teacher_processing_class`"):
        check(tiny_models.build_internvl(), (teacher, processor.tokenizer))


def test_a_text_student_may_have_an_image_text_teacher():
    student, _ = tiny_models.build_qwen3()
    teacher, processor = tiny_models.build_internvl()
    check((student, processor.tokenizer), (teacher, processor))


def test_image_processors_that_differ_are_refused_with_the_option():
    with pytest.raises(ValueError, match=r"`pixel_values`.*`image_mean` is .0.5, 0.5, 0.5. and .0.1, 0.1, 0.1."):
        check(tiny_models.build_internvl(), tiny_models.build_internvl(image_mean=0.1))
    with pytest.raises(ValueError, match="image processors of student and teacher disagree"):
        check(tiny_models.build_internvl(), tiny_models.build_internvl(max_patches=4))


def test_image_token_counts_that_differ_are_refused():
    teacher, processor = tiny_models.build_internvl()
    processor.image_seq_length = 9
    with pytest.raises(ValueError, match="takes 4 placeholder tokens for the student and 9 for the teacher"):
        check(tiny_models.build_internvl(), (teacher, processor))


def test_another_placeholder_token_is_refused():
    teacher, processor = tiny_models.build_internvl()
    teacher.config.image_token_id = 5
    with pytest.raises(ValueError, match="`config.image_token_id`"):
        check(tiny_models.build_internvl(), (teacher, processor))


def test_a_teacher_that_ends_with_another_token_is_warned_about():
    """A base student and an instruct teacher: the student does not stop where the teacher would."""
    teacher, tokenizer = tiny_models.build_qwen3()
    teacher.generation_config.eos_token_id = [END, 12]
    with pytest.warns(
        UserWarning, match=r"EOS MISMATCH: the teacher ends its turn with 12 \(.*`max_completion_length`"
    ):
        check(tiny_models.build_qwen3(), (teacher, tokenizer))


def test_the_teachers_ends_are_adopted_where_the_student_has_them():
    teacher, tokenizer = tiny_models.build_qwen3(tokenizer=tiny_models.build_tokenizer(extra_words=("bye",)))
    bye = tokenizer.convert_tokens_to_ids("bye")
    teacher.generation_config.eos_token_id = [END, 12, bye]
    description = describe("model", *tiny_models.build_qwen3(vocab_size=500))
    description.generation_config.eos_token_id = END
    description.adopted_stop_ids = set()
    with pytest.warns(UserWarning, match=rf"EOS MISMATCH: the teacher ends its turn with {bye} \("):
        check_compatibility(description, describe("teacher_model", teacher, tokenizer))
    assert description.adopted_stop_ids == {12}


def test_a_student_that_stops_where_the_teacher_never_does_is_warned_about():
    with pytest.warns(UserWarning, match=r"EOS MISMATCH: sampling from the student stops at 12 .*longer completions"):
        check(tiny_models.build_qwen3(), tiny_models.build_qwen3(), stop_ids=(END, 12))


def test_another_pad_token_is_warned_about():
    teacher, tokenizer = tiny_models.build_qwen3()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.warns(UserWarning, match="PAD MISMATCH"):
        check(tiny_models.build_qwen3(), (teacher, tokenizer))


def test_another_chat_template_is_warned_about():
    teacher, tokenizer = tiny_models.build_qwen3()
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant ", "assistant <think>")
    with pytest.warns(UserWarning, match="chat templates differ.*<think>"):
        check(tiny_models.build_qwen3(), (teacher, tokenizer))


# Chat templates that differ with their options, or that refuse what they are tried on.

THINKS = tiny_models.CHAT_TEMPLATE.replace(
    "assistant {%", "assistant {% if thinks is not defined or thinks %}<think>{% endif %}{%"
)
NEEDS_SYSTEM = "{% if messages[0].role != 'system' %}{{ raise_exception('begin with a system message') }}{% endif %}"
NEEDS_STYLE = "{% if style is not defined %}{{ raise_exception('pass style') }}{% endif %}"
REFUSES = "{{ raise_exception('not this') }}"


def described(template, **kwargs):
    model, tokenizer = tiny_models.build_qwen3()
    tokenizer.chat_template = template
    description = describe("model", model, tokenizer)
    description.template_kwargs = kwargs
    description.teacher_template_kwargs = kwargs
    return description


def test_chat_templates_are_compared_with_the_options_of_the_run(recwarn):
    plain, thinking = described(tiny_models.CHAT_TEMPLATE), described(THINKS)
    warn_on_chat_template(described(THINKS, thinks=False), plain)
    warn_on_chat_template(described(THINKS, thinks=False), thinking)
    warn_on_chat_template(described(NEEDS_STYLE + THINKS, style="short"), thinking)
    student, teacher = (described("{{ style }} " + THINKS) for _ in range(2))
    student.teacher_template_kwargs = {"style": "one"}  # which changes nothing of how an answer begins
    warn_on_chat_template(student, teacher)
    assert not recwarn.list
    with pytest.warns(UserWarning, match="chat templates differ.*<think>"):
        warn_on_chat_template(described(THINKS, thinks=True), plain)
    student = described(THINKS, thinks=False)
    student.teacher_template_kwargs = {"thinks": True}
    with pytest.warns(UserWarning, match="chat templates differ.*<think>.* for the teacher"):
        warn_on_chat_template(student, thinking)


def test_a_template_that_wants_more_is_compared_where_it_can_be(recwarn):
    needs = described(NEEDS_SYSTEM + tiny_models.CHAT_TEMPLATE)
    warn_on_chat_template(needs, described(tiny_models.CHAT_TEMPLATE))
    warn_on_chat_template(described(REFUSES), described(REFUSES))
    assert not recwarn.list
    with pytest.warns(UserWarning, match="chat templates differ.*<think>"):
        warn_on_chat_template(needs, described(THINKS))
    with pytest.warns(UserWarning, match="refuses every question .* NOT checked"):
        warn_on_chat_template(described(NEEDS_STYLE + THINKS), described(THINKS))


def test_images_are_counted_in_a_template_that_wants_more():
    student, processor = tiny_models.build_internvl()
    teacher, other = tiny_models.build_internvl()
    other.image_seq_length = 9
    for which in (processor, other):
        which.chat_template = NEEDS_SYSTEM + which.chat_template
    with pytest.raises(ValueError, match="takes 4 placeholder tokens for the student and 9 for the teacher"):
        check((student, processor), (teacher, other))
    processor.chat_template = other.chat_template = REFUSES
    with pytest.warns(UserWarning, match="NOT checked whether an image takes as many tokens"):
        check((student, processor), (teacher, other))


@pytest.mark.parametrize(
    "make_teacher", [LocalTeacher, lambda model, tokenizer: ServerTeacher("http://localhost:9", tokenizer)]
)
def test_text_before_a_teacher_that_has_a_template_is_warned_about(text_dataset, recwarn, make_teacher):
    model, tokenizer = tiny_models.build_qwen3()
    teacher = make_teacher(model, tokenizer)
    texts = Dataset.from_dict({"prompt": ["one plus two"]})
    rendered = tokenizer.apply_chat_template(text_dataset[0]["prompt"], tokenize=False, add_generation_prompt=True)
    recwarn.clear()
    for dataset in (
        text_dataset,
        texts.add_column("teacher_prompt", [rendered]),
        Dataset.from_dict({"prompt": [rendered]}),
    ):
        teacher.check_data("train_dataset", dataset, has_prompt_fn=False)
    teacher.check_data("train_dataset", texts, has_prompt_fn=True)
    teacher.check_data("eval_dataset", None, has_prompt_fn=False)
    assert not recwarn.list
    with pytest.warns(
        UserWarning, match="prompts of `train_dataset` are plain text.*`teacher_prompt`, rendered as text"
    ):
        teacher.check_data("train_dataset", texts, has_prompt_fn=False)
    tokenizer.chat_template = None
    recwarn.clear()
    teacher.check_data("train_dataset", texts, has_prompt_fn=False)
    assert not recwarn.list
