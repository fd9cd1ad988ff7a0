"""Training over a network: two machines, each with a process, and what goes over the cable."""

import re
import time

import pytest
import torch
from helpers import CONFIG, SPREAD_COMPLETIONS
from run_training import train
from safetensors.torch import load_file

from gndpo_trl.grpo.checkpoints import whole_checkpoints


NUM_STEPS = 3


@pytest.fixture
def specify(checkpoints):
    def specify(folder, **config):
        return {
            "model": checkpoints["qwen3-student"],
            "teacher": checkpoints["qwen3-teacher"],
            "completions": SPREAD_COMPLETIONS,
            "config": {
                **CONFIG,
                "max_steps": NUM_STEPS,
                "learning_rate": 0.1,
                "output_dir": str(folder / "out"),
                **config,
            },
            "save": str(folder / "saved"),
        }

    return specify


@pytest.fixture
def expected(specify, tmp_path):
    """What one process learns, as weights, and its logs."""
    folder = tmp_path / "one_process"
    report = train({**specify(folder, per_device_train_batch_size=8), "images": False})
    return load_file(folder / "saved" / "model.safetensors"), report["log_history"][:NUM_STEPS]


# Of a step, in units of the weights in float32, by each of two machines. On paper, with W for the weights of student or teacher:
# a ring's all-reduce sends W, its all-gather or reduce-scatter W / 2. gloo reduces and scatters in one all-reduce. "ddp": one
# all-reduce of gradients. "zero2": that, and a gather of new weights. The others: one all-reduce, and gathers of the student for
# its scoring, its loss and its backward pass and of the teacher. Moments, logs and the like are 37 KB, which is 0.4 W of this model.
SENT = {"ddp": (1.0, 1.6), "zero2": (1.5, 2.1), "zero3": (3.0, 4.2), "fsdp2": (3.0, 4.5)}


@pytest.mark.parametrize("accelerate_config", SENT)
def test_two_nodes_learn_what_one_process_does(cluster, specify, expected, tmp_path, accelerate_config):
    folder = tmp_path / "two_nodes"
    spec = {
        **specify(folder, per_device_train_batch_size=4),
        "fsdp": accelerate_config == "fsdp2",
        "count_bytes": True,
    }
    cluster.start(accelerate_config, spec, folder)
    reports = cluster.wait()
    assert [report["num_processes"] for report in reports] == [2, 2]
    weights, logs = expected
    found = load_file(folder / "saved" / "model.safetensors")
    check_same(found, weights, reports[0]["log_history"], logs)
    num_bytes = sum(value.nbytes for value in weights.values())
    for report in reports:
        first, *others = report["bytes_sent"]
        sent = (others[-1] - first) / len(others) / num_bytes
        print(f"{accelerate_config}: {sent:.2f}")
        low, high = SENT[accelerate_config]
        assert low < sent < high


def test_a_teacher_on_a_third_machine(cluster, specify, expected, tmp_path, checkpoints):
    folder = tmp_path / "two_nodes"
    url = cluster.serve(checkpoints["qwen3-teacher"], tmp_path)
    spec = specify(folder, per_device_train_batch_size=4, teacher_server_url=[url])
    cluster.start("ddp", {**spec, "teacher": None}, folder)
    reports = cluster.wait()
    check_same(
        load_file(folder / "saved" / "model.safetensors"), *expected[:1], reports[0]["log_history"], expected[1]
    )


def check_same(found: dict, weights: dict, found_logs: list[dict], logs: list[dict]) -> None:
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    for one, two in zip(logs, found_logs[: len(logs)], strict=True):
        for name, value in one.items():
            if name.startswith(("score/", "advantages/", "teacher/", "student/", "reverse_kl")) and value is not None:
                assert two[name] == pytest.approx(value, abs=1e-5), name


VANISHED = r"RuntimeError: Of 2 ranks rank {rank} \([^)]*10.77.0.{node}\) does not answer any more"


def test_a_node_that_vanishes_is_named_by_the_other_and_the_run_goes_on_afterwards(
    cluster, network, specify, tmp_path
):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "learning_rate": 1e-3}
    folder = tmp_path / "cut_off"
    spec = specify(folder, per_device_train_batch_size=4, max_steps=100_000, **saving)
    cluster.start("ddp", {**spec, "timeout": 15}, folder)
    try:
        cluster.wait_for(lambda: len(list((folder / "out").glob("checkpoint-*"))) > 1)
        network.cut("two")
        start = time.monotonic()
        assert [process.wait(timeout=60) for process in cluster.processes] == [1, 1]
        assert time.monotonic() - start < 15 + 30
    finally:
        network.mend("two")
    assert re.search(VANISHED.format(rank=1, node=2), cluster.output("one"))
    assert re.search(VANISHED.format(rank=0, node=1), cluster.output("two"))
    step, checkpoint = max(whole_checkpoints(str(folder / "out")).items())
    again = specify(tmp_path / "again", per_device_train_batch_size=4, max_steps=step + 2, **saving)
    cluster.start("ddp", {**again, "resume": checkpoint}, tmp_path / "again")
    assert cluster.wait()[0]["global_step"] == step + 2
