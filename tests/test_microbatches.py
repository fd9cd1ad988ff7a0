"""Grouping and aligning rows as pure functions, on the layouts of every model family that GRPO supports."""

import gc
from itertools import combinations

import pytest
import tiny_models
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from gndpo_trl.grpo.microbatches import (
    GROUP_SLACK,
    LeftAligned,
    Regrouping,
    merge_batches,
    plan_by_length,
    select_rows,
)


def every_cut(lengths: list[int], num_groups: int) -> list[list[int]]:
    """Costs of the groups, for all ways to cut the lengths, longest first, into that many groups."""
    lengths = sorted(lengths, reverse=True)
    ways = []
    for cuts in combinations(range(1, len(lengths)), num_groups - 1):
        bounds = [0, *cuts, len(lengths)]
        ways.append([(end - start) * lengths[start] for start, end in zip(bounds, bounds[1:], strict=False)])
    return ways


def costs(lengths: list[int], groups: list[list[int]]) -> list[int]:
    return [len(rows) * max(lengths[row] for row in rows) for rows in groups]


@settings(max_examples=400, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=9), data=st.data())
def test_groups_are_the_best_of_all_cuts(lengths, data):
    num_groups = data.draw(st.integers(1, len(lengths)))
    ways = every_cut(lengths, num_groups)
    groups, _ = plan_by_length(torch.tensor(lengths), num_groups=num_groups)
    assert len(groups) == num_groups
    assert sorted(sum(groups, [])) == list(range(len(lengths)))
    limit = min(GROUP_SLACK * min(max(way) for way in ways), -(-len(lengths) // num_groups) * max(lengths))
    assert max(costs(lengths, groups)) <= limit
    assert sum(costs(lengths, groups)) == min(sum(way) for way in ways if max(way) <= limit)
    longest = [max(lengths[row] for row in rows) for rows in groups]
    assert longest == sorted(longest, reverse=True)


@settings(max_examples=400, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=8), budget=st.integers(1, 200))
@example(lengths=[1, 2, 2, 2, 6], budget=4)  # a row above the budget is no leave for the others
def test_as_few_groups_as_the_budget_allows(lengths, budget):
    groups, _ = plan_by_length(torch.tensor(lengths), token_budget=budget)
    assert sorted(sum(groups, [])) == list(range(len(lengths)))
    assert all(cost <= budget or len(rows) == 1 for rows, cost in zip(groups, costs(lengths, groups), strict=True))
    fewer = every_cut(lengths, len(groups) - 1) if len(groups) > 1 else []
    assert not any(max(way) <= budget for way in fewer)


def test_equal_lengths_stay_in_equal_groups():
    assert plan_by_length(torch.full((12,), 7), num_groups=3)[0] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_all_ranks_cut_alike():
    """Each rank plans with the lengths of all of them and gets groups of the same sizes."""
    ranks = [torch.tensor([3, 40, 5, 6, 4, 2]), torch.tensor([9, 8, 30, 31, 7, 1])]

    def gather(lengths):
        return torch.stack([rank.sort(descending=True).values for rank in ranks])

    first, second = (plan_by_length(rank, num_groups=3, gather=gather)[0] for rank in ranks)
    assert [len(rows) for rows in first] == [len(rows) for rows in second]
    assert first[0][0] == 1 and second[0][0] == 3, "the longest rows come first"
    first, second = (plan_by_length(rank, token_budget=60, gather=gather)[0] for rank in ranks)
    assert [len(rows) for rows in first] == [len(rows) for rows in second]


def rows_of(count: int, width: int) -> torch.Tensor:
    return torch.arange(count * width).view(count, width)


# Row 0 has one image, row 1 none, row 2 two; the comment names a family with that layout.
LAYOUTS = {
    "text": {},  # Qwen3
    "grid": {  # Qwen-VL: 4, 2 and 6 patches
        "pixel_values": rows_of(12, 5),
        "image_grid_thw": torch.tensor([[1, 2, 2], [1, 1, 2], [1, 3, 2]]),
        "num_images": [1, 0, 2],
    },
    "positions": {  # Gemma
        "pixel_values": rows_of(3, 5),
        "image_position_ids": rows_of(3, 2),
        "num_images": [1, 0, 2],
    },
    "spatial": {  # LFM2-VL: 2, 0 and 3 tiles
        "pixel_values": rows_of(5, 4),
        "pixel_attention_mask": rows_of(5, 4),
        "spatial_shapes": rows_of(5, 2),
        "num_images": [1, 0, 2],
        "num_tiles": [2, 0, 3],
    },
    "tiles": {  # InternVL
        "pixel_values": torch.arange(5 * 3 * 2 * 2).view(5, 3, 2, 2),
        "num_images": [1, 0, 2],
        "num_tiles": [2, 0, 3],
    },
    "flat": {  # LLaVA
        "pixel_values": torch.arange(3 * 3 * 2 * 2).view(3, 3, 2, 2),
        "image_sizes": rows_of(3, 2),
        "num_images": [1, 0, 2],
    },
    "padded": {  # Idefics: as many slots in every row
        "pixel_values": torch.arange(3 * 2 * 4).view(3, 2, 4),
        "pixel_attention_mask": torch.arange(3 * 2 * 4).view(3, 2, 4),
        "num_images": [1, 1, 2],
    },
}
# Of each layout's tensors, the entries that belong to row 2.
LAST_ROWS = {
    "grid": {"pixel_values": slice(4, 12), "image_grid_thw": slice(1, 3)},
    "positions": {"pixel_values": slice(1, 3), "image_position_ids": slice(1, 3)},
    "spatial": dict.fromkeys(("pixel_values", "pixel_attention_mask", "spatial_shapes"), slice(2, 5)),
    "tiles": {"pixel_values": slice(2, 5)},
    "flat": {"pixel_values": slice(1, 3), "image_sizes": slice(1, 3)},
    "padded": dict.fromkeys(("pixel_values", "pixel_attention_mask"), slice(2, 3)),
}


def make_batch(layout: str) -> dict:
    return {
        "prompt_ids": rows_of(3, 4),
        "completion_ids": rows_of(3, 6),
        "num_items_in_batch": torch.tensor(9),
        "score_moments": None,
        **LAYOUTS[layout],
    }


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value) if isinstance(value, torch.Tensor) else found[key] == value, key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_follow_their_rows(layout):
    batch = make_batch(layout)
    selected = select_rows(batch, [2, 0])
    assert torch.equal(selected["prompt_ids"], batch["prompt_ids"][[2, 0]])
    assert selected["num_items_in_batch"] == 9
    if layout != "text":
        assert selected["num_images"] == [2, batch["num_images"][0]]
    for key, entries in LAST_ROWS.get(layout, {}).items():
        of_last = batch[key][entries]
        assert torch.equal(selected[key][: len(of_last)], of_last), key
        of_first = batch[key][: entries.start if batch.get("num_images", [0, 0])[1] == 0 else 1]
        assert torch.equal(selected[key][len(of_last) :], of_first), key
    # and back
    assert_same(select_rows(selected, [1]), select_rows(batch, [0]))
    assert_same(merge_batches([select_rows(batch, [0]), select_rows(batch, [1, 2])]), batch)


