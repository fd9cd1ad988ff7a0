"""Sampling ahead of the generation batch in use, from a server that samples as vLLM's does; `tests/vllm_engine` has the real one."""

import os
import re
import signal
import threading
import time
import warnings

import pytest
import torch
from helpers import canned, reward
from requests.adapters import HTTPAdapter
from stand_in_sampler import StandInSampler, stand_in, watched
from transformers import TrainerCallback

from gndpo_trl import GNDPOTrainer
from gndpo_trl.grpo.checkpoints import RunCannotGoOn
from gndpo_trl.grpo.sampling_lead import LookAhead, Request, SamplingThread


pytestmark = pytest.mark.filterwarnings("ignore:`reward_funcs` are computed")


@pytest.fixture
def sampler(checkpoints, monkeypatch):
    stand_in(monkeypatch)
    server = StandInSampler(checkpoints["qwen3-student"])
    server.goes_on = watched(server)
    yield server
    server.goes_on.set()
    server.stop()


@pytest.fixture
def make(make_trainer, sampler):
    def make(**options) -> GNDPOTrainer:
        served = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": sampler.url, "weight_decay": 1.0}
        trainer = make_trainer(**{**served, "learning_rate": 1e-2, **options})
        return trainer

    return make


def logged(trainer: GNDPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Act(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, step: int, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


# What is asked, and of whom


@pytest.mark.parametrize(
    "options",
    [
        {"sampling_lead": 1},
        {"sampling_lead": 1, "gradient_accumulation_steps": 2, "max_steps": 5},
        {"sampling_lead": 1, "gradient_accumulation_steps": 4, "steps_per_generation": 2, "max_steps": 3},
        {"sampling_lead": 3, "estimator": "exact"},
        {"sampling_lead": 1, "max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3},
    ],
    ids=["one", "accumulated", "two batches in a step", "three", "until the end of two epochs"],
)
def test_the_same_prompts_in_the_same_order(make, sampler, options):
    options = {"max_steps": 14, **options}
    make(**{**options, "sampling_lead": 0}).train()
    expected, sampler.asked = sampler.asked, []
    trainer = make(**options)
    trainer.train()
    assert sampler.asked == expected and len(expected) > 4
    assert max(logged(trainer, "sampling/lead")) >= 1 or "steps_per_generation" in options
    assert sampler.interrupted and not any(sampler.interrupted), "weights came while something was sampled"


def test_no_lead_is_the_order_of_before(make, sampler):
    trainer = make(max_steps=3)
    trainer.train()
    kinds = [path for path, _ in sampler.requests if path in ("/v1/completions", "/collective_rpc")]
    assert kinds == ["/collective_rpc", "/v1/completions"] * 3
    assert not logged(trainer, "sampling/lead")


def test_the_server_samples_while_the_student_learns(make, sampler):
    """Nothing but the first batch is answered before the loss of the one before it has begun."""
    begun, asked = threading.Semaphore(0), []

    def hold(path, body, answer):
        if path == "/v1/completions" and body["prompt"] != sampler.asked[0]:
            assert begun.acquire(timeout=20)
        return answer

    sampler.misbehave = hold
    trainer = make(max_steps=4, sampling_lead=1)
    loss = trainer._compute_loss

    def watched_loss(*args):
        deadline = time.monotonic() + 10
        while len(sampler.asked) < min(len(asked) + 2, 4) and time.monotonic() < deadline:
            time.sleep(0.01)
        asked.append(len(sampler.asked))
        begun.release()
        return loss(*args)

    trainer._compute_loss = watched_loss
    trainer.train()
    assert asked == [2, 3, 4, 4], "the last step looks no further"


# Which weights


def test_what_is_known_of_the_weights_that_sampled(make, monkeypatch):
    trainer = make(max_steps=4, sampling_lead=1)
    weights, seen = [], []
    watch = trainer._watch_sampling_logps

    def watched_logps(rollout, logps):
        ids = torch.cat([rollout["prompt_ids"], rollout["completion_ids"]], dim=1)
        mask = torch.cat([rollout["prompt_mask"], rollout["completion_mask"]], dim=1)
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        now = weights[-1]
        trainer.model.load_state_dict(weights[max(len(weights) - 2, 0)])
        with torch.no_grad():
            of_then = trainer.model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        trainer.model.load_state_dict(now)
        length = rollout["completion_ids"].size(1)
        of_then = of_then.gather(-1, ids[:, 1:, None])[:, -length:, 0]
        valid = rollout["completion_mask"].bool()
        assert torch.allclose(rollout["sampling_per_token_logps"][valid], of_then[valid], atol=1e-4)
        seen.append((logps - of_then)[valid].abs().mean().item())
        watch(rollout, logps)

    monkeypatch.setattr(trainer, "_watch_sampling_logps", watched_logps)
    trainer.train()
    assert logged(trainer, "sampling/lead") == logged(trainer, "sampling/staleness") == [0, 1, 1, 1]
    assert logged(trainer, "sampling/policy_change/mean") == pytest.approx(seen[1:], rel=1e-2) and min(seen[1:]) > 1e-3
    assert (
        logged(trainer, "sampling/logp_difference/max")[0] < 1e-4
        and len(logged(trainer, "sampling/logp_difference/max")) == 1
    )


def test_a_large_change_stops_nothing_and_is_warned_of(make):
    trainer = make(max_steps=12, sampling_lead=1, learning_rate=0.1, sampling_logp_threshold=1e-3)
    with pytest.warns(
        UserWarning, match=r"sampled with the weights of .* optimizer steps? ago.* nats.*`sampling_lead`"
    ):
        trainer.train()
    assert trainer.state.global_step == 12


def test_a_small_change_is_not_warned_of(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make(max_steps=12, sampling_lead=1, learning_rate=1e-5, weight_decay=0.0).train()
    assert not [warning for warning in caught if "sampling_lead" in str(warning.message)]


def test_the_correction_is_to_the_policy_that_sampled(make):
    trainer = make(
        max_steps=3,
        sampling_lead=1,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode="token_truncate",
    )
    trainer.train()
    assert logged(trainer, "sampling/importance_sampling_ratio/mean")[0] == pytest.approx(1, abs=1e-4)
    assert abs(logged(trainer, "sampling/importance_sampling_ratio/max")[1] - 1) > 1e-3


# What else a run does


def test_evaluation_lets_the_running_request_end(make, sampler, text_dataset):
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "max_steps": 3}
    trainer = make(sampling_lead=1, trainer_options={"eval_dataset": text_dataset.select(range(2))}, **options)
    trainer.add_callback(Act(1, lambda: sampler.goes_on.clear() or threading.Timer(0.5, sampler.goes_on.set).start()))
    trainer.train()
    assert len(logged(trainer, "eval_reverse_kl")) == 3 and not any(sampler.interrupted)
    assert logged(trainer, "sampling/staleness") == [0, 1, 1]


@pytest.mark.parametrize("save_steps", [1, 2])
def test_a_resumed_run_asks_again_for_what_was_left(make, sampler, tmp_path, save_steps):
    options = {"max_steps": 5, "sampling_lead": 1, "save_strategy": "steps", "save_steps": save_steps}
    options |= {"gradient_accumulation_steps": 2, "steps_per_generation": 2 * save_steps}
    if save_steps == 2:
        options["estimator"] = "exact"  # two steps use a batch
    make(**options, output_dir=str(tmp_path / "whole")).train()
    whole, sampler.asked = sampler.asked, []

    def stop():
        raise KeyboardInterrupt

    trainer = make(**options, output_dir=str(tmp_path / "parts"))
    trainer.add_callback(Act(3, stop))
    with pytest.raises(KeyboardInterrupt, match="go on with"):
        trainer.train()
    time.sleep(0.5)
    asked, sampler.asked = sampler.asked, []
    assert asked == whole[: len(asked)]
    make(**options, output_dir=str(tmp_path / "parts")).train(resume_from_checkpoint=True)
    first = whole.index(sampler.asked[0])
    assert first < len(asked) and sampler.asked == whole[first:]


def test_rewards_and_prompts_of_the_teacher_go_along(make, sampler):
    trainer = make(
        max_steps=4,
        sampling_lead=1,
        reward_coef=0.5,
        trainer_options={
            "reward_funcs": reward,
            "teacher_prompt_fn": lambda rows, completions: [row["prompt"] for row in rows],
        },
    )
    trainer.train()
    assert logged(trainer, "sampling/lead") == [0, 1, 1, 1] and len(logged(trainer, "rewards/reward/mean")) == 4


@pytest.mark.parametrize("lead", [0, 1])
def test_a_rollout_func_that_says_so_is_called_in_the_thread(make_trainer, lead):
    threads, prompts_of = [], []

    def roll(prompts, trainer):
        threads.append(threading.current_thread().name)
        prompts_of.append([prompt[0]["content"] for prompt in prompts])
        return canned(prompts, trainer)

    roll.samples_ahead = True
    options = {"per_device_train_batch_size": 8, "max_steps": 4, "sampling_lead": lead}
    trainer = make_trainer(trainer_options={"rollout_func": roll}, **options)
    trainer.train()
    assert threads == ["MainThread"] + 3 * ["sampling-ahead" if lead else "MainThread"]
    rows = {question for questions in prompts_of for question in questions}
    assert len(rows) == 16, "each prompt of the epoch once"


def test_what_a_rollout_func_raises_in_the_thread_ends_the_run(make_trainer):
    def roll(prompts, trainer):
        if threading.current_thread() is not threading.main_thread():
            raise KeyError("no such brief")
        return canned(prompts, trainer)

    roll.samples_ahead = True
    trainer = make_trainer(
        trainer_options={"rollout_func": roll}, per_device_train_batch_size=8, max_steps=3, sampling_lead=1
    )
    with pytest.raises(KeyError, match="no such brief"):
        trainer.train()
    assert trainer.state.global_step == 1


# How it ends


@pytest.mark.parametrize("is_sampling", [True, False])
def test_a_server_that_dies_leaves_a_checkpoint(make, sampler, is_sampling):
    trainer = make(max_steps=5, sampling_lead=1)
    client = trainer.vllm_generation.vllm_client
    client.session.mount(client.base_url, HTTPAdapter(max_retries=0))  # TRL's would try for a minute
    stopped = threading.Event()

    def hold(path, body, answer):
        if is_sampling and path == "/v1/completions" and len(sampler.asked) == 3:
            stopped.wait(20)
        return answer

    def stop():
        deadline = time.monotonic() + 10
        while len(sampler.asked) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0 if is_sampling else 0.5)
        sampler.stop()
        stopped.set()

    sampler.misbehave = hold
    trainer.add_callback(Act(2, stop))
    with pytest.raises(
        RunCannotGoOn, match=f"server at {sampler.url} samples no more.*ended after step 2, which is saved"
    ):
        trainer.train()


def test_a_server_that_hangs_is_waited_for_as_long_as_ranks_are(make, sampler):
    trainer = make(max_steps=5, sampling_lead=1, ddp_timeout=3, teacher_server_timeout=2.0)
    trainer.add_callback(Act(1, sampler.goes_on.clear))
    with pytest.raises(RunCannotGoOn, match=r"has not answered for 3 seconds \(`ddp_timeout`\).*which is saved"):
        trainer.train()


def test_ctrl_c_ends_a_run_whose_request_hangs(make, sampler):
    trainer = make(max_steps=5, sampling_lead=1)

    def hang():
        sampler.goes_on.clear()
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    act = Act(1, hang)
    trainer.add_callback(act)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt, match="There is no checkpoint of it"):
        trainer.train()
    assert time.monotonic() - begin < 10
    deadline = time.monotonic() + 5
    while any(thread.name == "sampling-ahead" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "the request goes on"
        time.sleep(0.05)
    sampler.goes_on.set()
    trainer.remove_callback(act)
    trainer.train()  # begins anew
    assert trainer.state.global_step == 5


def test_a_run_that_waits_for_samples_ends_with_a_checkpoint_when_it_is_told_to(make, sampler):
    trainer = make(max_steps=5, sampling_lead=1, enable_jit_checkpoint=True)

    def hang_and_interrupt():
        sampler.goes_on.clear()
        while trainer._due is None or trainer._due.is_done:  # until the run waits for samples
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    trainer.add_callback(Act(1, threading.Thread(target=hang_and_interrupt, daemon=True).start))
    with pytest.raises((RunCannotGoOn, KeyboardInterrupt)) as ended:
        trainer.train()
    assert ended.type is RunCannotGoOn
    assert re.search(r"told to end while it waited for samples.*ended after step \d, which is saved", str(ended.value))


# The parts


def test_looking_ahead_changes_no_order():
    look_ahead = LookAhead(iter(range(5)))
    assert look_ahead.after(0) == 0 and look_ahead.after(3) == 3
    assert [next(look_ahead) for _ in range(2)] == [0, 1] and look_ahead.num_given == 2
    look_ahead.used()
    assert look_ahead.after(0) == 1 and look_ahead.after(3) == 4 and look_ahead.after(4) is None
    assert list(look_ahead) == [2, 3, 4]


def test_nothing_is_sampled_with_weights_that_would_be_too_old():
    thread = SamplingThread(most_steps=2)
    requests = [Request([], (), 1, due, sample=lambda: None) for due in (1, 2, 3, 4)]
    for request in requests:
        thread.post(request)
    assert thread.wait(lambda: requests[1].is_done, 5) and thread.is_idle()
    assert not thread.wait(lambda: requests[2].is_done, 0.2)
    thread.have_weights_of(1)
    assert thread.wait(lambda: requests[2].is_done, 5) and not requests[3].is_done
    assert [request.step for request in requests] == [0, 0, 1, -1]
    thread.end()


# What is refused


@pytest.mark.parametrize(
    "options, message",
    [
        ({"sampling_lead": -1}, "`sampling_lead` is -1"),
        ({"sampling_lead": 1, "use_vllm": True, "vllm_mode": "colocate"}, '`vllm_mode` is "colocate"'),
        ({"sampling_lead": 1, "num_iterations": 2}, "`sampling_lead` is 1 and `num_iterations` 2"),
        (
            {"sampling_lead": 1, "use_sampling_logps": True, "use_vllm": True, "vllm_mode": "server"},
            "of older weights",
        ),
        ({"sampling_lead": 2}, "of up to 2 optimizer steps ago.*bears 1.*13 with 4"),
        (
            {"sampling_lead": 1, "gradient_accumulation_steps": 1, "steps_per_generation": 2},
            "of up to 2 optimizer steps",
        ),
    ],
)
def test_configurations_that_cannot_be(make_config, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_configurations_that_can(make_config):
    make_config(sampling_lead=4, estimator="exact")
    make_config(sampling_lead=2, gradient_accumulation_steps=4, steps_per_generation=2)


class Room:
    """An environment without anything in it."""

    def reset(self, **kwargs) -> None:
        pass


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "what samples is in this process.*vllm_mode"),
        (
            {"rollout_func": lambda prompts, trainer: {}},
            "does not say that it may be called in a thread.*samples_ahead",
        ),
        ({"environment_factory": Room}, "does not go with tools or environments"),
    ],
)
def test_trainers_that_cannot_be(make_trainer, monkeypatch, options, message):
    # The tiny template renders no tool calls, which TRL asks for wherever there is an environment.
    monkeypatch.setattr("trl.trainer.grpo_trainer.supports_tool_calling", lambda processing_class: True)
    with pytest.raises(ValueError, match=message):
        make_trainer(sampling_lead=1, trainer_options=options)
