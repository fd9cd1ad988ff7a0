"""
Warnings about a run that goes on but is no longer learning from its teacher, each with what to do about it.

They look at nothing but the logs, and at the beginning at the configuration, where that makes a metric something else than
its name says. `docs/metrics.md` says what each metric means and what is healthy.
"""

import warnings
from collections.abc import Callable

from transformers import TrainerCallback, TrainerControl, TrainerState

from .config import GNDPOConfig
from .grpo.sampling import shaping_options


# Optimizer steps that a mean is taken over, so that no odd batch gives a warning: the latest, or the first of the run.
WINDOW = 10

# Standard deviation of the scores, in nats. Log-probs in bfloat16 are off by hundredths of a nat (docs/step_cost.md has up
# to 0.17), so that below it the scores are mostly rounding, which whitening blows up twentyfold and more.
NOISE_STD = 0.05

# Standard deviation of advantages whose squares are 0 in float32, and with them the norm of the gradient.
UNDERFLOW = 1e-20

# Fraction of the tokens that the clamp changes. At the default of 5 nats, this many add 2.5 to the variance of the scores,
# more than all other tokens usually have: the clamp then decides what the unit of an advantage is. In the digits demo,
# whose student is wrong about half of its sums, it is 0.04 at most.
MANY_CLAMPED = 0.1

# Score of ends in nats: the teacher finds them a tenth less likely than the student. And how much longer completions are.
UNWANTED_END = -0.1
LONGER = 1.2

# Share of the sum of absolute advantages that a hundredth of the tokens has. It is 0.04 where advantages are normal, 0.06
# where they fall off exponentially, and 0.2 where they do so on a fifth of the tokens and are zero elsewhere. Whitened, it
# is hardly ever above 0.5, since the mean gives back to all others what a few have. Fewer than 100 tokens have no
# hundredth.
HANDFUL_SHARE = 0.4
HANDFUL_TOKENS = 100

# Share of the entropy at the beginning that is left. Students of a sure teacher lose half of it or more.
ENTROPY_LEFT = 0.1

# Share of a step's time. A teacher of the student's size takes about a fifth of what is not sampling; at more than half of
# the whole, making the teacher faster pays more than anything else.
TEACHER_SHARE = 0.5

# How many times as far the sampler is from the training engine as in the beginning, and the mean difference, in nats,
# below which it matters to no ratio.
DRIFT_FACTOR = 3
DRIFT = 0.01

# Share of completions that end in a loop. Trained models get into some; a student that is being ruined does so more and more.
MANY_LOOPS = 0.1

# Mean change of a sampled token's log-prob, in nats, between the student that sampled and the one that learns.
FAR_AHEAD = 0.05

# Entries of the log of training, each with its "step".
History = list[dict[str, float | None]]


class RunWarnings(TrainerCallback):
    """
    Gives each warning of `CHECKS` once in a run, on the main process, from the tenth step on; what the configuration alone
    tells, before the first; and of a shorter run, at its end, whether anything was learned.
    """

    def __init__(self):
        self._given: set[Callable] = set()

    def on_train_begin(self, args: GNDPOConfig, state: TrainerState, control: TrainerControl, **kwargs):
        self._given.clear()
        message = check_sampling(args)
        if state.is_world_process_zero and message is not None:
            warnings.warn(message)

    def on_log(self, args: GNDPOConfig, state: TrainerState, control: TrainerControl, **kwargs):
        # Evaluations and the summary at the end have no "loss".
        if not state.is_world_process_zero or "loss" not in state.log_history[-1] or state.global_step < WINDOW:
            return
        history = [entry for entry in state.log_history if "loss" in entry]
        for check in CHECKS:
            if check not in self._given and (message := check(history, args)) is not None:
                self._given.add(check)
                warnings.warn(message)

    def on_train_end(self, args: GNDPOConfig, state: TrainerState, control: TrainerControl, **kwargs):
        history = [entry for entry in state.log_history if "loss" in entry]
        if not state.is_world_process_zero or not history or state.global_step >= WINDOW:
            return
        message = check_nothing(history, args)
        if message is None and latest(history, "grad_norm") == 0:
            message = check_noise(history, args)
        if message is not None:
            warnings.warn(message)


