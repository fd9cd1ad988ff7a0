"""
Two tokenizers on one text: which tokens of the one say what tokens of the other say.

A *piece* of a completion is what lies between two neighbouring byte offsets at which tokens of both end. It has one or more
tokens of the student and of the teacher. Special tokens that both have are pieces of their own, and so is the end of turn.
"""

import codecs
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate

from transformers import PreTrainedTokenizerBase


# No UTF-8 has it: what stands for a token without a text.
NO_TEXT = b"\xff"

# What one tokenizer after another leaves as it is before a text, for those that put a space before all they are given.
LEADS = ("\n", "a", ".", "0")

codecs.register_error("as question marks", lambda error: ("?" * (error.end - error.start), error.end))


@cache
def byte_of_character() -> dict[str, int]:
    """The bytes that the characters of byte-level vocabularies stand for."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


@dataclass
class Encoded:
    """
    A text as `n` tokens.

    Attributes:
        ids (`list[int]`): The tokens.
        texts (`list[bytes]`): What the tokenizer writes for each.
        cuts (`list[tuple[int, int] | None]`): `n + 1` places in the bytes of the text, before, between and after the tokens,
            each from the end of the last token to the beginning of the next: the same where nothing was dropped between
            them, `None` where the two overlap.
    """

    ids: list[int]
    texts: list[bytes]
    cuts: list[tuple[int, int] | None]


class Vocabulary:
    """
    What the tokens of a tokenizer write, in bytes.

    Known of byte-level vocabularies and of those with SentencePiece's marks of spaces. Of any other one (words, WordPiece) a
    token's text is what it adds to that of the token before it, and whitespace may get lost where it splits texts.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): A tokenizer that knows where in a text its tokens are.

    Raises:
        `ValueError`: if it does not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        if not tokenizer.is_fast:
            raise ValueError(
                f'`teacher_alignment` is "text", but {type(tokenizer).__name__} does not say where in a text its tokens are. '
                "Save the tokenizer in the form of the `tokenizers` library (`tokenizer.json`), or choose another model."
            )
        self.tokenizer = tokenizer
        decoder = tokenizer.backend_tokenizer.decoder
        decoder = "" if decoder is None else json.dumps(json.loads(decoder.__getstate__()), ensure_ascii=False)
        self.is_byte_level = '"ByteLevel"' in decoder
        self.has_space_marks = "▁" in decoder
        self.has_byte_tokens = '"ByteFallback"' in decoder
        self.drops_spaces = not (self.is_byte_level or self.has_space_marks)
        self.added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
        self._texts: dict[int, bytes] = {}
        self.puts_space_before = b"".join(self.texts(self._ids("a"))) == b" a"

    def text(self, id: int) -> bytes:
        """What the vocabulary has for an id, if it does not drop spaces."""
        if id not in self._texts:
            self._texts[id] = self._text(id)
        return self._texts[id]

    def _text(self, id: int) -> bytes:
        if id in self.added:
            return self.added[id].encode()
        token = self.tokenizer.convert_ids_to_tokens(id) if id < len(self.tokenizer) else None
        if token is None:
            return NO_TEXT
        if self.is_byte_level:
            of = byte_of_character()
            return bytes(of[c] for c in token) if all(c in of for c in token) else token.encode()
        if self.has_space_marks:
            byte = re.fullmatch("<0x([0-9A-F]{2})>", token) if self.has_byte_tokens else None
            return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()
        return token.encode()

    def texts(self, ids: Sequence[int], before: int | None = None) -> list[bytes]:
        """
        What each token of a completion adds to the text.

        Args:
            ids (`Sequence[int]`): Its tokens.
            before (`int`, *optional*): The token that they follow on, if it is one of the same text.
        """
        if not self.drops_spaces:
            return [self.text(id) for id in ids]
        texts, previous = [], [] if before is None else [before]
        for id in ids:
            alone, both = (
                self.tokenizer.decode(some, clean_up_tokenization_spaces=False) for some in (previous, [*previous, id])
            )
            texts.append(
                both[len(alone) :].encode() if id < len(self.tokenizer) and both.startswith(alone) else NO_TEXT
            )
            previous = [id]
        return texts

    def encode(self, text: str) -> Encoded:
        """A text as it stands after another one: special tokens that it writes out are text, and no space comes before it."""
        for ids in self._readings(text):
            texts = self.texts(ids)
            if b"".join(texts) == text.encode():
                ends = list(accumulate(map(len, texts), initial=0))
                return Encoded(ids, texts, list(zip(ends, ends, strict=True)))
        ids = self._ids(text)
        return Encoded(ids, self.texts(ids), self._cuts(text))

    def _readings(self, text: str) -> Iterator[list[int]]:
        """Its tokens, with the space that the tokenizer puts before it, and without."""
        yield self._ids(text)
        if not self.puts_space_before:
            return
        if text.startswith(" "):
            yield self._ids(text[1:])
        for lead in LEADS:
            ids = self._ids(lead + text)
            ends = list(accumulate((len(self.text(id)) for id in ids), initial=0))
            yield ids[ends.index(1 + len(lead)) :] if 1 + len(lead) in ends else ids

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]

    def _cuts(self, text: str) -> list[tuple[int, int] | None]:
        """By the offsets that the tokenizer itself tells: of characters of the text before it was normalized."""
        spans = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )["offset_mapping"]
        at = [0]
        for character in text:
            at.append(at[-1] + len(character.encode()))
        ends, starts = [0], [len(text)]
        for _, end in spans:
            ends.append(max(ends[-1], end))
        for start, _ in reversed(spans):
            starts.append(min(starts[-1], start))
        return [
            (at[end], at[start]) if end <= start else None for end, start in zip(ends, reversed(starts), strict=True)
        ]


