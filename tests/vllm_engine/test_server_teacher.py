"""A teacher behind a real vLLM server."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import requests
import torch
from fastapi.responses import JSONResponse
from helpers import assert_same_gradients, gradients, make_rollout
from PIL import Image
from transformers import TrainerCallback
from vllm.entrypoints.generate.base.serving import clamp_prompt_logprobs
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.logprobs import Logprob

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.grpo.checkpoints import RunCannotGoOn
from gndpo_trl.grpo.rollouts import valid_tokens
from gndpo_trl.teachers import LocalTeacher, ServerTeacher
from gndpo_trl.teachers.compatibility import describe
from gndpo_trl.teachers.served.questions import MINUS_INFINITY, Picture, Question, ServedModel, data_url
from gndpo_trl.teachers.served.servers import NAN_IN_ANSWER, VLLMServers


FOLDER = Path(__file__).parent
STARTS_WITHIN = 420.0  # three servers and an engine start on two cores at once


@pytest.fixture(scope="module")
def teacher_urls(checkpoints, servers) -> dict[str, str]:
    """The servers of the students, which teach here, with the weights of their checkpoints again."""
    for family, url in servers.items():
        VLLMServers([url], STARTS_WITHIN).ask("/v1/models")
        body = {"method": "reload_weights", "kwargs": {"weights_path": checkpoints[f"{family}-student"]}}
        for path in ("/collective_rpc", "/reset_encoder_cache", "/reset_prefix_cache"):
            requests.post(url + path, json=body if path == "/collective_rpc" else None).raise_for_status()
    return servers


@pytest.fixture
def make(make_config, checkpoints, text_dataset, image_dataset):
    def make(family: str, *urls: str, images: bool = True, teacher_model=None, **options) -> GNDPOTrainer:
        return GNDPOTrainer(
            model=checkpoints[f"{family}-teacher"],
            teacher_model=teacher_model,
            args=make_config(
                GNDPOConfig,
                teacher_server_url=list(urls) or None,
                **{"teacher_server_timeout": STARTS_WITHIN, "per_device_train_batch_size": 8, **options},
            ),
            train_dataset=image_dataset if images else text_dataset,
        )

    return make


@pytest.mark.parametrize("family, images", [("qwen25vl", False), ("qwen25vl", True), ("internvl", True)])
def test_it_scores_as_the_same_teacher_here(make, teacher_urls, checkpoints, family, images):
    trainer = make(family, teacher_urls[family], images=images)
    local = make(family, images=images, teacher_model=LocalTeacher(checkpoints[f"{family}-student"]))
    rollout = {**make_rollout(trainer), "rows": [trainer.train_dataset[index // 2] for index in range(8)]}
    assert ("num_images" in rollout) == images
    mask = valid_tokens(rollout)
    found, expected = (one.teacher.per_token_logps(rollout) for one in (trainer, local))
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5)
    trainer.train()
    assert trainer.state.global_step == 2
    assert [entry.get("teacher/unknown_tokens", 0) for entry in trainer.state.log_history] == [0, 0, 0]


@pytest.mark.parametrize("images", [False, True])
def test_a_teacher_of_another_family_scores_as_the_same_one_here(make, teacher_urls, checkpoints, images):
    path = checkpoints["qwen25vl-student"]
    options = {"images": images, "teacher_alignment": "text", "teacher_model_name_or_path": path}
    trainer, local = make("internvl", teacher_urls["qwen25vl"], **options), make("internvl", **options)
    rollout = {**make_rollout(trainer), "rows": [trainer.train_dataset[index // 2] for index in range(8)]}
    assert ("num_images" in rollout) == images
    mask = rollout["completion_mask"].bool()
    found, expected = (one.teacher.per_token_logps(rollout) for one in (trainer, local))
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5, equal_nan=True)
    assert expected[mask].isfinite().float().mean() > 0.8
    trainer.train()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("family, images", [("qwen25vl", False), ("qwen25vl", True), ("internvl", True)])
def test_with_all_tokens_the_exact_gradient_is_that_of_the_same_teacher_here(
    make, teacher_urls, checkpoints, family, images
):
    options = {"images": images, "estimator": "exact", "max_steps": 1}
    served = make(family, teacher_urls[family], teacher_top_k=10_000, **options)
    assert served.teacher.model.num_known == served.model.config.get_text_config().vocab_size
    found = gradients(served)
    local = make(family, teacher_model=LocalTeacher(checkpoints[f"{family}-student"]), **options)  # seeds
    assert_same_gradients(found, gradients(local))


@pytest.mark.parametrize("images", [False, True])
def test_the_likeliest_tokens_are_those_of_the_same_teacher_here(make, teacher_urls, checkpoints, images):
    options = {"images": images, "estimator": "exact", "max_steps": 1}
    found = gradients(make("qwen25vl", teacher_urls["qwen25vl"], teacher_top_k=8, **options))
    local = make("qwen25vl", teacher_model=LocalTeacher(checkpoints["qwen25vl-student"], top_k=8), **options)  # seeds
    assert_same_gradients(found, gradients(local))


def test_a_server_whose_bound_is_too_low_is_found_at_the_start(serve, checkpoints):
    process, url = serve(checkpoints["qwen3-student"], max_logprobs=10)
    VLLMServers([url], STARTS_WITHIN).ask("/v1/models")
    student = describe("model", checkpoints["qwen3-teacher"])
    ServerTeacher(url, top_k=9).check(student)
    with pytest.raises(ValueError, match=r"`teacher_top_k` is 10.*Restart it with `--max-logprobs 11` or more"):
        ServerTeacher(url, top_k=10).check(student)
    os.killpg(process.pid, signal.SIGKILL)


right_request = ServedModel.request


def expands_twice(model: ServedModel, questions: list[Question]):
    """Sends image tokens that are expanded already, with the images: the server expands the first of them again."""
    path, body = right_request(model, questions)
    return path, {**body, "token_ids": questions[0].ids} if questions[0].pictures else body


def sends_one_image(model: ServedModel, questions: list[Question]):
    """Sends the same image whatever it was asked about, as a server that does not look at images would answer."""
    path, body = right_request(model, questions)
    if questions[0].pictures:
        white = Picture.of(Image.new("RGB", questions[0].pictures[0].size, "white"))
        body["content_parts"] = [{"type": "image_url", "url": data_url(white)}]
    return path, body


@pytest.mark.parametrize(
    "wrong, message",
    [
        (expands_twice, r"reads \d+ tokens of text and images where the student has \d+"),
        (sends_one_image, "not look at"),
    ],
)
@pytest.mark.parametrize("family", ["qwen25vl", "internvl"])
def test_calls_that_get_wrong_numbers_are_found_at_the_start(
    teacher_urls, checkpoints, family, wrong, message, monkeypatch
):
    student = describe("model", checkpoints[f"{family}-teacher"])
    ServerTeacher(teacher_urls[family]).check(student)
    monkeypatch.setattr(ServedModel, "request", wrong)
    with pytest.raises(ValueError, match=message):
        ServerTeacher(teacher_urls[family]).check(student)


def test_how_vllm_writes_what_json_cannot():
    logprobs = [None, {5: Logprob(logprob=-math.inf)}]
    clamp_prompt_logprobs(logprobs)
    assert logprobs[1][5].logprob == MINUS_INFINITY
    with pytest.raises(ValueError) as error:
        JSONResponse({"logprob": math.nan})
    answer = create_error_response(error.value)
    assert answer.error.code == 400 and NAN_IN_ANSWER in answer.error.message


def test_two_ranks_and_two_servers(teacher_urls, spare_server, checkpoints, tmp_path):
    VLLMServers([spare_server[1]], STARTS_WITHIN).ask("/v1/models")
    options = {
        "output_dir": str(tmp_path),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "max_steps": 2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "teacher_server_url": [teacher_urls["qwen25vl"], spare_server[1]],
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    models = [checkpoints["qwen25vl-teacher"], checkpoints["qwen25vl-student"]]
    command += [str(FOLDER / "two_served_ranks.py"), *models, json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr[-5000:]
    reports = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    for report in reports:
        assert len(report["differences"]) == 2 and max(report["differences"]) < 1e-5
        assert min(report["requests"]) > 0  # of each server


class Kill(TrainerCallback):
    """Kills a server after the first step, with the engine's own processes."""

    def __init__(self, process: subprocess.Popen):
        self.process = process

    def on_step_end(self, args, state, control, **kwargs):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def test_a_server_that_is_killed(make, teacher_urls, spare_server, tmp_path):
    process, url = spare_server
    options = {"teacher_server_timeout": 20.0, "output_dir": str(tmp_path / "out"), "max_steps": 3}
    alone, one_of_two = make("qwen25vl", url, **options), make("qwen25vl", url, teacher_urls["qwen25vl"], **options)
    alone.add_callback(Kill(process))
    with pytest.raises(RunCannotGoOn, match=f"(?s){url} has not answered for 20 seconds.*ended after step 1"):
        alone.train()
    one_of_two.train(resume_from_checkpoint=True)
    assert one_of_two.state.global_step == 3
