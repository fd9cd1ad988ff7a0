"""Teachers that cannot score the student, and teachers that can but will harm it."""

import copy

import pytest
import tiny_models

from gndpo_trl.teachers.compatibility import check_compatibility, describe


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


def test_an_image_text_student_needs_an_image_text_teacher():
    teacher, tokenizer = tiny_models.build_qwen3()
    for processing_class in (tokenizer, None):
        with pytest.raises(ValueError, match="reads images, but the teacher \\(Qwen3ForCausalLM\\) is text-only"):
            check(tiny_models.build_internvl(), (teacher, processing_class))
    teacher, processor = tiny_models.build_internvl()
    with pytest.raises(ValueError, match="no image processor"):
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
