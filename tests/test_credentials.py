"""Secrets are kept out of configurations, which are logged and saved."""

import pytest

from gndpo_trl import GNDPOConfig
from gndpo_trl.gspo import GSPOConfig
from gndpo_trl.teachers import ServerTeacher


SECRET = "s3cret"


@pytest.mark.parametrize(
    "config_class, options, names",
    [
        (
            GNDPOConfig,
            {"teacher_server_url": [f"http://me:{SECRET}@host:8000"]},
            ["teacher_server_url", "VLLM_API_KEY"],
        ),
        (GNDPOConfig, {"teacher_server_url": ["http://one", f"http://{SECRET}@two"]}, ["VLLM_API_KEY"]),
        (GNDPOConfig, {"teacher_server_url": f"https://host?token={SECRET}"}, ["VLLM_API_KEY"]),
        (GNDPOConfig, {"teacher_server_url": f"https://host/#{SECRET}"}, ["VLLM_API_KEY"]),
        (GSPOConfig, {"vllm_server_base_url": f"http://me:{SECRET}@host"}, ["vllm_server_base_url", "VLLM_API_KEY"]),
        (GNDPOConfig, {"teacher_model_init_kwargs": {"token": SECRET}}, ["teacher_model_init_kwargs", "`HF_TOKEN`"]),
        (GNDPOConfig, {"teacher_model_init_kwargs": f'{{"token": "{SECRET}"}}'}, ["`hf auth login`"]),
        (GSPOConfig, {"model_init_kwargs": {"quantization": [{"api_key": SECRET}]}}, ["`quantization.api_key`"]),
    ],
)
def test_secrets_in_a_configuration_are_refused(make_config, config_class, options, names):
    with pytest.raises(ValueError) as error:
        make_config(config_class, **options)
    assert all(name in str(error.value) for name in names) and SECRET not in str(error.value)


def test_secrets_in_a_teacher_are_refused():
    with pytest.raises(ValueError, match="`VLLM_API_KEY`") as error:
        ServerTeacher(f"http://me:{SECRET}@host:8000")
    assert SECRET not in str(error.value)


def test_what_is_no_secret(make_config):
    config = make_config(
        GNDPOConfig,
        model_init_kwargs={"token": True, "revision": "main"},
        teacher_server_url=["http://host:8000/teacher"],
        vllm_server_base_url="http://[::1]:8000",
    )
    assert config.model_init_kwargs["token"] is True