def check_sampling(args: GNDPOConfig) -> str | None:
    """Completions come from another distribution than the one that is scored."""
    options = shaping_options(args)
    if not options:
        return None
    names = ", ".join(f"`{name}` ({value!r})" for name, value in options.items())
    return (
        f"{names} makes the student sample from another distribution than its own, while the tokens are scored under its own: "
        "`reverse_kl` and `score/mean` are then means over what was sampled, no estimates of the divergence between student "
        "and teacher (off by a factor of two is usual), and the gradient is that of these tokens. Compare them among runs "
        'with the same options alone, or leave these at their defaults; with `estimator="exact"` or `score_baseline="expected"`, '
        "`score/expected` is an expectation under the whole distributions of the student in any case."
    )


def mean(entries: History, name: str) -> float | None:
    """Mean of a metric, or `None` where no entry has a number."""
    values = [entry[name] for entry in entries if entry.get(name) is not None]
    return sum(values) / len(values) if values else None


def latest(history: History, name: str) -> float | None:
    """Mean of a metric over the latest steps."""
    return mean([entry for entry in history if entry["step"] > history[-1]["step"] - WINDOW], name)


def first_and_latest(history: History, name: str) -> tuple[float, float] | None:
    """Means of a metric over the first and over the latest steps of the run; `None` while these overlap."""
    start, now = history[0]["step"], history[-1]["step"]
    if now - start < 2 * WINDOW:
        return None
    first, last = mean([entry for entry in history if entry["step"] < start + WINDOW], name), latest(history, name)
    return None if first is None or last is None else (first, last)


def check_nothing(history: History, args: GNDPOConfig) -> str | None:
    """No step changes anything, or none has anything of the teacher in it."""
    rate, norm = latest(history, "learning_rate"), latest(history, "grad_norm")
    if rate == 0:
        return (
            "`learning_rate` was 0 in the latest steps, so that the student stays as it is. Raise it, or look at "
            f"`lr_scheduler_type` ({args.lr_scheduler_type}) and the steps of its warmup."
        )
    if latest(history, "advantages/num_tokens") == 0:
        return f"No token is learned from: {why_no_token(history, args)}"
    if norm == 0 and check_noise(history, args) is None:  # which says it already
        return f"The gradient is 0, so that nothing is learned: {why_no_gradient(history, args)}"
    return None


def why_no_token(history: History, args: GNDPOConfig) -> str:
    unknown = latest(history, "teacher/unknown_tokens")
    if unknown:
        return (
            f"the teacher knows the log-prob of none (`teacher/unknown_tokens` is {unknown:.0f}, and `advantages/num_tokens` "
            "0). Look at the log of the teacher's server, or at what your `Teacher` returns."
        )
    if args.mask_truncated_completions and latest(history, "completions/clipped_ratio") == 1:
        return (
            f"all completions are cut off at `max_completion_length` ({args.max_completion_length}), and "
            "`mask_truncated_completions` leaves them out. Raise the one or unset the other, and see whether the student ends "
            "its turns with the teacher's token."
        )
    if latest(history, "completions/max_length") == 0:
        return "all completions are empty. Look at the prompts, and at what samples them."
    return (
        "all of them are masked (`advantages/num_tokens` is 0). Look at the masks of your `rollout_func`, tools or environment, "
        f"and at the sampler's correction (`vllm_importance_sampling_mode`, {args.vllm_importance_sampling_mode!r})."
    )


def why_no_gradient(history: History, args: GNDPOConfig) -> str:
    score_std, advantage_std = latest(history, "score/std"), latest(history, "advantages/std")
    if advantage_std is not None and advantage_std > UNDERFLOW:
        return (
            "there are advantages, but none reaches a parameter that is trained. Look at which have `requires_grad`, whether "
            "adapters are active, and at the dtype."
        )
    if score_std == 0:
        return (
            f"all scores are {latest(history, 'score/mean'):.2g}. If that is 0, the teacher is the student itself and reads the "
            "same prompt: look at `teacher_model` and `teacher_prompt`."
        )
    if score_std is None or latest(history, "advantages/undefined"):
        return (
            f'with `advantage_normalization="{args.advantage_normalization}"`, no completion has two tokens to be compared '
            'with (`advantages/undefined`). Set it to "global", have more completions in a generation batch, or raise '
            "`max_completion_length`."
        )
    return (
        f"the advantages are 0 as well, though the scores have a standard deviation of {score_std:.2g} nats. Look at "
        f"`std_floor` ({args.std_floor}), which they are divided by, and at `distillation_coef` ({args.distillation_coef})."
    )