def test_regrouped_micro_batches_hold_the_same_rows_and_weigh_the_same():
    lengths = torch.tensor([3, 9, 1, 2, 30, 2, 8, 1])
    mask = (torch.arange(30) < lengths.unsqueeze(1)).int()
    whole = {"prompt_mask": torch.ones(8, 2, dtype=torch.int), "completion_mask": mask, "advantages": rows_of(8, 30)}
    groups, _ = plan_by_length(lengths + 2, num_groups=4)
    regrouping = Regrouping([select_rows(whole, [row, row + 1]) for row in range(0, 8, 2)], groups)
    batches = [regrouping[index] for index in range(4)]
    assert batches[0]["completion_mask"].sum() == 30, "the longest row is alone"
    rows = torch.cat([batch["advantages"] for batch in batches])
    assert sorted(rows[:, 0].tolist()) == whole["advantages"][:, 0].tolist()
    assert [batch["row_share"] * 2 for batch in batches] == [len(batch["advantages"]) for batch in batches]
    assert sum(batch["row_share"] for batch in batches) == 4
    assert [batch["num_tokens"] for batch in batches] == [batch["completion_mask"].sum() for batch in batches]


def test_regrouping_holds_no_image_twice_but_those_in_use():
    rows = [1, 30, 2, 3]
    mask = (torch.arange(30) < torch.tensor(rows).unsqueeze(1)).int()
    images = torch.randn(8, 3, 16, 16)  # two for each row
    whole = {"prompt_mask": torch.ones(4, 2, dtype=torch.int), "completion_mask": mask, "pixel_values": images}
    whole["num_images"] = [2] * 4
    batches = [select_rows(whole, [0, 1]), select_rows(whole, [2, 3])]
    del images, whole

    def num_images():
        storages = {}
        for tensor in (object for object in gc.get_objects() if isinstance(object, torch.Tensor)):
            if tensor.shape[1:] == (3, 16, 16):
                storages[tensor.untyped_storage().data_ptr()] = len(tensor)
        return sum(storages.values())

    regrouping = Regrouping(batches, [[1], [3, 2, 0]])
    assert num_images() == 8
    first = regrouping[0]
    assert first["completion_mask"].sum() == 30 and num_images() == 8 + 2
    del first
    second = regrouping[1]
    assert len(second["pixel_values"]) == num_images() - 8 == 6


