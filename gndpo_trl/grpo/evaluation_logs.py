"""Names of evaluations in the logs, and which way their metrics are better."""

import re
from collections.abc import Iterator
from typing import Any

from transformers import Trainer, TrainingArguments


# Metrics of which it is known which way they are better, `{name}` being any: TRL's here, its own ones in `GNDPOConfig`.
# Whether more is better of lengths, entropy and what rewards log depends on the task.
LESS_IS_BETTER = ("kl", "completions/clipped_ratio", "frac_reward_zero_std", "tools/failure_frequency")
GREATER_IS_BETTER = ("reward", "rewards/{name}/mean")

# Learning rates that wait for a metric to get better.
WAITING_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


class EvaluationLogsMixin(Trainer):
    """
    Logs all metrics of an evaluation under the names that transformers gives its own: `eval_{name}`, `eval_{set}_{name}`
    for each of several sets, and `{prefix}_{name}` with `evaluate(metric_key_prefix=prefix)`.

    TRL logs `eval_{name}` for every set, so that each overwrites the one before. This class stands below
    [`~trl.GRPOTrainer`], where TRL has added its metrics to the logs and nobody has read them yet.
    """

    _evaluation_name = "eval"
    _are_metrics_logged = False  # of the log that TRL is at

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        self._evaluation_name = metric_key_prefix
        self._metrics["eval"].clear()  # those of a prediction, which logs nothing
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def log(self, logs, start_time=None):
        if self._log_name(logs) == self._evaluation_name:
            for metric in self._metrics["eval"]:
                logs[f"{self._evaluation_name}_{metric}"] = logs.pop(f"eval_{metric}")
        super().log(logs, start_time)
        self._are_metrics_logged = True

    def _log_name(self, logs: dict[str, Any]) -> str | None:
        """`"train"`, or the name of the evaluation that is being logged; `None` for what a user logs beside them."""
        if "loss" in logs or "train_runtime" in logs:
            return "train"
        return self._evaluation_name if f"{self._evaluation_name}_runtime" in logs else None


def is_greater_better(args: TrainingArguments) -> bool | None:
    """Whether more is better of `metric_for_best_model`; `None` where that is not known."""
    name = args.metric_for_best_model.removeprefix("eval_")
    for is_better, metrics in ((False, args._less_is_better), (True, args._greater_is_better)):
        for metric in metrics:
            pattern = re.escape(metric).replace(re.escape("{name}"), ".+")
            if re.fullmatch(rf"(.+_)?{pattern}", name):  # perhaps after the name of an evaluation set
                return is_better
    return None


def best_model_problems(args: TrainingArguments) -> Iterator[str]:
    """Ways of choosing the best model that would choose another one."""
    metric, is_better = args.metric_for_best_model, args.greater_is_better
    known = ", ".join(f"`{name}`" for name in (*args._less_is_better, *args._greater_is_better))
    if metric is None:
        users = {
            "`load_best_model_at_end` is True": args.load_best_model_at_end,
            '`save_strategy` is "best"': args.save_strategy == "best",
            f"`lr_scheduler_type` is {str(args.lr_scheduler_type)!r}": args.lr_scheduler_type in WAITING_SCHEDULES,
        }
        for reason in (reason for reason, applies in users.items() if applies):
            yield (
                f"{reason}, but `metric_for_best_model` is not set. transformers' own, the loss, is no measure of progress "
                f"where advantages have a mean of 0. Set it to a metric of evaluation: {known}, or another with "
                "`greater_is_better`."
            )
        return
    found = is_greater_better(args)
    if found is None and is_better is None:
        reason = (
            "is no measure of progress where advantages have a mean of 0"
            if metric.endswith("loss")
            else "may be either"
        )
        yield (
            f"`metric_for_best_model` is {metric!r}, which {reason}. Set `greater_is_better` to True or False, or take a "
            f"metric of which that is known: {known}."
        )
    if found is not None and is_better is not None and is_better != found:
        yield (
            f"`greater_is_better` is {is_better}, but of {metric!r}, the `metric_for_best_model`, "
            f"{'more' if found else 'less'} is better: the worst checkpoint would be taken for the best. Leave it out."
        )


def check_best_metric(args: TrainingArguments, eval_dataset: Any) -> None:
    """Raise `ValueError` if `metric_for_best_model` is of none of several evaluation sets."""
    metric = args.metric_for_best_model
    if metric is None or not isinstance(eval_dataset, dict):
        return
    name = metric.removeprefix("eval_")
    if not any(name.startswith(f"{key}_") for key in eval_dataset):
        first = next(iter(eval_dataset), "set")
        raise ValueError(
            f"`metric_for_best_model` is {metric!r}, but `eval_dataset` has several sets ({', '.join(map(str, eval_dataset))}),"
            f" whose metrics have names of their own. Say which one counts, as in 'eval_{first}_{name}'."
        )
