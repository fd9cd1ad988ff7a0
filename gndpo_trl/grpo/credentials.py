"""Passwords and tokens in a configuration, which a run logs, saves, and may upload."""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit

from trl import GRPOConfig


# Names of arguments of `from_pretrained`, and of what is nested in them, that hold a secret where they hold text.
SECRETS = ("token", "use_auth_token", "hf_token", "api_key", "password", "secret")


def credential_problems(args: GRPOConfig) -> Iterator[str]:
    """
    Fields that hold a secret. Loggers and `training_args.bin`, which is pushed with the model, have all of them.

    Fields that end in `_url` are URLs of servers; those that end in `_kwargs` are arguments of `from_pretrained` and the like.
    """
    for field in fields(args):
        value = getattr(args, field.name, None)
        if field.name.endswith("_url") and value is not None:
            for url in [value] if isinstance(value, str) else value:
                if has_credentials(url):
                    yield url_problem(field.name)
        elif field.name.endswith("_kwargs") and isinstance(value, Mapping):
            for name in secrets_in(value):
                yield (
                    f"`{field.name}` has a text under `{name}`, which would be logged, and saved in `training_args.bin`. "
                    "Leave it out: a token of the Hub is read from the environment variable `HF_TOKEN`, or from where "
                    "`hf auth login` has put it."
                )


def has_credentials(url: str) -> bool:
    """Whether a URL has more than a place: user, password, query or fragment."""
    parts = urlsplit(url)
    return "@" in parts.netloc or bool(parts.query or parts.fragment)


def url_problem(field: str) -> str:
    remedy = "The key of a teacher's server is read from the environment variable `VLLM_API_KEY`."
    if field != "teacher_server_url":
        remedy = f"TRL's client reads user and password from `~/.netrc`. {remedy}"
    return (
        f"`{field}` has a URL with a user, a password or a query, which would be logged, and saved in "
        f"`training_args.bin`. Write it as `http://host:8000`. {remedy}"
    )


def secrets_in(values: Any, path: str = "") -> Iterator[str]:
    """Names, with those that they are nested in, of what holds a secret."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            place = f"{path}.{name}" if path else str(name)
            if isinstance(value, str) and str(name).lower() in SECRETS:
                yield place
            else:
                yield from secrets_in(value, place)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from secrets_in(value, path)
