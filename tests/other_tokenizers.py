"""Tokenizers of other families: over bytes, over SentencePiece's marks, over characters, over lowercase words."""

import tiny_models
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast


# What byte-level vocabularies learn to merge.
TEXTS = [
    "what is the sum of one and two and three ?",
    "<think> two plus three </think> five",
    "def f(x):\n    return x + 1\n\n",
    "The quick brown fox 😀 says 你好 and สวัสดี.",
] * 8

CHAT_TEMPLATE = (
    "{% for message in messages %}<turn>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "<end>\n{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)

SPECIAL_TOKENS = ["<pad>", "<end>", "<turn>"]


def finished(backend: Tokenizer, image: str = "", **options) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<end>",
        chat_template=CHAT_TEMPLATE.replace("IMAGE", image),
        padding_side="left",
        clean_up_tokenization_spaces=False,
        **{"extra_special_tokens": {"turn_token": "<turn>"}, **options},
    )


def over_bytes(vocab_size: int = 330, normalizer=None, added=(), **options) -> PreTrainedTokenizerFast:
    """As GPT-2's, Llama 3's and Qwen's; 256 bytes, and as many merges as fit."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=SPECIAL_TOKENS, show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens(list(added))
    return finished(backend, **options)


def with_space_marks(**options) -> PreTrainedTokenizerFast:
    """As Llama 2's and Mistral's: a space before every text, bytes for what it has no character for."""
    pieces = ["▁", *"abcdefghijklmnopqrstuvwxyz?.", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = []
    for word in ("the", "sum", "of", "one", "two"):
        for end in range(1, len(word) + 1):
            merges.append(("▁" + word[: end - 1], word[end - 1]))
            pieces.append("▁" + word[:end])
    tokens = ["<unk>", *SPECIAL_TOKENS, *dict.fromkeys(pieces)]
    vocab = {token: id for id, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(vocab, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return finished(backend, unk_token="<unk>", **options)


def over_characters(**options) -> PreTrainedTokenizerFast:
    characters = [*map(chr, range(32, 127)), "\n", "\t"]
    tokens = ["<unk>", *SPECIAL_TOKENS, *characters]
    backend = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    backend.decoder = decoders.Fuse()
    return finished(backend, unk_token="<unk>", **options)


def over_lowercase_words(**options) -> PreTrainedTokenizerFast:
    """As BERT's: words, and parts of words that go on."""
    tokens = ["<unk>", *SPECIAL_TOKENS, *tiny_models.WORDS, "f", "##our", "##n", "quick", "the"]
    vocab = {token: id for id, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=False)
    return finished(backend, unk_token="<unk>", **options)
