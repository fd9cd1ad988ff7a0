"""The comparison of arms: its transforms, tiny runs of every kind of trainer, and the tables made of the rows."""

import itertools
import sys

import bitsandbytes
import digits_data
import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, load_from_disk
from digits_models import tokenize
from trl import DistillationConfig, SFTConfig

from benchmarks.arms import (
    chain_data,
    chain_models,
    command,
    gradient_noise,
    moments,
    pretrained,
    report,
    runs,
    transforms,
)
from benchmarks.arms.cells import ARMS, REGIMES, SMOKE_TASKS, TASKS
from benchmarks.arms.models import (
    build_once,
    load_model,
    load_processor,
    round_to_four_bits,
    sample,
    swap_ends,
    to_four_bits,
)
from benchmarks.arms.results import ROOT
from benchmarks.arms.trainers import SHARED_OPTIONS, train_order
from benchmarks.arms.transforms import build_transform
from gndpo_trl import GNDPOConfig
from gndpo_trl.gspo import GSPOConfig
from gndpo_trl.objective.advantages import row_moments


@pytest.fixture(scope="module")
def output_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("arms")


# ---- transforms

SCORES = torch.tensor([[0.5, -7.0, 0.0], [1.0, 1.0, 0.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
# Clamped: 0.5, -5, 0 | 1, 1 with mean -0.5 and variance (1 + 20.25 + .25 + 2 * 2.25) / 4 = 6.5.


@pytest.mark.parametrize(
    "name, expected",
    [
        ("scale", [[0.196116, -1.961161, 0.0], [0.392232, 0.392232, 0.0]]),
        ("center", [[1.0, -4.5, 0.5], [1.5, 1.5, 0.0]]),
        # of each completion: standard deviations 3.041381 and 0, which is taken for 1e-4
        ("scale-sequence", [[0.164399, -1.643990, 0.0], [10_000.0, 10_000.0, 0.0]]),
        ("center-sequence", [[2.0, -3.5, 1.5], [0.0, 0.0, 0.0]]),
        # median 0.5, absolute deviations 0, 7.5, 0.5, 0.5, 0.5: (score - 0.5) / (0.5 / 0.6745), no further than 5
        ("robust", [[0.0, -5.0, -0.6745], [0.6745, 0.6745, 0.0]]),
        # the first batch starts the averages: variance 5.2 around the mean, not unbiased
        ("running", [[0.438529, -1.973379, 0.219265], [0.657794, 0.657794, 0.0]]),
        ("tanh", [[0.498340, -4.426758, 0.0], [0.986877, 0.986877, 0.0]]),
    ],
)
def test_transforms_are_what_they_were(name, expected):
    torch.testing.assert_close(build_transform(name)(SCORES, MASK), torch.tensor(expected), atol=1e-5, rtol=0)


def test_running_moments_forget_slowly_and_belong_to_one_run():
    first, second = torch.zeros(1, 4), torch.full((1, 4), 2.0)
    first[0, 0], mask = 4.0, torch.ones(1, 4, dtype=torch.bool)
    running = transforms.Running()
    running(first, mask)  # mean 1, mean square 4
    # 0.9 * 1 + 0.1 * 2 = 1.1; 0.9 * 4 + 0.1 * 4 = 4
    expected = torch.full((1, 4), (2 - 1.1) / (4 - 1.1**2) ** 0.5)
    torch.testing.assert_close(running(second, mask), expected)
    torch.testing.assert_close(build_transform("running")(second, mask), torch.zeros(1, 4))


def test_robust_outlives_a_batch_of_equal_scores():
    scores = torch.tensor([[0.25, 0.25, 0.25, 1.25]])
    advantages = transforms.robust(scores, torch.ones(1, 4, dtype=torch.bool))
    torch.testing.assert_close(advantages, torch.tensor([[0.0, 0.0, 0.0, 5.0]]))


# ---- the sampler


@pytest.fixture(scope="module")
def model_and_questions(output_dir):
    data, student = (
        build_once("digits", SMOKE_TASKS["digits"], 1, which, output_dir) for which in ("data", "student")
    )
    processor, model = load_processor(student), load_model(student)
    # A model that has learned nothing repeats its last token, whose embedding is tied to the head.
    generator = torch.Generator().manual_seed(0)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape, generator=generator))
    return model, tokenize(processor, load_from_disk(data)["test"]), processor.tokenizer.eos_token_id


def test_samples_follow_the_model_without_placeholders(model_and_questions):
    model, questions, end_id = model_and_questions
    one = {key: value[:1] for key, value in questions.items()}
    torch.manual_seed(0)
    tokens, mask = sample(model, one, end_id, 2, repeats=4000)
    first = model(**one).logits[0, -1].detach()
    first[model.config.image_token_id] = -torch.inf
    frequencies = torch.bincount(tokens[:, 0], minlength=len(first)) / len(tokens)
    assert (frequencies - first.softmax(-1)).abs().max() < 0.03
    assert not (tokens == model.config.image_token_id).any() and mask[:, 0].all()
    assert torch.equal(mask[:, 1], tokens[:, 0] != end_id)


def test_repeated_samples_stand_beside_each_other(model_and_questions):
    model, questions, end_id = model_and_questions
    tokens, _ = sample(model, questions, end_id, 4, repeats=2, greedy=True)
    assert torch.equal(tokens[::2], tokens[1::2]) and len(tokens.unique(dim=0)) > 3


# ---- runs


CONFIGS = {"gndpo": GNDPOConfig, "distillation": DistillationConfig, "sft": SFTConfig, "gspo": GSPOConfig}


@pytest.mark.parametrize("arm", [arm for arm in ARMS.values() if arm.trainer in CONFIGS], ids=str)
def test_options_of_every_arm_are_fields_that_go_together(arm):
    CONFIGS[arm.trainer]("out", **SHARED_OPTIONS, **arm.options)
    assert arm.transform is None or callable(build_transform(arm.transform))


@pytest.mark.parametrize("regime", REGIMES.values(), ids=REGIMES)
def test_every_regime_has_options_and_a_teacher(regime, output_dir):
    GNDPOConfig("out", **SHARED_OPTIONS, **regime.options)
    paths = {
        which: build_once("digits", SMOKE_TASKS["digits"], 1, which, output_dir) for which in ("teacher", "student")
    }
    kept = load_model(paths["student" if regime.teacher == "student" else "teacher"])
    processor = load_processor(paths["student"])
    teacher = runs.load_teacher(regime.teacher, paths, processor)
    inputs = {"input_ids": torch.arange(40).view(4, 10)}
    with torch.no_grad():
        is_another = not torch.equal(teacher(**inputs).logits, kept(**inputs).logits)
    assert is_another == (regime.teacher != "teacher")


@pytest.mark.parametrize(
    "task, regime, arm",
    [
        ("digits", "own-teacher-floor", "global"),
        ("digits", "demo", "tanh"),
        ("digits", "demo", "distillation"),
        ("digits", "demo", "sft"),
        ("digits", "demo", "gspo"),
        ("digits", "demo", "student"),
        ("digits", "demo", "teacher"),
        ("chain", "outliers", "global"),
    ],
)
def test_every_kind_of_trainer_runs(task, regime, arm, output_dir):
    row = runs.run_cell(task, regime, arm, 1e-3, 1, output_dir, smoke=True)
    steps = 0 if arm in ("student", "teacher") else SMOKE_TASKS[task].steps
    assert row["steps"] == len(row["grad_norm"]) == steps and not row["diverged"]
    shortest = 32 if task == "chain" else 0  # where a model that knows nothing knows no end
    assert 0 <= row["accuracy"] <= 1 and shortest < row["length"] <= TASKS[task].max_new_tokens
    assert abs(row["reverse_kl"]) < 1e-6 if arm == "teacher" else row["reverse_kl"] > 0
    if arm not in ("student", "teacher", "gspo"):  # no reward differs between models that know nothing
        assert row["grad_norm"][-1] > 0
    assert len(row["clamped"]) == (steps if ARMS[arm].trainer == "gndpo" else 0)


def test_outliers_are_rare_sure_and_always_the_same(model_and_questions, output_dir):
    _, questions, end_id = model_and_questions
    teacher = load_model(build_once("digits", SMOKE_TASKS["digits"], 1, "teacher", output_dir))
    tokens, mask = sample(teacher, questions, end_id, 32, repeats=8)
    inputs = {key: value.repeat_interleave(8, dim=0) for key, value in questions.items()}
    inputs["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with torch.no_grad():
        before = teacher(**inputs).logits.log_softmax(-1)
        runs.add_outliers(teacher)
        after = teacher(**inputs).logits.log_softmax(-1)
        half = teacher(**{key: value[:4] for key, value in inputs.items()}).logits.log_softmax(-1)
    changed = (after - before).abs().amax(-1) > 1e-3
    assert 0.005 < changed.float().mean() < 0.05
    assert after[changed].exp().amax(-1).min() > 0.5 > before[changed].exp().amax(-1).max()
    torch.testing.assert_close(after[:4], half, atol=1e-3, rtol=0)


def test_a_run_that_diverges_has_a_row(output_dir):
    row = runs.run_cell("digits", "sgd-unclipped", "global", 1e38, 1, output_dir, smoke=True)
    assert row["diverged"] and row["accuracy"] == 0 and row["steps"] < SMOKE_TASKS["digits"].steps + 1


def test_a_mistake_is_no_divergence(output_dir):
    with pytest.raises(TypeError, match="std_floor"):
        runs.run_cell("digits", "own-teacher-floor", "distillation", 1e-3, 1, output_dir, smoke=True)


def test_four_bits_are_those_of_bitsandbytes():
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    weight[1, :3], weight[2] = torch.tensor([4.0, -0.36, 1.0]), 0.0
    rounded = to_four_bits(weight)
    quantized, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    torch.testing.assert_close(rounded, bitsandbytes.functional.dequantize_4bit(quantized, state))
    # 0.25 lies nearest to 0.2461123; -0.09 to -0.09105004
    torch.testing.assert_close(rounded[1, :3], torch.tensor([4.0, -0.3642002, 0.9844492]))
    assert not rounded[2].any()


def test_four_bits_reach_all_linear_layers_and_nothing_else(output_dir):
    teacher = load_model(build_once("digits", SMOKE_TASKS["digits"], 1, "teacher", output_dir))
    before = {name: parameter.clone() for name, parameter in teacher.named_parameters()}
    round_to_four_bits(teacher)
    changed = {name for name, parameter in teacher.named_parameters() if not torch.equal(parameter, before[name])}
    linear = {f"{name}.weight" for name, module in teacher.named_modules() if isinstance(module, torch.nn.Linear)}
    assert changed == linear - {"lm_head.weight"} and len(changed) > 20


def test_a_teacher_with_another_end_says_it_and_reads_as_before(model_and_questions, output_dir, tmp_path):
    _, questions, end_id = model_and_questions
    teacher = load_model(build_once("digits", SMOKE_TASKS["digits"], 1, "teacher", output_dir))
    before = teacher(**questions).logits
    swap_ends(teacher, end_id, 2)
    after = teacher(**questions).logits
    assert end_id in questions["input_ids"] and end_id != 2
    torch.testing.assert_close(after[..., [end_id, 2]], before[..., [2, end_id]])
    others = [id for id in range(before.shape[-1]) if id not in (end_id, 2)]
    torch.testing.assert_close(after[..., others], before[..., others])
    teacher.save_pretrained(tmp_path)
    torch.testing.assert_close(load_model(tmp_path)(**questions).logits, after)


def test_all_trainers_get_the_same_prompts():
    order = list(train_order(Dataset.from_dict({"x": range(8)}), prompts=2, num_generations=3, seed=0))
    assert len(order) == 24 and order[0] == order[1] == order[2] != order[3]


@pytest.mark.processes
def test_the_command_resumes(tmp_path, monkeypatch, capsys):
    folders = ["--output_dir", str(tmp_path / "out"), "--results", str(tmp_path / "rows.parquet")]
    cells = ["--arms", "none", "student", "--learning_rates", "1e-3", "--seeds", "1"]
    monkeypatch.setattr(sys, "argv", ["arms", "--smoke", *folders, *cells])
    assert command.main() == 0
    assert list(pd.read_parquet(tmp_path / "rows.parquet")["arm"]) == ["none", "student"]
    assert not list((tmp_path / "out" / "cells").glob("*.partial"))
    (tmp_path / "out" / "cells" / "digits-demo-none-lr0.001-seed1.json").unlink()  # the table is enough
    assert command.main() == 0
    assert "2 of 2 cells are there, 0 to run" in capsys.readouterr().out
    assert len(pd.read_parquet(tmp_path / "rows.parquet")) == 2


def test_the_smoke_form_keeps_away_from_the_real_rows(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["arms", "--smoke"])
    with pytest.raises(SystemExit):
        command.main()


# ---- the chain task


@pytest.fixture(scope="module")
def chain():
    return chain_data.build_splits(seed=3, train_rows=400, test_rows=100)


@pytest.mark.parametrize(
    "manner, stated_sum, expected",
    [
        ("Plain", 7, r"<think>I see 2, 5 and 9. 2+5=7. 7-9=-2.</think>\boxed{-2}"),
        ("Checking", 8, r"<think>I see 2, 5 and 9. 2+5=8. 8-9=-1. 9+-1=8. 8-5=3.</think>\boxed{-1}"),
    ],
)
def test_answers_of_the_chain(manner, stated_sum, expected):
    assert chain_data.answer_text(manner, 2, 5, 9, stated_sum) == expected


def test_a_counted_answer_goes_up_and_down():
    text = "I see 1, 2 and 1. 1+2=2+1, 2+1=4. 4-1=3."
    assert chain_data.answer_text("Counting", 1, 2, 1, 4) == f"<think>{text}</think>\\boxed{{3}}"


def test_answers_of_the_chain_survive_the_tokenizer_and_fit():
    tokenizer = chain_models.build_processor().tokenizer
    lengths = {manner: [] for manner in chain_data.MANNERS}
    for manner, a, b, c, slip in itertools.product(lengths, (0, 4, 9), (0, 5, 9), (0, 9), (0, 1)):
        answer = chain_data.answer_text(manner, a, b, c, a + b + slip)
        assert digits_data.is_correct(answer, str(a + b + slip - c))
        ids = tokenizer(answer)["input_ids"]
        assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == answer
        lengths[manner].append(len(ids) + 1)  # the end of the turn
    assert max(lengths["Plain"]) < 30 < min(lengths["Checking"]) and max(lengths["Checking"]) < 45
    assert 5 * max(lengths["Plain"]) < max(lengths["Counting"]) <= TASKS["chain"].max_new_tokens


def test_rows_of_the_chain(chain):
    rows, processor = chain["test"], chain_models.build_processor()
    assert all(
        digits_data.is_correct(completion[0]["content"], solution)
        for completion, solution in zip(rows["completion"], rows["solution"], strict=True)
    )
    questions = tokenize(processor, rows)
    assert questions["attention_mask"].all() and processor.tokenizer.unk_token_id not in questions["input_ids"]
    counted = [prompt[0]["content"].startswith("Counting") for prompt in chain["train"]["prompt"]]
    assert 0.02 < np.mean(counted) < 0.09

    def scans(split):
        pixels = [np.asarray(images[0].convert("L")) for images in split["images"]]
        corners = [(slice(8), slice(8)), (slice(8), slice(8, 16)), (slice(8, 16), slice(8))]
        return {image[corner].tobytes() for image in pixels for corner in corners}

    assert len(scans(chain["train"])) > 500 and not scans(chain["train"]) & scans(rows)


def test_wrong_sums_of_the_chain_are_gone_on_with(chain):
    split = chain["train"]
    spoiled = chain_data.with_wrong_sums(split, seed=0)
    pairs = zip(split["completion"], spoiled["completion"], spoiled["solution"], strict=True)
    kept = [before == after for before, after, _ in pairs]
    assert 0.4 < np.mean(kept) < 0.6
    for completion, solution, same in zip(spoiled["completion"], spoiled["solution"], kept, strict=True):
        assert digits_data.is_correct(completion[0]["content"], str(int(solution) + (not same)))


def test_batches_of_the_chain_are_counted_or_not():
    split = Dataset.from_dict(
        {
            "prompt": [
                [{"role": "user", "content": "Counting:" if index % 8 == 0 else "Plain:"}] for index in range(512)
            ]
        }
    )
    ordered = [prompt[0]["content"] for prompt in chain_models.in_batches(split, seed=0)["prompt"]]
    size = chain_models.BATCH_SIZE
    batches = [set(ordered[start : start + size]) for start in range(0, len(ordered), size)]
    assert all(len(batch) == 1 for batch in batches)
    assert batches.count({"Counting:"}) == chain_models.REPEATS * 64 // size
    assert batches.count({"Plain:"}) == 448 // size


# ---- noise of the gradient


def test_noise_and_direction_are_those_of_the_distribution():
    generator = torch.Generator().manual_seed(0)
    signal, other = torch.zeros(2000), torch.zeros(2000)
    signal[0], other[:2] = 3.0, 2.0
    noise = torch.randn(50, 2000, generator=generator)
    # Independent noise of variance 1 and 4 in each of 2,000 directions, and a part that both have.
    numbers = gradient_noise.compare_gradients(signal + noise, other + 2 * noise)
    assert numbers["noise"] == pytest.approx(2000 / 9, rel=0.15)
    assert numbers["cosine"] == pytest.approx(0.5**0.5, abs=0.2)
    assert numbers["norm"] == pytest.approx(2009**0.5, rel=0.05) and numbers["norm_max"] > numbers["norm"]


def test_exact_gradient_is_that_of_the_reverse_kl():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator).requires_grad_()
    teacher = (3 * torch.randn(2, 3, 5, generator=generator)).log_softmax(-1)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    batch = gradient_noise.Batch(logits.log_softmax(-1), teacher, torch.zeros(2, 3, dtype=torch.long), mask)
    kl = (batch.student.exp() * (batch.student - teacher)).sum(-1)
    (expected,) = torch.autograd.grad((kl[0].mean() + kl[1, 0]) / 2, logits, retain_graph=True)
    (gradient,) = torch.autograd.grad(gradient_noise.objective(gradient_noise.REVERSE_KL, batch), logits)
    torch.testing.assert_close(gradient, expected)


def test_noise_of_every_arm_is_measured_and_kept(output_dir, tmp_path, monkeypatch, capsys):
    results = tmp_path / "noise.parquet"
    states = ["--students", "later", "own-teacher", "--teachers", "outliers", "--seeds", "1", "--prompts", "2"]
    folders = ["--output_dir", str(output_dir), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["gradient_noise", "--smoke", *states, *folders])
    assert gradient_noise.main() == 0 and gradient_noise.main() == 0
    rows = pd.read_parquet(results)
    arms_per_state = len(gradient_noise.SAMPLED) + len(gradient_noise.EXACT)
    assert len(rows) == 2 * arms_per_state and capsys.readouterr().out.count("seed 1") == 2
    # A student that is its teacher has scores of rounding: whitening makes a gradient of them as of any others.
    own = rows[rows["student"] == "own-teacher"].set_index("arm")["norm"]
    assert own["none"] < 0.1 * own["global"] and own["global, std_floor 0.1"] < 0.5 * own["global"]


# ---- moments of a batch


def test_errors_of_moments_are_those_of_independent_prompts():
    generator = torch.Generator().manual_seed(0)
    independent = torch.randn(2000, 25, generator=generator)
    errors = moments.moment_errors(row_moments(independent, torch.ones(2000, 25)), prompts=16)
    assert errors["tokens"] == 400
    assert errors["mean_error"] == pytest.approx(400**-0.5, rel=0.05)
    assert errors["std_error"] == pytest.approx(800**-0.5, rel=0.05)
    # The tokens of a prompt all alike: its 25 tokens are one.
    alike = independent[:, :1].expand(2000, 25)
    errors = moments.moment_errors(row_moments(alike, torch.ones(2000, 25)), prompts=16)
    assert errors["mean_error"] == pytest.approx(16**-0.5, rel=0.05)


def test_moments_of_every_task_are_measured(output_dir, tmp_path, monkeypatch):
    results = tmp_path / "moments.parquet"
    folders = ["--output_dir", str(output_dir), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["moments", "--smoke", "--seeds", "1", "--prompts", "16", *folders])
    assert moments.main() == 0
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--tasks", "digits"])
    assert moments.main() == 0
    rows = pd.read_parquet(results)
    assert list(rows["prompts"]) == [1, 4, 16, 64] * 2 and list(rows["task"]) == ["chain"] * 4 + ["digits"] * 4
    assert (rows[["mean_error", "std_error"]] > 0).all(axis=None)
    assert "| chain | 64 |" in report.moments_table(rows)


# ---- tables


def rows_of(accuracies: dict[tuple[str, float], list[float]]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "task": "digits",
                "regime": "demo",
                "arm": arm,
                "learning_rate": rate,
                "seed": seed,
                "accuracy": accuracy,
                "reverse_kl": 0.1,
                "length": 20.0,
                "steps": 3,
                "train_seconds": 6.0,
                "eval_step": [2, 3],
                "eval_accuracy": [accuracy / 2, accuracy],
                "grad_norm": [1.0, 2.0, 9.0],
                "completion_length": [20.0, 21.0, 22.0],
                "clamped": [0.02, 0.04, 0.06],
            }
            for (arm, rate), values in accuracies.items()
            for seed, accuracy in enumerate(values)
        ]
    )


