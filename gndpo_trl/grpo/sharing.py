"""Forward passes in which rows share their prompts, and whether a model computes the same in them, for any `GRPOTrainer`."""

from types import SimpleNamespace
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather

from .branch_attention import IMPLEMENTATION, core_of, has_dropout, has_grid_positions, reason_against
from .microbatches import select_rows
from .modes import evaluating
from .shared_prompts import WORTHWHILE, Plan, SharedPrompts, same_prompts
from .trl_hooks import MULTIMODAL_KEYS, real_tokens_in_lm_head


logger = get_logger(__name__)

# Tokens of a completion that the numeric comparison looks at, and how far log-probs may be apart there, on average, in
# nats: what float32 loses, and what bfloat16, float16 and TF32 do.
PROBE_TOKENS = 8
PROBE_LIMIT, PROBE_LIMIT_HALF = 1e-4, 0.1


class SharingMixin:
    """
    Lets a [`~trl.GRPOTrainer`] compute a prompt once for all of its completions in a forward pass, see [`SharedPrompts`].

    A model takes part if nothing in its structure speaks against it and if it gives the log-probs of separate rows on a few
    tokens of the first batch that it sees; that is found out on all ranks together. Else it keeps separate rows, and the
    log says why; with `args.share_prompts=True` that is an error.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._share_prompts = getattr(self.args, "share_prompts", False)  # a plain GRPOConfig does not ask for it
        self._reasons = {}  # why a model keeps separate rows, or None: (model, in the loss) -> reason
        if self._share_prompts:
            reason = self._reason_in_run() or reason_against(self.accelerator.unwrap_model(self.model))
            self._check_share_prompts(self.model, reason)

    def _plan_sharing(
        self,
        model,
        batches: list[dict[str, Any]],
        costs: list[int],
        in_loss: bool = False,
        token_budget: int | None = None,
    ) -> tuple[Plan, list[int]] | None:
        """
        Passes over shared prompts, and the prompts' numbers; `None` for separate rows. All ranks call it together.

        Args:
            batches (`list[dict]`): Rows, with `prompt_ids` and so on.
            costs (`list[int]`): Tokens of the passes over separate rows, which the plan has to beat; in the loss it has as
                many passes.
        """
        if not self._may_share():
            return None
        prompts = same_prompts(batches)
        plan = Plan(
            torch.cat([batch["prompt_mask"] for batch in batches]),
            torch.cat([batch["completion_mask"] for batch in batches]),
            prompts,
            largest_pass=max(costs) if token_budget is None else token_budget,
            num_passes=len(costs) if in_loss else None,
            gather=gather,
        )
        if not self._share_prompts and plan.num_tokens > (1 - WORTHWHILE) * sum(costs):
            return None
        return (plan, prompts) if self._can_share(model, batches[0], in_loss) else None

    def _prompts_of_micro_batch(self, model, batch: dict[str, Any]) -> list[int] | None:
        """Numbers of the prompts of a micro-batch of the loss if its rows shall share them. Each rank decides for itself."""
        # Not only where a plan has asked before: a run that goes on from a checkpoint has made none yet.
        if not self._may_share() or not self._can_share(model, batch, in_loss=True):
            return None
        prompts = same_prompts([batch])
        prompt_lengths, completion_lengths = batch["prompt_mask"].sum(-1), batch["completion_mask"].sum(-1)
        separate = len(prompts) * (prompt_lengths + completion_lengths).max().item()
        firsts = [prompts.index(prompt) for prompt in range(max(prompts) + 1)]
        shared = (prompt_lengths[firsts] - 1).sum().item() + completion_lengths.clamp(min=1).sum().item()
        return prompts if self._share_prompts or shared <= (1 - WORTHWHILE) * separate else None

    def _forward_shared(
        self, model, batch: dict[str, Any], logits_to_keep: int, prompts: list[int], problems=None, **options
    ):
        """TRL's forward pass on a packed row; results are `(B, T)` as in TRL."""
        shared = SharedPrompts(batch["attention_mask"], logits_to_keep, prompts)
        shared.branches.problems = problems
        all_input_ids, places = batch["input_ids"], batch.pop("places", None)
        if places is not None:
            places = shared.scored(places)
        core = core_of(self._core(model))

        def forward(input_ids, attention_mask, labels, mm_token_type_ids=None, **inputs):
            # TRL's inputs are those of one row for each prompt, of which the images are taken.
            grid_positions = None
            if "image_grid_thw" in inputs and has_grid_positions(core):
                grid_positions, _ = core.base_model.get_rope_index(
                    input_ids=input_ids[:, : shared.width],
                    mm_token_type_ids=mm_token_type_ids[:, : shared.width],
                    image_grid_thw=inputs["image_grid_thw"],
                    attention_mask=attention_mask[:, : shared.width],
                )
            outputs = model(
                input_ids=shared.pack(all_input_ids),
                attention_mask=shared.branches.no_mask(),
                position_ids=shared.positions(grid_positions),
                shift_labels=shared.labels(all_input_ids),
                shared_prompts=shared.branches,
                **inputs,
            )
            entropy = None if outputs.entropy is None else shared.restore(outputs.entropy)
            return SimpleNamespace(log_probs=shared.restore(outputs.log_probs), entropy=entropy)

        questions = select_rows(batch, shared.first_rows)
        with real_tokens_in_lm_head(all_input_ids.device), self._read_head(places):
            results = super()._get_per_token_logps_and_entropies(
                forward, logits_to_keep=logits_to_keep, **questions, **options
            )
        if problems is not None and shared.branches.num_calls != core.get_decoder().config.num_hidden_layers:
            problems.append(f"{shared.branches.num_calls} of its layers attended as they were told")
        return results

    def _core(self, model) -> torch.nn.Module:
        return self.accelerator.unwrap_model(model)

    def _can_share(self, model, batch: dict[str, Any], in_loss: bool) -> bool:
        """Whether a model computes the same on shared prompts. All ranks call it together; it is found out once."""
        core = self._core(model)
        if (core, False) not in self._reasons:
            reason = reason_against(core)
            if reason is None:
                config = core_of(core).get_decoder().config
                before, config._attn_implementation = config._attn_implementation, IMPLEMENTATION
                reason = self._compare(model, batch)
                is_against = torch.tensor([reason is not None], device=self.accelerator.device)
                if gather(is_against).any():
                    reason = reason or "another process found a reason"
                    config._attn_implementation = before
            if reason is None:
                logger.info(f"{type(core_of(core)).__name__} computes each prompt once for all of its completions.")
            self._settle(core, False, reason)
        if (core, True) not in self._reasons:
            reason = self._reasons[core, False]
            if reason is None and in_loss:
                reason = "it drops out" if has_dropout(core) else None
                reason = "a router's auxiliary loss counts every token" if self.aux_loss_enabled else reason
                self._settle(core, True, reason)
        return self._reasons.get((core, in_loss), self._reasons[core, False]) is None

    def _settle(self, core, in_loss: bool, reason: str | None) -> None:
        self._reasons[core, in_loss] = reason
        if reason is not None:
            self._check_share_prompts(core, reason)
            where = "in the loss " if in_loss else ""
            name = type(core_of(core)).__name__
            logger.warning(f"{name} computes a prompt {where}once for each of its completions: {reason}.")

    def _check_share_prompts(self, model, reason: str | None) -> None:
        if self._share_prompts and reason is not None:
            raise ValueError(
                f"`share_prompts` is True, but {type(core_of(model)).__name__} cannot share prompts: {reason}. Set "
                "`share_prompts` to None, to share them where that is exact, or change the setting named here."
            )

    def _may_share(self) -> bool:
        """Whether the settings of the run, which are those of all ranks, let rows share their prompts."""
        if self._share_prompts is None and max(self.num_generations, self.num_generations_eval or 1) == 1:
            return False  # nothing to share
        return self._share_prompts is not False and self._reason_in_run() is None

    def _reason_in_run(self) -> str | None:
        """What in the settings of the run speaks against shared prompts, whatever the model."""
        if self.pad_to_multiple_of is not None:
            return "`pad_to_multiple_of` asks for padding"
        if self.args.torch_compile:
            return "`torch_compile` compiles for rows of one shape"
        if getattr(self.args, "use_transformers_continuous_batching", False):
            return "`use_transformers_continuous_batching` exchanges the attention"
        if self.tools and self._is_vlm:
            return "tools may return images, which then are in the completions"
        return None

    def _compare(self, model, batch: dict[str, Any]) -> str | None:
        """Why not to trust the model, by a few tokens of a batch in separate rows and in a packed one."""
        rows, prompts, logits_to_keep = probe_rows(batch)
        problems = []
        try:
            with torch.no_grad(), evaluating(model):
                expected, _, _ = self._forward(model, dict(rows), logits_to_keep)
                found, _, _ = self._forward_shared(model, dict(rows), logits_to_keep, prompts, problems)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # models raise all kinds of errors at inputs that they do not know
            problems.append(f"it raised {type(error).__name__}: {error}")
        if not problems:
            difference = (found - expected)[rows["attention_mask"][:, -logits_to_keep:].bool()].abs().mean().item()
            dtypes = {parameter.dtype for parameter in model.parameters()}
            is_exact = dtypes == {torch.float32} and self.accelerator.mixed_precision == "no"
            is_exact = is_exact and torch.get_float32_matmul_precision() == "highest"
            if not difference <= (PROBE_LIMIT if is_exact else PROBE_LIMIT_HALF):
                problems.append(f"its log-probs differ by {difference:.2g} nats from those of separate rows")
        return problems[0] if problems else None


def probe_rows(batch: dict[str, Any]) -> tuple[dict[str, Any], list[int], int]:
    """Two prompts of a batch, if it has two, with two completions of a few tokens each; their numbers; and `T`."""
    numbers = same_prompts([batch])
    firsts = [numbers.index(number) for number in range(min(2, max(numbers) + 1))]
    rows = select_rows(batch_of_forward(batch), [row for row in firsts for _ in range(2)])
    width, tokens = batch["prompt_ids"].size(1), min(PROBE_TOKENS, batch["completion_ids"].size(1))
    for key in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if key in rows:
            rows[key] = rows[key][:, : width + tokens].clone()
    rows["input_ids"][1::2, width:] = rows["input_ids"][1::2, width:].flip(1)
    rows["attention_mask"][:, width:] = 1
    rows["attention_mask"][1::2, width + (tokens + 1) // 2 :] = 0
    return rows, [row // 2 for row in range(2 * len(firsts))], tokens


def batch_of_forward(batch: dict[str, Any]) -> dict[str, Any]:
    """What a forward pass needs of a batch, by the names that TRL's has for it."""
    return {
        "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
        "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
        **{key: batch[key] for key in MULTIMODAL_KEYS if batch.get(key) is not None},
    }
