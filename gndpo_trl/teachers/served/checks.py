"""What vLLM servers are asked at the start: what they run, and whether it can score what the student samples."""

import math
import warnings
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image, ImageOps
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from ..compatibility import (
    PROBE_SIZES,
    ModelDescription,
    ProcessingClass,
    check_vocabularies,
    describe,
    placeholders_of,
    render,
    try_probes,
    warn_on_chat_template,
    warn_on_special_tokens,
)
from .questions import Picture, Question, ServedModel
from .servers import Refusal, ServerError, VLLMServers, finish


PROBE = "what is the sum of one and two ?"

# Nats. Servers of the same model differ by rounding; the same prompt with two different pictures by more than that.
SAME_MODEL, OTHER_PROMPT = 0.1, 1e-3


@dataclass
class Wanted:
    """
    What the teacher is known to be, before anybody was asked.

    Attributes:
        name (`str` or `None`): Name under which it is served.
        path (`str` or `None`): Path or id to load its processing class from.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`] or `None`): That.
        load_options (`dict`): `revision` and `trust_remote_code` of what is loaded from `path`.
        max_completion_length (`int` or `None`): Longest completion to score.
        top_k (`int` or `None`): Number of likeliest tokens to know at each position beside the sampled one.
    """

    name: str | None
    path: str | None
    processing_class: ProcessingClass | None
    load_options: dict[str, Any]
    max_completion_length: int | None
    top_k: int | None = None

    @cached_property
    def description(self) -> ModelDescription | None:
        """What is known of it from `path` or `processing_class`; `None` if neither was given."""
        if self.path is not None:
            return describe("teacher_model_name_or_path", self.path, self.processing_class, **self.load_options)
        if self.processing_class is not None:
            return ModelDescription(self.name or "behind a server", None, None, self.processing_class)
        return None


def check_servers(servers: VLLMServers, wanted: Wanted, student: ModelDescription) -> ServedModel:
    """
    Ask every server what it runs, and for the log-probs of a probe, with images if the student reads images.

    What servers say of themselves is compared, and never loaded.

    Returns:
        [`ServedModel`]: how they are to be asked.

    Raises:
        `ValueError`: if a server cannot be reached, or cannot score what the student samples, or if it answers with
            wrong numbers.
    """
    try:
        model = find_model(servers, wanted)
        model.image_token_id = getattr(student.config, "image_token_id", None)
        model.placeholders = placeholders_of(student)
        check_tokens(servers, model, wanted, student)
        vocab_size = student.config.get_text_config().vocab_size
        model.vocab_size = find_vocab_size(servers, model, vocab_size)
        if wanted.top_k is not None:
            model.num_known = min(wanted.top_k + 1, model.vocab_size or vocab_size)
            for one in servers.alone():
                check_top_k(one, model, student.tokenizer, wanted.top_k)
        check_same(servers.urls, [check_text(one, model, student.tokenizer) for one in servers.alone()])
        if isinstance(student.processing_class, ProcessorMixin):
            for size in PROBE_SIZES:
                probes = picture_probes(student, size)
                if probes is None:
                    warnings.warn(
                        "The student's chat template refuses every question that it was tried on, so that it is NOT checked "
                        "whether the teacher's server reads images as the student does.",
                        stacklevel=3,
                    )
                    break
                if size == PROBE_SIZES[0] or len(probes[0].ids) < model.max_model_len:
                    check_same(servers.urls, [check_pictures(one, model, probes) for one in servers.alone()])
    except ServerError as error:
        raise ValueError(f"The teacher of `teacher_server_url` cannot score. {error}") from error
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        raise ValueError(
            f"`teacher_server_url` ({servers}) does not answer as vLLM does: {error!r}. Give the base URL of a `vllm serve`."
        ) from error
    return model


