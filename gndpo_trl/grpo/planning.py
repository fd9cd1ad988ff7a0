"""Which rows share a forward pass, and whether a model computes the same where they share their prompts there."""

from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather
from trl import GRPOTrainer

from .branch_attention import IMPLEMENTATION, core_of, has_dropout, reason_against
from .head_check import computes_exactly
from .microbatches import plan_by_length, select_rows
from .modes import evaluating
from .passes import Passes
from .shared_prompts import WORTHWHILE, Plan, same_prompts
from .trl_hooks import MULTIMODAL_KEYS


logger = get_logger(__name__)

# Tokens of a completion that the numeric comparison looks at, and how far log-probs may be apart there, on average, in
# nats: what float32 loses, and what bfloat16, float16 and TF32 do.
PROBE_TOKENS = 8
PROBE_LIMIT, PROBE_LIMIT_HALF = 1e-4, 0.1


class PassPlanner:
    """
    Plans the forward passes of a [`~trl.GRPOTrainer`]: rows of similar length in one, or rows that share their prompts.

    A model takes part in sharing if nothing in its structure speaks against it and if it gives the log-probs of separate
    rows on a few tokens of the first batch that it sees; that is found out on all ranks together. Else it keeps separate
    rows, and the log says why; with `share_prompts=True` that is an error.

    Args:
        passes ([`Passes`]): Runs the passes of that comparison.
        share_prompts (`bool` or `None`): See [`sharing_in_run`].
        has_aux_loss (`bool`): Whether the loss has a router's auxiliary loss.

    Attributes:
        reasons (`dict`): For each model, unwrapped, why it keeps separate rows; `None` if it does not.
        reasons_in_loss (`dict`): The same for the loss, of models that share prompts elsewhere.
    """

    def __init__(self, passes: Passes, share_prompts: bool | None, has_aux_loss: bool):
        self.passes, self.share_prompts, self.has_aux_loss = passes, share_prompts, has_aux_loss
        self.reasons: dict[torch.nn.Module, str | None] = {}
        self.reasons_in_loss: dict[torch.nn.Module, str | None] = {}

    def plan_scoring(
        self, model, rows: dict[str, Any], num_passes: int | None = None, token_budget: int | None = None
    ) -> tuple[list[list[int]], list[int] | None]:
        """
        Passes that score rows, and the numbers of their prompts, or `None` for separate rows. All ranks call it together.

        Args:
            rows (`dict`): The rows of this rank, with `prompt_ids` and so on.
            num_passes (`int`, *optional*): Number of passes over separate rows; those over shared prompts may be others.
            token_budget (`int`, *optional*): Largest pass in padded tokens. Give either this or `num_passes`.
        """
        lengths = row_lengths(rows)
        if self.passes.keeps_padding:  # what will be computed
            lengths = torch.full_like(lengths, rows["prompt_mask"].size(1) + rows["completion_mask"].size(1))
        groups, costs = plan_by_length(lengths, num_groups=num_passes, token_budget=token_budget, gather=gather)
        largest_pass = max(costs) if token_budget is None else token_budget
        return self._plan_sharing(model, [rows], costs, largest_pass) or (groups, None)

    def plan_loss(self, model, batches: list[dict[str, Any]]) -> list[list[int]]:
        """Rows of as many micro-batches as there are, counted through all `batches`. All ranks call it together."""
        lengths = torch.cat([row_lengths(batch) for batch in batches])
        groups, costs = plan_by_length(lengths, num_groups=len(batches), gather=gather)
        shared = self._plan_sharing(model, batches, costs, max(costs), in_loss=True)
        return groups if shared is None else shared[0]

    def prompts_of_micro_batch(self, model, rows: dict[str, Any]) -> list[int] | None:
        """Numbers of the prompts of a micro-batch of the loss if its rows shall share them. Each rank decides for itself."""
        # Not only where a plan has asked before: a run that goes on from a checkpoint has made none yet.
        if self.share_prompts is False or not self.can_share(model, rows, in_loss=True):
            return None
        prompts = same_prompts([rows])
        prompt_lengths, completion_lengths = rows["prompt_mask"].sum(-1), rows["completion_mask"].sum(-1)
        separate = len(prompts) * (prompt_lengths + completion_lengths).max().item()
        firsts = [prompts.index(prompt) for prompt in range(max(prompts) + 1)]
        shared = (prompt_lengths[firsts] - 1).sum().item() + completion_lengths.clamp(min=1).sum().item()
        return prompts if self._is_worthwhile(shared, separate) else None

    def can_share(self, model, rows: dict[str, Any], in_loss: bool) -> bool:
        """Whether a model computes the same on shared prompts. All ranks call it together; it is found out once."""
        core = self.passes.core(model)
        if core not in self.reasons:
            self.reasons[core] = self._reason_against(model, core, rows)
            self._tell(core, self.reasons[core])
        if self.reasons[core] is not None or not in_loss:
            return self.reasons[core] is None
        if core not in self.reasons_in_loss:
            reason = reason_in_loss(core, self.has_aux_loss)
            self.reasons_in_loss[core] = reason
            self._tell(core, reason, in_loss=True)
        return self.reasons_in_loss[core] is None

    def _plan_sharing(
        self, model, batches: list[dict[str, Any]], costs: list[int], largest_pass: int, in_loss: bool = False
    ) -> tuple[list[list[int]], list[int]] | None:
        """
        Passes over shared prompts, and the prompts' numbers; `None` for separate rows.

        Args:
            costs (`list[int]`): Tokens of the passes over separate rows, which the plan has to beat; in the loss it has as
                many passes.
        """
        if self.share_prompts is False:
            return None
        prompts = same_prompts(batches)
        plan = Plan(
            torch.cat([batch["prompt_mask"] for batch in batches]),
            torch.cat([batch["completion_mask"] for batch in batches]),
            prompts,
            largest_pass=largest_pass,
            num_passes=len(costs) if in_loss else None,
            gather=gather,
        )
        if self._is_worthwhile(plan.num_tokens, sum(costs)) and self.can_share(model, batches[0], in_loss):
            return plan.passes, prompts
        return None

    def _is_worthwhile(self, shared: int, separate: int) -> bool:
        return self.share_prompts or shared <= (1 - WORTHWHILE) * separate

    def _reason_against(self, model, core: torch.nn.Module, rows: dict[str, Any]) -> str | None:
        """Why not to have a model share prompts. If it may, its attention is exchanged, on all ranks or on none."""
        reason = reason_against(core)
        if reason is not None:
            return reason
        config = core_of(core).get_decoder().config
        before, config._attn_implementation = config._attn_implementation, IMPLEMENTATION
        reason = self._compare(model, rows)
        if gather(torch.tensor([reason is not None], device=self.passes.accelerator.device)).any():
            config._attn_implementation = before
            return reason or "another process found a reason"
        return None

    def _compare(self, model, rows: dict[str, Any]) -> str | None:
        """Why not to trust the model, by a few tokens of some rows, separate and in a packed one."""
        batch, prompts, logits_to_keep = probe_rows(rows)
        problems = []
        try:
            with torch.no_grad(), evaluating(model):
                expected, _, _ = self.passes.run(model, batch, logits_to_keep)
                found, _, _ = self.passes.run(model, batch, logits_to_keep, prompts, problems)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models raise all kinds of errors at inputs that they do not know
            problems.append(f"it raised {type(error).__name__}: {error}")
        if not problems:
            difference = (found - expected)[batch["attention_mask"][:, -logits_to_keep:].bool()].abs().mean().item()
            limit = PROBE_LIMIT if computes_exactly(model, self.passes.accelerator) else PROBE_LIMIT_HALF
            if not difference <= limit:
                problems.append(f"its log-probs differ by {difference:.2g} nats from those of separate rows")
        return problems[0] if problems else None

    def _tell(self, core: torch.nn.Module, reason: str | None, in_loss: bool = False) -> None:
        """Say in the log what was found out about a model, or raise where its rows have to share their prompts."""
        if reason is not None and self.share_prompts:
            raise cannot_share(core, reason)
        where, name = "In the loss, " if in_loss else "", type(core_of(core)).__name__
        if reason is not None:
            logger.warning(f"{where}{name} computes each prompt again for every completion, because {reason}.")
        elif not in_loss:
            logger.info(f"{name} computes each prompt once for all of its completions.")


