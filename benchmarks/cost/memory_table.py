"""
Memory per GPU for the weights, gradients and optimizer state of student and teacher, by ZeRO stage, as a Markdown table.

    python -m benchmarks.cost.memory_table --gpus 8

Parameters are counted on models built from their configurations without weights; the student's states are DeepSpeed's
own estimates for mixed-precision Adam, the teacher's are its bf16 weights. Activations, generation (vLLM's or the KV
cache) and fragmentation come on top.
"""

import argparse

import torch
from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs
from transformers import AutoModelForImageTextToText, InternVLConfig


GIB = 2**30

# Text models of InternVL3.5 (Qwen3, with embeddings and LM head of their own): hidden and intermediate size, layers,
# heads.
TEXT_MODELS = {
    "1B": (1024, 3072, 28, 16),
    "2B": (2048, 6144, 28, 16),
    "4B": (2560, 9728, 36, 32),
    "8B": (4096, 12288, 36, 32),
}


def count_parameters(name: str) -> tuple[int, int]:
    """Parameters of InternVL3.5 of that size, and of its largest layer, the embedding."""
    hidden_size, intermediate_size, layers, heads = TEXT_MODELS[name]
    text = {
        "model_type": "qwen3",
        "vocab_size": 151_936,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    }
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    config = InternVLConfig(vision_config=vision, text_config=text, tie_word_embeddings=False)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters()), 151_936 * hidden_size


def student_bytes(stage: str, parameters: int, largest_layer: int, gpus: int) -> float:
    """Bytes per GPU of weights, gradients and Adam's two moments in mixed precision."""
    if stage == "DDP":  # all of it in fp32, computed under autocast
        return 16 * parameters
    if stage == "ZeRO-1":
        # DeepSpeed has no estimator for it. By its account of ZeRO-2: bf16 weights and gradients are whole, fp32
        # gradients, weights and moments are sharded.
        return 4 * parameters + 16 * parameters / gpus
    # The factor 1 leaves the buffers out, as they are left out of the other rows.
    if stage == "ZeRO-2":
        return estimate_zero2_model_states_mem_needs(
            parameters, num_gpus_per_node=gpus, cpu_offload=False, additional_buffer_factor=1
        )[1]
    offload = stage == "ZeRO-3 + offload"
    return estimate_zero3_model_states_mem_needs(
        parameters,
        largest_layer,
        num_gpus_per_node=gpus,
        cpu_offload=offload,
        cpu_offload_params=offload,
        additional_buffer_factor=1,
    )[1]


def teacher_bytes(stage: str, parameters: int, largest_layer: int, gpus: int) -> float:
    """Bytes per GPU of bf16 weights; at ZeRO-3 one shard, and the layer that is being computed."""
    if stage == "ZeRO-3":
        return 2 * parameters / gpus + 2 * largest_layer
    if stage == "ZeRO-3 + offload":
        return 2 * largest_layer
    return 2 * parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8, help="number of GPUs, over all nodes")
    parser.add_argument("--teacher", choices=TEXT_MODELS, default="8B")
    args = parser.parse_args()
    counts = {name: count_parameters(name) for name in TEXT_MODELS}
    students = [name for name in TEXT_MODELS if name != args.teacher]
    columns = [f"student {name} ({counts[name][0] / 1e9:.2f}e9)" for name in students]
    teacher_column = f"of which teacher {args.teacher} ({counts[args.teacher][0] / 1e9:.2f}e9)"
    print(f"| GiB per GPU, {args.gpus} GPUs | {' | '.join(columns)} | {teacher_column} |")
    print(f"|---{'|---' * (len(columns) + 1)}|")
    for stage in ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3 + offload"):
        teacher = teacher_bytes(stage, *counts[args.teacher], args.gpus)
        totals = [student_bytes(stage, *counts[name], args.gpus) + teacher for name in students]
        cells = [f"{total / GIB:.1f}" for total in [*totals, teacher]]
        print(f"| {stage} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
