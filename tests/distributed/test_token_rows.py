"""The token view of two processes: the main one writes the completions of both, each once."""

import pyarrow.parquet as pq
import pytest
from helpers import SPREAD_COMPLETIONS


@pytest.mark.parametrize(
    ("family", "accelerate_config"),
    [("qwen3", "ddp"), ("internvl", "ddp"), ("internvl", "zero3"), ("qwen3", "fsdp2")],
)
def test_the_rows_of_all_processes_are_written_once(launch, accelerate_config, family):
    config = {
        "log_completions": True,
        "num_completions_to_print": 1,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    }
    run = launch(accelerate_config, family, config, completions=SPREAD_COMPLETIONS, fsdp=accelerate_config == "fsdp2")
    assert run.returncode == 0, run.output
    (path,) = (run.folder / "out" / "token_scores").glob("*.parquet")
    assert path.stem == "train_00001" and path.with_suffix(".html").exists()
    assert run.output.count("Tokens of step 1, train") == 1
    rows = pq.read_table(path).to_pylist()
    assert [row["rank"] for row in rows] == [0] * 4 + [1] * 4
    assert sorted(row["token_ids"] for row in rows) == sorted(SPREAD_COMPLETIONS)
    for row in rows:
        word = row["prompt"].split(" ?")[0].split()[-1]
        advantages = run.reports[row["rank"]]["advantages"][word]
        assert row["advantages"] == pytest.approx(advantages, abs=1e-6)
        assert row["rewards/teacher_score"] == pytest.approx(sum(row["scores"]) / len(row["scores"]), abs=1e-5)
        assert len(row["images"]) == (family != "qwen3")
