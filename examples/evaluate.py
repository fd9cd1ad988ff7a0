r"""
Greedy accuracy of one or several checkpoints on a split, compared in one table.

    python examples/evaluate.py --dataset_name data/geometry3k --output_dir runs/evaluation \
        --model_name_or_path OpenGVLab/InternVL3_5-1B-HF runs/1b-gspo runs/1b-opd runs/1b-gndpo

The data have the columns that the trainers use: `prompt` (messages), `solution` and, for image-text models, `images`.
"""

import contextlib
import gc
import importlib.util
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel
from tqdm.auto import tqdm
from transformers import AutoProcessor, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import find_adapter_config_file
from trl import TrlParser, prepare_multimodal_messages
from trl.rewards import think_format_reward

from gndpo_trl.data import get_split, load_splits
from gndpo_trl.grpo.trl_hooks import create_model_from_path
from gndpo_trl.rewards import check_answer


@dataclass
class EvaluationArguments:
    """
    Arguments of an evaluation.

    Args:
        model_name_or_path (`list[str]`):
            Checkpoints to compare: paths or hub ids of models, or of PEFT adapters, which are merged into their base
            model. The others are compared with the first.
        dataset_name (`str`):
            Hub id, folder of `save_to_disk`, data file or folder of data files.
        output_dir (`str`):
            Folder for `summary.json` and one `{checkpoint}.jsonl` each, with a line for every question.
        dataset_config (`str`, *optional*):
            Configuration of a set on the hub.
        dataset_split (`str`, *optional*, defaults to `"test"`):
            Split to evaluate on.
        max_samples (`int`, *optional*):
            Take only this many rows, the first ones.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of questions generated at once; vLLM chooses for itself.
        max_new_tokens (`int`, *optional*, defaults to `2048`):
            Number of tokens after which a completion is cut off.
        dtype (`str`, *optional*, defaults to `"bfloat16"`):
            Number format of the weights: `bfloat16`, `float16`, `float32`, or `auto` for the checkpoint's.
        device (`str`, *optional*):
            Device of the model, such as `cuda:1` or `cpu`. All GPUs if left out, the CPU if there is none.
        revision (`str`, *optional*):
            Branch, tag or commit of the checkpoints on the hub, and of the base model of an adapter in a folder.
        trust_remote_code (`bool`, *optional*, defaults to `False`):
            Run the code that comes with a checkpoint. Only for sources that you trust.
        chat_template_kwargs (`dict[str, Any]` or `str`, *optional*):
            Arguments of the chat template, in JSON on the command line: `{"enable_thinking": false}`. Give those that
            the students were trained with.
        use_vllm (`bool`, *optional*, defaults to `False`):
            Generate with vLLM instead of transformers. It has to be installed.
        bootstrap_samples (`int`, *optional*, defaults to `1000`):
            Number of resamplings of the questions behind each confidence interval.
        seed (`int`, *optional*, defaults to `0`):
            Seed of the resampling; generation is greedy.
    """

    model_name_or_path: list[str] = field(
        metadata={
            "help": "Checkpoints to compare: paths or hub ids of models, or of PEFT adapters, which are merged into "
            "their base model. The others are compared with the first."
        }
    )
    dataset_name: str = field(
        metadata={"help": "Hub id, folder of `save_to_disk`, data file or folder of data files."}
    )
    output_dir: str = field(
        metadata={
            "help": "Folder for `summary.json` and one `{checkpoint}.jsonl` each, with a line for every question."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a set on the hub."})
    dataset_split: str = field(default="test", metadata={"help": "Split to evaluate on."})
    max_samples: int | None = field(default=None, metadata={"help": "Take only this many rows, the first ones."})
    batch_size: int = field(
        default=16, metadata={"help": "Number of questions generated at once; vLLM chooses for itself."}
    )
    max_new_tokens: int = field(
        default=2048, metadata={"help": "Number of tokens after which a completion is cut off."}
    )
    dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "Number format of the weights: `bfloat16`, `float16`, `float32`, or `auto` for the checkpoint's.",
            "choices": ["bfloat16", "float16", "float32", "auto"],
        },
    )
    device: str | None = field(
        default=None,
        metadata={
            "help": "Device of the model, such as `cuda:1` or `cpu`. All GPUs if left out, the CPU if there is none."
        },
    )
    revision: str | None = field(
        default=None,
        metadata={
            "help": "Branch, tag or commit of the checkpoints on the hub, and of the base model of an adapter in a "
            "folder."
        },
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run the code that comes with a checkpoint. Only for sources that you trust."},
    )
    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": 'Arguments of the chat template, in JSON on the command line: `{"enable_thinking": false}`. Give '
            "those that the students were trained with."
        },
    )
    use_vllm: bool = field(
        default=False, metadata={"help": "Generate with vLLM instead of transformers. It has to be installed."}
    )
    bootstrap_samples: int = field(
        default=1000, metadata={"help": "Number of resamplings of the questions behind each confidence interval."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the resampling; generation is greedy."})

    def __post_init__(self):
        value = self.chat_template_kwargs
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value) if isinstance(value, str) else value
        if not isinstance(value, dict | None):
            raise ValueError(
                f"`chat_template_kwargs` is {self.chat_template_kwargs!r}. Write an object in JSON, such as "
                "'{\"enable_thinking\": false}'."
            )
        self.chat_template_kwargs = value


class Completion(NamedTuple):
    text: str
    tokens: int  # including the one that ends the turn
    truncated: bool  # cut off at `max_new_tokens`


def check_args(args: EvaluationArguments) -> None:
    for name in ("batch_size", "max_new_tokens", "max_samples", "bootstrap_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}. Give a number from 1 on.")
    if args.use_vllm and importlib.util.find_spec("vllm") is None:
        raise ImportError("`use_vllm` is set, but vLLM is not installed. Install `trl[vllm]`, or leave it out.")
    if args.use_vllm and args.device is not None:
        raise ValueError(f"`device` is {args.device!r}, but vLLM chooses the device: set `CUDA_VISIBLE_DEVICES`.")


def load_questions(args: EvaluationArguments) -> Dataset:
    """The first `max_samples` rows of the split, after a check of all of them."""
    splits = load_splits(args.dataset_name, args.dataset_config, train_split=args.dataset_split)
    dataset = get_split(splits, "dataset_split", args.dataset_split)
    where = f"Split {args.dataset_split!r} of {args.dataset_name}"
    missing = {"prompt", "solution"} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"{where} has no column {sorted(missing)}, only {dataset.column_names}. The columns are those of "
            "training; `examples/prepare_geometry3k.py` writes them."
        )
    if args.max_samples is not None:
        dataset = dataset.select(range(min(args.max_samples, len(dataset))))
    for index, (prompt, solution) in enumerate(zip(dataset["prompt"], dataset["solution"], strict=True)):
        if not isinstance(prompt, list) or not prompt:
            raise ValueError(f"{where}, row {index}: `prompt` is {prompt!r}. Give a list of messages.")
        if not isinstance(solution, str) or not solution.strip():
            raise ValueError(f"{where}, row {index}: `solution` is {solution!r}. Give the answer as text.")
    return dataset