def find_model(servers: VLLMServers, wanted: Wanted) -> ServedModel:
    """The model that all servers say they run, or the one of that name among several."""
    names, lengths = [], []
    for url, one in zip(servers.urls, servers.alone(), strict=True):
        cards = one.ask("/v1/models")["data"]
        card = choose_card(url, cards, wanted.name)
        base = next((other for other in cards if other["id"] == card.get("parent")), {})
        names.append(card["id"])
        # Of an adapter, the server does not say it.
        lengths.append(card.get("max_model_len") or base.get("max_model_len") or math.inf)
        if names[-1] != names[0]:
            raise ValueError(
                f"The servers of `teacher_server_url` run different models: {servers.urls[0]} runs {names[0]!r} and {url} "
                f"runs {names[-1]!r}. Start the same teacher on all of them."
            )
    model = ServedModel(names[0], min(lengths))
    if wanted.max_completion_length is not None and wanted.max_completion_length + 2 > model.max_model_len:
        raise ValueError(
            f"`max_completion_length` is {wanted.max_completion_length}, but the vLLM server at {servers} holds "
            f"{model.max_model_len} tokens: prompt, completion, and one more that it has to generate. Raise its "
            "`--max-model-len`, or lower `max_completion_length`."
        )
    return model


def choose_card(url: str, cards: list[dict[str, Any]], name: str | None) -> dict[str, Any]:
    """What a server says of the model of that name, or of the only one that it serves."""
    served = ", ".join(
        f"{card['id']!r}" + (f" (an adapter on {card['parent']!r})" if card.get("parent") else "") for card in cards
    )
    if name is not None:
        for card in cards:
            if card["id"] == name:
                return card
        raise ValueError(
            f"`teacher_server_model` is {name!r}, but the vLLM server at {url} serves {served or 'nothing'}. Name what it "
            "serves, or start it with that name (`--served-model-name`, `--lora-modules`)."
        )
    # A model may have several names.
    if len({(card.get("root") or card["id"], card.get("parent")) for card in cards}) > 1:
        raise ValueError(
            f"The vLLM server at {url} serves several models: {served}. Name the one that is the teacher in "
            "`teacher_server_model`."
        )
    return cards[0]


def check_tokens(servers: VLLMServers, model: ServedModel, wanted: Wanted, student: ModelDescription) -> None:
    """Compare the tokenizers: with the teacher's if it was given, else with the server's answers."""
    teacher = wanted.description
    if teacher is None:
        check_texts(servers, model, student.tokenizer, sorted(student.tokenizer.get_vocab().values()))
        return
    check_vocabularies(student.tokenizer, teacher.tokenizer)
    warn_on_special_tokens(student, teacher)
    warn_on_chat_template(student, teacher)


