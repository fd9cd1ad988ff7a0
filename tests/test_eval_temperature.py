"""Evaluation at a temperature of its own, under GNDPO and GSPO, with transformers' generation and with vLLM's."""

import logging
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from transformers import Qwen3ForCausalLM
from transformers.utils import logging as transformers_logging
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.gspo import GSPOConfig, GSPOTrainer


ALGORITHMS = {"gndpo": (GNDPOConfig, GNDPOTrainer), "gspo": (GSPOConfig, GSPOTrainer)}


@pytest.fixture
def make_config(make_config):
    def make(algorithm: str, **options) -> GNDPOConfig | GSPOConfig:
        defaults = {"per_device_eval_batch_size": 4, "max_completion_length": 12, "max_steps": 1}
        return make_config(ALGORITHMS[algorithm][0], **{**defaults, **options})

    return make


class Recorder:
    """A reward that remembers which completions each prompt got."""

    __name__ = "recorder"

    def __init__(self):
        self.completions: dict[str, list[list[int]]] = {}

    def __call__(self, prompts, completion_ids, **kwargs):
        for prompt, ids in zip(prompts, completion_ids, strict=True):
            self.completions.setdefault(prompt[0]["content"], []).append(ids)
        return [float(len(ids)) for ids in completion_ids]


@pytest.fixture
def make_trainer(make_config, checkpoints, text_dataset):
    def make(algorithm: str, recorder: Recorder | None = None, rollout_func=None, student=None, **options):
        teacher = {"teacher_model": checkpoints["qwen3-teacher"]} if algorithm == "gndpo" else {}
        return ALGORITHMS[algorithm][1](
            model=student or checkpoints["qwen3-student"],
            reward_funcs=recorder or Recorder(),
            args=make_config(algorithm, **options),
            train_dataset=text_dataset,
            eval_dataset=text_dataset,
            rollout_func=rollout_func,
            **teacher,
        )

    return make


def greedy(trainer, dataset) -> dict[str, list[list[int]]]:
    """What `generate(do_sample=False)` of the student gives for each prompt alone, up to the end of the turn."""
    model = Qwen3ForCausalLM.from_pretrained(trainer.model.name_or_path)
    completions = {}
    for prompt in dataset["prompt"]:
        inputs = trainer.processing_class.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**inputs, do_sample=False, max_new_tokens=trainer.max_completion_length)
        completions[prompt[0]["content"]] = [output[0, inputs["input_ids"].size(1) :].tolist()]
    return completions


