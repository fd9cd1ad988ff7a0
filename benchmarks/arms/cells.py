"""What is compared, as plain data: the arms, the tasks, and the regimes in which they are run."""

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Arm:
    """
    One way to train.

    Attributes:
        trainer: `"gndpo"`, or a peer: `"distillation"` (TRL's `DistillationTrainer`: reverse KL over the whole
            vocabulary), `"sft"` (TRL's `SFTTrainer` on completions that the teacher sampled for the same prompts),
            `"gspo"` (`GSPOTrainer` on the accuracy of the answer, without a teacher).
        options: Fields of its configuration that differ from the recipe's.
        transform: What makes the advantages in the place of GNDPO's normalization, see `transforms.py`.
    """

    trainer: str = "gndpo"
    options: dict[str, Any] = field(default_factory=dict)
    transform: str | None = None


ARMS = {
    # In the package.
    "global": Arm(),
    "none": Arm(options={"advantage_normalization": "none"}),
    "raw": Arm(options={"advantage_normalization": "none", "score_clip": None}),
    "global-unclamped": Arm(options={"score_clip": None}),
    "global-clip-1": Arm(options={"score_clip": 1.0}),
    "global-clip-0.3": Arm(options={"score_clip": 0.3}),
    "group": Arm(options={"advantage_normalization": "group"}),
    "sequence": Arm(options={"advantage_normalization": "sequence"}),
    "global-dapo": Arm(options={"loss_type": "dapo"}),
    "none-dapo": Arm(options={"advantage_normalization": "none", "loss_type": "dapo"}),
    "expected": Arm(options={"score_baseline": "expected"}),
    "expected-none": Arm(options={"score_baseline": "expected", "advantage_normalization": "none"}),
    "expected-sequence": Arm(options={"score_baseline": "expected", "advantage_normalization": "sequence"}),
    "exact": Arm(options={"estimator": "exact"}),
    "exact-top-8": Arm(options={"estimator": "exact", "teacher_top_k": 8}),
    "exact-top-16": Arm(options={"estimator": "exact", "teacher_top_k": 16}),
    "exact-none": Arm(options={"estimator": "exact", "advantage_normalization": "none"}),
    "exact-sequence": Arm(options={"estimator": "exact", "advantage_normalization": "sequence"}),
    "exact-dapo": Arm(options={"estimator": "exact", "loss_type": "dapo"}),
    "exact-dapo-raw": Arm(options={"estimator": "exact", "loss_type": "dapo", "score_clip": None}),
    "power-0.5": Arm(options={"score_power": 0.5}),
    "power-1": Arm(options={"score_power": 1.0}),
    "power-1-global": Arm(options={"score_power": 1.0, "advantage_normalization": "global"}),
    "discount-0.5": Arm(options={"score_discount": 0.5}),
    "discount-0.9": Arm(options={"score_discount": 0.9}),
    "extrapolation-1.25": Arm(options={"extrapolation": 1.25}),
    "extrapolation-1.5": Arm(options={"extrapolation": 1.5}),
    # In the benchmark alone.
    "scale": Arm(transform="scale"),
    "center": Arm(transform="center"),
    "scale-sequence": Arm(transform="scale-sequence"),
    "center-sequence": Arm(transform="center-sequence"),
    "robust": Arm(transform="robust"),
    "running": Arm(transform="running"),
    "tanh": Arm(transform="tanh"),
    # Peers.
    "distillation": Arm("distillation"),
    "sft": Arm("sft"),
    "gspo": Arm("gspo"),
    # Nothing trained: what a run starts from, and what it is to reach.
    "student": Arm("student"),
    "teacher": Arm("teacher"),
}


@dataclass(frozen=True)
class Task:
    """
    Arithmetic on handwritten digits.

    Attributes:
        train_rows, test_rows: Rows of the splits; no run sees a scan of the test split.
        max_new_tokens: Length after which a completion is cut off.
        steps: Of every run.
        eval_steps: Number of steps between two evaluations.
        trained: Whether teacher and student have learned anything before.
    """

    train_rows: int = 10_000
    test_rows: int = 500
    max_new_tokens: int = 32
    steps: int = 200
    eval_steps: int = 50
    trained: bool = True


# `digits` is the demo's task, `examples/digits_data.py`; `chain` is that of `chain_data.py`.
TASKS = {"digits": Task(), "chain": Task(max_new_tokens=160, steps=150)}

SMOKE_TASKS = {
    name: replace(task, train_rows=64, test_rows=8, steps=2, eval_steps=2, trained=False)
    for name, task in TASKS.items()
}


@dataclass(frozen=True)
class Regime:
    """
    What is made hard about a run; the defaults are those of `recipes/digits/gndpo.yaml`.

    Attributes:
        options: Fields of the configuration of every arm.
        prompts, num_generations: Of a generation batch, which is the batch of one optimizer step.
        teacher: `"teacher"`; `"outliers"`, the same but sure of a random token at two of a hundred positions;
            `"four-bit"`, the same with the weights of its linear layers in 4 bits; `"other-end"`, the same but ending its
            turn with another token than the student; or `"student"`, the student itself with its weights in bfloat16, so
            that scores are rounding errors.
        staleness: Number of optimizer steps since the weights that sample a batch were those of the student.
    """

    options: dict[str, Any] = field(default_factory=dict)
    prompts: int = 16
    num_generations: int = 4
    teacher: str = "teacher"
    staleness: int = 0


SMOKE_REGIME = {"prompts": 2, "num_generations": 2}

# Clipping is turned off by a limit that nothing reaches, so that the norm is measured all the same.
REGIMES = {
    "demo": Regime(),
    "unclipped": Regime(options={"max_grad_norm": 1e9}),
    "sgd": Regime(options={"optim": "sgd"}),
    "sgd-unclipped": Regime(options={"optim": "sgd", "max_grad_norm": 1e9}),
    "outliers": Regime(teacher="outliers"),
    "outliers-unclipped": Regime(teacher="outliers", options={"max_grad_norm": 1e9}),
    "one-prompt": Regime(prompts=1),
    "four-prompts": Regime(prompts=4),
    "many-prompts": Regime(prompts=64),
    "four-bit-teacher": Regime(teacher="four-bit"),
    "other-end": Regime(teacher="other-end"),
    "stale-1": Regime(staleness=1),
    "stale-2": Regime(staleness=2),
    "stale-4": Regime(staleness=4),
    "stale-8": Regime(staleness=8),
    "own-teacher": Regime(teacher="student"),
    "own-teacher-floor": Regime(teacher="student", options={"std_floor": 0.1}),
}


@dataclass(frozen=True, order=True)
class Cell:
    """One run. Two cells that are equal are the same run."""

    task: str
    regime: str
    arm: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.regime}-{self.arm}-lr{self.learning_rate:g}-seed{self.seed}"