def checkpoint_names(paths: list[str]) -> list[str]:
    """Names for files and tables: the last folders of each path, as few as tell the checkpoints apart."""
    resolved = [Path(path).resolve() if Path(path).exists() else Path(path) for path in paths]
    parts = [[part for part in path.parts if part != path.anchor] for path in resolved]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["-".join(folders[-depth:]) for folders in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"`model_name_or_path` names a checkpoint twice: {paths}.")


def base_of_adapter(path: str, args: EvaluationArguments) -> tuple[str, str | None]:
    """Path or hub id of the model under an adapter, and its revision; `args.revision` is the adapter's if that has one."""
    config = PeftConfig.from_pretrained(path, revision=args.revision)
    return config.base_model_name_or_path, config.revision or (args.revision if Path(path).exists() else None)


def load_processing_class(
    path: str, args: EvaluationArguments, has_images: bool
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """Tokenizer or processor of a checkpoint; an adapter saved without one uses its base model's."""
    source, revision = path, args.revision
    if find_adapter_config_file(path, revision=args.revision) is not None:
        if args.use_vllm:
            raise ValueError(
                f"{path} is an adapter, which vLLM is not given here. Leave `use_vllm` out, or save the merged model."
            )
        if not (Path(path) / "tokenizer_config.json").exists():
            source, revision = base_of_adapter(path, args)
    processing_class = AutoProcessor.from_pretrained(
        source, revision=revision, trust_remote_code=args.trust_remote_code
    )
    if has_images and not isinstance(processing_class, ProcessorMixin):
        raise ValueError(
            f"The data have the column 'images', but {path} is a text model. Give image-text models, or remove the "
            "column if the questions do without images."
        )
    return processing_class


def load_model(path: str, args: EvaluationArguments) -> PreTrainedModel:
    options = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    if args.device is not None:
        options["device_map"] = args.device
    if find_adapter_config_file(path, revision=args.revision) is None:
        return create_model_from_path(path, revision=args.revision, **options).eval()
    base_path, base_revision = base_of_adapter(path, args)
    base = create_model_from_path(base_path, revision=base_revision, **options)
    return PeftModel.from_pretrained(base, path, revision=args.revision).merge_and_unload().eval()


def text_of(prompt: list[dict]) -> str:
    """Text of all messages of a prompt, without images."""
    contents = [message["content"] for message in prompt]
    return "\n".join(
        content if isinstance(content, str) else "".join(part["text"] for part in content if part["type"] == "text")
        for content in contents
    )


def generate(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    rows: list[dict],
    chat_template_kwargs: dict[str, Any],
) -> list[Completion]:
    """Completions of one batch, by `model.generation_config`."""
    is_vlm = isinstance(processing_class, ProcessorMixin)
    prompts = [row["prompt"] for row in rows]
    if is_vlm:
        prompts = [prepare_multimodal_messages(row["prompt"], images=row.get("images")) for row in rows]
    inputs = processing_class.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **({"processor_kwargs": {"padding": True}} if is_vlm else {"padding": True}),
        **chat_template_kwargs,
    ).to(model.device)
    with torch.inference_mode():
        completion_ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].cpu()

    is_eos = torch.isin(completion_ids, torch.tensor(model.generation_config.eos_token_id))
    truncated = ~is_eos.any(dim=1)
    lengths = torch.where(truncated, completion_ids.shape[1], is_eos.int().argmax(dim=1) + 1).tolist()
    texts = processing_class.batch_decode(
        [ids[:length] for ids, length in zip(completion_ids, lengths, strict=True)], skip_special_tokens=True
    )
    return [Completion(*values) for values in zip(texts, lengths, truncated.tolist(), strict=True)]


