"""
A tiny task for each recipe in `recipes/self_distillation/`: models and data are made here, trained and measured on a CPU.

    python examples/self_distillation_tasks.py compression --seed 0
    python examples/self_distillation_tasks.py compression --seed 0 --estimator exact --name exact

One student learns sums of three digits from scratch, in two languages. In English it adds well and talks too much. In
Spanish half of its second sums are one too high. It also learns what the teachers' prompts ask of it: to be concise, to
write in Spanish what it is told in English, to correct a draft that was checked, to follow a correct solution. The larger
teacher of `mixed_policy` learns to rewrite wordy solutions. Everything goes to `--output_dir`, where data and models of a
seed are kept for the next run; unknown options go to the training script, after those of the recipe, which they replace.
"""

import argparse
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_from_disk
from self_distillation import CHECKED_DRAFT, CONCISE, CORRECT_SOLUTION, REWRITE, add_words
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    set_seed,
)
from trl import SFTConfig, SFTTrainer


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "self_distillation"
TASKS = ("compression", "crosslingual", "harness", "mixed_policy", "self_supervised")
NUM_TEST = 200  # of 1,000 questions

SPANISH = (
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince dieciséis diecisiete"
)
SPANISH += (
    " dieciocho diecinueve veinte veintiuno veintidós veintitrés veinticuatro veinticinco veintiséis veintisiete"
)
SPANISH += " veintiocho"
NUMBERS = {"en": [str(number) for number in range(29)], "es": SPANISH.split()}
QUESTION = {"en": "What is {} plus {} plus {}?", "es": "¿Cuánto es {} más {} más {}?"}
STEP = {"en": "{} plus {} is {}.", "es": "{} más {} son {}."}
ANSWER = {"en": "The answer is {}.", "es": "La respuesta es {}."}
IN_SPANISH = "Write it in Spanish."
THINKING, CHECKING = "Let me think.", "Let me check that: {}"

SPECIAL_TOKENS = ["<|pad|>", "<|unk|>", "<|im_end|>", "<|im_start|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} {{ message['content'] }}<|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
)

# What makes a recipe tiny. Its method stays as it is.
TINY_OPTIONS = {
    "dtype": "float32",
    "attn_implementation": "eager",
    "use_peft": False,
    "use_vllm": False,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 80,
    "learning_rate": 2e-4,
    "max_steps": 60,
    "reward_funcs": "examples.self_distillation_tasks.answer_reward",
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_pin_memory": False,
}


def say(language: str, template: dict[str, str], *numbers: int) -> str:
    return template[language].format(*(NUMBERS[language][number] for number in numbers))


def solve(language: str, digits: tuple[int, int, int], error: int = 0, first_sum: int | None = None) -> str:
    """A solution in two steps, the second of which is off by `error`; the first one may be told to be wrong, too."""
    a, b, c = digits
    first_sum = a + b if first_sum is None else first_sum
    steps = [say(language, STEP, a, b, first_sum), say(language, STEP, first_sum, c, first_sum + c + error)]
    return " ".join([*steps, say(language, ANSWER, first_sum + c + error)])


def solve_wordily(digits: tuple[int, int, int], generator: random.Random, first_sum: int | None = None) -> str:
    """An English solution in which four of five steps are announced, and as many checked."""
    sentences = re.findall(r"[^.]+\.", solve("en", digits, first_sum=first_sum))
    for number, step in enumerate(sentences[:2]):
        before = THINKING if generator.random() < 0.8 else ""
        after = CHECKING.format(step.strip()) if generator.random() < 0.8 else ""
        sentences[number] = " ".join(part for part in (before, step.strip(), after) if part)
    return " ".join(sentence.strip() for sentence in sentences)


def ask(language: str, digits: tuple[int, int, int], words: str = "") -> list[dict]:
    prompt = [{"role": "user", "content": say(language, QUESTION, *digits)}]
    return add_words(prompt, words) if words else prompt


