"""A small set in the form of `hiyouga/geometry3k`: drawn triangles and rectangles with real questions and answers."""

import math
import random

from datasets import Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image, ImageDraw


FEATURES = Features({"problem": Value("string"), "images": List(ImageFeature()), "answer": Value("string")})


def draw(points: list[tuple[float, float]], labels: list[tuple[tuple[float, float], str]]) -> Image.Image:
    """An outline through `points`, in pixels, with a text at each place of `labels`."""
    size = [int(max(coordinates)) + 24 for coordinates in zip(*points, strict=True)]
    image = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    pen.polygon(points, outline="black")
    for place, text in labels:
        pen.text(place, text, fill="black")
    return image


def draw_rectangle(width: int, height: int) -> Image.Image:
    right, bottom = 12 + 8 * width, 12 + 8 * height
    labels = [((6 + 4 * width, bottom + 2), str(width)), ((right + 4, 6 + 4 * height), str(height))]
    return draw([(12, 12), (right, 12), (right, bottom), (12, bottom)], labels)


def area(rng: random.Random) -> dict:
    width, height = rng.randint(2, 9), rng.randint(2, 9)
    return {
        "problem": "<image>Find the area of the rectangle.",
        "images": [draw_rectangle(width, height)],
        "answer": str(width * height),
    }


def perimeter(rng: random.Random) -> dict:
    width, height = rng.randint(2, 9), rng.randint(2, 9)
    return {
        "problem": "<image>Find the perimeter of the rectangle.",
        "images": [draw_rectangle(width, height)],
        "answer": str(2 * (width + height)),
    }


def diagonal(rng: random.Random) -> dict:
    side = rng.randint(2, 9)
    return {
        "problem": "<image>Find the length of the diagonal of the square.",
        "images": [draw_rectangle(side, side)],
        "answer": rf"{side} \sqrt {{ 2 }}",
    }


def hypotenuse(rng: random.Random) -> dict:
    a, b, c = rng.choice([(3, 4, 5), (4, 3, 5), (6, 8, 10), (8, 6, 10)])
    bottom, right = 12 + 8 * b, 12 + 8 * a
    labels = [((6 + 4 * a, bottom + 2), str(a)), ((2, 6 + 4 * b), str(b)), ((16 + 4 * a, 6 + 4 * b), "x")]
    return {
        "problem": "<image>Find $x$, the longest side of the right triangle.",
        "images": [draw([(12, 12), (12, bottom), (right, bottom)], labels)],
        "answer": str(c),
    }


def third_angle(rng: random.Random) -> dict:
    a, b = rng.randrange(30, 75, 5), rng.randrange(30, 75, 5)
    slope_a, slope_b = math.tan(math.radians(a)), math.tan(math.radians(b))
    apex_x = 72 * slope_b / (slope_a + slope_b)
    bottom = 12 + apex_x * slope_a
    labels = [((18, bottom - 12), str(a)), ((66, bottom - 12), str(b)), ((12 + apex_x, 0), "C")]
    return {
        "problem": "<image>Two angles are given in degrees. Find $m \\angle C$.",
        "images": [draw([(12 + apex_x, 12), (12, bottom), (84, bottom)], labels)],
        "answer": str(180 - a - b),
    }


def area_with_the_figure_in_the_sentence(rng: random.Random) -> dict:
    return {**area(rng), "problem": "The rectangle <image> is made of paper. Find its area."}


def total_area(rng: random.Random) -> dict:
    first, second = area(rng), area(rng)
    return {
        "problem": "First <image> and second <image>: find the total area of the two rectangles.",
        "images": first["images"] + second["images"],
        "answer": str(int(first["answer"]) + int(second["answer"])),
    }


def build_geometry(num_train: int = 16, num_test: int = 8, seed: int = 0, mixed: bool = False) -> DatasetDict:
    """
    The splits `train` and `test` with the columns `problem`, `images` and `answer`; the same rows for the same seed.

    `mixed` adds questions with two images and with the `<image>` marker inside the sentence.
    """
    rng = random.Random(seed)
    questions = [area, third_angle, perimeter, hypotenuse, diagonal]
    if mixed:
        questions += [area_with_the_figure_in_the_sentence, total_area]
    rows = [questions[index % len(questions)](rng) for index in range(num_train + num_test)]
    return DatasetDict(
        train=Dataset.from_list(rows[:num_train], features=FEATURES),
        test=Dataset.from_list(rows[num_train:], features=FEATURES),
    )
