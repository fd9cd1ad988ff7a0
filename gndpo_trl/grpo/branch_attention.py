"""Attention over rows that share their prompts, and which models can take it.

A packed row holds every prompt once and after them a *branch* for each completion, see [`SharedPrompts`]. A token of a
prompt attends to its prompt, a token of a branch to the prompt of that branch and to the branch itself. The function is
registered with transformers under `IMPLEMENTATION` and works as "sdpa" does wherever a forward call brings no
`shared_prompts`. They travel as a keyword of the call: with gradient checkpointing, layers run a second time in the
backward pass, when any state beside the call may already be that of another pass.
"""

import inspect
from dataclasses import dataclass, field

import torch
from accelerate.utils import is_compiled_module, is_peft_model
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask


IMPLEMENTATION = "sdpa_shared_prompts"
# Branches of a prompt are attended from as one padded batch where the shortest is at least this much of the longest, and
# at most so many, since the batch holds a copy of the prompt's keys and values for each.
SHORTEST_IN_CHUNK, LARGEST_CHUNK = 0.75, 4
# What models hand to the attention of "sdpa" beside queries, keys, values and mask. Anything else (a window, a softcap,
# sinks, a bias) is another kind of attention.
KNOWN_OPTIONS = ("dropout", "scaling", "is_causal", "position_ids", "use_cache", "num_items_in_batch")
KNOWN_OPTIONS += ("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "cache_position")


@dataclass
class Chunk:
    """Neighbouring branches of one prompt: `columns` `(n, T)` of the packed row, padded with each branch's last token."""

    prompt: slice
    columns: torch.Tensor
    real: torch.Tensor  # indices into the flattened (n, T), without the padding
    mask: torch.Tensor  # (1, 1, T, P + T), True where a branch may look


@dataclass
class Branches:
    """
    Which columns of a packed row are prompts and which are branches.

    Args:
        prompt_lengths (`list[int]`): Tokens of each prompt, without the last one, which starts its branches; may be 0.
        branch_lengths (`list[list[int]]`): For each prompt the tokens of its branches, longest first, at least 1 each.
        device (`torch.device`): Device of the model's inputs.

    Attributes:
        problems (`list[str]` or `None`): What a layer asked for that this attention does not do. `None` has it raise
            instead; with a list it goes on, so that sharded models end their forward pass together.
        num_calls (`int`): How often layers attended.
    """

    prompt_lengths: list[int]
    branch_lengths: list[list[int]]
    device: torch.device
    problems: list[str] | None = None
    num_calls: int = 0
    prompts: list[slice] = field(init=False)
    chunks: list[Chunk] = field(init=False)

    def __post_init__(self):
        self.prompts, self.chunks, column = [], [], 0
        for length in self.prompt_lengths:
            self.prompts.append(slice(column, column + length))
            column += length
        for prompt, lengths in zip(self.prompts, self.branch_lengths, strict=True):
            for chunk in split_by_length(lengths):
                self.chunks.append(self._chunk(prompt, column, chunk))
                column += sum(chunk)
        self.num_columns = column

    def _chunk(self, prompt: slice, column: int, lengths: list[int]) -> Chunk:
        sizes = torch.tensor(lengths)
        longest, prompt_length = lengths[0], prompt.stop - prompt.start
        offsets = torch.arange(longest)
        starts = column + sizes.cumsum(0) - sizes
        columns = starts.unsqueeze(1) + torch.minimum(offsets, sizes.unsqueeze(1) - 1)
        real = (offsets < sizes.unsqueeze(1)).flatten().nonzero().squeeze(1)
        mask = torch.ones(longest, prompt_length + longest, dtype=torch.bool).tril(prompt_length)
        tensors = (tensor.to(self.device) for tensor in (columns, real, mask[None, None]))
        return Chunk(prompt, *tensors)

    def no_mask(self) -> torch.Tensor:
        """An `attention_mask` that models hand on to their attention as it is: of four dimensions, and empty of content."""
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)


def split_by_length(lengths: list[int]) -> list[list[int]]:
    """Descending lengths of branches, cut into those of each padded batch."""
    chunks = []
    for length in lengths:
        if chunks and length >= SHORTEST_IN_CHUNK * chunks[-1][0] and len(chunks[-1]) < LARGEST_CHUNK:
            chunks[-1].append(length)
        else:
            chunks.append([length])
    return chunks