def ask_crosslingually(digits: tuple[int, int, int]) -> list[dict]:
    return ask("en", digits, f"{CORRECT_SOLUTION.format(solution=solve('en', digits))} {IN_SPANISH}")


def split_questions(seed: int) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
    """Digits of the questions to train on, and of those to measure on."""
    questions = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    random.Random(seed).shuffle(questions)
    return questions[NUM_TEST:], questions[:NUM_TEST]


def student_examples(digits: tuple[int, int, int], generator: random.Random) -> list[tuple[list[dict], str]]:
    """Prompts and completions that the student learns for one question, each kind as often as it should."""
    error = generator.random() < 0.5
    verdict = "wrong" if error else "right"
    draft = CHECKED_DRAFT.format(draft=solve("es", digits, error), verdict=verdict)
    known = CORRECT_SOLUTION.format(solution=solve("es", digits))
    right = solve("es", digits)
    return [
        (ask("en", digits), solve_wordily(digits, generator)),
        (ask("en", digits, CONCISE), solve("en", digits)),
        (ask("es", digits), solve("es", digits, generator.random() < 0.5)),
        (ask("es", digits), solve("es", digits, generator.random() < 0.5)),
        (ask_crosslingually(digits), right),
        (ask("es", digits, draft), right),
        (ask("es", digits, known), right),
    ]


def teacher_examples(digits: tuple[int, int, int], generator: random.Random) -> list[tuple[list[dict], str]]:
    """What the larger teacher of `mixed_policy` learns: to rewrite, right where the trace is wrong, and to answer."""
    trace = solve_wordily(digits, generator, generator.choice([None, generator.randrange(19)]))
    return [
        (ask("en", digits, REWRITE.format(trace=trace)), solve("en", digits)),
        (ask("en", digits), solve("en", digits)),
    ]


def build_data(task: str, seed: int) -> DatasetDict:
    """Questions with their solutions, and for `crosslingual` with the teacher's prompts."""
    language = "en" if task in ("compression", "mixed_policy") else "es"

    def make_row(digits: tuple[int, int, int]) -> dict:
        row = {"prompt": ask(language, digits), "solution": NUMBERS[language][sum(digits)]}
        return {**row, "teacher_prompt": ask_crosslingually(digits)} if task == "crosslingual" else row

    splits = zip(("train", "test"), split_questions(seed), strict=True)
    return DatasetDict({name: Dataset.from_list([make_row(digits) for digits in part]) for name, part in splits})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word, number and punctuation mark of all that is written here."""
    generator = random.Random(0)
    examples = [
        pair
        for digits in ((0, 0, 0), (9, 9, 9))
        for pair in student_examples(digits, generator) + teacher_examples(digits, generator)
    ]
    texts = [THINKING, CHECKING, "system user assistant right wrong"] + [" ".join(words) for words in NUMBERS.values()]
    texts += [text for prompt, completion in examples for text in (prompt[-1]["content"], completion)]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})
    vocabulary = {token: id for id, token in enumerate([*SPECIAL_TOKENS, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        eos_token="<|im_end|>",
        extra_special_tokens={"turn_token": "<|im_start|>"},
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def build_model(path: Path, width: int, make_examples: Callable, seed: int, max_steps: int) -> None:
    """Trains a Qwen3 of two layers from scratch, with TRL's SFTTrainer, and saves it."""
    set_seed(seed)
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    model = Qwen3ForCausalLM._from_config(config, attn_implementation="eager")
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    generator = random.Random(seed)
    questions, _ = split_questions(seed)
    examples = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": completion}]}
        for _ in range(2)  # other words and other mistakes each time
        for digits in questions
        for prompt, completion in make_examples(digits, generator)
    ]
    args = SFTConfig(
        output_dir=str(path),
        max_steps=max_steps,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        max_length=None,
        logging_steps=100,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        seed=seed,
    )
    SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(examples), processing_class=tokenizer).train()
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def read_answer(text: str) -> str | None:
    found = re.findall(r"(?:answer is|respuesta es) (\w+)", text)
    return found[-1] if found else None


