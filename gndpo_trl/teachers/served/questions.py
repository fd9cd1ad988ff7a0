"""What is said to a vLLM server: a question, the request that it becomes, and what is made of the answer."""

import asyncio
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from PIL import Image
from trl.generation.vllm_client import pil_to_base64

from ...grpo.pictures import open_picture
from ...objective.likeliest import pack
from .servers import NaNInAnswer, ServerError, VLLMServers


# vLLM writes minus infinity so, because JSON cannot.
MINUS_INFINITY = -9999.0


@dataclass(frozen=True)
class Picture:
    size: tuple[int, int]  # width, height
    pixels: bytes  # RGB

    @classmethod
    def of(cls, image: Any) -> "Picture":
        image = open_picture(image)
        return cls(image.size, image.tobytes())


@lru_cache(maxsize=32)
def data_url(picture: Picture) -> str:
    return f"data:image/png;base64,{pil_to_base64(Image.frombytes('RGB', picture.size, picture.pixels))}"


@dataclass(frozen=True)
class Question:
    """Prompt and completion, whose log-probs are asked for from position `start` on. Equal ones have one answer."""

    ids: tuple[int, ...]
    start: int
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Answer:
    """
    What is known of a question from its `start` on; may end early.

    Attributes:
        logps (`list[float]`): Log-probs of its tokens, in nats, NaN where unknown.
        states (`torch.Tensor` of shape `(len(logps), K, 2)` or `None`): Those of the likeliest tokens, too, if they were asked
            for, see [`~objective.likeliest.LikeliestTokens`]; NaN where `logps` is.
    """

    logps: list[float]
    states: torch.Tensor | None = None


Answers = dict[Question, Answer]


def split(questions: Iterable[Question], request_tokens: int) -> Iterator[list[Question]]:
    """Questions for one request each: of at most so many tokens, or a single one; those with pictures alone."""
    part: list[Question] = []
    for question in questions:
        if question.pictures:
            yield [question]
            continue
        if part and sum(len(other.ids) for other in part) + len(question.ids) > request_tokens:
            yield part
            part = []
        part.append(question)
    if part:
        yield part


@dataclass
class ServedModel:
    """
    The teacher as its servers know it, and how they are asked.

    Attributes:
        name (`str`): Name under which it is served.
        max_model_len (`float`): Most tokens of a row, with the one that is generated; infinite if unknown.
        image_token_id (`int` or `None`): Placeholder of a picture.
        placeholders (`frozenset[int]`): Ids that stand for what is not text; the model knows them by what comes with them.
        vocab_size (`int` or `None`): The servers take ids below this; `None`: all of the student's.
        around_picture (`tuple[list[int], list[int]]`): Ids that the servers write before and after a picture themselves,
            and must not be given.
        num_known (`int`): Number of tokens whose log-probs are asked for at each position, the sampled one among them; 0: that
            one alone, and no states.
    """

    name: str
    max_model_len: float = math.inf
    image_token_id: int | None = None
    placeholders: frozenset[int] = frozenset()
    vocab_size: int | None = None
    around_picture: tuple[list[int], list[int]] = ((), ())
    num_known: int = 0

    def known(self, ids: list[int]) -> list[int]:
        """The sampled ids up to the first that the servers cannot score, nor what comes after it."""
        for place, id in enumerate(ids):
            if id in self.placeholders or (self.vocab_size is not None and id >= self.vocab_size):
                return ids[:place]
        return ids

    async def answers(self, servers: VLLMServers, questions: list[Question], first: int = 0) -> Answers:
        """
        Answers to questions that go into one request.

        Args:
            servers ([`VLLMServers`]): Who is asked.
            questions (`list[Question]`): As [`split`] has them.
            first (`int`, *optional*, defaults to 0): Position of the server to begin with.

        Raises:
            `ServerError`: if there is no answer, or one of any other form than vLLM's, or to another question.
        """
        try:
            if questions[0].pictures:  # which take a while to be written down
                path, body = await asyncio.to_thread(self.request, questions)
            else:
                path, body = self.request(questions)
            answer = await servers.answer(path, body, first)
        except NaNInAnswer:
            if len(questions) == 1:
                return {questions[0]: Answer([], torch.zeros(0, self.num_known, 2) if self.num_known else None)}
            return {one: (await self.answers(servers, [one], first))[one] for one in questions}
        try:
            return self.read(questions, answer, servers)
        except ServerError:
            raise
        except Exception as error:  # whatever an answer does to this code, its server is to blame
            raise ServerError(f"The vLLM server at {servers} answers in another form: {error!r}.") from error

    def request(self, questions: list[Question]) -> tuple[str, dict[str, Any]]:
        """
        Path and body of the request for questions. Ids go out from here and from nowhere else.

        Raises:
            `ServerError`: if the servers would read placeholders as text.
        """
        # The likeliest, and the token itself where it is none of them.
        options = {"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": self.num_known}
        if questions[0].pictures:
            (question,) = questions
            body = {
                "sampling_params": options,
                "token_ids": self._with_placeholders(question),
                "content_parts": [{"type": "image_url", "url": data_url(picture)} for picture in question.pictures],
            }
            return "/inference/v1/generate", {"model": self.name, **body, "return_token_ids": True}
        for question in questions:
            self._check_placeholders(question.ids, 0)
        body = {**options, "prompt": [question.ids for question in questions]}
        return "/v1/completions", {"model": self.name, **body, "return_token_ids": True}

    def _check_placeholders(self, ids: Iterable[int], num_pictures: int) -> None:
        found = [id for id in ids if id in self.placeholders]
        if found != [self.image_token_id] * num_pictures:
            raise ServerError(
                f"A row has {num_pictures} pictures for the teacher, and placeholders for others (token ids "
                f"{sorted(set(found))}), which its server would read as text. Have the pictures in the column `images`, "
                "or in the messages of the prompt."
            )

    def _with_placeholders(self, question: Question) -> list[int]:
        """The ids with one placeholder for each picture, which the server expands."""
        before, after = self.around_picture
        ids, given, done = list(question.ids), [], 0
        for number in range(len(question.pictures)):
            start = next((place for place in range(done, len(ids)) if ids[place] == self.image_token_id), None)
            if start is None:
                raise ServerError(f"A row has {len(question.pictures)} images, but placeholders for {number} alone.")
            end = start
            while end < len(ids) and ids[end] == self.image_token_id:
                end += 1
            given += [*ids[done : start - len(before)], self.image_token_id]
            done = end + len(after)
        given += ids[done:]
        self._check_placeholders(given, len(question.pictures))
        return given

    def read(self, questions: list[Question], answer: dict[str, Any], servers: VLLMServers) -> Answers:
        """The log-probs in an answer; raises `ServerError`, or anything, where these are none of these questions."""
        if questions[0].pictures:
            (question,) = questions
            if answer.get("prompt_token_ids") is None:
                raise ServerError(
                    f"The vLLM server at {servers} does not report which prompt it read, so nothing vouches for its image "
                    "tokens. Serve the teacher with a newer vLLM."
                )
            if answer["prompt_token_ids"] != list(question.ids):
                raise ServerError(
                    f"The vLLM server at {servers} reads {len(answer['prompt_token_ids'])} tokens of text and images where "
                    f"the student has {len(question.ids)}, or others. Serve a teacher of the student's model family, with "
                    "its processor files, and with no `--mm-processor-kwargs` of its own."
                )
            return {question: read_answer(answer["prompt_logprobs"], question, self.num_known, servers)}
        answers = {}
        for question, choice in zip(questions, answer["choices"], strict=True):
            read = choice.get("prompt_token_ids")  # older servers do not say
            if read is not None and read != list(question.ids):
                raise ServerError(
                    f"The vLLM server at {servers} reads other tokens than it was sent. {ANOTHER_PROMPT}"
                )
            answers[question] = read_answer(choice["prompt_logprobs"], question, self.num_known, servers)
        return answers