def check_noise(history: History, args: GNDPOConfig) -> str | None:
    """The student has become its teacher, and whitening turns what is left into advantages of the usual size."""
    std = latest(history, "score/std")
    # Adam makes up for any factor of the gradient.
    floor = 0.0 if "adam" in str(args.optim).lower() else args.std_floor
    if args.advantage_normalization == "none" or std is None or max(std, floor) >= NOISE_STD:
        return None
    return (
        f"The scores have a standard deviation of {std:.2g} nats, hardly more than rounding errors, so that student and "
        f'teacher are as good as the same, and `advantage_normalization="{args.advantage_normalization}"` divides by it: '
        'the student is trained on noise. End the run; if it has to go on, `estimator="exact"` drifts least. A larger '
        f"`std_floor` (it is {args.std_floor}) helps with SGD alone: Adam makes up for a smaller gradient. If the run has "
        "just begun, look whether `teacher_model` is what you meant, and whether a teacher that is the student itself "
        "reads another prompt (`teacher_prompt`)."
    )


def check_clamp(history: History, args: GNDPOConfig) -> str | None:
    """The clamp decides much of what is learned."""
    low, high = latest(history, "score/clamped_low"), latest(history, "score/clamped_high")
    if low is None or high is None or low + high <= MANY_CLAMPED:
        return None
    return (
        f"`score_clip` ({args.score_clip}) clamps {low + high:.0%} of the tokens ({low:.0%} that the teacher finds less "
        f"likely, {high:.0%} more likely), so that how much it dislikes or likes them is lost. Few scores are so large where "
        "both models read the same: compare their chat templates, their prompts and their ends of turn, and look at the "
        "tokens. If the two really differ so much, raise `score_clip`, or train the student on the teacher's completions "
        "first."
    )


def check_length(history: History, args: GNDPOConfig) -> str | None:
    """Completions get longer because the teacher does not want them to end."""
    eos = latest(history, "score/eos")
    ended = first_and_latest(history, "completions/mean_terminated_length")
    # Where it falls, longer ones have begun to end before the limit.
    lengths = first_and_latest(history, "completions/mean_length")
    if eos is None or ended is None or lengths is None:
        return None
    if eos >= UNWANTED_END or ended[1] <= LONGER * ended[0] or lengths[1] <= lengths[0]:
        return None
    return (
        f"Completions that end have grown from {ended[0]:.0f} to {ended[1]:.0f} tokens, and the teacher still finds their "
        f"ends less likely than the student (`score/eos` {eos:.2g} nats): expect them to reach `max_completion_length` "
        f"({args.max_completion_length}). See whether both models end a turn with the same token, and whether the teacher's "
        "prompt asks for longer answers. If they should be as long, raise `max_completion_length`; otherwise set "
        "`mask_truncated_completions=True`, so that what is cut off is not learned from."
    )


def check_handful(history: History, args: GNDPOConfig) -> str | None:
    """A handful of tokens is all that the gradient sees."""
    share, count = latest(history, "advantages/share_top_1_percent"), latest(history, "advantages/num_tokens")
    if share is None or share <= HANDFUL_SHARE or count < HANDFUL_TOKENS:
        return None
    if args.score_power != 0:
        clamp = ""  # scores are bounded already
    elif args.score_clip is None:
        clamp = "set `score_clip` to 5.0; "
    else:
        clamp = f"lower `score_clip` ({args.score_clip}); "
    return (
        f"One token in a hundred has {share:.0%} of the sum of absolute advantages, so that the gradient is that of a "
        f"handful of tokens, and noisy. Look at which they are; {clamp}have more prompts in a generation batch "
        '(`gradient_accumulation_steps`); or, with a teacher in this process, set `score_baseline="expected"` or '
        '`estimator="exact"`.'
    )


