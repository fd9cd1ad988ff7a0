"""What the recipes in `recipes/self_distillation/` do with the student's samples, as functions that a recipe names.

Four write the teacher's prompts after sampling (`teacher_prompt_fn`). One samples in place of the trainer
(`rollout_func`). Prompts are messages; each function adds words to the last one. The words here are plain on purpose: put
your own in their place.
"""

import torch
from torch.distributed.tensor import DTensor
from trl.models import unwrap_model_for_generation


CONCISE = "Be concise."
CHECKED_DRAFT = (
    "A draft of the solution: {draft}\nA check says that its answer is {verdict}. Write a correct solution."
)
CORRECT_SOLUTION = "A correct solution: {solution}\nWrite a solution of your own."
REWRITE = "A solution: {trace}\nWrite it again, as short as possible."


def add_words(prompt: list[dict], words: str) -> list[dict]:
    """Messages with `words` at the end of the last one."""
    return [*prompt[:-1], {**prompt[-1], "content": f"{prompt[-1]['content']}\n\n{words}"}]


def is_correct(completion) -> bool:
    """Whether the first reward function gave a completion at least 1."""
    return next(iter(completion.rewards.values())) >= 1.0


def concise(rows, completions) -> list[list[dict]]:
    """The question, and that the answer should be concise."""
    return [add_words(row["prompt"], CONCISE) for row in rows]


def checked_draft(rows, completions) -> list[list[dict]]:
    """The question, the student's completion as a draft, and what the first reward function says of it."""
    verdicts = ["right" if is_correct(completion) else "wrong" for completion in completions]
    return [
        add_words(row["prompt"], CHECKED_DRAFT.format(draft=completion.text, verdict=verdict))
        for row, completion, verdict in zip(rows, completions, verdicts, strict=True)
    ]


def verified_draft(rows, completions) -> list[list[dict] | None]:
    """The question and a draft that the first reward function found right: the first in the completion's group, if any."""
    drafts = [next((other for other in each.group if is_correct(other)), None) for each in completions]
    return [
        draft and add_words(row["prompt"], CORRECT_SOLUTION.format(solution=draft.text))
        for row, draft in zip(rows, drafts, strict=True)
    ]


def shortest_correct(rows, completions) -> list[list[dict] | None]:
    """
    For the longest wrong completion of each group, the question and the group's shortest correct completion.

    All other completions get `None`. A teacher with the student's own weights then scores them 0.
    """
    prompts = []
    for row, completion in zip(rows, completions, strict=True):
        right = [other for other in completion.group if is_correct(other)]
        wrong = [other for other in completion.group if not is_correct(other)]
        if right and wrong and completion is max(wrong, key=lambda other: other.num_tokens):
            shortest = min(right, key=lambda other: other.num_tokens)
            prompts.append(add_words(row["prompt"], CORRECT_SOLUTION.format(solution=shortest.text)))
        else:
            prompts.append(None)
    return prompts


def rewritten(prompts, trainer) -> dict[str, list]:
    """
    Samples a trace of the student for each prompt, and the teacher's rewriting of it, which is what is trained on.

    The teacher, a model in the same process, writes after the trace and scores after the student's prompt: what is wrong in a
    trace it copies, and would then teach. A field `teacher_prompt` beside the others has it score after a prompt of its own,
    such as the question with `CONCISE`, if it is wordy by itself. In evaluation the student's own traces are returned. Raises
    `ValueError` if ZeRO-3 or FSDP shards the models.
    """
    if any(hasattr(weight, "ds_id") or isinstance(weight, DTensor) for weight in trainer.teacher.model.parameters()):
        raise ValueError(
            "`rollout_func` is `rewritten`, which samples from the teacher on each process by itself, but ZeRO-3 or FSDP "
            "shards it. Launch with DDP or ZeRO-2."
        )
    prompt_ids, traces = sample(trainer.model_wrapped, prompts, trainer)
    texts = trainer.processing_class.batch_decode(traces, skip_special_tokens=True)
    requests = [add_words(prompt, REWRITE.format(trace=text)) for prompt, text in zip(prompts, texts, strict=True)]
    completion_ids = traces
    if trainer.model.training:
        with trainer.teacher.on_device():
            _, completion_ids = sample(trainer.teacher.model, requests, trainer)
    return {"prompt_ids": prompt_ids, "completion_ids": completion_ids, "logprobs": None}


def sample(model, prompts, trainer) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts, and of one completion of a model for each, up to its first end token."""
    inputs = trainer.processing_class.apply_chat_template(
        prompts,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
        **trainer.chat_template_kwargs,
    ).to(trainer.accelerator.device)
    with unwrap_model_for_generation(model, trainer.accelerator) as unwrapped, torch.no_grad():
        sequences = unwrapped.generate(**inputs, generation_config=trainer.generation_config)
    prompt_ids = [
        ids[mask.bool()].tolist() for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ]
    completion_ids = sequences[:, inputs["input_ids"].size(1) :].tolist()
    for row, ids in enumerate(completion_ids):
        ends = [place for place, token in enumerate(ids) if token in trainer.eos_token_ids]
        completion_ids[row] = ids[: ends[0] + 1] if ends else ids
    return prompt_ids, completion_ids
