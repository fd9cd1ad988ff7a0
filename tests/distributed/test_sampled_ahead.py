"""A server that samples for two processes while they learn."""

import pytest
from stand_in_sampler import StandInSampler, watched


@pytest.fixture
def sampler(checkpoints):
    server = StandInSampler(checkpoints["qwen3-student"])
    watched(server)
    yield server
    server.stop()


@pytest.fixture
def run(launch, sampler):
    def run(accelerate_config: str, folder, lead: int = 1, **spec):
        config = {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 6, "max_steps": 4}
        config |= {"learning_rate": 0.1, "use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": sampler.url}
        config |= {"output_dir": str(folder), "save_strategy": "steps", "save_steps": 1, "sampling_lead": lead}
        sampler.asked = []
        run = launch(accelerate_config, config=config, task="sampled", **spec)
        assert run.returncode == 0 and len(run.reports) == 2, run.output
        return run.reports, sampler.asked

    return run


def logged(report: dict, name: str) -> list[float]:
    return [entry[name] for entry in report["log_history"] if name in entry]


@pytest.mark.parametrize("accelerate_config", ["ddp", "zero3"])
def test_every_rank_gets_its_own_rows_in_the_order_of_before(run, sampler, tmp_path, accelerate_config):
    _, expected = run(accelerate_config, tmp_path / "before", lead=0)
    reports, asked = run(accelerate_config, tmp_path / "ahead")
    assert asked == expected and len(asked) == 4
    assert logged(reports[0], "sampling/staleness") == [0, 1, 0, 1], "two batches make an epoch"
    assert not any(sampler.interrupted)
    for number, prompts in enumerate(asked):
        of_ranks = [prompt for report in reports for prompt in report["seen"][number]["prompts"]]
        assert of_ranks == [prompt for prompt in prompts for _ in range(2)]
    first, second = ([tuple(ids) for each in report["seen"] for ids in each["completions"]] for report in reports)
    assert not set(first) & set(second), "no completion went to both"


@pytest.mark.parametrize("accelerate_config", ["ddp"])
def test_a_run_that_ends_in_the_middle_goes_on(run, tmp_path, accelerate_config):
    _, whole = run(accelerate_config, tmp_path / "whole")
    _, asked = run(accelerate_config, tmp_path / "parts", end_after=1)
    assert asked == whole[:2], "the second batch was being sampled"
    _, asked = run(accelerate_config, tmp_path / "parts", resume=True)
    assert asked == whole[1:]


@pytest.mark.parametrize("accelerate_config", ["ddp"])
def test_all_ranks_end_when_the_server_does_not_answer(run, sampler, tmp_path, accelerate_config):
    sampler.misbehave = lambda path, body, answer: (
        (400, {"detail": "no more"}) if path == "/v1/completions" and len(sampler.asked) == 2 else answer
    )
    reports, _ = run(accelerate_config, tmp_path / "out")
    for report in reports:
        assert "samples no more" in report["error"] and "no more" in report["error"]
        assert "ended after step 1, which is saved" in report["error"]