def check_entropy(history: History, args: GNDPOConfig) -> str | None:
    """The student hardly samples any more: all of its completions become alike."""
    entropies = first_and_latest(history, "entropy")
    if entropies is None or entropies[1] >= ENTROPY_LEFT * entropies[0]:
        return None
    return (
        f"The student's entropy has fallen from {entropies[0]:.2g} to {entropies[1]:.2g} nats per token, so that its "
        "completions become alike. If `reverse_kl` has fallen as well and samples read well, the teacher is as sure of "
        f"itself and all is in order. If not, or if they repeat themselves, lower `learning_rate` ({args.learning_rate:g}), "
        "set `entropy_coef`, or go back to an earlier checkpoint."
    )


def check_loops(history: History, args: GNDPOConfig) -> str | None:
    """Many completions go round in circles until they are cut off."""
    share = latest(history, "completions/repeating_ratio")
    if share is None or share <= MANY_LOOPS:
        return None
    learned = (
        "which are left out of the loss"
        if args.mask_repeating_completions
        else "and the teacher finds what has been said three times likely the fourth time, so that they count as good"
    )
    remedy = (
        "" if args.mask_repeating_completions else "set `mask_repeating_completions: true`, which leaves them out; "
    )
    return (
        f"{share:.0%} of the completions end in a loop, saying the same until they stop or are cut off, {learned}. Look at some; "
        f"{remedy}lower `learning_rate` ({args.learning_rate:g}) or go back to an earlier checkpoint if they have become more; "
        f"lower `max_completion_length` ({args.max_completion_length}) if the answers need fewer tokens; and if the student "
        "came with them, train it on the teacher's completions first."
    )


def check_teacher_time(history: History, args: GNDPOConfig) -> str | None:
    """Most of the time goes to the teacher."""
    scoring, step = latest(history, "time/teacher_scoring"), latest(history, "step_time")
    if scoring is None or not step:
        return None
    # The teacher is timed for a generation batch, which may serve several optimizer steps, or be a part of one.
    scoring *= args.gradient_accumulation_steps / (args.steps_per_generation * args.num_iterations)
    if scoring <= TEACHER_SHARE * step:
        return None
    return (
        f"The teacher takes {scoring:.1f} of the {step:.1f} seconds of a step. Let it have larger forward passes "
        f"(`scoring_token_budget`, now {args.scoring_token_budget}) and a smaller dtype (`teacher_model_init_kwargs`: "
        "bfloat16, or 8 bits), or its own machine (`teacher_server_url`), where it scores while the student is scored."
    )


def check_drift(history: History, args: GNDPOConfig) -> str | None:
    """vLLM samples from another and another distribution than the one that is trained."""
    differences = first_and_latest(history, "sampling/logp_difference/mean")
    if differences is None or differences[1] <= max(DRIFT_FACTOR * differences[0], DRIFT):
        return None
    return (
        f"vLLM's log-probs of the tokens that it sampled were {differences[0]:.2g} nats from the training engine's on "
        f"average, and are {differences[1]:.2g} now: the two drift apart, and the student learns from completions that are "
        "not its own (`sampling_logp_threshold` looks at the first batches alone). See whether all weights reach vLLM "
        "(adapters, tied and quantized weights), and at the dtype of both; `vllm_importance_sampling_correction=True` "
        "corrects for what is left."
    )


def check_lead(history: History, args: GNDPOConfig) -> str | None:
    """The student has become another one by the time that it learns from what it sampled."""
    change, behind = latest(history, "sampling/policy_change/mean"), latest(history, "sampling/staleness")
    if change is None or change <= FAR_AHEAD:
        return None
    return (
        f"Completions are sampled with the weights of {behind:.2g} optimizer step{'' if behind == 1 else 's'} ago, after which "
        f"the student finds their tokens {change:.2g} nats more or less likely on average, more than {FAR_AHEAD:g}: what it "
        f"learns from is no longer its own. Lower `learning_rate` ({args.learning_rate:g}) or `sampling_lead` "
        f"({args.sampling_lead})"
        + ("." if args.estimator == "exact" else ', or set `estimator="exact"`, which bears more of it.')
    )


CHECKS = (
    check_nothing,
    check_noise,
    check_clamp,
    check_length,
    check_handful,
    check_entropy,
    check_loops,
    check_teacher_time,
    check_drift,
    check_lead,
)