def check_texts(servers: VLLMServers, model: ServedModel, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
    """Raise `ValueError`, naming the first id, if the server writes ids as another text than the tokenizer does."""
    try:
        text = servers.ask("/detokenize", {"model": model.name, "tokens": ids})["prompt"]
    except Refusal as refusal:
        if refusal.status == 404:
            raise
        text = None  # it does not have one of them
    if text == tokenizer.decode(ids):
        return
    if len(ids) == 1:
        raise ValueError(
            f"The tokenizers of student and teacher disagree: id {ids[0]} is {tokenizer.decode(ids)!r} to the student and "
            f"{'unknown' if text is None else repr(text)} to the vLLM server at {servers.urls[0]}. The teacher scores the "
            "student's token ids, so each must mean the same token to both: serve a teacher of the student's model family. "
            "If the two only write it differently, pass the teacher's tokenizer as `teacher_processing_class`, which is "
            'compared token by token. Or name its path in `teacher_model_name_or_path`, and set `teacher_alignment="text"`.'
        )
    half = len(ids) // 2
    check_texts(servers, model, tokenizer, ids[:half])
    check_texts(servers, model, tokenizer, ids[half:])


def find_vocab_size(servers: VLLMServers, model: ServedModel, vocab_size: int) -> int | None:
    """Number of ids that the servers take, `None` if these are all of the student's."""

    def is_refused(id: int) -> bool:
        try:
            servers.ask("/v1/completions", {"model": model.name, "prompt": [[id]], "max_tokens": 1})
        except Refusal as refusal:
            if "out of vocabulary" in str(refusal):
                return True
            raise
        return False

    return bisect_left(range(vocab_size), True, key=is_refused) if is_refused(vocab_size - 1) else None


def check_top_k(server: VLLMServers, model: ServedModel, tokenizer: PreTrainedTokenizerBase, top_k: int) -> None:
    """Raise `ValueError` if a single server does not give the log-probs of so many tokens."""
    try:
        server.ask(*model.request([Question(tuple(tokenizer(PROBE)["input_ids"]), 1)]))
    except Refusal as refusal:
        raise ValueError(
            f"`teacher_top_k` is {top_k}, so that the vLLM server at {server} is asked for the log-probs of {model.num_known} "
            f"tokens at each position, which it refuses. Restart it with `--max-logprobs {model.num_known}` or more (vLLM's "
            f"default is 20), or lower `teacher_top_k`. It says: {refusal}"
        ) from refusal


def check_text(server: VLLMServers, model: ServedModel, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Log-probs that a single server gives for a text; `ValueError` if they are none."""
    probe = Question(tuple(tokenizer(PROBE)["input_ids"]), 1)
    path, body = model.request([probe])
    positions = server.ask(path, {**body, "prompt_logprobs": 5})["choices"][0]["prompt_logprobs"][1:]
    most = max(sum(math.exp(entry["logprob"]) for entry in position.values()) for position in positions)
    if most > 1.01:
        raise ValueError(
            f"The vLLM server at {server} gives logits in place of log-probs: five tokens would have a probability of "
            f"{most:.3g} together. Restart it with `--logprobs-mode raw_logprobs`."
        )
    logps = torch.tensor(finish(model.answers(server, [probe]))[probe].logps)
    if not logps.isfinite().all():
        raise ValueError(f"The vLLM server at {server} has no log-probs for tokens as common as {PROBE!r}.")
    return logps


def picture_probes(student: ModelDescription, size: tuple[int, int]) -> list[Question] | None:
    """The same prompt with two different pictures of that size; `None` if the student's chat template takes none."""
    processor, image = student.processing_class, Image.linear_gradient("L").resize(size).convert("RGB")
    prompt = try_probes(lambda probe: render(processor, probe, [image], **student.template_kwargs))
    if prompt is None:
        return None
    ids = tuple(int(id) for id in processor(text=[prompt], images=[[image]])["input_ids"][0])
    return [Question(ids, 1, (Picture.of(one),)) for one in (image, ImageOps.invert(image))]


def check_pictures(server: VLLMServers, model: ServedModel, probes: list[Question]) -> torch.Tensor:
    """Log-probs that a single server gives for the first probe; `ValueError` if it does not look at pictures."""
    learn_around_picture(server, model, probes[0])
    logps, others = (torch.tensor(finish(model.answers(server, [probe]))[probe].logps) for probe in probes)
    ids = probes[0].ids
    last = len(ids) - 1 - ids[::-1].index(model.image_token_id)
    if not (logps - others)[last:].abs().nan_to_num().max() > OTHER_PROMPT:
        raise ValueError(
            f"The vLLM server at {server} gives the same log-probs with one image and with another, so it does not look at "
            "images. Serve an image-text teacher, with its vision tower."
        )
    return logps


def learn_around_picture(server: VLLMServers, model: ServedModel, probe: Question) -> None:
    """Of some families, servers write the tokens before and after an image themselves, and must not be given them."""
    model.around_picture = [], []
    path, body = model.request([probe])
    given, read = body["token_ids"], server.ask(path, body).get("prompt_token_ids")
    if read is None or read == list(probe.ids):
        return
    start = given.index(model.image_token_id)
    made = read[start : len(read) - (len(given) - start - 1)]
    if model.image_token_id in made:
        first, last = made.index(model.image_token_id), len(made) - made[::-1].index(model.image_token_id)
        model.around_picture = made[:first], made[last:]
    # Whether that is right, the next answer tells.


def check_same(urls: list[str], answers: list[torch.Tensor]) -> None:
    """Raise `ValueError` if servers differ in the log-probs that they give for a probe."""
    for url, logps in zip(urls, answers, strict=True):
        difference = (logps - answers[0]).abs().nanmean().item()
        if not difference <= SAME_MODEL:
            raise ValueError(
                f"The servers of `teacher_server_url` run different models: for the same tokens, {url} gives log-probs "
                f"that are {difference:.3g} nats from those of {urls[0]} on average. Start the same teacher, with the same "
                "options, on all of them."
            )
