"""Special tokens that a text only writes out: what a model said, or what data hold, makes no control tokens."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin


# Within a special token it leaves ordinary text, which reads the same and goes through any processor.
ZERO_WIDTH_SPACE = "\u200b"


class SpecialTokens:
    """
    The special tokens of a tokenizer, and the placeholders of a processor, as texts write them.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`]): The student's.
    """

    def __init__(self, processing_class: PreTrainedTokenizerBase | ProcessorMixin):
        tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
        tokens = {*tokenizer.all_special_tokens}
        try:
            tokens |= {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        except NotImplementedError:
            pass  # Mistral's own tokenizer, which finds no special tokens in texts
        tokens |= {getattr(processing_class, f"{modality}_token", None) for modality in ("image", "video", "audio")}
        longest_first = sorted((token for token in tokens if isinstance(token, str) and len(token) > 1), key=len)[::-1]
        self.pattern = "|".join(map(re.escape, longest_first)) or "(?!)"  # which never matches

    def as_text(self, value: Any, like: Any = None) -> Any:
        """
        The same text or messages, in which no special token is written out any more.

        Args:
            value: A text, or messages with texts anywhere in them.
            like: Another such value, whose texts stay where they occur word for word.
        """
        kept = {text for text in texts_in(like) if re.search(self.pattern, text)}
        pattern = "|".join([*map(re.escape, sorted(kept, key=len, reverse=True)), self.pattern])

        def part(found: re.Match) -> str:
            text = found[0]
            return text if text in kept else text[0] + ZERO_WIDTH_SPACE + text[1:]

        def mended(value: Any) -> Any:
            if isinstance(value, str):
                return re.sub(pattern, part, value)
            if isinstance(value, dict):
                return {key: mended(entry) for key, entry in value.items()}
            return [mended(entry) for entry in value] if isinstance(value, list | tuple) else value

        return mended(value)


def texts_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [text for entry in entries for text in texts_in(entry)]
