"""Two tokenizers on one text: pieces, and what becomes of each token in them."""

import itertools
import random

import other_tokenizers
import pytest
import tiny_models
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from transformers import PreTrainedTokenizer

from gndpo_trl.teachers.alignment import Translation, Translator, Vocabulary, common_cuts


TOKENIZERS = {
    "bytes": other_tokenizers.over_bytes(290),
    "more bytes": other_tokenizers.over_bytes(400),
    "marks": other_tokenizers.with_space_marks(),
    "characters": other_tokenizers.over_characters(),
    "lowercase": other_tokenizers.over_lowercase_words(),
    "words": tiny_models.build_tokenizer(),
}
KEEP_ALL = ("bytes", "more bytes", "marks")


def translator(student: str, teacher: str) -> Translator:
    mine, theirs = TOKENIZERS[student], TOKENIZERS[teacher]
    return Translator(Vocabulary(mine), Vocabulary(theirs), {mine.eos_token_id: theirs.eos_token_id})


def ids_of(name: str, text: str) -> list[int]:
    """As the student would write a text after another one."""
    return Vocabulary(TOKENIZERS[name]).encode(text).ids


def written(name: str, ids: list[int]) -> bytes:
    vocabulary = Vocabulary(TOKENIZERS[name])
    return b"".join(vocabulary.text(id) for id in ids)


def parts(name: str, found: Translation, student_ids: list[int], teacher_name: str) -> list[tuple[bytes, bytes]]:
    """What both have in each piece, by their vocabularies."""
    return [
        tuple(
            written(of, [id for id, its in zip(ids, numbers, strict=True) if its == piece])
            for of, ids, numbers in (
                (name, student_ids, found.of_student),
                (teacher_name, found.ids, found.of_teacher),
            )
        )
        for piece in range(len(found.is_known))
    ]


def check(found: Translation, num_student: int) -> None:
    """Pieces come in order, hold all tokens of both, and the known ones have some of each."""
    assert len(found.of_student) == num_student and len(found.of_teacher) == len(found.ids)
    assert found.of_student == sorted(found.of_student) and found.of_teacher == sorted(found.of_teacher)
    assert {*found.of_student} == {*range(len(found.is_known))}
    known = {piece for piece, is_known in enumerate(found.is_known) if is_known}
    assert known <= {*found.of_teacher} <= {*range(len(found.is_known))}


TEXTS = {
    "words": "what is the sum of one and two ?",
    "leading spaces": "   the sum",
    "trailing whitespace": "the sum  \n\n",
    "emoji": "a 😀😀 b 👩‍👩‍👧",
    "Chinese": "你好，世界。",
    "Thai": "สวัสดีครับ",
    "reasoning": "<think>\nwhat is x\n</think>\n\nfive",
    "tool tags": '<tool_call>{"name": "f"}</tool_call>',
    "their special tokens": "the <end> of <turn>",
    "code": "def f(x):\n\treturn x\r\n",
    "combining": "e\u0301 \u00e9 \ufb01",
    "nothing": "",
}


@pytest.mark.parametrize("student, teacher", itertools.product(KEEP_ALL, repeat=2))
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_pieces_say_the_same_and_nothing_is_lost(student, teacher, text):
    ids = [*ids_of(student, text), TOKENIZERS[student].eos_token_id]
    found = translator(student, teacher).translate(ids)
    check(found, len(ids))
    assert all(found.is_known) and found.num_changed == 0
    *of_text, end = parts(student, found, ids, teacher)
    assert [mine for mine, _ in of_text] == [theirs for _, theirs in of_text]
    assert b"".join(mine for mine, _ in of_text) == text.encode()
    assert found.ids[-1] == TOKENIZERS[teacher].eos_token_id and end[1] == b"<end>"
    # What a text writes out is no special token.
    assert found.ids.count(TOKENIZERS[teacher].eos_token_id) == 1
    # No two pieces could be cut further: no place within is an end for both.
    for piece in range(len(found.is_known) - 1):
        ends = []
        for of, numbers, row in ((student, found.of_student, ids), (teacher, found.of_teacher, found.ids)):
            lengths = [len(written(of, [id])) for id, its in zip(row, numbers, strict=True) if its == piece]
            ends.append({*itertools.accumulate(lengths[:-1])} - {0})
        assert not ends[0] & ends[1]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("is_ended", [True, False])
