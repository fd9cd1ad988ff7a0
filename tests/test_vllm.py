"""What holds vLLM to the training engine, as far as no engine is needed; `tests/vllm_engine` runs the real one."""

import configparser
import inspect
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from stand_in_server import StandInServer
from trl import GRPOConfig, GRPOTrainer
from trl.generation import vllm_client
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from gndpo_trl import GNDPOConfig
from gndpo_trl.grpo.vllm import VLLMConfig, check_sampling_logps, logp_difference
from gndpo_trl.grpo.vllm_engine import (
    BELOW_VLLM,
    MIN_VLLM,
    ExactVLLMClient,
    check_image_limit,
    check_prompt_ids,
    check_prompt_length,
    check_version,
)


# The number that watches


def test_the_difference_counts_valid_tokens_alone():
    nan = float("nan")
    sampled = torch.tensor([[-1.0, -2.0, nan, -9.0], [-1.0, 0.0, 0.0, 0.0]])
    scored = torch.tensor([[-1.5, -2.0, -3.0, -1.0], [-1.25, -4.0, -4.0, -4.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    assert logp_difference(sampled, scored, mask) == pytest.approx((0.25, 0.5))
    assert logp_difference(sampled, scored, torch.zeros_like(mask)) == (0.0, 0.0)


def test_the_difference_is_of_all_ranks():
    """The mean is over tokens, not over ranks, and a rank without tokens does not disturb it."""
    torch.manual_seed(0)
    sampled, scored = torch.randn(6, 5), torch.randn(6, 5)
    mask = torch.rand(6, 5) < 0.5
    mask[4:] = False
    parts = [slice(0, 1), slice(1, 4), slice(4, 6)]
    summaries = []

    def remember(summary):
        summaries.append(summary)
        return summary

    for rows in parts:
        logp_difference(sampled[rows], scored[rows], mask[rows], remember)
    everything = torch.cat(summaries)
    expected = (sampled - scored).abs()[mask]
    for rows in parts:
        mean, largest = logp_difference(sampled[rows], scored[rows], mask[rows], lambda _: everything)
        assert mean == pytest.approx(expected.mean().item(), rel=1e-6)
        assert largest == pytest.approx(expected.max().item(), rel=1e-6)


def test_a_log_prob_that_is_not_finite_is_no_agreement():
    mean, _ = logp_difference(torch.zeros(1, 2), torch.tensor([[0.0, float("nan")]]), torch.ones(1, 2))
    assert not mean <= 0.2
    mean, _ = logp_difference(torch.tensor([[0.0, -float("inf")]]), torch.zeros(1, 2), torch.ones(1, 2))
    assert not mean <= 0.2


# What is refused


@pytest.mark.parametrize(
    "reported, message",
    [
        ([1, 2, 9, 9, 3], r"row 1 from another prompt.*: 5 tokens instead of 4, different from position 3 on"),
        ([1, 2, 9], "3 tokens instead of 4, different from position 3 on"),
        ([7, 2, 9, 3], "4 tokens instead of 4, different from position 0 on"),
        (None, "does not report which prompt"),
    ],
)
def test_another_prompt(reported, message):
    check_prompt_ids([[1], [1, 2, 9, 3]], [(1,), [1, 2, 9, 3]])
    with pytest.raises(ValueError, match=message):
        check_prompt_ids([[1], [1, 2, 9, 3]], [[1], reported])


@pytest.mark.parametrize("version", ["0.21.9", "0.31.0", "0.31.0+cu129", "1.0"])
def test_versions_outside_the_range(version):
    with pytest.raises(ValueError, match=f"is vLLM {version}".replace("+", r"\+") + ".*from 0.22.0 to below 0.31.0"):
        check_version(version, "The engine")


@pytest.mark.parametrize("version", ["0.22.0", "0.30.0+cpu", "0.30.2"])
def test_versions_inside_the_range(version):
    check_version(version, "The engine")


def test_the_extra_names_the_same_versions():
    setup = configparser.ConfigParser()
    setup.read(Path(__file__).parents[1] / "setup.cfg")
    assert f"vllm>={MIN_VLLM},<{BELOW_VLLM}" in setup["options.extras_require"]["vllm"].split()


def test_a_prompt_needs_room_for_a_completion():
    check_prompt_length("The prompt", 15, 16)
    with pytest.raises(ValueError, match="The prompt has 16 tokens, but vLLM holds 16.*`vllm_max_model_length`"):
        check_prompt_length("The prompt", 16, 16)


def test_images_within_the_limit():
    dataset = Dataset.from_dict({"images": [["a"], ["a", "b", "c"], [], None]})
    for limit in (None, 3, 999):
        check_image_limit(dataset, limit)
    check_image_limit(dataset.select([0, 2]), 1)
    check_image_limit(None, 1)
    check_image_limit(Dataset.from_dict({"prompt": ["a"]}), 1)
    with pytest.raises(ValueError, match="prompts with 3 images, but vLLM takes 2"):
        check_image_limit(dataset, 2)


@pytest.mark.parametrize(
    "options, name",
    [
        ({"top_p": 0.9}, "top_p"),
        ({"top_k": 20}, "top_k"),
        ({"min_p": 0.1}, "min_p"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex"),
        ({"generation_kwargs": {"temperature": 0.5}}, "temperature"),
        ({"generation_kwargs": {"allowed_token_ids": [1]}}, "allowed_token_ids"),
        ({"generation_kwargs": {"logit_bias": {1: -100}}}, "logit_bias"),
        ({"generation_kwargs": {"min_tokens": 4}}, "min_tokens"),  # masks the end of the turn
    ],
)
def test_log_probs_of_another_distribution(make_config, options, name):
    with pytest.raises(ValueError, match=f"`use_sampling_logps` is True, but `{name}`"):
        check_sampling_logps(make_config(GRPOConfig, **options))


def test_log_probs_of_the_students_distribution(make_config):
    harmless = {"seed": 1, "stop_token_ids": [3], "temperature": 0.7, "top_p": 1.0}
    check_sampling_logps(make_config(GRPOConfig, temperature=0.7, generation_kwargs=harmless))


@pytest.mark.parametrize("config_class", [VLLMConfig, GNDPOConfig])
def test_bad_values(make_config, config_class):
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="`sampling_logp_threshold` is .*Give a positive number of nats"):
            make_config(config_class, sampling_logp_threshold=value)
    with pytest.raises(ValueError, match="`vllm_max_model_length` is 8, but.*`max_completion_length` alone is 8"):
        make_config(config_class, use_vllm=True, vllm_max_model_length=8)
    make_config(config_class, sampling_logp_threshold=float("inf"), vllm_max_model_length=8)


# What TRL does not promise to keep


@pytest.mark.parametrize(
    "method, parameters",
    [
        (GRPOTrainer._generate_and_score_completions, ["self", "inputs"]),
        (GRPOTrainer._compute_loss, ["self", "model", "inputs"]),
        (GRPOTrainer._tokenize_prompts, ["self", "prompts"]),
        (VLLMGeneration.sync_weights, ["self"]),
        (VLLMGeneration.generate, ["self", "prompts", "images", "num_generations", "profiler"]),
        (VLLMGeneration._place_features, ["self", "features", "prompt_ids"]),
        (VLLMClient._get, ["self", "url", "kwargs"]),
        (VLLMClient._post, ["self", "url", "kwargs"]),
        (VLLMClient.get_server_info, ["self"]),
        (VLLMClient.image_features, ["self", "images", "max_concurrent_requests"]),
    ],
)
def test_trl_has_the_methods(method, parameters):
    assert list(inspect.signature(method).parameters) == parameters


def test_trl_makes_the_sampler_in_its_constructor_and_keeps_it():
    source = inspect.getsource(GRPOTrainer.__init__)
    assert "self.vllm_generation = VLLMGeneration(" in source
    assert "self.vllm_client = VLLMClient(" in inspect.getsource(VLLMGeneration._init_vllm)
    # An adapter is gathered with what gathers everything else.
    assert "self._dist.gather_params(" in inspect.getsource(VLLMGeneration._iter_named_params)
    # No slots and no metaclass: their class can be changed afterwards.
    assert not hasattr(VLLMGeneration, "__slots__") and not hasattr(VLLMClient, "__slots__")


def test_trl_generates_from_features_by_the_request_that_is_checked():
    assert "/inference/v1/generate" in inspect.getsource(VLLMClient._generate_from_features)
    assert "self._post(" in inspect.getsource(VLLMClient._generate_from_features)


def test_trl_supports_every_version_that_is_accepted():
    from trl.import_utils import is_vllm_available

    source = inspect.getsource(is_vllm_available)
    assert f'Version("{MIN_VLLM}") <=' in source
    (most,) = (part.split('"')[1] for part in source.split("<= Version(")[1:])
    assert Version(BELOW_VLLM) <= Version(most)


def test_a_server_whose_template_takes_no_image_is_told_from_others(checkpoints, monkeypatch):
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    server = StandInServer(checkpoints["qwen25vl-student"])
    refusal = 400, {"error": {"message": "begin with a system message"}}
    server.misbehave = lambda path, body, answer: {"/health": (200, {})}.get(path, refusal if body else answer)
    try:
        client = ExactVLLMClient(base_url=server.url)
        with pytest.raises(ValueError, match="server at .* takes no image: .*`--chat-template`.*begin with a system"):
            client.try_an_image(3)
    finally:
        server.stop()
