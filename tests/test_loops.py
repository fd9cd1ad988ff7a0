"""Completions that end in a loop: which do, and what becomes of them."""

import pytest
import torch
from helpers import make_rollout

from gndpo_trl.grpo.loops import repeats_itself
from gndpo_trl.grpo.rollouts import valid_tokens


END = 2  # the tiny tokenizers' end token
PLAIN = [11 + (7 * place + place * place) % 20 for place in range(40)]


@pytest.mark.parametrize(
    "ids, is_one",
    [
        ([], False),
        ([END], False),
        ([5] * 31, False),
        ([5] * 32, True),
        ([5] * 32 + [END], True),
        ([5] * 31 + [END], False),
        ([5] * 32 + [6], False),
        (PLAIN, False),
        (PLAIN + [5, 6, 7] * 11, True),
        (PLAIN + [5, 6, 7] * 11 + [5, 6], True),  # cut off in its midst
        (PLAIN + [5, 6, 7] * 11 + [8], False),
        (PLAIN + list(range(100, 164)) * 4, True),
        (PLAIN + list(range(100, 164)) * 3, False),
        (PLAIN + list(range(100, 165)) * 8, False),  # longer pieces are not looked for
        ([5] * 100 + PLAIN, False),  # it came out of it
    ],
)
def test_what_a_loop_is(ids, is_one):
    assert repeats_itself(ids, {END}) == is_one


def with_loops(prompts, trainer):
    """Every other completion goes round in a circle to the limit."""
    prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
    completions = [[11, 12] * 20 if row % 2 else PLAIN[: 3 + row] + [END] for row in range(len(prompts))]
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": completions,
        "logprobs": [[0.0] * len(ids) for ids in completions],
    }


def run(make_trainer, **options):
    options = {"max_completion_length": 40, "per_device_train_batch_size": 8, **options}
    return make_trainer(trainer_options={"rollout_func": with_loops}, **options)


def test_they_are_counted_and_left_out_where_that_is_asked_for(make_trainer):
    kept, left_out = (make_rollout(run(make_trainer, mask_repeating_completions=mask)) for mask in (False, True))
    lengths = torch.tensor([40 if row % 2 else 4 + row for row in range(8)])
    assert torch.equal(valid_tokens(kept).sum(-1), lengths)
    assert torch.equal(valid_tokens(left_out).sum(-1), lengths * torch.tensor([1, 0] * 4))
    assert left_out["num_items_in_batch"] == valid_tokens(left_out).sum()
    advantages = left_out["advantages"][valid_tokens(left_out)]
    assert advantages.mean().abs() < 1e-5 and advantages.std() == pytest.approx(1, abs=1e-3)  # among themselves
    assert not left_out["advantages"][1::2].any()


@pytest.mark.parametrize("estimator", ["sampled", "exact"])
def test_the_gradient_is_that_of_the_others(make_trainer, estimator):
    """Rows that are left out add nothing to the mean over rows, whatever they say."""

    def other(prompts, trainer):
        found = with_loops(prompts, trainer)
        return {
            **found,
            "completion_ids": [[13, 14] * 20 if len(ids) == 40 else ids for ids in found["completion_ids"]],
        }

    weights = []
    for rollout_func in (with_loops, other):
        trainer = make_trainer(
            trainer_options={"rollout_func": rollout_func},
            mask_repeating_completions=True,
            max_completion_length=40,
            per_device_train_batch_size=8,
            estimator=estimator,
            max_steps=1,
        )
        trainer.train()
        assert trainer.state.log_history[0]["completions/repeating_ratio"] == 0.5
        assert trainer.state.log_history[0]["grad_norm"] > 0
        weights.append(trainer.model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "mask, remedy", [(False, "set `mask_repeating_completions: true`"), (True, "left out of the loss")]
)
def test_many_of_them_are_warned_about(make_trainer, mask, remedy):
    with pytest.warns(UserWarning, match=f"50% of the completions end in a loop.*{remedy}"):
        run(make_trainer, max_steps=10, mask_repeating_completions=mask).train()