ANOTHER_PROMPT = "It reads something else than it was sent: look for a proxy between, or for options that truncate."


def read_answer(
    positions: list[dict[str, Any] | None], question: Question, num_known: int, servers: VLLMServers
) -> Answer:
    """
    What vLLM says of a question's tokens from its `start` on.

    Args:
        positions (`list[dict]`): vLLM's `prompt_logprobs`: of every token but the first, by id, as strings.
        question ([`Question`]): What was asked.
        num_known (`int`): See [`ServedModel`].
        servers ([`VLLMServers`]): Who answered, for the message.

    Returns:
        [`Answer`]: log-probs in nats, NaN where there is none. Where it is minus infinity, that of the token itself is NaN.

    Raises:
        `ServerError`: if these are the log-probs of other tokens, of fewer than were asked for, or no log-probs.
    """
    where = f"The vLLM server at {servers}"
    others = [
        place
        for place, id in enumerate(question.ids[: question.start])
        if place > 0 and (place >= len(positions) or str(id) not in (positions[place] or {}))
    ]
    if len(positions) != len(question.ids) or others:
        raise ServerError(
            f"{where} gives log-probs of {len(positions)} tokens for a prompt and completion of {len(question.ids)}"
            + (f", and of another token at position {others[0]}" if others else "")
            + f". {ANOTHER_PROMPT}"
        )
    completion = question.ids[question.start :]
    logps, known = [], []
    for id, position in zip(completion, positions[question.start :], strict=True):
        entry = (position or {}).get(str(id)) or {}
        logp = entry.get("logprob")
        logp = math.nan if logp is None or logp <= MINUS_INFINITY else float(logp)
        if logp > 1e-3:
            raise ServerError(f"{where} gives a log-prob of {logp:.3g}, which is none. Look at its `--logprobs-mode`.")
        logps.append(logp)
        if num_known:
            known.append(read_known(position or {}, str(id), num_known, where))
    if not num_known:
        return Answer(logps)
    ids, log_probs = torch.tensor(known, dtype=torch.float64).view(-1, 2, num_known).unbind(1)
    log_probs[log_probs <= MINUS_INFINITY] = -math.inf
    states = pack(ids, log_probs.float())
    unknown = torch.tensor(logps).isnan() | states.isnan().flatten(1).any(-1)
    states[unknown] = math.nan
    return Answer(torch.tensor(logps).masked_fill(unknown, math.nan).tolist(), states)


def read_known(position: dict[str, Any], sampled: str, num_known: int, where: str) -> list[float]:
    """Ids of the known tokens at a position, and then their log-probs; NaN where nothing is said of the sampled one."""
    if sampled not in position:
        return [math.nan] * (2 * num_known)
    if len(position) > num_known:  # the sampled one came in addition: it takes the place of the least likely other one
        others = [id for id in position if id != sampled]
        least = min(others, key=lambda id: -math.inf if position[id]["logprob"] is None else position[id]["logprob"])
        position = {id: entry for id, entry in position.items() if id != least}
    if len(position) < num_known:
        raise ServerError(
            f"{where} gives the log-probs of {len(position)} tokens at a position where {num_known} were asked for. It answers "
            "otherwise than vLLM does: look for a proxy between, or unset `teacher_top_k`."
        )
    log_probs = [math.nan if entry["logprob"] is None else entry["logprob"] for entry in position.values()]
    return [*map(int, position), *log_probs]
