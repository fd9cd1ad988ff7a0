"""Is the fused LM head the model's own? Compared on a few tokens of the first batch that a model scores."""

import inspect
import math
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather, is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TrainableTokensWrapper

from .branch_attention import core_of
from .hidden_states import head_of
from .microbatches import LeftAligned, select_rows
from .mixed_rows import without_empty_pictures
from .modes import evaluating
from .routers import quiet_routers
from .trl_hooks import HeadCall, HeadFields, lm_head_read_by


# Tokens of a completion that are compared, and how far log-probs may be apart there, on average, in nats: what float32
# loses, and what bfloat16, float16 and TF32 do, which is more where logits are large.
PROBE_TOKENS = 8
PROBE_LIMIT, PROBE_LIMIT_HALF, LARGEST_LOGIT_SHARE = 1e-4, 0.1, 2**-8

# Inputs of a forward pass that have an entry for each token.
PER_TOKEN = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


class HeadCheckMixin:
    """
    Stops a [`~trl.GRPOTrainer`] whose log-probs are not those of its models, before the first of them is used.

    Log-probs are computed from hidden states and `get_output_embeddings().weight`. What a model's own forward pass does
    beside that (an adapter, a hook, quantized weights, a factor of its own) is not in them, nor are positions that depend on
    padding. A model, in each state of its adapters, is compared once, on all ranks together.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._checked_heads = set()

    def _check_head(self, model: torch.nn.Module, rows: dict[str, Any]) -> None:
        """
        Compare the fused log-probs of a model with its own logits. All ranks call it together.

        Args:
            model (`torch.nn.Module`): With a fused head.
            rows (`dict`): A batch, with `prompt_ids` and so on.

        Raises:
            `ValueError`: on all ranks, if they differ on any.
        """
        core = self._passes.core(model)
        key = (core, adapters_of(core))
        if key in self._checked_heads:
            return
        batch, tokens = self._probe(rows, self._passes.picture_for(model))
        problem = None
        with torch.no_grad(), evaluating(model), quiet_routers(core):
            try:
                fused, call = self._fused_logps(model, dict(batch), tokens)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # heads raise all kinds of errors where they are no plain projection
                problem = error
            temperature = 1.0 if problem else call.temperature
            expected, largest = self._own_logps(model, dict(batch), tokens, temperature)
        verdict = [math.inf, math.nan, expected.mean().item()]
        if problem is None:
            difference = max((logps - expected).abs().mean().item() for logps in fused)
            limit = PROBE_LIMIT / min(1.0, temperature)
            if not computes_exactly(model, self.accelerator):
                limit = max(PROBE_LIMIT_HALF / min(1.0, temperature), LARGEST_LOGIT_SHARE * largest)
            # Log-probs of the model itself that are no numbers are another matter, which ends the run elsewhere.
            excess = difference / limit if expected.isfinite().all() else 0.0
            found = max(fused, key=lambda logps: (logps - expected).abs().mean().item())
            verdict[:2] = math.inf if math.isnan(excess) else excess, found.mean().item()
        verdicts = gather(torch.tensor([verdict], device=self.accelerator.device)).tolist()
        excess, found, own = max(verdicts, key=lambda of_rank: of_rank[0])
        if excess > 1:
            raise ValueError(self._words(core, found, own, problem)) from problem
        self._checked_heads.add(key)

    def _probe(self, rows: dict[str, Any], picture: dict[str, Any] | None) -> tuple[dict[str, Any], int]:
        """
        The row with the shortest prompt, or a `picture`'s, with a few tokens of a completion, for TRL's forward pass; and their
        number.
        """
        shortest = rows["prompt_mask"].sum(-1).argmin().item()
        width, tokens = rows["prompt_ids"].size(1), rows["completion_ids"].size(1)
        if not (self.tools and self._is_vlm):  # whose completions may hold images, which are not cut
            tokens = min(PROBE_TOKENS, tokens)
        row = without_empty_pictures(select_rows(rows, [shortest]))
        if picture is not None:  # which all processes have alike, with a completion of their own
            row = {**picture, **{key: row[key] for key in ("completion_ids", "completion_mask")}}
            length, width = row["completion_ids"].size(1), row["prompt_ids"].size(1)
            row |= {key: torch.nn.functional.pad(row[key], (0, length)) for key in PER_TOKEN & row.keys()}
        batch = {key: value for key, value in row.items() if not key.startswith(("prompt_", "completion_"))}
        batch["input_ids"] = torch.cat([row["prompt_ids"], row["completion_ids"]], dim=1)
        batch["attention_mask"] = torch.cat([row["prompt_mask"], row["completion_mask"]], dim=1)
        padding = self.pad_to_multiple_of or 0  # always some where rows are scored with it
        for key in PER_TOKEN & batch.keys():
            batch[key] = torch.nn.functional.pad(batch[key][:, : width + tokens], (padding, 0))
        batch["attention_mask"][:, -tokens:] = 1
        return batch, tokens

    def _fused_logps(self, model, batch: dict[str, Any], tokens: int) -> tuple[list[torch.Tensor], HeadCall]:
        """Log-probs `(1, tokens)` by the fused head, and from the hidden states that it gets; and what it gets."""
        seen = []

        def read(call: HeadCall) -> HeadFields:
            head = head_of(call)
            logits = head.on(call.hidden.device).logits(call.hidden)
            seen.append((call, logits.log_softmax(-1).gather(-1, call.ids[:, None]).view(1, -1)))
            return call.compute()

        with lm_head_read_by(read):
            fused, _, _ = self._forward(model, batch, tokens)
        call, from_states = seen[0]
        return [fused, from_states.to(fused.device)], call

    def _own_logps(self, model, batch: dict[str, Any], tokens: int, temperature: float) -> tuple[torch.Tensor, float]:
        """Log-probs `(1, tokens)` by the model's own logits, of the row without padding; and the largest logit."""
        rows = LeftAligned(batch["attention_mask"], tokens)
        batch.update({key: rows.align(batch[key]) for key in PER_TOKEN & batch.keys()})
        largest = []

        def forward(labels, fused_lm_head, **inputs):
            if "logits_to_keep" in inspect.signature(core_of(self._passes.core(model)).forward).parameters:
                inputs["logits_to_keep"] = tokens + 1  # and not the logits of the whole prompt
            logits = model(**inputs, use_cache=False).logits[:, -tokens - 1 : -1].float() / temperature
            largest.append(logits.abs().max().item())
            ids = inputs["input_ids"][:, -tokens:, None].to(logits.device)
            return SimpleNamespace(log_probs=logits.log_softmax(-1).gather(-1, ids).squeeze(-1), entropy=None)

        own, _, _ = super()._get_per_token_logps_and_entropies(forward, logits_to_keep=tokens, **batch)
        return own.to(batch["input_ids"].device), largest[0]

    def _words(self, core: torch.nn.Module, found: float, own: float, problem: Exception | None) -> str:
        is_student = core is self._passes.core(self.model)
        model = core_of(core)
        name = f"{'the student' if is_student else 'a teacher or reference model'} ({type(model).__name__})"
        they = f"cannot be computed so ({type(problem).__name__}: {problem})" if problem else f"are {found:.4g} nats"
        return (
            f"Log-probs are computed from the last hidden states and the weights of the LM head, but this is not what {name} "
            f"does: on a few tokens of the first batch they {they}, and by its own logits {own:.4g} nats, on average. "
            f"{remedy(model, self.pad_to_multiple_of)}"
        )


