"""The colours of scores: orange where the teacher finds a token less likely than the student, blue where more."""

# Two ends that stay apart for all common kinds of colour blindness and in grey.
LOW, MIDDLE, HIGH = (179, 88, 6), (255, 255, 255), (33, 102, 172)


def strength(score: float, scale: float) -> float:
    """
    How strong the colour of a score is, from 0 to 1: the root of its share of the scale, for most scores are small.

    Args:
        score (`float`): Score in nats.
        scale (`float`): Score that gets the full colour.
    """
    return min(abs(score) / scale, 1.0) ** 0.5


def colour(score: float, scale: float) -> tuple[int, int, int]:
    """Red, green and blue, each from 0 to 255."""
    end, share = (LOW if score < 0 else HIGH), strength(score, scale)
    return tuple(int(m + (e - m) * share + 0.5) for m, e in zip(MIDDLE, end, strict=True))