def test_the_same_tokenizer_has_the_same_tokens(name, is_ended):
    text = "what is the sum of one and two ?"
    ids = [*ids_of(name, text), *([TOKENIZERS[name].eos_token_id] if is_ended else [])]
    found = translator(name, name).translate(ids)
    assert found.ids == ids
    assert found.of_student == found.of_teacher == [*range(len(ids))]
    assert all(found.is_known)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from([*TOKENIZERS]),
    st.sampled_from([*TOKENIZERS]),
    st.lists(st.integers(0, 10**6), max_size=20),
    st.booleans(),
)
@example("bytes", "marks", [], False)
def test_whatever_is_sampled_is_cut_in_pieces(student, teacher, numbers, is_ended):
    """Any tokens, with halves of characters, special tokens, and ids beyond the vocabulary."""
    end = TOKENIZERS[student].eos_token_id
    ids = [number % (len(TOKENIZERS[student]) + 2) for number in numbers]
    ids = [id for id in ids if id != end] + [end] * is_ended
    found = translator(student, teacher).translate(ids)
    check(found, len(ids))
    assert 0 <= found.num_changed <= len(ids)
    if student in KEEP_ALL and teacher in KEEP_ALL:
        for (mine, theirs), is_known in zip(parts(student, found, ids, teacher), found.is_known, strict=True):
            assert mine == theirs or not is_known


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(KEEP_ALL), st.sampled_from(KEEP_ALL), st.text(max_size=30))
def test_any_text_that_both_can_write_is_known(student, teacher, text):
    text = text.encode("utf-8", "ignore").decode()  # halves of surrogates are no text
    ids = [*ids_of(student, text), TOKENIZERS[student].eos_token_id]
    if written(student, ids[:-1]) == text.encode():
        found = translator(student, teacher).translate(ids)
        assert found.num_changed == 0 and all(found.is_known)


def test_halves_of_characters_are_unknown_and_shift_nothing():
    bytes_of = {bytes([byte]): id for id in range(290) if len(text := written("bytes", [id])) == 1 for byte in text}
    smile = [bytes_of[bytes([byte])] for byte in "😀".encode()]
    before, after = ids_of("bytes", "the sum"), ids_of("bytes", "?")
    end = TOKENIZERS["bytes"].eos_token_id
    whole = translator("bytes", "more bytes").translate([*before, *smile, *after, end])
    assert all(whole.is_known)
    for lost in range(4):
        half = smile[:lost] + smile[lost + 1 :]
        ids = [*before, *half, *after, end]
        found = translator("bytes", "more bytes").translate(ids)
        known = [found.is_known[piece] for piece in found.of_student]
        assert known == [True] * len(before) + [False] * 3 + [True] * (len(after) + 1)
        assert found.num_changed == 3


def test_what_comes_before_tokens_of_no_width_goes_with_what_follows():
    # Student: "ab|c|d", teacher: "|ab" "c" "" "d", of which the first and the fourth have no width.
    assert common_cuts([2, 3, 4], [(0, 0), (0, 0), (2, 2), (3, 3), (3, 3), (4, 4)]) == [(0, 0), (1, 2), (2, 3), (3, 5)]
    # What the teacher drops between two tokens belongs to either; alone it goes with what follows, and at the end with nothing.
    assert common_cuts([2, 3], [(0, 0), (1, 2), (3, 3)]) == [(0, 0), (1, 1), (2, 2)]
    assert common_cuts([1, 2, 3], [(0, 0), (1, 2), (3, 3)]) == [(0, 0), (1, 1), (3, 2)]
    assert common_cuts([1, 2], [(0, 0), (1, 2)]) == [(0, 0), (1, 1), (2, 1)]
    # Tokens of one character, which no place divides.
    assert common_cuts([1, 2, 4], [(0, 0), None, (2, 2), (4, 4)]) == [(0, 0), (2, 2), (3, 3)]


def test_special_tokens_of_the_same_string_are_pieces_and_others_are_text():
    mine = other_tokenizers.over_bytes(300, added=["<think>", "</think>", "<call>"])
    plain, theirs = other_tokenizers.over_characters(), other_tokenizers.over_characters()
    theirs.add_tokens(["<think>", "</think>"])
    ends = {mine.eos_token_id: theirs.eos_token_id}
    ids = mine("<think>one</think><call>two", add_special_tokens=False)["input_ids"] + [mine.eos_token_id]
    found = Translator(Vocabulary(mine), Vocabulary(theirs), ends).translate(ids)
    check(found, len(ids))
    begin, end = (theirs.convert_tokens_to_ids(name) for name in ("<think>", "</think>"))
    assert found.ids == [begin, *plain("one")["input_ids"], end, *plain("<call>two")["input_ids"], theirs.eos_token_id]
    call = found.of_student[ids.index(mine.convert_tokens_to_ids("<call>"))]
    assert found.of_teacher.count(call) == len("<call>")
    assert all(found.is_known)
    # A teacher without them reads the text; so does one to which it is the placeholder of an image.
    found = Translator(Vocabulary(mine), Vocabulary(plain), ends).translate(ids)
    assert found.ids == [*plain("<think>one</think><call>two")["input_ids"], plain.eos_token_id]
    assert begin not in Translator(Vocabulary(mine), Vocabulary(theirs), ends, frozenset({begin})).same.values()