def shared_prompts_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    shared_prompts: Branches | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """
    "sdpa" of transformers, and over a packed row where there are `shared_prompts`.

    Args:
        query (`torch.Tensor` of shape `(1, H, L, D)`): Queries; keys and values have `(1, K, L, D)`.
        attention_mask (`torch.Tensor` of shape `(1, 1, 1, 1)`): [`Branches.no_mask`].

    Returns:
        `(torch.Tensor, None)`: the first of shape `(1, L, H, D)`.

    Raises:
        `ValueError`: if the layer asks for anything but causal attention to all that came before.
    """
    if shared_prompts is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    shared_prompts.num_calls += 1
    problem = find_problem(module, query, key, attention_mask, shared_prompts, kwargs)
    if problem is not None:
        if shared_prompts.problems is None:
            raise ValueError(
                f"{type(module).__name__} cannot attend to shared prompts: {problem}. Set `share_prompts: false`."
            )
        shared_prompts.problems.append(problem)
        return sdpa_attention_forward(module, query, key, value, None, **kwargs)

    kwargs = {name: kwargs[name] for name in ("dropout", "scaling") if name in kwargs}
    outputs = []
    for prompt in shared_prompts.prompts:
        if prompt.stop > prompt.start:
            of_prompt = (states[:, :, prompt] for states in (query, key, value))
            output, _ = sdpa_attention_forward(module, *of_prompt, None, is_causal=True, **kwargs)
            outputs.append(output.flatten(0, 1))
    for chunk in shared_prompts.chunks:
        queries = take(query, chunk.columns)
        keys, values = (
            torch.cat(
                [states[:, :, chunk.prompt].expand(len(chunk.columns), -1, -1, -1), take(states, chunk.columns)], 2
            )
            for states in (key, value)
        )
        output, _ = sdpa_attention_forward(module, queries, keys, values, chunk.mask, **kwargs)
        outputs.append(output.flatten(0, 1)[chunk.real])
    return torch.cat(outputs).unsqueeze(0), None


def take(states: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """`(1, H, L, D)` states at `(n, T)` columns, as `(n, H, T, D)`."""
    return states[0][:, columns].transpose(0, 1)


def find_problem(module, query, key, attention_mask, branches: Branches, options: dict) -> str | None:
    unknown = [
        name for name, value in options.items() if not (name in KNOWN_OPTIONS or value is None or value is False)
    ]
    if unknown:
        return f"it uses `{unknown[0]}`"
    if attention_mask is None or attention_mask.shape != (1, 1, 1, 1):
        return "it has an attention mask of its own"
    if options.get("is_causal") is False or not getattr(module, "is_causal", True):
        return "it is not causal"
    if query.shape[2] != branches.num_columns or key.shape[2] != branches.num_columns or query.shape[0] != 1:
        return f"it attends from {tuple(query.shape)} to {tuple(key.shape)}, and not within the row"
    return None


AttentionInterface.register(IMPLEMENTATION, shared_prompts_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def core_of(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model under adapters."""
    return model.get_base_model() if is_peft_model(model) else model


def reason_against(model: torch.nn.Module) -> str | None:
    """
    Why a model, unwrapped, cannot compute packed rows, as far as its structure tells; `None` if it shows no reason.

    Structure does not tell everything: a numeric comparison has to follow.
    """
    if is_compiled_module(model):
        return "it is compiled"
    if is_peft_model(model) and any(config.is_prompt_learning for config in model.peft_config.values()):
        return "it has learned prompts of PEFT"
    core = core_of(model)
    if not isinstance(core, PreTrainedModel):
        return "it is not a model of transformers"
    decoder = core.get_decoder()
    config = decoder.config
    if not decoder._supports_attention_backend:
        return "its attention cannot be exchanged"
    if config._attn_implementation not in ("sdpa", IMPLEMENTATION):
        return f"its `attn_implementation` is {config._attn_implementation!r}, and only 'sdpa' is known here"
    if core._is_stateful or decoder._is_stateful:
        return "its layers keep a state"
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    if window and getattr(config, "layer_types", None) is None:
        return "it has a sliding window"
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if other:
        return f"it has layers of type {sorted(other)[0]!r}"
    if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None):
        return "its attention is not causal"
    parameters = inspect.signature(type(core).forward).parameters
    by_type = "token_type_ids" in parameters or "mm_token_type_ids" in parameters and not has_grid_positions(core)
    if core.config is not config and by_type:
        return "its attention depends on which tokens are images"
    return None


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether the model, unwrapped, drops anything out in training mode."""
    config = vars(core_of(model).get_decoder().config)
    in_heads = ("summary", "classifier")  # of other tasks than language modelling
    names = (name for name in config if name.endswith(("dropout", "_pdrop")) and not name.startswith(in_heads))
    rates = (config[name] for name in names)
    layers = (module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))
    return any(isinstance(rate, float) and rate > 0 for rate in (*rates, *layers))


def has_grid_positions(core: PreTrainedModel) -> bool:
    """Whether the positions of an image's tokens are its rows and columns, as in Qwen-VL."""
    return hasattr(core.base_model, "get_rope_index")
