"""
What a teacher behind a vLLM server saves and costs: wall time of a step beside that with the same teacher in the
process, and the bytes that cross the network for each token.

    python -m benchmarks.cost.served_teacher --build
    vllm serve runs/served_teacher/teacher --dtype float32 --enforce-eager --max-model-len 2048
    python -m benchmarks.cost.served_teacher --url http://localhost:8000

Random Qwen3 models and completions of random lengths; nothing is sampled, so that a step is scoring and loss alone.
"""

import argparse
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from gndpo_trl import GNDPOConfig, GNDPOTrainer


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
    num_bytes = {"sent": 0, "received": 0}
    if "teacher_server_url" in teacher:

        def count(response, **kwargs):
            num_bytes["sent"] += len(response.request.body)
            num_bytes["received"] += len(response.content)

        trainer.teacher.servers.session.hooks["response"].append(count)
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "step_time" in entry]
    num_tokens = history[-1]["num_tokens"]
    names = {"step": "step_time", "teacher": "time/teacher_scoring", "student": "time/student_scoring"}
    seconds = {name: median(entry[key] for entry in history) for name, key in names.items()}
    return {**seconds, **{name: number / num_tokens for name, number in num_bytes.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="make the models and leave")
    parser.add_argument("--url", help="of the server of the teacher")
    args = parser.parse_args()
    if args.build:
        return build()
    print(
        "| teacher | step, s | of which waiting for the teacher | student's scoring | bytes sent per token | received |"
    )
    print("|---|---|---|---|---|---|")
    arms = {"in the process": {"teacher_model_name_or_path": str(FOLDER / "teacher")}}
    if args.url:
        arms["behind a server"] = {"teacher_server_url": [args.url]}
    for name, teacher in arms.items():
        found = measure(**teacher)
        seconds = " | ".join(f"{found[key]:.2f}" for key in ("step", "teacher", "student"))
        print(f"| {name} | {seconds} | {found['sent']:.1f} | {found['received']:.1f} |")


if __name__ == "__main__":
    main()