def sharing_in_run(trainer: GRPOTrainer) -> bool | None:
    """
    `args.share_prompts` of a constructed trainer, or `False` where the run has nothing to share or speaks against it.

    Raises:
        `ValueError`: if it is `True` and the run or the student's structure speaks against it.
    """
    share_prompts = getattr(trainer.args, "share_prompts", False)  # a plain GRPOConfig does not ask for it
    if share_prompts is None and max(trainer.num_generations, trainer.num_generations_eval or 1) == 1:
        return False
    reason = reason_in_run(trainer)
    if share_prompts:
        student = trainer.accelerator.unwrap_model(trainer.model)
        reason = reason or reason_against(student) or reason_in_loss(student, trainer.aux_loss_enabled)
        if reason is not None:
            raise cannot_share(student, reason)
    if share_prompts is None and reason is not None:
        logger.warning(f"Each prompt is computed again for every completion, because {reason}.")
    return share_prompts if reason is None else False


def reason_in_run(trainer: GRPOTrainer) -> str | None:
    """What in the settings of the run, which are those of all ranks, speaks against shared prompts, whatever the model."""
    if trainer.pad_to_multiple_of is not None:
        return "`pad_to_multiple_of` asks for padding"
    if trainer.args.torch_compile:
        return "`torch_compile` compiles for rows of one shape"
    if getattr(trainer.args, "use_transformers_continuous_batching", False):
        return "`use_transformers_continuous_batching` exchanges the attention"
    if trainer.tools and trainer._is_vlm:
        return "tools may return images, which then are in the completions"
    return None


