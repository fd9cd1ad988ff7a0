r"""
Data of the chain task: three handwritten digits in one image and two steps of arithmetic, in completions of any length.

The question says how the answer is to be worked out: `Plain` takes 27 tokens, `Checking` goes back and takes 40, `Counting`
goes up and down one by one and takes 27 to 155. One row in twenty is counted, so that a batch holds a few completions many
times longer than its median. The scans and their pools are those of `examples/digits_data.py`.
"""

import itertools
import re

import numpy as np
from datasets import Dataset, DatasetDict
from digits_data import FEATURES, scan_pools
from PIL import Image
from sklearn.datasets import load_digits


# Manner -> its share of the rows. Each is one token, so that all prompts have the same length.
MANNERS = {"Plain": 0.65, "Checking": 0.3, "Counting": 0.05}

QUESTION = "{}: what is the first digit plus the second, minus the third?"

_SEEN = re.compile(r"I see (\d), (\d) and (\d)\.")


def counted(start: int, by: int, sign: str, end: int) -> str:
    """`by` steps from `start`, the last of which is said to reach `end`: `7+3=8+2, 8+2=9+1, 9+1=10.`"""
    step = 1 if sign == "+" else -1
    # What is left to count stands in each step, so that a small model can see where to stop.
    terms = [f"{start + step * done}{sign}{by - done}" for done in range(max(by, 1))] + [str(end)]
    return ", ".join(f"{term}={following}" for term, following in itertools.pairwise(terms)) + "."


def answer_text(manner: str, a: int, b: int, c: int, stated_sum: int) -> str:
    """The answer of a reader who sees `a`, `b` and `c`, says that `a` and `b` add up to `stated_sum`, and goes on."""
    result = stated_sum - c
    if manner == "Counting":
        steps = [counted(a, b, "+", stated_sum), counted(stated_sum, c, "-", result)]
    else:
        steps = [f"{a}+{b}={stated_sum}.", f"{stated_sum}-{c}={result}."]
    if manner == "Checking":
        steps += [f"{c}+{result}={stated_sum}.", f"{stated_sum}-{b}={stated_sum - b}."]
    return f"<think>I see {a}, {b} and {c}. {' '.join(steps)}</think>\\boxed{{{result}}}"


def image_of(scans: np.ndarray) -> Image.Image:
    """Three scans `(3, 8, 8)` with values 0..16, in reading order as one RGB image of 16 x 16 pixels; a corner is empty."""
    first, second, third = scans * (255 / 16)
    pixels = np.block([[first, second], [third, np.zeros_like(third)]])
    return Image.fromarray(np.round(pixels).astype(np.uint8)).convert("RGB")


def build_splits(seed: int, train_rows: int = 10_000, test_rows: int = 500, held_out_scans: int = 250) -> DatasetDict:
    """
    The splits `train` and `test`.

    Args:
        seed: Decides which scan goes to which pool, which are combined, and the manner of each row.
        train_rows, test_rows: Rows per split. Scans are drawn with replacement.
        held_out_scans: Scans in the test pool, and as many that nothing here looks at. Training has the rest (1,297).

    Returns:
        Rows as those of `examples/digits_data.py`: `prompt`, `images`, `completion` (the right answer), `solution`.
    """
    digits = load_digits()
    rng = np.random.default_rng(seed)
    pools = scan_pools(rng, len(digits.target), held_out_scans)
    splits = {}
    for name, size in (("train", train_rows), ("test", test_rows)):
        manners = rng.choice(list(MANNERS), size=size, p=list(MANNERS.values()))
        rows = []
        for manner, scans in zip(manners, rng.choice(pools[name], size=(size, 3)), strict=True):
            a, b, c = map(int, digits.target[scans])
            rows.append(
                {
                    "prompt": [{"role": "user", "content": QUESTION.format(manner)}],
                    "images": [image_of(digits.images[scans])],
                    "completion": [{"role": "assistant", "content": answer_text(manner, a, b, c, a + b)}],
                    "solution": str(a + b - c),
                }
            )
        splits[name] = Dataset.from_list(rows, features=FEATURES)
    return DatasetDict(splits)


def with_wrong_sums(split: Dataset, seed: int) -> Dataset:
    """`split` with the first sum of a random half of its answers one too high, and the rest worked out from there."""
    rng = np.random.default_rng(seed)

    def spoil(row: dict) -> dict:
        manner = row["prompt"][0]["content"].partition(":")[0]
        a, b, c = map(int, _SEEN.search(row["completion"][0]["content"]).groups())
        stated_sum = a + b + int(rng.integers(2))
        return {**row, "completion": [{"role": "assistant", "content": answer_text(manner, a, b, c, stated_sum)}]}

    return split.map(spoil, load_from_cache_file=False)
