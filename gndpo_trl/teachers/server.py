"""A teacher that a vLLM server runs: what the server is asked, when, and what is made of its answers."""

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from urllib.parse import urlparse

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_utils import load_image
from trl.generation.vllm_client import pil_to_base64

from ..grpo.checkpoints import RunCannotGoOn
from .compatibility import (
    PROBE_SIZES,
    ModelDescription,
    ProcessingClass,
    check_vocabularies,
    describe,
    warn_on_chat_template,
    warn_on_special_tokens,
)
from .prompts import images_of
from .teacher import Score, Teacher
from .vllm_servers import NaNInAnswer, Refusal, ServerError, VLLMServers


# Requests of a rank to a server at a time. It has to have the next one when it is done with one, and no more.
IN_FLIGHT = 4

# vLLM writes minus infinity so, because JSON cannot.
MINUS_INFINITY = -9999.0

PROBE = "what is the sum of one and two ?"

# Nats. Servers of the same model differ by rounding; the same prompt with an image and without one by more than that.
SAME_MODEL, OTHER_PROMPT = 0.1, 1e-3


@dataclass(frozen=True)
class Picture:
    size: tuple[int, int]  # width, height
    pixels: bytes  # RGB

    @classmethod
    def of(cls, image: Any) -> "Picture":
        image = load_image(image).convert("RGB")
        return cls(image.size, image.tobytes())


@lru_cache(maxsize=32)
def data_url(picture: Picture) -> str:
    return f"data:image/png;base64,{pil_to_base64(Image.frombytes('RGB', picture.size, picture.pixels))}"


@dataclass(frozen=True)
class Question:
    """Prompt and completion, whose log-probs are asked for from position `start` on. Equal ones have one answer."""

    ids: tuple[int, ...]
    start: int
    images: tuple[Picture, ...] = ()


# Log-probs in nats from `start` on, NaN where unknown; may end early.
Answers = dict[Question, list[float]]


@dataclass
class Asked:
    """A batch that is being scored: a question for each row, and the requests that they went into."""

    completion_ids: torch.Tensor
    questions: list[Question]
    requests: list[Future[Answers]]
    problem: str | None  # why it cannot be scored