def answer_reward(completions: list[list[dict]], solution: list[str], **kwargs) -> list[float]:
    """1.0 where the answer of a completion is the solution."""
    texts = [completion[0]["content"] for completion in completions]
    return [float(read_answer(text) == right) for text, right in zip(texts, solution, strict=True)]


@torch.no_grad()
def measure(path: str | Path, split: Dataset) -> dict[str, float]:
    """Share of right answers and mean number of tokens, greedy, end tokens included."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    inputs = tokenizer.apply_chat_template(list(split["prompt"]), **options)
    sequences = model.generate(**inputs, do_sample=False, max_new_tokens=TINY_OPTIONS["max_completion_length"])
    completion_ids = sequences[:, inputs["input_ids"].size(1) :]
    texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    right = [read_answer(text) == solution for text, solution in zip(texts, split["solution"], strict=True)]
    num_tokens = (completion_ids != tokenizer.pad_token_id).sum(-1).float()
    return {"accuracy": sum(right) / len(right), "tokens": num_tokens.mean().item()}


def tiny_command(task: str, student: Path, teacher: Path, data: Path, output_dir: Path, seed: int) -> list[str]:
    """Arguments of `examples/train_gndpo.py` that run the recipe of a task on its models."""
    options = {**TINY_OPTIONS, "model_name_or_path": student, "dataset_name": data, "output_dir": output_dir}
    options.update(seed=seed, data_seed=seed)
    if task == "mixed_policy":
        options["teacher_model_name_or_path"] = teacher
    arguments = ["--config", RECIPES / f"{task}.yaml"]
    arguments += [part for key, value in options.items() for part in (f"--{key}", value)]
    return [str(part) for part in arguments]


def build_once(path: Path, build: Callable[[Path], None]) -> Path:
    """`path`, built if it is not there; an interrupted build is never taken for a finished one."""
    if not path.exists():
        print(f"Building {path}", flush=True)
        partial = path.with_name(f"{path.name}.partial")
        build(partial)
        partial.rename(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--seed", type=int, default=0, help="seed of the data, the models and the training")
    parser.add_argument("--estimator", choices=("sampled", "exact"), help="instead of what the recipe has")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/self_distillation"))
    parser.add_argument("--name", default="trained", help="name of the run, to tell several of a task apart")
    args, options = parser.parse_known_args()

    torch.set_num_threads(1)
    folder, seed = args.output_dir.resolve(), args.seed
    folder.mkdir(parents=True, exist_ok=True)
    data = build_once(
        folder / f"{args.task}-data-seed{seed}", lambda path: build_data(args.task, seed).save_to_disk(path)
    )
    student = build_once(
        folder / f"student-seed{seed}", lambda path: build_model(path, 64, student_examples, seed, max_steps=1200)
    )
    teacher = folder / f"teacher-seed{seed}"
    if args.task == "mixed_policy":
        build_once(teacher, lambda path: build_model(path, 96, teacher_examples, seed, max_steps=700))

    split = load_from_disk(data)["test"]
    output_dir = folder / f"{args.task}-{args.name}-seed{seed}"
    before = measure(student, split)
    # Models this small do not fill a core, and more threads only wait for each other.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    command = tiny_command(args.task, student, teacher, data, output_dir, seed)
    if args.estimator is not None:
        command += ["--estimator", args.estimator]
    subprocess.run([*launch, str(ROOT / "examples" / "train_gndpo.py"), *command, *options], cwd=ROOT, check=True)
    after = measure(output_dir, split)
    summary = {"task": args.task, "seed": seed, "before": before, "after": after}
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{args.task}, seed {seed}: right answers {before['accuracy']:.1%} -> {after['accuracy']:.1%}, ", end="")
    print(f"tokens {before['tokens']:.1f} -> {after['tokens']:.1f}")


if __name__ == "__main__":
    main()