def test_intervals_hold_the_mean_and_narrow_with_agreement():
    values = np.array([0.5, 0.6, 0.7, 0.8, 0.9])
    low, high = report.interval(values)
    # of 5 ** 5 resamples, 2.5 % have a mean of at most 0.58 and as many of at least 0.82
    assert low == pytest.approx(0.58, abs=0.01) and high == pytest.approx(0.82, abs=0.01)
    assert report.interval(np.full(5, 0.7)) == (pytest.approx(0.7), pytest.approx(0.7))


def test_differences_are_paired_by_seed():
    rows = rows_of({("global", 1e-3): [0.2, 0.4, 0.6, 0.8, 0.9], ("none", 1e-3): [0.3, 0.5, 0.7, 0.9, 1.0]})
    assert "| none | +10.0 [+10.0, +10.0] |" in report.paired_by_rate(rows, "accuracy", report.points)


def test_tables_of_other_regimes_stand_in_one(tmp_path):
    rows = rows_of({("global", 1e-3): [0.2, 0.4, 0.6], ("none", 1e-3): [0.3, 0.5], ("sft", 2e-3): [0.7]})
    tables = report.tables(rows.assign(regime="other-end"))
    assert tables["digits-demo-accuracy"] == tables["chain-demo-length"] == report.NO_ROWS
    lines = tables["regimes"].splitlines()[2:]
    assert lines[0].startswith("| digits | other-end | global | 0.001 | 40.0 [20.0, 60.0] (n=3) |  | 0.100")
    assert "+10.0 [+10.0, +10.0] (n=2)" in lines[1] and "| 2 / 9 | 20.0" in lines[1] and "| 4.0" in lines[1]
    assert "| sft | 0.002 | 70.0 (n=1) | – |" in lines[2]
    mixed = report.tables(pd.concat([rows, rows.assign(task="chain"), rows.assign(regime="other-end")]))
    assert mixed["chain-demo-accuracy"] == mixed["digits-demo-accuracy"] and mixed["regimes"] == tables["regimes"]
    assert "20.0" in mixed["chain-demo-length"] and "models" not in mixed