def sample(trainer) -> list[list[int]]:
    """Completions of one prompt as in training, always with the same seed."""
    trainer.model.train()
    torch.manual_seed(0)
    return trainer._generate_single_turn([[3, 4, 5]] * 8, None, {}, 2)[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_evaluation_at_temperature_zero_is_greedy(make_trainer, text_dataset, tmp_path, caplog, algorithm):
    # Checkpoints come with sampling options of their own, which must neither win nor be warned about.
    model, tokenizer = tiny_models.build_qwen3()
    model.generation_config.update(do_sample=True, temperature=0.6, top_p=0.95, top_k=20)
    student = tiny_models.save(model, tokenizer, tmp_path / "student")
    recorder = Recorder()
    trainer = make_trainer(algorithm, recorder, student=student, eval_temperature=0.0, temperature=1.5, top_k=7)
    assert trainer.num_generations_eval == 1
    before = sample(trainer)

    logging.getLogger("transformers").addHandler(caplog.handler)
    transformers_logging.warning_once.cache_clear()
    metrics = trainer.evaluate()
    logging.getLogger("transformers").removeHandler(caplog.handler)
    assert not [record.message for record in caplog.records if "do_sample" in record.message]
    assert metrics["eval_reward"] > 0
    assert recorder.completions == greedy(trainer, text_dataset)

    assert sample(trainer) == before
    assert len(set(map(tuple, before))) > 1


def test_a_positive_temperature(make_trainer, text_dataset):
    recorder = Recorder()
    trainer = make_trainer("gndpo", recorder, eval_temperature=1e-4, generation_kwargs={"temperature": 2.0})
    trainer.evaluate()
    expected = {prompt: 2 * completions for prompt, completions in greedy(trainer, text_dataset).items()}
    assert recorder.completions == expected  # two of each: `num_generations`
    assert trainer.generation_config.temperature == 2.0


def test_without_it_evaluation_samples_as_training(make_trainer):
    recorder = Recorder()
    make_trainer("gndpo", recorder).evaluate()
    assert any(first != second for first, second in recorder.completions.values())


def test_training_options_come_back_after_an_error(make_trainer):
    trainer = make_trainer("gndpo", eval_temperature=0.0)
    before, options = sample(trainer), trainer.generation_config
    trainer.model.eval()
    with pytest.raises(IndexError):
        trainer._generate_single_turn([[10**6]], None, {}, 1)  # no such token
    assert trainer.generation_config is options and sample(trainer) == before


def test_continuous_batching_evaluates_every_batch(make_trainer, text_dataset):
    """It leaves the model in training mode, in which the next batch would be taken for one of training."""
    recorder = Recorder()
    trainer = make_trainer(
        "gspo",
        recorder,
        eval_temperature=0.0,
        per_device_eval_batch_size=8,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={"num_blocks": 8, "max_batch_tokens": 64},
    )
    trainer.evaluate()
    assert recorder.completions == greedy(trainer, text_dataset)


# vLLM: TRL's own code, up to the requests that it makes


@pytest.fixture
def with_vllm(make_trainer):
    """A trainer whose sampler is TRL's client of vLLM, and the requests that reach vLLM."""

    def make(mode: str, **options):
        trainer = make_trainer("gndpo", **options)
        trainer.use_vllm = True
        trainer._last_loaded_step = trainer.state.global_step
        trainer.vllm_generation = generation = VLLMGeneration.__new__(VLLMGeneration)
        generation.mode, generation.accelerator, generation.model = mode, trainer.accelerator, trainer.model
        generation.temperature, generation.top_p, generation.top_k, generation.min_p = 1.0, 1.0, 0, None
        generation.repetition_penalty, generation.max_completion_length, generation.logprobs = 1.0, 12, 0
        generation.structured_outputs_regex, generation.generation_kwargs = None, {"seed": 7}
        generation.tensor_parallel_size, generation.enable_sleep_mode = 1, False
        return trainer, generation

    return make


def test_a_vllm_server_is_asked_for_the_evaluation_temperature(with_vllm):
    requests = []

    def post(url, json):
        requests.append(json)
        logprobs = {"tokens": ["token_id:5"], "top_logprobs": [{"token_id:5": -0.5}], "token_logprobs": [-0.5]}
        choice = {"prompt_token_ids": [3], "token_ids": [5], "logprobs": logprobs}
        return {"choices": [choice] * len(json["prompt"]) * json["n"]}

    trainer, generation = with_vllm("server", eval_temperature=0.0)
    generation.vllm_client = VLLMClient.__new__(VLLMClient)
    generation.vllm_client.model, generation.vllm_client.base_url = "student", "there"
    generation.vllm_client._post = post
    for training, num_generations in [(True, 2), (False, 1), (True, 2)]:
        trainer.model.train(training)
        assert trainer._generate_single_turn([[3], [3]], None, {}, num_generations)[0] == [[5], [5]]
    assert [request["temperature"] for request in requests] == [1.0, 0.0, 1.0]
    assert [request["seed"] for request in requests] == [7, 7, 7]


def test_a_colocated_vllm_is_asked_for_the_evaluation_temperature(with_vllm, monkeypatch):
    requests = []

    def generate(prompts, sampling_params, use_tqdm):
        requests.append(sampling_params)
        logprobs = [{5: SimpleNamespace(logprob=-0.5, rank=1)}]
        output = SimpleNamespace(token_ids=[5], logprobs=logprobs)
        return [SimpleNamespace(prompt_token_ids=[3], outputs=[output]) for _ in prompts]

    trainer, generation = with_vllm("colocate", eval_temperature=0.5)
    generation.llm = SimpleNamespace(generate=generate)
    monkeypatch.setattr(vllm_generation, "SamplingParams", dict, raising=False)
    for training in (True, False, True):
        trainer.model.train(training)
        assert trainer._generate_single_turn([[3], [3]], None, {}, 2)[0] == [[5], [5]]
    assert [request["temperature"] for request in requests] == [1.0, 0.5, 1.0]
    generation.llm.generate = None
    trainer.model.eval()
    with pytest.raises(TypeError):
        trainer._generate_single_turn([[3], [3]], None, {}, 2)
    assert generation.generation_kwargs == {"seed": 7}


# What it refuses


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    "options, message",
    [
        ({"eval_temperature": -0.1}, r"`eval_temperature` is -0.1.*0.0 for greedy"),
        ({"eval_temperature": float("nan")}, r"`eval_temperature` is nan"),
        (
            {"eval_temperature": 0.0, "num_generations_eval": 2},
            r"`num_generations_eval` is 2.*num_generations_eval: 1",
        ),
    ],
)
def test_bad_values_are_refused_with_a_remedy(make_config, algorithm, options, message):
    with pytest.raises(ValueError, match=message):
        make_config(algorithm, **options)


def test_temperature_zero_sets_one_completion_per_prompt(make_config):
    options = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 3}
    assert make_config("gndpo", eval_temperature=0.0, **options).num_generations_eval == 1
    assert make_config("gndpo", eval_temperature=0.0, num_generations_eval=1, **options).num_generations_eval == 1
    with pytest.raises(ValueError, match="has to be divisible by .num_generations."):
        make_config("gndpo", eval_temperature=0.5, **options)


def test_a_rollout_func_has_its_own_temperature(make_trainer):
    with pytest.raises(ValueError, match="`eval_temperature` is 0.0, but `rollout_func` does the sampling"):
        make_trainer("gndpo", eval_temperature=0.0, rollout_func=lambda prompts, trainer: {})