def reason_in_loss(model: torch.nn.Module, has_aux_loss: bool) -> str | None:
    """What speaks against shared prompts in the loss alone, of a student, unwrapped, that shares them elsewhere."""
    if has_aux_loss:
        return "a router's auxiliary loss (`router_aux_loss_coef`) counts every token"
    return "it drops out" if has_dropout(model) else None


def cannot_share(model: torch.nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"`share_prompts` is True, but {type(core_of(model)).__name__} cannot share prompts: {reason}. Set "
        "`share_prompts` to None, to share them where that is exact, or change the setting named here."
    )


def row_lengths(rows: dict[str, Any]) -> torch.Tensor:
    """`(B,)` tokens of each row."""
    return rows["prompt_mask"].sum(-1) + rows["completion_mask"].sum(-1)


def probe_rows(rows: dict[str, Any]) -> tuple[dict[str, Any], list[int], int]:
    """
    Two prompts of some rows, if they have two, with two completions of a few tokens each, as a forward pass takes them;
    their numbers; and `T`.
    """
    numbers = same_prompts([rows])
    firsts = [numbers.index(number) for number in range(min(2, max(numbers) + 1))]
    batch = select_rows(batch_of_forward(rows), [row for row in firsts for _ in range(2)])
    width, tokens = rows["prompt_ids"].size(1), min(PROBE_TOKENS, rows["completion_ids"].size(1))
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if key in batch:
            batch[key] = batch[key][:, : width + tokens].clone()
    batch["input_ids"][1::2, width:] = batch["input_ids"][1::2, width:].flip(1)
    batch["attention_mask"][:, width:] = 1
    batch["attention_mask"][1::2, width + (tokens + 1) // 2 :] = 0
    return batch, [row // 2 for row in range(2 * len(firsts))], tokens


def batch_of_forward(rows: dict[str, Any]) -> dict[str, Any]:
    """What a forward pass needs of rows, by the names that TRL's has for it."""
    return {
        "input_ids": torch.cat([rows["prompt_ids"], rows["completion_ids"]], dim=1),
        "attention_mask": torch.cat([rows["prompt_mask"], rows["completion_mask"]], dim=1),
        **{key: rows[key] for key in MULTIMODAL_KEYS if rows.get(key) is not None},
    }
