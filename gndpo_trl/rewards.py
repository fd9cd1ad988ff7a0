r"""Accuracy of the final `\boxed{}` answer, decided by math-verify; TRL's `think_format_reward` goes with it."""

import re
import threading
from collections.abc import Callable
from typing import Any, NamedTuple


try:
    from math_verify import LatexExtractionConfig, parse, verify
except ImportError as error:
    raise ImportError(
        "Answers are checked by math-verify, which is not installed: `pip install 'gndpo-trl[math]'`."
    ) from error


# The text handed to `parse` is one box and nothing else, so what stands in it is all that may be read.
BOX_ONLY = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]
TIMEOUT = 5  # seconds for each parse and each comparison; an answer such as 9^{9^{9^9}} would take forever


class Verdict(NamedTuple):
    r"""
    What `check_answer` found.

    Attributes:
        correct (`bool`): The answer equals the solution.
        answer (`str` or `None`): Content of the last `\boxed{}` of the completion; `None` if there is none.
        answer_parsed (`bool`): There is an answer, and math-verify could read it (or the solution is compared as text).
        solution_parsed (`bool`): math-verify could read the solution; otherwise it is compared as text.
    """

    correct: bool
    answer: str | None
    answer_parsed: bool
    solution_parsed: bool


def extract_boxed(text: str) -> str | None:
    r"""Content of the last `\boxed{}` in `text`; `None` if there is none or its braces do not close."""
    boxes = list(re.finditer(r"\\boxed\s*\{", text))
    if not boxes:
        return None
    start, depth = boxes[-1].end(), 1
    for brace in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):  # `\{` and `\}` are consumed and do not count
        depth += (brace.group() == "{") - (brace.group() == "}")
        if depth == 0:
            return text[start : start + brace.start()].strip()
    return None


def check_answer(completion: str, solution: str) -> Verdict:
    r"""
    Compare the last `\boxed{}` of a completion with the solution.

    Both are read as LaTeX by math-verify, so that `\frac{1}{2}` equals `0.5`, `75^\circ` or `75°` equals `75`,
    `12 cm` equals `12` and `x = 5` equals `5`; numbers are equal when they agree to 6 decimals. A solution that
    math-verify cannot read is compared as text, without white space, `$` and upper case.

    In the main thread every parse and every comparison ends after 5 seconds, as unparsed or unequal. Elsewhere there
    is no limit, because math-verify's needs signals.

    Args:
        completion (`str`):
            Text of the completion. Boxes anywhere in it count, also in its reasoning.
        solution (`str`):
            The answer, as bare LaTeX (`9 \sqrt { 2 }`), between `$`, or in the last `\boxed{}` of a text.

    Returns:
        `Verdict`: `correct`, `answer`, `answer_parsed`, `solution_parsed`.
    """
    timeout = TIMEOUT if threading.current_thread() is threading.main_thread() else None

    def read(latex: str) -> list:
        box = "\\boxed{" + latex.replace("°", "^\\circ") + "}"
        return parse(box, BOX_ONLY, fallback_mode="no_fallback", parsing_timeout=timeout)

    answer, solution = extract_boxed(completion), extract_boxed(solution) or solution
    gold = read(solution)
    if answer is None:
        return Verdict(False, None, False, bool(gold))
    if not gold:
        return Verdict(normalize(answer) == normalize(solution) != "", answer, True, False)
    target = read(answer)
    return Verdict(verify(gold, target, timeout_seconds=timeout), answer, bool(target), True)


def message_text(message: dict) -> str:
    """Text of a message whose content is a string, a list of parts, or missing, as beside a tool call."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def normalize(text: str) -> str:
    return "".join(text.replace("$", "").split()).lower()


def boxed_accuracy_reward(
    completions: list[str] | list[list[dict[str, Any]]],
    solution: list[str],
    log_metric: Callable[[str, float], None] | None = None,
    **kwargs,
) -> list[float]:
    r"""
    Reward function: 1.0 where the final `\boxed{}` answer equals the solution (see `check_answer`), else 0.0.

    Logs two fractions (0..1) of the completions: `unparsed/answers`, those without a box or with one that math-verify
    cannot read, which score 0.0; and `unparsed/solutions`, those whose solution it cannot read, which are compared as
    text.

    Args:
        completions (`list[str]` or `list[list[dict[str, Any]]]`):
            Completions, as text or as messages, of which the last one holds the answer. One without text, such as a
            call of a tool, has none.
        solution (`list[str]`):
            The answer for each completion, from the data set's column of this name.
        log_metric (`callable`, *optional*):
            Logs a metric by name; the trainer provides it.

    Returns:
        `list[float]`: One reward for each completion.
    """
    texts = [
        completion if isinstance(completion, str) else "".join(map(message_text, completion[-1:]))
        for completion in completions
    ]
    verdicts = [check_answer(text, gold) for text, gold in zip(texts, solution, strict=True)]
    if log_metric is not None:
        log_metric("unparsed/answers", sum(not verdict.answer_parsed for verdict in verdicts) / len(verdicts))
        log_metric("unparsed/solutions", sum(not verdict.solution_parsed for verdict in verdicts) / len(verdicts))
    return [float(verdict.correct) for verdict in verdicts]