def test_samples_of_some_steps_ago_have_a_table_and_a_figure_of_their_own(tmp_path):
    rows = rows_of({("global", 1e-3): [0.8, 0.6], ("exact", 1e-3): [0.9, 0.9], ("exact", 2e-3): [0.7]})
    old = rows_of({("global", 1e-3): [0.1], ("exact", 1e-3): [0.8, 0.9]}).assign(regime="stale-4")
    older = rows_of({("exact", 1e-3): [0.7]}).assign(regime="stale-8")
    tables = report.tables(pd.concat([rows, old, older]))
    assert tables["regimes"] == report.NO_ROWS
    header, _, first, second = tables["staleness"].splitlines()  # the same seeds, and no rate without old samples
    assert header == "| rate | arm | 0 | 4 | 8 |"
    assert first == "| 0.001 | global | 80.0 (n=1) | 10.0 (n=1) | – |"
    assert second.startswith("| 0.001 | exact | 90.0 [90.0, 90.0] (n=2) | 85.0 [80.0, 90.0] (n=2) | 70.0 (n=1) |")
    report.plot_staleness(pd.concat([rows, old, older]), tmp_path / "stale.png")
    report.plot_staleness(rows, tmp_path / "none.png")
    assert [path.name for path in tmp_path.iterdir()] == ["stale.png"]


