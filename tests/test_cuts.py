"""Cutting rows in a line: the cheapest cut within limits, by the plain dynamic program that looks at all of them."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gndpo_trl.grpo.cuts import cheapest_cut, fewest_groups
from gndpo_trl.grpo.microbatches import GROUP_SLACK, group_sizes
from gndpo_trl.grpo.shared_prompts import PassCosts


def all_costs(costs, num_rows: int) -> torch.Tensor:
    """`(B, B + 1)` costs of rows `i` to `j - 1` as one group, infinite where there is none."""
    starts, ends = np.arange(num_rows)[:, None], np.arange(num_rows + 1)[None]
    starts, ends = np.broadcast_arrays(starts, ends)
    table = costs(starts.ravel(), ends.ravel()).reshape(starts.shape)
    return torch.from_numpy(np.where(starts < ends, table, np.inf))


def least_largest(costs: torch.Tensor, num_groups: int) -> float:
    largest = costs[0]
    for _ in range(num_groups - 1):
        largest = torch.maximum(largest[:-1].unsqueeze(1), costs).amin(0)
    return largest[-1].item()


def least_total(costs: torch.Tensor, num_groups: int) -> float:
    total = costs[0]
    for _ in range(num_groups - 1):
        total = (total[:-1].unsqueeze(1) + costs).amin(0)
    return total[-1].item()


def of_cut(costs: torch.Tensor, sizes) -> torch.Tensor:
    """Costs of the groups of a cut."""
    ends = torch.tensor(sizes).cumsum(0)
    return costs[ends - torch.tensor(sizes), ends]


def rows_of(rank) -> np.ndarray:
    """`(3, B)`: what rows add to a pass, cost as its first one beside that, and cost alone, for (prompt, completions) pairs."""
    columns = []
    for prompt, completions in rank:
        for k, completion in enumerate(completions):
            again = prompt if k > 0 else 0
            columns.append((completion + prompt - again, again, completion + prompt))
    return np.array(columns).T


LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=40)
PROMPTS = st.lists(st.tuples(st.integers(0, 40), st.lists(st.integers(1, 40), min_size=1, max_size=6)), min_size=5)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, data=st.data())
def test_groups_of_rows_are_the_cheapest_of_those_that_are_small_enough(lengths, data):
    num_groups = data.draw(st.integers(1, len(lengths)))
    longest = np.array(sorted(lengths, reverse=True))
    costs = all_costs(lambda starts, ends: (ends - starts) * longest[starts], len(lengths))
    limit = min(GROUP_SLACK * least_largest(costs, num_groups), -(-len(lengths) // num_groups) * longest[0])
    sizes = group_sizes(tuple(longest.tolist()), num_groups)
    found = of_cut(costs, sizes)
    assert len(sizes) == num_groups and min(sizes) > 0 and sum(sizes) == len(lengths)
    assert found.max() <= limit
    assert found.sum() == least_total(costs.masked_fill(costs > limit, torch.inf), num_groups)


@settings(max_examples=150, deadline=None)
@given(ranks=st.lists(PROMPTS, min_size=1, max_size=3), data=st.data())
def test_passes_of_several_ranks_are_the_cheapest_of_those_that_are_small_enough(ranks, data):
    ranks = [rows_of(rank) for rank in ranks]
    num_rows = min(rank.shape[1] for rank in ranks)
    costs = PassCosts(np.stack([rank[:, :num_rows] for rank in ranks]))
    tokens, memory = all_costs(costs.tokens, num_rows), all_costs(costs.memory, num_rows)
    limit = data.draw(st.integers(1, int(memory[0, -1])))
    one_row = torch.eye(num_rows, num_rows + 1, dtype=torch.bool).roll(1, 1)
    allowed = tokens.masked_fill((memory > limit) & ~one_row, torch.inf)
    ends = costs.ends_within(limit)
    assert ends.tolist() == [int(row.isfinite().nonzero().max()) for row in allowed]

    totals = [least_total(allowed, number) for number in range(1, num_rows + 1)]
    assert fewest_groups(ends) == 1 + next(k for k, total in enumerate(totals) if total < torch.inf)
    num_groups = data.draw(st.integers(fewest_groups(ends), num_rows))
    sizes = cheapest_cut(costs.tokens, ends, num_groups)
    assert len(sizes) == num_groups and min(sizes) > 0 and sum(sizes) == num_rows
    assert of_cut(allowed, sizes).sum() == totals[num_groups - 1]
    of_any_number = cheapest_cut(costs.tokens, ends)
    assert of_cut(allowed, of_any_number).sum() == min(totals)
    assert len(of_any_number) == 1 + totals.index(min(totals)), "as few as are that cheap"


@pytest.mark.parametrize("lengths", ["uniform", "heavy-tailed", "one long row"])
def test_large_batches_are_cut_within_a_moment(lengths):
    generator, num_rows = np.random.default_rng(0), 2048
    lengths = {
        "uniform": generator.integers(200, 4000, num_rows),
        "heavy-tailed": generator.lognormal(7, 1, num_rows).astype(int).clip(1, 32768),
        "one long row": np.array([32768, *[500] * (num_rows - 1)]),
    }[lengths]
    longest = np.sort(lengths)[::-1]
    prompts = [(500, longest[row : row + 8].tolist()) for row in range(0, num_rows, 8)]
    costs = PassCosts(np.stack([rows_of(prompts)] * 8))
    begin = time.process_time()
    sizes = group_sizes(tuple(longest.tolist()), 512)
    largest = max(size * longest[end - size] for size, end in zip(sizes, np.cumsum(sizes), strict=True))
    passes = cheapest_cut(costs.tokens, costs.ends_within(largest), 512)
    seconds = time.process_time() - begin
    assert len(sizes) == len(passes) == 512
    assert seconds < 2, "of the processor; it is a tenth of that"
