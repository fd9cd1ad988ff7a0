"""The text of each token of a completion, such that the texts together are the text of the completion."""

import re

import numpy as np
from transformers import PreTrainedTokenizerBase


# What a decoder puts in the place of bytes that are no character: here, of a token that is only a part of one.
REPLACEMENT = "\ufffd"
# A character has up to four bytes, and a token that completes one may begin another.
MOST_TOKENS_OF_A_CHARACTER = 8
# Placeholders of images stand hundreds of times in a row.
REPEATED = re.compile(r"(<[^<>\s]+>\s?)\1{7,}")


class TokenTexts:
    """
    Decodes tokens one by one, and remembers what each id becomes.

    Many decoders treat the beginning of a text in their own way (they drop a space), so that a token is decoded behind
    another one, any word. Where a character is spread over several tokens, the first of them gets its text and the others none.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): The student's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        words = ([id] for id in range(len(tokenizer)) if self._decode_all([id]).strip().isalnum())
        self.before = next(words, [])
        self.skip = len(self._decode_all(self.before))
        self.known: dict[int, str] = {}

    def tokens(self, ids: np.ndarray) -> list[str]:
        """Texts of the tokens of a completion."""
        ids, texts = ids.tolist(), []
        while len(texts) < len(ids):
            start = len(texts)
            if start > 0 and ids[start] not in self.known:
                self.known[ids[start]] = self._decode(ids[start : start + 1], start)
            text, width = self.known[ids[start]] if start > 0 else self._decode(ids[:1], start), 1
            if REPLACEMENT in text:
                for end in range(start + 2, min(start + MOST_TOKENS_OF_A_CHARACTER, len(ids)) + 1):
                    together = self._decode(ids[start:end], start)
                    if REPLACEMENT not in together:
                        text, width = together, end - start
                        break
            texts += [text] + [""] * (width - 1)
        return texts

    def prompt(self, ids: np.ndarray) -> str:
        """Text of a prompt as the model reads it, with placeholders that repeat written once."""
        text = self._decode_all(ids.tolist())
        return REPEATED.sub(lambda found: f"{found[1].rstrip()}×{len(found[0]) // len(found[1])} ", text)

    def _decode(self, ids: list[int], start: int) -> str:
        return self._decode_all(ids) if start == 0 else self._decode_all(self.before + ids)[self.skip :]

    def _decode_all(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