def test_a_regimes_teacher_has_a_line_of_its_own():
    ends = rows_of({("student", 1e-3): [0.5], ("teacher", 1e-3): [0.9]})
    other = ends.assign(regime="four-bit-teacher", accuracy=0.8)
    table = report.tables(pd.concat([ends, other]))["models"].splitlines()[2:]
    assert table == [
        "| digits | student | 50.0 |",
        "| digits | teacher | 90.0 |",
        "| digits | teacher, four-bit-teacher | 80.0 |",
    ]


def test_figures_are_drawn_of_the_demo_alone(tmp_path):
    rows = rows_of({("student", 1e-3): [0.5], ("global", 1e-3): [0.6, 0.7], ("sft", 1e-3): [0.7, 0.8]})
    rows.loc[rows["arm"] == "sft", "completion_length"] = pd.Series([[]] * len(rows))  # it samples nothing
    plots = (report.plot_accuracy, report.plot_gradient_norms, report.plot_cost)
    for plot in plots:
        plot(rows, tmp_path / "alone.png")
        plot(pd.concat([rows.assign(task="chain"), rows.assign(regime="sgd"), rows]), tmp_path / "among.png")
        assert (tmp_path / "alone.png").read_bytes() == (tmp_path / "among.png").read_bytes()


def test_figures_leave_out_arms_of_few_rates():
    rates = {("global", rate): [0.5] for rate in (1e-4, 2e-4, 4e-4)} | {
        ("sequence", rate): [0.5] for rate in (1e-4, 4e-4)
    }
    rows = rows_of({**rates, ("group", 1e-4): [0.5], ("student", 0.0): [0.5]})
    assert set(report.of_demo(rows)["arm"]) == {"global", "sequence", "student"}


