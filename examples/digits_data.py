"""Data of the digits task: add two handwritten digits that stand side by side in one image.

The images are scikit-learn's `load_digits`: 1,797 real scans of 8 x 8 pixels with values 0..16. The *scans* are split
into disjoint pools before any pair is formed, so no scan that a model is validated or tested on was ever seen in
training, not even beside another partner. Everything follows from one seed.
"""

import re

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image
from sklearn.datasets import load_digits


QUESTION = "What is the sum of the digits?"

FEATURES = Features(
    {
        "prompt": [{"role": Value("string"), "content": Value("string")}],
        "images": List(ImageFeature()),
        "completion": [{"role": Value("string"), "content": Value("string")}],
        "solution": Value("string"),
    }
)

_BOX = re.compile(r"\\boxed\{\s*(-?\d+)\s*\}")
_ADDITION = re.compile(r"(\d+)\+(\d+)=")


def answer_text(a: int, b: int, stated_sum: int) -> str:
    """The answer of a reader who sees `a` and `b` and says that they add up to `stated_sum`, right or wrong."""
    return f"<think>I see {a} and {b}. {a}+{b}={stated_sum}.</think>\\boxed{{{stated_sum}}}"


def is_correct(text: str, solution: str) -> bool:
    r"""Whether the last `\boxed{...}` of `text` holds the number `solution`. No box is a wrong answer."""
    boxes = _BOX.findall(text)
    return bool(boxes) and int(boxes[-1]) == int(solution)


def pair_image(left: np.ndarray, right: np.ndarray) -> Image.Image:
    """Two scans side by side, each (8, 8) with values 0..16, as one RGB image of 16 x 8 pixels."""
    pixels = np.concatenate([left, right], axis=1) * (255 / 16)
    return Image.fromarray(np.round(pixels).astype(np.uint8)).convert("RGB")


def scan_pools(rng: np.random.Generator, num_scans: int, held_out_scans: int) -> dict[str, np.ndarray]:
    """Split -> the numbers of its scans, of which no other split has any."""
    order = rng.permutation(num_scans)
    return {
        "train": order[2 * held_out_scans :],
        "validation": order[:held_out_scans],
        "test": order[held_out_scans : 2 * held_out_scans],
    }


def build_splits(
    seed: int,
    train_rows: int = 10_000,
    validation_rows: int = 500,
    test_rows: int = 500,
    held_out_scans: int = 250,
) -> DatasetDict:
    """
    The splits `train`, `validation` and `test`, one row per pair of scans.

    Args:
        seed: Decides which scan goes to which pool and which scans are paired.
        train_rows, validation_rows, test_rows: Rows per split. Pairs are drawn with replacement.
        held_out_scans: Scans in the validation pool, and again in the test pool. Training has the rest (1,297).

    Returns:
        Rows with `prompt` (one user message), `images` (a list with one image), `completion` (one assistant message
        with the right answer) and `solution` (the sum, as a string).
    """
    digits = load_digits()
    rng = np.random.default_rng(seed)
    sizes = {"train": train_rows, "validation": validation_rows, "test": test_rows}
    splits = {}
    for name, pool in scan_pools(rng, len(digits.target), held_out_scans).items():
        rows = []
        for left, right in rng.choice(pool, size=(sizes[name], 2)):
            a, b = int(digits.target[left]), int(digits.target[right])
            rows.append(
                {
                    "prompt": [{"role": "user", "content": QUESTION}],
                    "images": [pair_image(digits.images[left], digits.images[right])],
                    "completion": [{"role": "assistant", "content": answer_text(a, b, a + b)}],
                    "solution": str(a + b),
                }
            )
        splits[name] = Dataset.from_list(rows, features=FEATURES)
    return DatasetDict(splits)


def with_wrong_sums(split: Dataset, seed: int) -> Dataset:
    """
    `split` with the stated sum of a random half of its answers one too high; the digits are still read right.

    Always one too high, not one up or one down: with a quarter each way the right sum would still be the likeliest,
    and a student that learned this mixture well would be right when it decodes greedily. So it is a toss-up.
    """
    rng = np.random.default_rng(seed)

    def spoil(row: dict) -> dict:
        a, b = map(int, _ADDITION.search(row["completion"][0]["content"]).groups())
        stated_sum = a + b + int(rng.integers(2))
        return {**row, "completion": [{"role": "assistant", "content": answer_text(a, b, stated_sum)}]}

    return split.map(spoil, load_from_cache_file=False)


def sum_reward(completions: list[list[dict]], solution: list[str], **kwargs) -> list[float]:
    """1.0 for every completion that boxes the right sum, else 0.0; a monitor for the training log."""
    pairs = zip(completions, solution, strict=True)
    return [float(is_correct(completion[0]["content"], right)) for completion, right in pairs]
