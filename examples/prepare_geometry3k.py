r"""
Prepare image questions for training: from Geometry3K, or a set like it, to the columns `prompt`, `images`, `solution`.

    python examples/prepare_geometry3k.py --output_dir data/geometry3k \
        --model_name_or_path OpenGVLab/InternVL3_5-1B-HF

    accelerate launch examples/train_gndpo.py --dataset_name data/geometry3k ...

For other sets, name their columns and, where only some splits have answers, the splits to take. MathVista and MMK12:

    python examples/prepare_geometry3k.py --output_dir data/mathvista --dataset_name AI4Math/MathVista \
        --splits testmini --columns problem=question images=decoded_image --model_name_or_path OpenGVLab/InternVL3_5-1B-HF
    python examples/prepare_geometry3k.py --output_dir data/mmk12 --dataset_name FanqingM/MMK12 \
        --columns problem=question images=image --model_name_or_path OpenGVLab/InternVL3_5-1B-HF

Each split becomes a parquet file in `--output_dir`. Prompts longer than `--max_prompt_length` are left out and counted.
"""

from dataclasses import dataclass, field
from pathlib import Path

from datasets import DatasetDict, disable_caching
from transformers import AutoProcessor
from trl import TrlParser

from gndpo_trl.data import (
    INSTRUCTION,
    drop_long_prompts,
    get_split,
    load_splits,
    prepare_questions,
    split_off_test,
)


@dataclass
class PrepareArguments:
    """
    Arguments for preparing a set of image questions.

    Args:
        output_dir (`str`):
            Folder for `{split}.parquet`; must be empty or new.
        dataset_name (`str`, *optional*, defaults to `"hiyouga/geometry3k"`):
            Source: a hub id, a folder of `save_to_disk`, a data file, or a folder of them.
        dataset_config (`str`, *optional*):
            Configuration of the source on the hub.
        splits (`list[str]`, *optional*):
            Splits of the source to prepare. All if `None`.
        columns (`list[str]`, *optional*):
            Columns of the source that have other names, as `problem=question images=image answer=label`. `images=`
            says that the source has no images.
        instruction (`str`, *optional*):
            Text that follows every problem. By default it asks for reasoning between `<think>` and `</think>` and for
            the final answer in `\boxed{}`.
        model_name_or_path (`str`, *optional*):
            Student whose processor measures the prompts. If `None`, no prompt is measured and all rows are kept.
        max_prompt_length (`int`, *optional*, defaults to `8192`):
            Longest prompt that is kept, in tokens: chat template applied, images expanded.
        test_size (`float`, *optional*):
            Size of the split `test`, drawn from a source with a single split: a share of the rows below 1, a number
            of rows from 1 on.
        seed (`int`, *optional*, defaults to `42`):
            Decides which rows `test_size` draws.
    """

    output_dir: str = field(metadata={"help": "Folder for `{split}.parquet`; must be empty or new."})
    dataset_name: str = field(
        default="hiyouga/geometry3k",
        metadata={"help": "Source: a hub id, a folder of `save_to_disk`, a data file, or a folder of them."},
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the source on the hub."})
    splits: list[str] | None = field(
        default=None, metadata={"help": "Splits of the source to prepare. All if `None`."}
    )
    columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Columns of the source that have other names, as `problem=question images=image answer=label`. "
            "`images=` says that the source has no images."
        },
    )
    instruction: str = field(
        default=INSTRUCTION,
        metadata={
            "help": "Text that follows every problem. By default it asks for reasoning between `<think>` and "
            "`</think>` and for the final answer in `\\boxed{}`."
        },
    )
    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Student whose processor measures the prompts. If `None`, no prompt is measured and all rows are "
            "kept."
        },
    )
    max_prompt_length: int = field(
        default=8192,
        metadata={"help": "Longest prompt that is kept, in tokens: chat template applied, images expanded."},
    )
    test_size: float | None = field(
        default=None,
        metadata={
            "help": "Size of the split `test`, drawn from a source with a single split: a share of the rows below 1, "
            "a number of rows from 1 on."
        },
    )
    seed: int = field(default=42, metadata={"help": "Decides which rows `test_size` draws."})


def parse_columns(pairs: list[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise ValueError(f"`columns` has {pair!r}. Write `problem=NAME`, `images=NAME` or `answer=NAME`.")
    return dict(pair.split("=", 1) for pair in pairs)


def main(args: PrepareArguments) -> None:
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if any(output_dir.iterdir()):
        raise ValueError(
            f"`output_dir` is {args.output_dir!r}, which is not empty. Empty it or choose another folder."
        )
    disable_caching()  # intermediate files go to a temporary folder, not beside the source
    columns = parse_columns(args.columns or [])
    processor = AutoProcessor.from_pretrained(args.model_name_or_path) if args.model_name_or_path else None

    source = load_splits(args.dataset_name, args.dataset_config)
    if args.splits is not None:
        source = DatasetDict({name: get_split(source, "splits", name) for name in args.splits})
    splits = DatasetDict(
        {name: prepare_questions(rows, name, columns, args.instruction, processor) for name, rows in source.items()}
    )
    if args.test_size is not None:
        splits = split_off_test(splits, args.test_size, args.seed)
    num_read = splits.num_rows
    if processor is not None:
        splits = DatasetDict(
            {name: drop_long_prompts(rows, name, args.max_prompt_length) for name, rows in splits.items()}
        )
    for name, rows in splits.items():
        rows.to_parquet(output_dir / f"{name}.parquet")

    print(f"{'split':<12}{'read':>8}{'too long':>10}{'written':>9}")
    for name, rows in splits.items():
        print(f"{name:<12}{num_read[name]:>8}{num_read[name] - len(rows):>10}{len(rows):>9}")
    if processor is None:
        print("No prompt was measured: `model_name_or_path` is not set.")


if __name__ == "__main__":
    main(*TrlParser(PrepareArguments).parse_args_and_config())
