"""The token view in the terminal, with rich."""

from rich.console import Console, Group
from rich.panel import Panel
from rich.rule import Rule
from rich.style import Style
from rich.text import Text

from ..grpo.terminal_text import harmless
from .colours import colour, strength
from .rows import TokenRow, extreme_tokens, sample_rows, score_scale


# Extreme tokens at either end, and the tokens shown on both sides of each.
NUM_EXTREMES = 5
CONTEXT = 8

# Scores of less strength keep the terminal's own background, so that those with a colour stand out.
FAINTEST = 0.2


def print_rows(
    rows: list[TokenRow], step: int, mode: str, score_clip: float | None, count: int | None, console: Console
) -> None:
    """
    Print completions with their tokens coloured by score, and the most extreme tokens of the batch in context.

    Args:
        rows (`list[TokenRow]`): All rows of the batch, not empty.
        step (`int`): Optimizer step.
        mode (`str`): `"train"` or the name of an evaluation.
        score_clip (`float` or `None`): Bound of the clamp, in nats.
        count (`int` or `None`): Number of completions to print, taken at random; `None`: all; 0: nothing is printed.
        console (`rich.console.Console`): Where to print.
    """
    if count is not None and count <= 0:
        return
    scale = score_scale(rows, score_clip)
    parts = [legend(scale, score_clip)]
    for number in sample_rows(rows, count, step):
        row = rows[number]
        rewards = "".join(f", {name} {value:.3g}" for name, value in row.rewards.items())
        parts.append(heading(f"{number + 1}: {len(row.tokens)} tokens, mean score {row.mean_score:.3f}{rewards}"))
        parts.append(Text(harmless(row.prompt), style="dim"))
        parts += [Text(f"Images: {len(row.images)}", style="dim")] if row.images else []
        parts.append(Text().join(token_text(row, token, scale) for token in range(len(row.tokens))))
    for name, places in zip(("Lowest", "Highest"), extreme_tokens(rows, NUM_EXTREMES), strict=True):
        parts.append(heading(f"{name} scores of the batch"))
        parts += [in_context(rows[number], number, token, scale) for number, token in places]
    console.print(Panel(Group(*parts), title=Text(harmless(f"Tokens of step {step}, {mode}"))))


def heading(text: str) -> Rule:
    return Rule(Text(harmless(text)), align="left")  # a plain string would be read as markup


def legend(scale: float, score_clip: float | None) -> Text:
    marks = [-scale, -scale / 4, 0.0, scale / 4, scale]
    parts = [Text(f" {mark:+.3g} ", style=style_of(mark, scale, is_clamped=False)) for mark in marks]
    text = Text("Teacher's log-prob less the student's, in nats: ") + Text().join(parts)
    text.append("  dim: not in the loss")
    if score_clip is not None:
        text.append("  ")
        text.append("underlined", style="underline")
        text.append(f": clamped at ±{score_clip:.3g}")
    return text


def style_of(score: float, scale: float, is_clamped: bool) -> Style:
    share = strength(score, scale)
    if not share >= FAINTEST:  # NaN too
        return Style(dim=score != score)
    red, green, blue = colour(score, scale)
    text = "white" if share > 0.7 else "black"
    return Style.parse(f"{text} on rgb({red},{green},{blue})") + Style(underline=is_clamped)


def token_text(row: TokenRow, token: int, scale: float) -> Text:
    style = style_of(float(row.scores[token]), scale, bool(row.clamped[token]))
    return Text(harmless(row.tokens[token]), style=style)


def in_context(row: TokenRow, number: int, token: int, scale: float) -> Text:
    text = Text(f"{row.scores[token]:+8.3f}  in {number + 1}: ")
    for place in range(max(0, token - CONTEXT), min(len(row.tokens), token + CONTEXT + 1)):
        part = token_text(row, place, scale) if place == token else Text(harmless(row.tokens[place]))
        part.plain = part.plain.replace("\n", "↵")
        text.append_text(Text("⟦") + part + Text("⟧") if place == token else part)
    text.append(f"  (teacher {row.teacher_logps[token]:.3f}, student {row.student_logps[token]:.3f})")
    return text