def test_the_range_of_an_arm_ends_where_it_breaks():
    rows = rows_of({("none", 1e-4): [0.9], ("none", 2e-4): [0.7], ("none", 4e-4): [0.88], ("none", 8e-4): [0.9]})
    assert "| none | 0.0001 |" in report.best_rates(rows)  # the first of two equal ones
    rows.loc[rows["learning_rate"] == 8e-4, "accuracy"] = 0.92
    assert "0.0004 to 0.0008 | 2× |" in report.best_rates(rows)


def test_tables_of_a_document_are_replaced_and_nothing_else():
    text = "before\n<!-- a -->\nold\n<!-- end -->\nbetween\n<!-- b -->\n<!-- end -->\nafter"
    new = report.replace_tables(text, {"a": "| A |", "b": "| B |"})
    assert new == "before\n<!-- a -->\n| A |\n<!-- end -->\nbetween\n<!-- b -->\n| B |\n<!-- end -->\nafter"
    assert report.replace_tables(new, {"a": "| A |", "b": "| B |"}) == new


def test_seconds_are_those_of_a_step_and_beside_the_peer_of_the_same_seed(tmp_path):
    rows = rows_of({("global", 1e-3): [0.6, 0.8], ("distillation", 1e-3): [0.5, 0.7]})
    rows["train_seconds"] = [3.0, 6.0, 6.0, 6.0]
    header, _, ours, peer = report.time_table(rows).splitlines()
    assert header.endswith("| to distillation | accuracy at the end, % |")
    assert ours.startswith("| digits | global | 0.001 | 21.0 ") and ours.endswith("| 70.0 [60.0, 80.0] (n=2) |")
    assert "| 1.500 [1.000, 2.000] (n=2) | 0.75 [0.50, 1.00] (n=2) |" in ours
    assert "| 2.000 [2.000, 2.000] (n=2) | – |" in peer
    both = pd.concat([rows, rows.assign(task="chain")])
    report.plot_time(both, both.assign(arm="student"), tmp_path / "time.png")
    assert (tmp_path / "time.png").stat().st_size > 0