def common_cuts(ends: Sequence[int], cuts: Sequence[tuple[int, int] | None]) -> list[tuple[int, int]]:
    """
    Where tokens of both end.

    Args:
        ends (`Sequence[int]`): Ends of the student's `m` tokens, in bytes.
        cuts (`Sequence[tuple[int, int] | None]`): The `n + 1` cuts of the teacher's, see [`Encoded`].

    Returns:
        `list[tuple[int, int]]`: for each common cut how many tokens of the student and of the teacher come before it, from
        `(0, 0)` to `(m, n)`. What the teacher does not read goes with what follows, and lies at the end between two with as
        many of the teacher.
    """
    common, place = [(0, 0)], 0
    for number, end in enumerate(ends[:-1], 1):
        while place < len(cuts) and (cuts[place] is None or cuts[place][1] < end):
            place += 1
        if place < len(cuts) and cuts[place][0] <= end and place > common[-1][1]:
            common.append((number, place))
    return [*common, (len(ends), len(cuts) - 1)]


@dataclass
class Translation:
    """
    A completion in the teacher's tokens.

    Attributes:
        ids (`list[int]`): The teacher's tokens.
        of_student (`list[int]`), of_teacher (`list[int]`): For each token of either the number of its piece.
        is_known (`list[bool]`): Whether both say the same in a piece, for each.
        num_changed (`int`): Number of the student's tokens in pieces of which the teacher reads something else, or nothing.
    """

    ids: list[int] = field(default_factory=list)
    of_student: list[int] = field(default_factory=list)
    of_teacher: list[int] = field(default_factory=list)
    is_known: list[bool] = field(default_factory=list)
    num_changed: int = 0

    def add(self, num_student: int, ids: Sequence[int], is_known: bool) -> None:
        number = len(self.is_known)
        self.ids += ids
        self.of_student += [number] * num_student
        self.of_teacher += [number] * len(ids)
        self.is_known.append(is_known)


class Translator:
    """
    Puts completions of a student into the tokens of a teacher.

    Args:
        student ([`Vocabulary`]): The student's.
        teacher ([`Vocabulary`]): The teacher's.
        ends (`dict[int, int]`): For each token that ends a turn of the student's, the one that ends the teacher's.
        not_written (`frozenset[int]`): Tokens of the teacher that are not for completions, as placeholders of images.
    """

    def __init__(
        self, student: Vocabulary, teacher: Vocabulary, ends: dict[int, int], not_written: frozenset[int] = frozenset()
    ):
        self.student, self.teacher, self.ends = student, teacher, ends
        ids = {text: id for id, text in teacher.added.items() if id not in not_written}
        self.same = {id: ids[text] for id, text in student.added.items() if text in ids}

    def translate(
        self, ids: Sequence[int], before: int | None = None, leads: tuple[bytes, bytes] = (b"", b"")
    ) -> Translation:
        """
        A completion in the teacher's tokens, and in pieces.

        Args:
            ids (`Sequence[int]`): The student's tokens. The last may end the turn; if it does not, the text may have been
                about to go on, and what the teacher says of its last piece is unknown, unless both have the same tokens for it.
            before (`int`, *optional*): The student's token before the first, if the prompt is text.
            leads (`tuple[bytes, bytes]`): What the student and the teacher write at the beginning of an answer as a part
                of their format.
        """
        found = Translation()
        is_ended = len(ids) > 0 and ids[-1] in self.ends
        body = ids[:-1] if is_ended else ids
        texts = self.student.texts(body, before)
        if texts and body[0] not in self.same:
            texts[0] = leads[1] + texts[0].removeprefix(leads[0])
        start = 0
        for place, id in enumerate(body):
            if id in self.same:
                self._add_text(found, texts[start:place])
                found.add(1, [self.same[id]], is_known=True)
                start = place + 1
        self._add_text(found, texts[start:], may_go_on=not is_ended)
        if is_ended:
            found.add(1, [self.ends[ids[-1]]], is_known=True)
        return found

    def _add_text(self, found: Translation, texts: list[bytes], may_go_on: bool = False) -> None:
        if not texts:
            return
        # Each byte of what is no character is a question mark, so that all offsets stay.
        encoded = self.teacher.encode(b"".join(texts).decode("utf-8", "as question marks"))
        cuts = common_cuts(list(accumulate(map(len, texts))), encoded.cuts)
        are_alike = len(cuts) - 1 == len(texts) == len(encoded.ids)
        for (first, theirs), (last, their_last) in zip(cuts, cuts[1:], strict=False):
            num_read = their_last - theirs
            is_same = num_read > 0 and self._say_the_same(texts[first:last], encoded.texts[theirs:their_last])
            is_cut = may_go_on and last == len(texts) and not are_alike
            found.add(last - first, encoded.ids[theirs:their_last], is_known=is_same and not is_cut)
            found.num_changed += 0 if is_same else last - first

    def _say_the_same(self, mine: list[bytes], theirs: list[bytes]) -> bool:
        mine, theirs = b"".join(mine), b"".join(theirs)
        if mine != theirs and self.teacher.drops_spaces:  # but for one before a word
            mine, theirs = mine.removeprefix(b" "), theirs.removeprefix(b" ")
        return mine == theirs != b""