@pytest.mark.parametrize(
    "text, unknown",
    [
        ("the sum", ""),
        ("the  sum", "  sum"),
        ("the\nsum ?", "\nsum"),
        ("the sum \n", " \n"),
        ("the sum?", ""),
        ("sum x", " x"),
    ],
)
def test_of_whitespace_a_teacher_over_words_knows_one_space_before_a_word(text, unknown):
    ids = [*ids_of("characters", text), TOKENIZERS["characters"].eos_token_id]
    found = translator("characters", "words").translate(ids)
    check(found, len(ids))
    left_out = [id for id, piece in zip(ids, found.of_student, strict=True) if not found.is_known[piece]]
    assert TOKENIZERS["characters"].decode(left_out) == unknown and found.num_changed == len(unknown)


def test_a_completion_that_is_cut_off_leaves_its_last_piece_open():
    """The teacher would have gone on with a longer token, had it known the next letter."""
    ids = ids_of("characters", "is the su")
    found = translator("characters", "more bytes").translate(ids)
    assert found.is_known[-1] is False and found.num_changed == 0
    ended = translator("characters", "more bytes").translate([*ids, TOKENIZERS["characters"].eos_token_id])
    assert all(ended.is_known)
    assert translator("characters", "more bytes").translate([]) == Translation()


def test_what_the_teachers_normalizer_changes_is_unknown():
    text = "The quick sum ?"
    ids = [*ids_of("more bytes", text), TOKENIZERS["more bytes"].eos_token_id]
    found = translator("more bytes", "lowercase").translate(ids)
    check(found, len(ids))
    unknown = b"".join(
        mine
        for (mine, _), is_known in zip(parts("more bytes", found, ids, "lowercase"), found.is_known, strict=True)
        if not is_known
    )
    assert unknown == b"The"
    assert found.num_changed == sum(not found.is_known[piece] for piece in found.of_student) > 0

    composing = other_tokenizers.over_bytes(300, normalizer=normalizers.NFC())
    vocabulary = Vocabulary(TOKENIZERS["bytes"])
    ids = [*vocabulary.encode("a e\u0301 b").ids, TOKENIZERS["bytes"].eos_token_id]
    found = Translator(vocabulary, Vocabulary(composing), {ids[-1]: composing.eos_token_id}).translate(ids)
    unknown = written(
        "bytes", [id for id, piece in zip(ids, found.of_student, strict=True) if not found.is_known[piece]]
    )
    assert "e\u0301".encode() in unknown and len(unknown) <= len(" e\u0301".encode())


def test_no_space_is_put_before_what_follows_on_a_text():
    """SentencePiece's tokenizers put a space before every text; the student has written none."""
    for text in ("the sum", " the sum", "  the", "\nthe", "a", "."):
        found = translator("bytes", "marks").translate(ids_of("bytes", text))
        assert written("marks", found.ids) == text.encode()
    # Where the format has one before every answer, it is the format's, for both.
    bare, spaced = ids_of("bytes", "the sum"), ids_of("marks", " the sum")
    found = translator("bytes", "marks").translate(bare, leads=(b"", b" "))
    assert found.ids == spaced and found.num_changed == 0
    found = translator("marks", "bytes").translate(spaced, leads=(b" ", b""))
    assert written("bytes", found.ids) == b"the sum" and found.num_changed == 0


def test_words_know_the_token_that_they_follow_on():
    words = TOKENIZERS["words"]
    vocabulary = Vocabulary(words)
    ids = words.convert_tokens_to_ids(["the", "sum"])
    assert vocabulary.texts(ids) == [b"the", b" sum"]
    assert vocabulary.texts(ids, before=words.convert_tokens_to_ids("is")) == [b" the", b" sum"]


class PythonTokenizer(PreTrainedTokenizer):
    """One that is no `tokenizers` library's."""

    vocab_size = 0

    def get_vocab(self):
        return {}


def test_a_tokenizer_without_offsets_is_refused():
    tokenizer = PythonTokenizer()
    with pytest.raises(
        ValueError, match="PythonTokenizer does not say where in a text its tokens are.*`tokenizer.json`"
    ):
        Vocabulary(tokenizer)


def test_long_texts_take_no_longer_by_the_token():
    random.seed(0)
    words = [random.choice(["the", "sum", "of", "😀", "你好", "x"]) for _ in range(4000)]
    ids = ids_of("bytes", " ".join(words))
    found = translator("bytes", "characters").translate(ids)
    check(found, len(ids))
