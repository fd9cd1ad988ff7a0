"""
Sampling from the models of the digits task, several times faster than `generate`, which is most of a run otherwise.

At this size the arithmetic costs nothing and every call does. This loop makes few calls: one prefill for each distinct
prompt, fused projections, a cache of fixed size. The distribution is the model's own; `tests/test_arms.py` compares.
"""

import torch
import torch.nn.functional as F
from transformers import LlavaForConditionalGeneration


class Layer:
    """The weights of a decoder layer as the loop needs them, and its keys and values `(B, H, P + T, D)`."""

    def __init__(self, layer: torch.nn.Module, cached, repeats: int, length: int):
        attention, mlp = layer.self_attn, layer.mlp
        self.layer, self.attention, self.down = layer, attention, mlp.down_proj.weight
        self.qkv = torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
        self.gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.keys, self.values = (
            F.pad(state.repeat_interleave(repeats, dim=0), (0, 0, 0, length)) for state in (cached.keys, cached.values)
        )

    def __call__(self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, position: int) -> torch.Tensor:
        attention = self.attention
        heads, dim = self.keys.shape[1], attention.head_dim
        qkv = F.linear(norm(hidden, self.layer.input_layernorm), self.qkv).view(len(hidden), 3, heads, dim)
        query = rotate(norm(qkv[:, 0], attention.q_norm), cos, sin)
        self.keys[:, :, position] = rotate(norm(qkv[:, 1], attention.k_norm), cos, sin)
        self.values[:, :, position] = qkv[:, 2]
        keys, values = self.keys[:, :, : position + 1], self.values[:, :, : position + 1]
        weights = (query.unsqueeze(2) @ keys.transpose(2, 3) * attention.scaling).softmax(-1)
        hidden = hidden + F.linear((weights @ values).reshape(len(hidden), heads * dim), attention.o_proj.weight)
        gate, up = F.linear(norm(hidden, self.layer.post_attention_layernorm), self.gate_up).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * up, self.down)


def norm(hidden: torch.Tensor, module: torch.nn.Module) -> torch.Tensor:
    return F.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat([-second, first], dim=-1) * sin


@torch.no_grad()
def sample(
    model: LlavaForConditionalGeneration,
    questions: dict[str, torch.Tensor],
    end_id: int,
    max_new_tokens: int,
    *,
    repeats: int = 1,
    greedy: bool = False,
    suppress: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Completions of prompts of the same length, at temperature 1 or greedily.

    Args:
        model ([`~transformers.LlavaForConditionalGeneration`]): With a Qwen3 decoder without grouped heads.
        questions (`dict`): `input_ids` and `attention_mask` `(B, P)` without padding, `pixel_values`.
        end_id (`int`): Token that ends a completion.
        max_new_tokens (`int`): Length after which a completion is cut off.
        repeats (`int`, *optional*, defaults to `1`): Completions of each prompt, next to each other in the result.
        greedy (`bool`, *optional*, defaults to `False`): Take the likeliest token.
        suppress (`bool`, *optional*, defaults to `True`): Never sample the image placeholder, as the trainers do.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: token ids `(B * repeats, T)`, and a mask of that shape that is True up to and
            including the token that ends the completion.

    Raises:
        `ValueError`: if the prompts differ in length.
        `RuntimeError`: from torch, if the model gives NaN.
    """
    if not questions["attention_mask"].all():
        raise ValueError("The prompts differ in length: this loop knows no padding.")
    training = model.training
    model.eval()
    outputs = model(**questions, use_cache=True, logits_to_keep=1)
    model.train(training)
    decoder, head = model.get_decoder(), model.get_output_embeddings().weight
    layers = [
        Layer(layer, cached, repeats, max_new_tokens)
        for layer, cached in zip(decoder.layers, outputs.past_key_values.layers, strict=True)
    ]
    start = questions["input_ids"].shape[1]
    cos, sin = decoder.rotary_emb(head, torch.arange(start, start + max_new_tokens).unsqueeze(0))
    logits = outputs.logits[:, -1].repeat_interleave(repeats, dim=0)
    tokens = []
    ended = torch.zeros(len(logits), dtype=torch.bool)
    for step in range(max_new_tokens):
        if suppress:
            logits[:, model.config.image_token_id] = -torch.inf
        token = logits.argmax(-1) if greedy else torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
        tokens.append(token)
        ended |= token == end_id
        if ended.all():
            break
        hidden = F.embedding(token, decoder.embed_tokens.weight)
        for layer in layers:
            hidden = layer(hidden, cos[0, step], sin[0, step], start + step)
        logits = F.linear(norm(hidden, decoder.norm), head)
    tokens = torch.stack(tokens, dim=1)
    is_end = tokens == end_id
    return tokens, is_end.cumsum(-1) - is_end.long() == 0
