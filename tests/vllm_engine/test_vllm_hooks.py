"""What is relied upon in vLLM and what it does not promise to keep; the other tests would fail less clearly."""

import inspect

import vllm
from vllm.config import MultiModalConfig
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.v1.engine.llm_engine import LLMEngine


def test_the_processor_applies_and_finds_placeholders():
    parameters = inspect.signature(BaseMultiModalProcessor._apply_prompt_updates).parameters
    assert list(parameters) == ["self", "token_ids", "mm_prompt_updates"]
    parameters = inspect.signature(BaseMultiModalProcessor._find_mm_placeholders).parameters
    assert list(parameters) == ["self", "new_token_ids", "mm_prompt_updates"]
    source = inspect.getsource(BaseMultiModalProcessor._maybe_apply_prompt_updates)
    assert "self._apply_prompt_updates(" in source and "self._validate_mm_placeholders(" in source


def test_the_engine_forgets_images():
    assert list(inspect.signature(LLMEngine.reset_encoder_cache).parameters) == ["self"]


def test_the_image_limit_is_known():
    assert MultiModalConfig(limit_per_prompt={"image": 3}).get_limit_per_prompt("image") == 3


def test_what_an_engine_says_about_itself(engines, checkpoints):
    engine = engines(checkpoints["internvl-student"]).llm_engine
    assert isinstance(engine.renderer.mm_processor, BaseMultiModalProcessor)
    assert engine.model_config.logprobs_mode and engine.model_config.max_model_len == 256
    assert str(engine.model_config.dtype) == "torch.float32"
    assert vllm.__version__.startswith("0.30.")
