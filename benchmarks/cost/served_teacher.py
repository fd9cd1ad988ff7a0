"""
What a teacher behind a vLLM server saves and costs: wall time of a step beside that with the same teacher in the
process, and the bytes that cross the network for each token.

    python -m benchmarks.cost.served_teacher --build
    vllm serve runs/served_teacher/teacher --dtype float32 --enforce-eager --max-model-len 2048 --max-logprobs 65
    python -m benchmarks.cost.served_teacher --url http://localhost:8000 --top_k 16
    python -m benchmarks.cost.served_teacher --url http://localhost:8000 --answers 0 8 16 32 64

Random Qwen3 models and completions of random lengths; nothing is sampled, so that a step is scoring and loss alone. With
`--answers` there is no training: the server is asked for the likeliest tokens of the same completions, and its answers are
read, by the json of Python and, where it is installed, by orjson.
"""

import argparse
import importlib.util
import json
import time
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.teachers.served.questions import Question, ServedModel
from gndpo_trl.teachers.served.servers import VLLMServers


FOLDER = Path(__file__).parents[2] / "runs" / "served_teacher"
WIDTHS = {"student": (256, 4), "teacher": (512, 8)}  # hidden size, layers
VOCABULARY, PROMPT, COMPLETIONS, COMPLETION, STEPS = 8192, 128, 16, 512, 6


def build() -> None:
    backend = Tokenizer(models.WordLevel({f"w{id}": id for id in range(VOCABULARY)}, unk_token="w1"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", unk_token="w1", eos_token="w2")
    for name, (width, num_layers) in WIDTHS.items():
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=num_layers,
            num_attention_heads=width // 64,
            num_key_value_heads=width // 64,
            head_dim=64,
            eos_token_id=2,
        )
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(FOLDER / name)
        tokenizer.save_pretrained(FOLDER / name)


def measure(**teacher) -> dict[str, float]:
    """Median seconds of the steps, and bytes for each token of prompts and completions."""
    generator = torch.Generator().manual_seed(0)

    def rollout_func(prompts, trainer):
        def draw(length):
            return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()

        lengths = torch.randint(COMPLETION // 4, COMPLETION, (len(prompts),), generator=generator).tolist()
        rows = {"prompt_ids": [draw(PROMPT) for _ in prompts], "completion_ids": [draw(length) for length in lengths]}
        return {**rows, "logprobs": [[0.0] * length for length in lengths]}

    trainer = GNDPOTrainer(
        model=str(FOLDER / "student"),
        args=GNDPOConfig(
            str(FOLDER / "out"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=COMPLETIONS // 4,
            num_generations=1,
            max_completion_length=COMPLETION,
            max_steps=STEPS,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **teacher,
        ),
        train_dataset=Dataset.from_dict({"prompt": ["w3"] * COMPLETIONS * STEPS}),
        rollout_func=rollout_func,
    )
    responses = []
    if "teacher_server_url" in teacher:

        async def keep(response):
            responses.append(response)

        trainer.teacher.servers.client.event_hooks = {"response": [keep]}
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "step_time" in entry]
    num_tokens = history[-1]["num_tokens"]
    num_bytes = {
        "sent": sum(int(response.request.headers["content-length"]) for response in responses),
        "received": sum(response.num_bytes_downloaded for response in responses),
    }
    names = {"step": "step_time", "teacher": "time/teacher_scoring", "student": "time/student_scoring"}
    # Where the loss reads the student, there is no scoring of it.
    seconds = {name: median(entry.get(key, 0.0) for entry in history) for name, key in names.items()}
    return {**seconds, **{name: number / num_tokens for name, number in num_bytes.items()}}


def measure_answers(url: str, top_k: int) -> dict[str, float]:
    """Bytes for each token of prompts and completions, seconds for a thousand: of the server, and of reading its answer."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(3, VOCABULARY, (COMPLETIONS, PROMPT + COMPLETION // 2), generator=generator).tolist()
    servers = VLLMServers([url], 600.0)
    name = servers.ask("/v1/models")["data"][0]["id"]
    model = ServedModel(name, num_known=top_k + 1 if top_k else 0)
    questions = [Question(tuple(row), PROMPT) for row in rows]
    path, body = model.request(questions)
    seconds, num_tokens = {}, sum(map(len, rows))
    for _ in range(2):  # the first warms the server up
        start = time.perf_counter()
        answer = servers.ask(path, body)
        seconds["server"] = time.perf_counter() - start
    text = json.dumps(answer, separators=(",", ":"), ensure_ascii=False).encode()
    for parser in ("json", "orjson"):
        if importlib.util.find_spec(parser) is not None:
            seconds[parser] = best_of_three(lambda parser=parser: importlib.import_module(parser).loads(text))
    seconds["tensors"] = best_of_three(lambda: model.read(questions, answer, servers))
    per_thousand = {name: 1000 * value / num_tokens for name, value in seconds.items()}
    return {"sent": len(json.dumps(body)) / num_tokens, "received": len(text) / num_tokens, **per_thousand}


def best_of_three(function) -> float:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="make the models and leave")
    parser.add_argument("--url", help="of the server of the teacher")
    parser.add_argument(
        "--top_k", nargs="+", type=int, default=[], help="with the exact estimator, and so many tokens"
    )
    parser.add_argument("--answers", nargs="+", type=int, help="ask the server for so many tokens, and train nothing")
    args = parser.parse_args()
    if args.build:
        return build()
    if args.answers is not None:
        found = {top_k: measure_answers(args.url, top_k) for top_k in args.answers}
        names = list(next(iter(found.values())))
        print(f"| k | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
        for top_k, values in found.items():
            print(f"| {top_k} | {' | '.join(f'{values[name]:.3g}' for name in names)} |")
        return None
    print(
        "| teacher | step, s | of which waiting for the teacher | student's scoring | bytes sent per token | received |"
    )
    print("|---|---|---|---|---|---|")
    here, there = {"teacher_model_name_or_path": str(FOLDER / "teacher")}, {"teacher_server_url": [args.url]}
    arms = {"in the process": here}
    if args.url:
        arms["behind a server"] = there
        for top_k in args.top_k:
            arms[f"behind a server, exact, top {top_k}"] = {**there, "estimator": "exact", "teacher_top_k": top_k}
    for name, teacher in arms.items():
        found = measure(**teacher)
        seconds = " | ".join(f"{found[key]:.2f}" for key in ("step", "teacher", "student"))
        print(f"| {name} | {seconds} | {found['sent']:.1f} | {found['received']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