def test_tables_of_the_pretrained_pair():
    row = {"left_out": 4, "learning_rate": 1e-4, "agreement": 0.5, "length": 20.0, "peak_bytes": 2**30}
    row |= {"grad_norm": [1.0, 3.0, 4.0], "step_seconds": [9.0, 3.0, 5.0], "generation_seconds": [1.0, 1.0, 1.0]}
    rows = [
        {**row, "arm": arm, "seed": seed, "reverse_kl": end, "eval_reverse_kl": [0.5, end], "clamped": clamped}
        for arm, end, clamped in (("global", 0.4, [0.0, 0.1, 0.2]), ("distillation", 0.3, []))
        for seed in (0, 1)
    ]
    rows.append(
        {**row, "arm": "student", "learning_rate": 0.0, "seed": 0, "reverse_kl": 0.8, "eval_reverse_kl": [0.8]}
    )
    new = report.pretrained_tables(pd.DataFrame(rows))
    both = "[{0}, {0}] (n=2)".format
    line = f"| 4 | 0.0001 | distillation | 0.500 {both('0.500')} | 0.300 {both('0.300')} | -0.100 {both('-0.100')} |"
    assert (
        line in new["pretrained-results"] and "| 4 | – | student | – | 0.800 (n=1) | – |" in new["pretrained-results"]
    )
    # the first step warms up: of 2 and 4 seconds beside sampling, the median is 3
    assert (
        f"| distillation | 1.00 {both('1.00')} | 3.00 {both('3.00')} | 1.00 {both('1.00')} | 3.0"
        in new["pretrained-cost"]
    )
    assert f"| 10.0 {both('10.0')} |" in new["pretrained-cost"] and "student" not in new["pretrained-cost"]


def test_the_document_holds_the_tables_of_the_committed_rows():
    text = (ROOT / "docs" / "evidence_tables.md").read_text()
    results, *others = (module.RESULTS for module in (command, gradient_noise, moments, pretrained))
    committed = (results, report.TIMES, *others)
    assert report.replace_tables(text, report.all_tables(*committed)) == text