def complete(
    path: str, processing_class: PreTrainedTokenizerBase | ProcessorMixin, dataset: Dataset, args: EvaluationArguments
) -> list[Completion]:
    """Greedy completions of all rows by transformers, in the order of the rows."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = load_model(path, args)
    # A new one, since a checkpoint's own may sample or penalize repetitions; but all of its end tokens count.
    own = model.generation_config.eos_token_id
    eos_token_ids = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=args.max_new_tokens,
        eos_token_id=sorted(eos_token_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    # Prompts of like length share a batch; the longest come first, so that memory runs out at once or never.
    lengths = [len(text_of(prompt)) for prompt in dataset["prompt"]]
    order = sorted(range(len(dataset)), key=lengths.__getitem__, reverse=True)
    completions = {}
    with tqdm(total=len(dataset), desc=path) as progress:
        for start in range(0, len(order), args.batch_size):
            indices = order[start : start + args.batch_size]
            rows = [dataset[index] for index in indices]
            batch = generate(model, processing_class, rows, args.chat_template_kwargs or {})
            completions.update(zip(indices, batch, strict=True))
            progress.update(len(indices))
    return [completions[index] for index in range(len(dataset))]


def complete_with_vllm(path: str, dataset: Dataset, args: EvaluationArguments) -> list[Completion]:
    """Greedy completions of all rows by vLLM, in the order of the rows."""
    from vllm import LLM, SamplingParams

    def messages_of(row: dict) -> list[dict]:
        if row.get("images") is None:
            return row["prompt"]
        messages = prepare_multimodal_messages(row["prompt"], images=row["images"])
        for message in messages:
            message["content"] = [
                {"type": "image_pil", "image_pil": part["image"]} if part["type"] == "image" else part
                for part in message["content"]
            ]
        return messages

    conversations = [messages_of(row) for row in tqdm(dataset, desc="prompts")]
    llm = LLM(
        path,
        dtype=args.dtype,
        seed=args.seed,
        revision=args.revision,
        tokenizer_revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    outputs = llm.chat(
        conversations,
        SamplingParams(temperature=0, max_tokens=args.max_new_tokens),
        chat_template_kwargs=args.chat_template_kwargs,
    )
    return [
        Completion(completion.text, len(completion.token_ids), completion.finish_reason == "length")
        for completion in (output.outputs[0] for output in outputs)
    ]


def judge(dataset: Dataset, completions: list[Completion]) -> pd.DataFrame:
    """One row per question: what was asked, what the model said, and whether it was right."""
    questions = dataset.select_columns(["prompt", "solution"])
    rows = []
    for index, (question, completion) in enumerate(zip(questions, completions, strict=True)):
        verdict = check_answer(completion.text, question["solution"])
        rows.append(
            {
                "index": index,
                "question": text_of(question["prompt"]),
                "solution": question["solution"],
                "completion": completion.text,
                "answer": verdict.answer,
                "correct": verdict.correct,
                "format": think_format_reward([[{"content": completion.text}]])[0] == 1.0,
                "tokens": completion.tokens,
                "truncated": completion.truncated,
                "answer_parsed": verdict.answer_parsed,
                "solution_parsed": verdict.solution_parsed,
            }
        )
    return pd.DataFrame(rows)


def bootstrap_interval(values: np.ndarray, num_samples: int, seed: int) -> list[float]:
    """
    95 % percentile-bootstrap confidence interval of a mean.

    Args:
        values (`np.ndarray` of shape `(N,)`):
            One number for each question: 0 or 1 for a rate, or the paired differences of two checkpoints.
        num_samples (`int`):
            Number of resamplings.
        seed (`int`):
            Seed of the resampling.

    Returns:
        `list[float]`: lower and upper end.
    """
    indices = np.random.default_rng(seed).integers(len(values), size=(num_samples, len(values)))
    return np.percentile(values[indices].mean(axis=1), [2.5, 97.5]).tolist()


def summarize(rows: pd.DataFrame, first: pd.DataFrame, args: EvaluationArguments) -> dict:
    """Results of one checkpoint, all as fractions (0..1) of the questions except `tokens`, a mean."""

    def estimate(values: pd.Series) -> dict:
        values = values.to_numpy(dtype=float)
        return {"mean": values.mean(), "interval": bootstrap_interval(values, args.bootstrap_samples, args.seed)}

    return {
        "accuracy": estimate(rows["correct"]),
        "difference_to_first": estimate(rows["correct"].astype(int) - first["correct"].astype(int)),
        "format": estimate(rows["format"]),
        "tokens": rows["tokens"].mean(),
        "truncated": rows["truncated"].mean(),
        "unparsed_answers": 1 - rows["answer_parsed"].mean(),
        "unparsed_solutions": 1 - rows["solution_parsed"].mean(),
    }


def format_table(results: dict[str, dict]) -> str:
    def percent(result: dict, sign: str = "") -> str:
        low, high = result["interval"]
        return f"{100 * result['mean']:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"

    table = [
        {
            "checkpoint": name,
            "accuracy %": percent(result["accuracy"]),
            "difference": percent(result["difference_to_first"], "+") if index else "",
            "format %": percent(result["format"]),
            "tokens": f"{result['tokens']:.1f}",
            "cut off %": f"{100 * result['truncated']:.1f}",
            "unparsed %": f"{100 * result['unparsed_answers']:.1f}",
        }
        for index, (name, result) in enumerate(results.items())
    ]
    return pd.DataFrame(table).to_string(index=False)


def main(args: EvaluationArguments) -> None:
    check_args(args)
    dataset = load_questions(args)
    names = checkpoint_names(args.model_name_or_path)
    has_images = "images" in dataset.column_names
    # All before the first model, so that a wrong path does not show only after hours of generation.
    processing_classes = [load_processing_class(path, args, has_images) for path in args.model_name_or_path]
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)

    results, first = {}, None
    for name, path, processing_class in zip(names, args.model_name_or_path, processing_classes, strict=True):
        if args.use_vllm:
            completions = complete_with_vllm(path, dataset, args)
        else:
            completions = complete(path, processing_class, dataset, args)
        gc.collect()
        torch.cuda.empty_cache()  # the memory of this checkpoint, for the next one
        rows = judge(dataset, completions)
        rows.to_json(output_dir / f"{name}.jsonl", orient="records", lines=True, force_ascii=False)
        first = rows if first is None else first
        results[name] = summarize(rows, first, args)

    summary = {"arguments": asdict(args), "num_questions": len(dataset), "checkpoints": results}
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{len(dataset)} questions of {args.dataset_name}, split {args.dataset_split!r}, with 95 % intervals\n")
    print(format_table(results))
    unparsed = results[names[0]]["unparsed_solutions"]
    if unparsed:
        print(f"\nSolutions that math-verify cannot read, compared as text: {unparsed:.1%}")
    print(f"\nWritten: {output_dir / 'summary.json'} and a line for every question in {{checkpoint}}.jsonl")


if __name__ == "__main__":
    main(*TrlParser((EvaluationArguments,)).parse_args_and_config())
