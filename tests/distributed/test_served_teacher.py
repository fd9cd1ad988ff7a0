"""A teacher behind a server, asked by two processes."""

import pytest
from stand_in_server import StandInServer


@pytest.mark.parametrize("accelerate_config", ["ddp"])
def test_every_rank_asks_for_its_own_rows(launch, accelerate_config, checkpoints):
    server = StandInServer(checkpoints["qwen3-teacher"])
    try:
        config = {"per_device_train_batch_size": 4, "teacher_server_url": [server.url]}
        server.requests.clear()
        run = launch(accelerate_config, config=config, task="served")
    finally:
        server.stop()
    assert run.returncode == 0, run.output
    asked = [{tuple(row) for row in report["asked"]} for report in run.reports]
    assert all(len(rows) == 4 for rows in asked) and not asked[0] & asked[1]
    assert all(server.rows.count(row) == 1 for rows in asked for row in rows)
    assert run.reports[0]["log_history"][0]["teacher/unknown_tokens"] == 0