def adapters_of(model: torch.nn.Module) -> tuple:
    """Which adapters of a model are at work."""
    if not is_peft_model(model):
        return ()
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    return (layer is not None and layer.disable_adapters, *model.active_adapters)


def computes_exactly(model: torch.nn.Module, accelerator: Accelerator) -> bool:
    """Whether a model computes in float32 throughout."""
    is_float32 = {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    return is_float32 and accelerator.mixed_precision == "no" and torch.get_float32_matmul_precision() == "highest"


def check_head(name: str, model: torch.nn.Module) -> None:
    """
    Raise where the structure of a model tells that its LM head has more than weights.

    Args:
        name (`str`): What it was passed as, for the error.
        model (`torch.nn.Module`): The model, not wrapped for training.

    Raises:
        `ValueError`: if an adapter is on its head.
    """
    model = core_of(model)
    head = model.get_output_embeddings()
    if isinstance(head, BaseTunerLayer | TrainableTokensWrapper):
        raise ValueError(
            f"`{name}` has an adapter on its LM head, of which log-probs take the weights alone. {remedy(model, None)}"
        )


def remedy(model: torch.nn.Module, pad_to_multiple_of: int | None) -> str:
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        return (
            "Its embeddings are tied, so that the tokens of `trainable_token_indices` are a part of the head: leave the "
            "setting out, or save the model with `tie_word_embeddings=False`."
        )
    if isinstance(head, BaseTunerLayer):
        return (
            "An adapter is on the head: pass the model after `merge_and_unload()` if it is not to be trained, else leave the "
            "head out of `target_modules`; `modules_to_save` trains it whole."
        )
    if head._forward_hooks or head._forward_pre_hooks:
        return "The head has hooks, which only its own forward pass runs: remove them."
    if pad_to_multiple_of is not None:
        return (
            f"`pad_to_multiple_of` is {pad_to_multiple_of}, which shifts the positions of models that count padding: unset "
            "it. If that does not help, the head does more than to multiply."
        )
    return (
        f"The head is a {type(head).__name__} with weights of dtype {head.weight.dtype}: if it is quantized, leave it out "
        "(`llm_int8_skip_modules`); if the model scales or caps its logits in a way of its own, it cannot be used here."
    )
