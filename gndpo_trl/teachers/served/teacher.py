"""A teacher that vLLM servers run: what they are asked during a run, and when."""

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from ...grpo.checkpoints import RunCannotGoOn
from ...grpo.hidden_states import HiddenStates
from ...grpo.ranks import raised_on_all_ranks
from ...objective.likeliest import LikeliestTokens
from ..compatibility import ModelDescription, ProcessingClass, warn_on_text_prompts
from ..prompts import images_of
from ..teacher import ReadHiddenStates, Score, Teacher
from .checks import Wanted, check_same, check_servers
from .questions import Answer, Answers, Picture, Question, split
from .servers import ServerError, VLLMServers, begin
from .urls import check_urls


# Requests of a rank to a server at a time. It has to have the next one when it is done with one, and no more.
IN_FLIGHT = 4


@dataclass
class Asked:
    """A batch that is being scored: a question for each row, and the requests that they went into."""

    completion_ids: torch.Tensor
    questions: list[Question]
    requests: list[Future[Answers]]
    problem: str | None  # why it cannot be scored
    second: "Second | None" = None

    def give_up(self) -> None:
        for request in [*self.requests, *([self.second.request] if self.second is not None else [])]:
            request.cancel()


@dataclass
class Second:
    """A question that goes to a second server, too: what both say tells whether they run the same model."""

    question: Question
    request: Future[Answers]
    urls: list[str]  # of the first and of the second