PROMPT_LENGTHS, COMPLETION_LENGTHS = [3, 1, 5, 2], [4, 7, 0, 1]  # 0: masked, as a truncated completion


def padded_batch(num_tokens: int = 20) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Token ids and attention mask of 5 + 8 columns, in TRL's layout, and the 8."""
    columns = torch.arange(8)
    prompt_mask = (torch.arange(5) >= 5 - torch.tensor(PROMPT_LENGTHS).unsqueeze(1)).long()
    completion_mask = (columns < torch.tensor(COMPLETION_LENGTHS).unsqueeze(1)).long()
    attention_mask = torch.cat([prompt_mask, completion_mask], dim=1)
    ids = torch.randint(1, num_tokens, attention_mask.shape, generator=torch.Generator().manual_seed(0))
    return ids * attention_mask, attention_mask, 8


def test_aligned_rows_hold_no_padding_that_could_go():
    input_ids, attention_mask, logits_to_keep = padded_batch()
    rows = LeftAligned(attention_mask, logits_to_keep)
    ids, mask = rows.align(input_ids), rows.align(attention_mask)
    assert ids.shape == (4, 8), "one prompt token and seven of its completion"
    labels = rows.mask_labels(ids)
    for row, length in enumerate([7, 8, 5, 3]):
        assert mask[row].tolist() == [1] * length + [0] * (8 - length)
        prompt_length = PROMPT_LENGTHS[row]
        assert (labels[row] == -100).tolist() == [True] * prompt_length + [False] * (length - prompt_length) + [
            True
        ] * (8 - length)
        assert ids[row, :length].tolist() == input_ids[row][attention_mask[row].bool()].tolist()
        assert not ids[row, length:].any()


def test_a_batch_of_masked_completions_keeps_a_column_to_score():
    attention_mask = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]])
    rows = LeftAligned(attention_mask, 2)
    assert rows.logits_to_keep == 1 and rows.align(attention_mask).shape == (2, 3)
    assert rows.restore(torch.ones(2, 1)).tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("positions", ["rotary", "absolute"])
def test_log_probs_of_aligned_rows(positions):
    """Those of each row alone. With absolute positions TRL's left-padded rows have others."""
    if positions == "rotary":
        model, _ = tiny_models.build_qwen3()
    else:
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=20, n_positions=32)).eval()
    input_ids, attention_mask, logits_to_keep = padded_batch()

    def logps(ids, mask):
        with torch.no_grad():
            log_probs = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        return log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1)

    rows = LeftAligned(attention_mask, logits_to_keep)
    aligned = logps(rows.align(input_ids), rows.align(attention_mask))
    found = rows.restore(aligned[:, -rows.logits_to_keep :])
    assert found.shape == (4, 8)
    for row, (prompt_length, completion_length) in enumerate(zip(PROMPT_LENGTHS, COMPLETION_LENGTHS, strict=True)):
        ids = input_ids[row][attention_mask[row].bool()].unsqueeze(0)
        alone = logps(ids, torch.ones_like(ids))[0, prompt_length - 1 :]
        torch.testing.assert_close(found[row, :completion_length], alone, rtol=0, atol=1e-5)
        assert not found[row, completion_length:].any()