class ServerTeacher(Teacher):
    """
    A model behind an ordinary `vllm serve`, on this machine or others, that scores at temperature 1.

    The server gets the token ids of prompt and completion and answers with their log-probs, while the student is scored
    here. Images go as the pictures they are, with one placeholder each, and the server has to report that it read
    exactly the student's ids. Every rank asks for its own rows, and for equal rows once. Answers that are missing, NaN
    or minus infinity are NaN here, see [`Teacher`].

    Args:
        urls (`str` or `Sequence[str]`):
            Base URLs of one or several servers of the same model, as `http://host:8000`. Requests are spread over them,
            and what one does not answer, another does.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer or processor of the teacher, used to check that token ids mean the same to both models. If `None`,
            the server is asked what each of the student's ids means.
        model (`str`, *optional*):
            Path or id of the teacher on this machine, to load its processing class from. No weights are loaded.
        revision (`str`, *optional*):
            Revision of it on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code from the Hub.
        max_completion_length (`int`, *optional*):
            Longest completion to score. A server whose context is no longer is refused at the start.
        timeout (`float`, *optional*, defaults to 600.0):
            Seconds after which a request has failed, tries included.
        request_tokens (`int`, *optional*, defaults to 16384):
            Most tokens in a request, unless it is a single longer row. Rows with images go one by one.
        max_unknown (`float`, *optional*, defaults to 0.01):
            Largest fraction of a batch's tokens that the server may have no log-prob for.

    Raises:
        `ValueError`: at construction or in `check`, if a URL is none, if there is no server, or if it cannot score what
            the student samples.
        [`~grpo.checkpoints.RunCannotGoOn`]: during a run, on all ranks, if no server answers, if one refuses a request,
            or if too many log-probs are unknown.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        processing_class: ProcessingClass | None = None,
        *,
        model: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        max_completion_length: int | None = None,
        timeout: float = 600.0,
        request_tokens: int = 16384,
        max_unknown: float = 0.01,
    ):
        self.urls = [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
        check_urls(self.urls)
        self.processing_class, self.path = processing_class, model
        self.load_options = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.max_completion_length, self.timeout = max_completion_length, timeout
        self.request_tokens, self.max_unknown = request_tokens, max_unknown
        self.servers = VLLMServers(self.urls, timeout, IN_FLIGHT)
        self.around_image: tuple[list[int], list[int]] = [], []  # ids that the server writes before and after one
        self.asked: Asked | None = None

    # At the start

    def check(self, student: ModelDescription) -> None:
        """
        Ask every server what it runs, and for the log-probs of a probe, with images if the student reads images.

        Raises:
            `ValueError`: if a server cannot be reached, or cannot score what the student samples, or if it answers with
                wrong numbers.
        """
        if student.processing_class is None:
            return  # TRL refuses the student
        self.image_token_id = getattr(student.config, "image_token_id", None)
        try:
            self._check_cards([VLLMServers([url], self.timeout).ask("/v1/models")["data"][0] for url in self.urls])
            self._check_tokens(student)
            self.vocab_size = self._find_vocab_size(student.config.get_text_config().vocab_size)
            probes = [Question(tuple(student.tokenizer(PROBE)["input_ids"]), 1)]
            if isinstance(student.processing_class, ProcessorMixin):
                probes += self._image_probes(student.processing_class)
            for probe in probes:
                answers = [self._check_probe(VLLMServers([url], self.timeout), probe) for url in self.urls]
                self._check_same(answers)
        except ServerError as error:
            raise ValueError(f"The teacher of `teacher_server_url` cannot score. {error}") from error
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"`teacher_server_url` ({' or '.join(self.urls)}) does not answer as vLLM does: {error!r}. Give the base "
                "URL of a `vllm serve`."
            ) from error

    def _check_cards(self, cards: list[dict[str, Any]]) -> None:
        """Look at what the servers say of themselves."""
        for url, card in zip(self.urls, cards, strict=True):
            if card["id"] != cards[0]["id"]:
                raise ValueError(
                    f"The servers of `teacher_server_url` run different models: {self.urls[0]} runs "
                    f"{cards[0]['id']!r} and {url} runs {card['id']!r}. Start the same teacher on all of them."
                )
        self.name, self.root = cards[0]["id"], cards[0].get("root") or cards[0]["id"]
        self.max_model_len = min(card.get("max_model_len") or math.inf for card in cards)
        if self.max_completion_length is not None and self.max_completion_length + 2 > self.max_model_len:
            raise ValueError(
                f"`max_completion_length` is {self.max_completion_length}, but the vLLM server at "
                f"{' or '.join(self.urls)} holds {self.max_model_len} tokens: prompt, completion, and one more that it "
                "has to generate. Raise its `--max-model-len`, or lower `max_completion_length`."
            )

    def _check_tokens(self, student: ModelDescription) -> None:
        """Compare the tokenizers: with the teacher's if it was given, else with the server's answers."""
        teacher = None
        try:
            field = "teacher_server_url" if self.path is None else "teacher_model_name_or_path"
            teacher = describe(field, self.path or self.root, self.processing_class, **self.load_options)
        except Exception:
            if self.path is not None:
                raise
            # The server's own path means nothing here, or something else; it would have served warnings alone.
        if teacher is None and self.processing_class is not None:
            teacher = ModelDescription(self.root, None, None, self.processing_class)
        if self.path is not None or self.processing_class is not None:
            check_vocabularies(student.tokenizer, teacher.tokenizer)
        else:
            self._check_texts(student.tokenizer, sorted(student.tokenizer.get_vocab().values()))
        if teacher is not None:
            warn_on_special_tokens(student, teacher)
            warn_on_chat_template(student.tokenizer, teacher.tokenizer)

    def _check_texts(self, tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> None:
        """Raise `ValueError`, naming the first id, if the server writes ids as another text than the tokenizer does."""
        try:
            text = self.servers.ask("/detokenize", {"model": self.name, "tokens": ids})["prompt"]
        except Refusal as refusal:
            if refusal.status == 404:
                raise
            text = None  # it does not have one of them
        if text == tokenizer.decode(ids):
            return
        if len(ids) == 1:
            raise ValueError(
                f"The tokenizers of student and teacher disagree: id {ids[0]} is {tokenizer.decode(ids)!r} to the "
                f"student and {'unknown' if text is None else repr(text)} to the vLLM server at {self.urls[0]}. The "
                "teacher scores the student's token ids, so each must mean the same token to both: serve a teacher of "
                "the student's model family. If the two only write it differently, pass the teacher's tokenizer as "
                "`teacher_processing_class`, which is compared token by token."
            )
        half = len(ids) // 2
        self._check_texts(tokenizer, ids[:half])
        self._check_texts(tokenizer, ids[half:])

    def _find_vocab_size(self, vocab_size: int) -> int | None:
        """Number of ids that the server takes, `None` if these are all of the student's."""

        def is_refused(id: int) -> bool:
            try:
                self.servers.ask("/v1/completions", {"model": self.name, "prompt": [[id]], "max_tokens": 1})
            except Refusal as refusal:
                if "out of vocabulary" in str(refusal):
                    return True
                raise
            return False

        return bisect_left(range(vocab_size), True, key=is_refused) if is_refused(vocab_size - 1) else None

    def _image_probes(self, processor: ProcessorMixin) -> list[Question]:
        """Prompts with an image, and with a larger one if the server holds so many tokens."""
        probes = []
        for size in PROBE_SIZES:
            image = Image.linear_gradient("L").resize(size).convert("RGB")
            message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": PROBE}]}
            inputs = processor.apply_chat_template([[message]], tokenize=True, return_dict=True)
            probe = Question(tuple(int(id) for id in inputs["input_ids"][0]), 1, (Picture.of(image),))
            if not probes or len(probe.ids) < self.max_model_len:
                probes.append(probe)
        return probes

    def _check_probe(self, server: VLLMServers, probe: Question) -> torch.Tensor:
        """
        Log-probs that a single server gives for a probe.

        Raises:
            `ValueError`: if they are none, if the server reads another prompt, or if it does not look at the image.
        """
        (url,) = server.urls
        if not probe.images:
            body = {**self._options(), "prompt": [probe.ids], "prompt_logprobs": 5}
            positions = server.ask("/v1/completions", body)["choices"][0]["prompt_logprobs"][1:]
            most = max(sum(math.exp(entry["logprob"]) for entry in position.values()) for position in positions)
            if most > 1.01:
                raise ValueError(
                    f"The vLLM server at {url} gives logits in place of log-probs: five tokens would have a "
                    f"probability of {most:.3g} together. Restart it with `--logprobs-mode raw_logprobs`."
                )
            logps = torch.tensor(self._score_text(server, [probe])[probe])
            if not logps.isfinite().all():
                raise ValueError(f"The vLLM server at {url} has no log-probs for tokens as common as {PROBE!r}.")
            return logps
        self._learn_around_image(server, probe)
        logps = torch.tensor(self._score_images(server, probe)[probe])
        unseen = Question(probe.ids, probe.start)
        without = torch.tensor(self._score_text(server, [unseen])[unseen])
        last = len(probe.ids) - 1 - probe.ids[::-1].index(self.image_token_id)
        if not (logps - without)[last:].abs().nan_to_num().max() > OTHER_PROMPT:
            raise ValueError(
                f"The vLLM server at {url} gives the same log-probs with an image and without it, so it does not look "
                "at images. Serve an image-text teacher, with its vision tower."
            )
        return logps

    def _check_same(self, answers: list[torch.Tensor]) -> None:
        """Raise `ValueError` if servers differ in the log-probs that they give for a probe."""
        for url, logps in zip(self.urls, answers, strict=True):
            difference = (logps - answers[0]).abs().nanmean().item()
            if not difference <= SAME_MODEL:
                raise ValueError(
                    f"The servers of `teacher_server_url` run different models: for the same tokens, {url} gives "
                    f"log-probs that are {difference:.3g} nats from those of {self.urls[0]} on average. Start the same "
                    "teacher, with the same options, on all of them."
                )

    def _learn_around_image(self, server: VLLMServers, probe: Question) -> None:
        """Of some families, servers write the tokens before and after an image themselves, and must not be given them."""
        self.around_image = [], []
        given = self._with_placeholders(probe)
        read = self._ask_about_images(server, probe)["prompt_token_ids"]
        if read == list(probe.ids):
            return
        start = given.index(self.image_token_id)
        made = read[start : len(read) - (len(given) - start - 1)]
        if self.image_token_id in made:
            first, last = made.index(self.image_token_id), len(made) - made[::-1].index(self.image_token_id)
            self.around_image = made[:first], made[last:]
        # Whether that is right, the next answer tells.

    # During the run

    def prepare(self, student: PreTrainedModel, accelerator: Accelerator, score: Score) -> None:
        self.process_index = accelerator.process_index
        self.threads = ThreadPoolExecutor(max_workers=IN_FLIGHT * len(self.urls))

    def start(self, rollout: dict[str, Any]) -> None:
        questions, problem = [], None
        for row in range(len(rollout["completion_ids"])):
            question = self._question(rollout, row)
            questions.append(question)
            # One token more is generated.
            if len(question.ids) >= self.max_model_len:
                problem = (
                    f"Prompt and completion have {question.start} and {len(question.ids) - question.start} tokens, but "
                    f"the vLLM server at {' or '.join(self.urls)} holds {self.max_model_len} with one that it has to "
                    "generate. Raise its `--max-model-len`, lower `max_completion_length`, or drop longer prompts."
                )
        requests = []
        if problem is None:
            once = dict.fromkeys(question for question in questions if len(question.ids) > question.start)
            for number, part in enumerate(split(once, self.request_tokens), self.process_index):
                requests.append(self.threads.submit(self._score, self.servers, part, number))
        self.asked = Asked(rollout["completion_ids"], questions, requests, problem)

    def per_token_logps(self, rollout: dict[str, Any]) -> torch.Tensor:
        """
        Log-probs of the sampled tokens, see [`Teacher`]. All ranks call this together.

        Raises:
            [`~grpo.checkpoints.RunCannotGoOn`]: on all ranks, if one of them has no answer, or if too many log-probs are
                unknown.
        """
        completion_ids, mask = rollout["completion_ids"], rollout["completion_mask"].bool()
        if self.asked is None or not torch.equal(self.asked.completion_ids, completion_ids):
            self.start(rollout)
        asked, self.asked = self.asked, None
        answers, problem = {}, asked.problem
        try:
            for request in asked.requests:
                answers.update(request.result())
        except ServerError as error:
            problem = str(error)
        finally:
            for request in asked.requests:
                request.cancel()
            self.servers.give_up()
            wait(asked.requests)
            self.servers.is_over.clear()

        logps = torch.full(mask.shape, math.nan)
        for row, (question, tokens) in enumerate(zip(asked.questions, mask.cpu(), strict=True)):
            values = torch.tensor(answers.get(question, []))
            logps[row, tokens.nonzero().squeeze(1)[: len(values)]] = values
        logps = logps.to(completion_ids.device)

        unknown = (logps.isnan() & mask).sum().item()
        reports = gather_object([(problem, unknown, mask.sum().item())])
        problems = [problem for problem, *_ in reports if problem is not None]
        if problems:
            raise RunCannotGoOn(f"The teacher has no answer. {problems[0]}")
        unknown, total = (sum(report[place] for report in reports) for place in (1, 2))
        if unknown > self.max_unknown * total:
            raise RunCannotGoOn(
                f"The vLLM server at {' or '.join(self.urls)} has no finite log-prob for {unknown} of {total} tokens of "
                f"a batch, more than a fraction of {self.max_unknown:g}. Check the teacher's weights and dtype."
            )
        return logps

    def _question(self, rollout: dict[str, Any], row: int) -> Question:
        prompt, completion = (
            rollout[f"{part}_ids"][row][rollout[f"{part}_mask"][row].bool()].tolist()
            for part in ("prompt", "completion")
        )
        if self.vocab_size is not None:  # what comes after a token that the server refuses, it cannot score either
            known = next((place for place, id in enumerate(completion) if id >= self.vocab_size), None)
            completion = completion[:known]
        images = images_of(rollout["rows"][row]) or []
        return Question((*prompt, *completion), len(prompt), tuple(Picture.of(image) for image in images))

    # One request

    def _score(self, servers: VLLMServers, questions: list[Question], first: int) -> Answers:
        """Answers to questions that go into one request."""
        try:
            if questions[0].images:
                return self._score_images(servers, questions[0], first)
            return self._score_text(servers, questions, first)
        except NaNInAnswer:
            if len(questions) == 1:
                return {questions[0]: []}
            return {one: self._score(servers, [one], first)[one] for one in questions}
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ServerError(
                f"The vLLM server at {' or '.join(servers.urls)} answers in another form: {error!r}."
            ) from error

    def _options(self) -> dict[str, Any]:
        return {"model": self.name, "max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}

    def _score_text(self, servers: VLLMServers, questions: list[Question], first: int = 0) -> Answers:
        body = {**self._options(), "prompt": [question.ids for question in questions]}
        choices = servers.ask("/v1/completions", body, first)["choices"]
        return {
            question: read_logps(choice["prompt_logprobs"], question, servers.urls)
            for question, choice in zip(questions, choices, strict=True)
        }

    def _score_images(self, servers: VLLMServers, question: Question, first: int = 0) -> Answers:
        answer = self._ask_about_images(servers, question, first)
        if answer["prompt_token_ids"] != list(question.ids):
            raise ServerError(
                f"The vLLM server at {' or '.join(servers.urls)} reads {len(answer['prompt_token_ids'])} tokens of text "
                f"and images where the student has {len(question.ids)}, or others. Serve a teacher of the student's "
                "model family, with its processor files, and with no `--mm-processor-kwargs` of its own."
            )
        return {question: read_logps(answer["prompt_logprobs"], question, servers.urls)}

    def _ask_about_images(self, servers: VLLMServers, question: Question, first: int = 0) -> dict[str, Any]:
        options = self._options()
        body = {
            "model": options.pop("model"),
            "sampling_params": options,
            "token_ids": self._with_placeholders(question),
            "content_parts": [{"type": "image_url", "url": data_url(picture)} for picture in question.images],
            "return_token_ids": True,
        }
        answer = servers.ask("/inference/v1/generate", body, first)
        if answer.get("prompt_token_ids") is None:
            raise ServerError(
                f"The vLLM server at {' or '.join(servers.urls)} does not report which prompt it read, so nothing "
                "vouches for its image tokens. Serve the teacher with a newer vLLM."
            )
        return answer

    def _with_placeholders(self, question: Question) -> list[int]:
        """The ids with one placeholder for each image, which the server expands."""
        before, after = self.around_image
        ids, given, done = list(question.ids), [], 0
        for number in range(len(question.images)):
            start = next((place for place in range(done, len(ids)) if ids[place] == self.image_token_id), None)
            if start is None:
                raise ServerError(f"A row has {len(question.images)} images, but placeholders for {number} alone.")
            end = start
            while end < len(ids) and ids[end] == self.image_token_id:
                end += 1
            given += [*ids[done : start - len(before)], self.image_token_id]
            done = end + len(after)
        return given + ids[done:]


def check_urls(urls: list[str]) -> None:
    """Raise `ValueError` unless these are base URLs of servers, each of them once."""
    for url in urls:
        parts = urlparse(url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ValueError(
                f"`teacher_server_url` has {url!r}, which is no URL of a server. Write it as `http://host:8000`."
            )
        if parts.path.endswith("/v1"):
            raise ValueError(f"`teacher_server_url` has {url!r}. Leave out the `/v1` at its end.")
        if urls.count(url) > 1:
            raise ValueError(f"`teacher_server_url` has {url!r} more than once. Name each server once.")
    if not urls:
        raise ValueError("`teacher_server_url` is an empty list. Name at least one server, or leave it unset.")


def split(questions: Iterable[Question], request_tokens: int) -> Iterator[list[Question]]:
    """Questions for one request each: of at most so many tokens, or a single one; those with images alone."""
    part: list[Question] = []
    for question in questions:
        if question.images:
            yield [question]
            continue
        if part and sum(len(other.ids) for other in part) + len(question.ids) > request_tokens:
            yield part
            part = []
        part.append(question)
    if part:
        yield part


def read_logps(positions: list[dict[str, Any] | None], question: Question, urls: list[str]) -> list[float]:
    """
    Log-probs of a question's tokens from its `start` on.

    Args:
        positions (`list[dict]`): vLLM's `prompt_logprobs`: of every token but the first, by id, as strings.
        question ([`Question`]): What was asked.
        urls (`list[str]`): Who answered, for the message.

    Returns:
        `list[float]`: log-probs in nats, NaN where there is none or where it is minus infinity.

    Raises:
        `ServerError`: if these are the log-probs of other tokens, or no log-probs.
    """
    where = f"The vLLM server at {' or '.join(urls)}"
    others = [
        place
        for place, id in enumerate(question.ids[: question.start])
        if place > 0 and (place >= len(positions) or str(id) not in (positions[place] or {}))
    ]
    if len(positions) != len(question.ids) or others:
        raise ServerError(
            f"{where} gives log-probs of {len(positions)} tokens for a prompt and completion of {len(question.ids)}"
            + (f", and of another token at position {others[0]}" if others else "")
            + ". It reads something else than it was sent: look for a proxy between, or for options that truncate."
        )
    logps = []
    for place in range(question.start, len(question.ids)):
        entry = (positions[place] or {}).get(str(question.ids[place])) or {}
        logp = entry.get("logprob")
        logp = math.nan if logp is None or logp <= MINUS_INFINITY else float(logp)
        if logp > 1e-3:
            raise ServerError(f"{where} gives a log-prob of {logp:.3g}, which is none. Look at its `--logprobs-mode`.")
        logps.append(logp)
    return logps