class ServerTeacher(Teacher):
    """
    A model behind an ordinary `vllm serve`, on this machine or others, that scores at temperature 1.

    The server gets the token ids of prompt and completion and answers with their log-probs, while the student is scored
    here. Images go as the pictures they are, with one placeholder each, and the server has to report that it read
    exactly the student's ids. Every rank asks for its own rows, and for equal rows once. Answers that are missing, NaN
    or minus infinity are NaN here, see [`Teacher`]; so is what follows a placeholder of an image that the student sampled.

    Args:
        urls (`str` or `Sequence[str]`):
            Base URLs of one or several servers of the same model, as `http://host:8000`. Requests are spread over them,
            and what one does not answer, another does. One row of each batch is asked of two, whose answers are compared. A key is read from the environment variable `VLLM_API_KEY`.
        processing_class ([`~transformers.PreTrainedTokenizerBase`] or [`~transformers.ProcessorMixin`], *optional*):
            Tokenizer or processor of the teacher, used to check that token ids mean the same to both models. If `None`,
            the server is asked what each of the student's ids means.
        served_model (`str`, *optional*):
            Name of the teacher on servers that serve several models, as a base and adapters on it.
        model (`str`, *optional*):
            Path or id of the teacher on this machine, to load its processing class from. No weights are loaded.
        revision (`str`, *optional*):
            Revision of it on the Hub.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Whether to run code that comes with `model`. What a server names is never loaded.
        max_completion_length (`int`, *optional*):
            Longest completion to score. A server whose context is no longer is refused at the start.
        timeout (`float`, *optional*, defaults to 600.0):
            Seconds after which a request has failed, tries included.
        request_tokens (`int`, *optional*, defaults to 16384):
            Most tokens in a request, unless it is a single longer row. Rows with images go one by one.
        max_unknown (`float`, *optional*, defaults to 0.01):
            Largest fraction of a batch's tokens that the server may have no log-prob for.
        top_k (`int`, *optional*):
            Number of likeliest tokens to ask for at each position, beside the sampled one, for `estimator="exact"` and
            `score_baseline="expected"`. `None`: the sampled one alone, which these two cannot do with.

    Raises:
        `ValueError`: at construction or in `check`, if a URL is none, if there is no server, or if it cannot score what
            the student samples.
        [`~grpo.checkpoints.RunCannotGoOn`]: during a run, on all ranks, if no server answers, if one refuses a request,
            if two give different answers, or if too many log-probs are unknown.
    """

    def __init__(
        self,
        urls: str | Sequence[str],
        processing_class: ProcessingClass | None = None,
        *,
        served_model: str | None = None,
        model: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        max_completion_length: int | None = None,
        timeout: float = 600.0,
        request_tokens: int = 16384,
        max_unknown: float = 0.01,
        top_k: int | None = None,
    ):
        self.urls = [url.rstrip("/") for url in ([urls] if isinstance(urls, str) else urls)]
        check_urls(self.urls)
        load_options = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.wanted = Wanted(served_model, model, processing_class, load_options, max_completion_length, top_k)
        self.request_tokens, self.max_unknown = request_tokens, max_unknown
        self.servers = VLLMServers(self.urls, timeout, IN_FLIGHT)
        self.asked: Asked | None = None
        self.num_compared = 0  # questions that a second server was asked, too

    @property
    def description(self) -> ModelDescription | None:
        """What is known of it here; `None` if nothing is."""
        return self.wanted.description

    def check(self, student: ModelDescription) -> None:
        """
        Ask every server what it runs, and for the log-probs of a probe, with images if the student reads images.

        Raises:
            `ValueError`: on all ranks, if a server cannot be reached by one of them, or cannot score what the student
                samples, or if it answers with wrong numbers.
        """
        if student.processing_class is None:
            return  # TRL refuses the student
        with raised_on_all_ranks():
            self.model = check_servers(self.servers, self.wanted, student)
            self.vocab_size = self.model.vocab_size

    def check_data(self, field: str, dataset: Any, has_prompt_fn: bool) -> None:
        if not has_prompt_fn and self.wanted.description is not None:
            warn_on_text_prompts(field, dataset, self.wanted.description)

    def prepare(self, student: PreTrainedModel, accelerator: Accelerator, score: Score) -> None:
        self.process_index = accelerator.process_index

    def start(self, rollout: dict[str, Any]) -> None:
        if self.asked is not None:  # of a run that has ended before it was answered
            self.asked.give_up()
        questions, requests, problem, second = [], [], None, None
        try:
            questions = [self._question(rollout, row) for row in range(len(rollout["completion_ids"]))]
        except ValueError as error:  # pictures that cannot be opened
            problem = f"The teacher has no answer. {error}"
        for question in questions:
            # One token more is generated.
            if len(question.ids) >= self.model.max_model_len:
                problem = (
                    f"The teacher has no answer. Prompt and completion have {question.start} and {len(question.ids) - question.start} tokens, but "
                    f"the vLLM server at {self.servers} holds {self.model.max_model_len} with one that it has to "
                    "generate. Raise its `--max-model-len`, lower `max_completion_length`, or drop longer prompts."
                )
        if problem is None:
            once = dict.fromkeys(question for question in questions if len(question.ids) > question.start)
            parts = list(split(once, self.request_tokens))
            for number, part in enumerate(parts, self.process_index):
                requests.append(begin(self.model.answers(self.servers, part, number)))
            if parts and len(self.urls) > 1:
                second = self._ask_another(parts)
        self.asked = Asked(rollout["completion_ids"], questions, requests, problem, second)

    def _ask_another(self, parts: list[list[Question]]) -> Second:
        """One row of the batch for another server than the one that its request begins with; other ones each time."""
        place, step = self.num_compared % len(parts), 1 + self.num_compared % (len(self.urls) - 1)
        self.num_compared += 1
        numbers = [self.process_index + place, self.process_index + place + step]
        question = parts[place][0]
        request = begin(self.model.answers(self.servers, [question], numbers[1]))
        return Second(question, request, [self.urls[number % len(self.urls)] for number in numbers])

    def per_token_logps(self, rollout: dict[str, Any]) -> torch.Tensor:
        """
        Log-probs of the sampled tokens, see [`Teacher`]. All ranks call this together.

        Raises:
            [`~grpo.checkpoints.RunCannotGoOn`]: on all ranks, if one of them has no answer, or if too many log-probs are
                unknown.
        """
        completion_ids, mask = rollout["completion_ids"], rollout["completion_mask"].bool()
        logps = torch.full(mask.shape, math.nan)
        for row, answer in enumerate(self._answers(rollout)):
            logps[row, mask[row].cpu().nonzero().squeeze(1)[: len(answer.logps)]] = torch.tensor(answer.logps)
        return logps.to(completion_ids.device)

    def hidden_states(self, rollout: dict[str, Any], read: ReadHiddenStates) -> HiddenStates:
        """The likeliest tokens, see [`Teacher`]; NaN where they are unknown. Raises as `per_token_logps` does."""
        rows = []
        for length, answer in zip(
            rollout["completion_mask"].bool().sum(-1).tolist(), self._answers(rollout), strict=True
        ):
            rows.append(torch.full((length, self.model.num_known, 2), math.nan))
            rows[-1][: len(answer.logps)] = answer.states
        return HiddenStates(rows, LikeliestTokens(self.model.vocab_size))

    def without_distributions(self) -> Teacher | None:
        return self if self.wanted.top_k is None else None

    def _answers(self, rollout: dict[str, Any]) -> list[Answer]:
        """The answer for each row; all ranks call it together, and raise together."""
        completion_ids, mask = rollout["completion_ids"], rollout["completion_mask"].bool()
        if self.asked is None or not torch.equal(self.asked.completion_ids, completion_ids):
            self.start(rollout)
        asked, self.asked = self.asked, None
        answers, problem = {}, asked.problem
        try:
            for request in asked.requests:
                answers.update(request.result())
            if asked.second is not None:
                compare(asked.second, answers)
        except ServerError as error:
            problem = f"The teacher has no answer. {error}"
        except ValueError as error:  # of servers that differ
            problem = str(error)
        finally:
            asked.give_up()
        nothing = Answer([], torch.zeros(0, self.model.num_known, 2))
        found = [answers.get(question, nothing) for question in asked.questions]

        total = mask.sum().item()
        known = sum(not math.isnan(logp) for answer in found for logp in answer.logps)
        reports = gather_object([(problem, total - known, total)])
        problems = [problem for problem, *_ in reports if problem is not None]
        if problems:
            raise RunCannotGoOn(problems[0])
        unknown, total = (sum(report[place] for report in reports) for place in (1, 2))
        if unknown > self.max_unknown * total:
            raise RunCannotGoOn(
                f"The vLLM server at {self.servers} has no finite log-prob for {unknown} of {total} tokens of a batch, more "
                f"than a fraction of {self.max_unknown:g}. Check the teacher's weights and dtype."
            )
        return found

    def identity(self) -> str:
        known = "" if self.wanted.top_k is None else f", its likeliest {self.wanted.top_k} tokens"
        return f"{self.model.name} behind a server{known}"

    def _question(self, rollout: dict[str, Any], row: int) -> Question:
        prompt, completion = (
            rollout[f"{part}_ids"][row][rollout[f"{part}_mask"][row].bool()].tolist()
            for part in ("prompt", "completion")
        )
        pictures = images_of(rollout["rows"][row]) or []
        return Question(
            (*prompt, *self.model.known(completion)), len(prompt), tuple(Picture.of(picture) for picture in pictures)
        )


def compare(second: Second, answers: Answers) -> None:
    """Raise `ValueError` if a second server has given other log-probs than the first one; what is unknown says nothing."""
    found = [torch.tensor(one[second.question].logps) for one in (answers, second.request.result())]
    length = min(map(len, found))
    is_known = found[0][:length].isfinite() & found[1][:length].isfinite()
    if is_known.any():
        check_same(second.urls, [logps[:length][is_known] for logps in found])
