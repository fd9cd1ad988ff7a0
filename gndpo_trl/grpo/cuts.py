"""
Rows in a line, cut into groups of neighbours: how few they can be, how small the largest, and which cut costs least.

Where groups may end is said by `ends`, an array of shape `(B,)`: one that begins with row `i` holds row `ends[i] - 1` at most.
Without its first row a group may reach as far, so that `i < ends[i] <= ends[i + 1] <= B`.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable
from itertools import repeat

import numpy as np


# Costs of groups in whole tokens, from arrays of their first rows and of the rows behind their last ones.
Costs = Callable[[np.ndarray, np.ndarray], np.ndarray]


def fewest_groups(ends: np.ndarray) -> int:
    """Smallest number of groups that all rows can be cut into."""
    num_groups, row = 0, 0
    while row < len(ends):
        num_groups, row = num_groups + 1, ends[row]
    return num_groups


def smallest_limit(ends_within: Callable[[int], np.ndarray], num_groups: int, limits: range) -> int:
    """
    Smallest limit on the size of groups with which `num_groups` of them hold all rows.

    Args:
        ends_within (`Callable`): Where groups may end within a limit; a larger limit gives more room.
        limits (`range`): Those to choose from. Its `stop` is taken for large enough.
    """

    def is_enough(limit: int) -> bool:
        return fewest_groups(ends_within(limit)) <= num_groups

    return limits.start if is_enough(limits.start) else limits.start + bisect_left(limits, True, key=is_enough)


def cheapest_cut(costs: Costs, ends: np.ndarray, num_groups: int | None = None) -> list[int]:
    """
    Sizes of groups of the least total cost.

    Args:
        ends (`np.ndarray` of shape `(B,)`): Where groups may end.
        num_groups (`int`, *optional*): At least [`fewest_groups`] and at most `B`. If `None`, as few as are that cheap.

    Returns:
        `list[int]`: numbers of rows, which sum to `B`.
    """
    table = cost_table(costs, ends)
    if num_groups is None:
        table += 1 / (len(ends) + 1)  # all groups together: less than a token
        return sizes_of(table, repeat(least_costs(table)))
    return sizes_of(table, reversed(least_costs_by_number(table, ends, num_groups)[:-1]))


def cost_table(costs: Costs, ends: np.ndarray) -> np.ndarray:
    """`(S, B + 1)`: at `[S - size, end]` the cost of `size` rows before row `end` as a group; infinite where there is none."""
    num_rows = len(ends)
    rows = np.arange(num_rows)
    largest = (ends - rows).max()
    table = np.full((largest, num_rows + 1), np.inf)
    for size in range(1, largest + 1):
        starts = np.flatnonzero(ends - rows >= size)
        table[largest - size, starts + size] = costs(starts, starts + size)
    return table


def least_costs(table: np.ndarray) -> np.ndarray:
    """Of the first `end` rows in any number of groups, at `[S + end]`; `S` infinities stand before."""
    largest, num_ends = table.shape
    least = np.full(largest + num_ends, np.inf)
    least[largest] = 0
    for end in range(1, num_ends):
        least[largest + end] = (least[end : largest + end] + table[:, end]).min()
    return least


def least_costs_by_number(table: np.ndarray, ends: np.ndarray, num_groups: int) -> list[np.ndarray]:
    """
    What [`least_costs`] are in no group, in one, and so on up to `num_groups`.

    Looked at are only as many rows as these groups can hold and leave to the remaining ones. Where groups have little more
    room than they need, that saves most of the work.
    """
    largest, num_rows = len(table), len(ends)
    furthest, nearest = [0], [num_rows]  # most rows in so many groups; fewest rows before the last so many groups
    for _ in range(num_groups):
        furthest.append(ends[min(furthest[-1], num_rows - 1)])
        nearest.append(np.searchsorted(ends, nearest[-1]))
    sizes, least = ends - np.arange(num_rows), [np.full(largest + num_rows + 1, np.inf)]
    least[0][largest] = first = last = 0
    for number in range(1, num_groups + 1):
        size = sizes[first : last + 1].max()
        remaining = num_groups - number
        first, last = max(number, nearest[remaining]), min(furthest[number], num_rows - remaining)
        before = np.lib.stride_tricks.sliding_window_view(least[-1], last + 1 - first)
        totals = before[largest + first - size : largest + first] + table[largest - size :, first : last + 1]
        least.append(np.full_like(least[0], np.inf))
        least[-1][largest + first : largest + last + 1] = totals.min(0)
    return least


def sizes_of(table: np.ndarray, least: Iterable[np.ndarray]) -> list[int]:
    """Sizes of the groups of the least total cost, from the least costs before the last group, before the one before it, ..."""
    largest, end = len(table), table.shape[1] - 1
    sizes = []
    for before in least:
        if end == 0:
            break
        sizes.append(largest - int((before[end : largest + end] + table[:, end]).argmin()))
        end -= sizes[-1]
    return sizes[::-1]
