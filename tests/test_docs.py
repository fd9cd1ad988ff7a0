"""Every code block and command of the documentation, through what would read it; Python is run. And the site is built."""

import argparse
import ast
import configparser
import doctest
import html.parser
import importlib
import itertools
import json
import re
import runpy
import shlex
import string
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
import train_gndpo
import trl.trainer.grpo_trainer
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.run import get_args_parser

import gndpo_trl
from gndpo_trl import GNDPOConfig, GNDPOTrainer
from gndpo_trl.report.command import build_parser
from gndpo_trl.teachers import Teacher


ROOT = Path(__file__).parents[1]
DOCS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

# Words that the reader replaces.
PLACEHOLDERS = {"RECIPE": "recipes/text/gndpo.yaml", "$NODE_RANK": "0", "$FIRST_NODE": "localhost"}
# Beginnings of commands of the shell and of other projects, whose parsers are not here.
OTHERS = [
    *("cd", "git clone", "vllm serve", "accelerate launch --num_processes 8 -m lmms_eval"),
    *("python -m lmms_eval", "python run.py", "torchrun --nproc-per-node 8 run.py", "pip download", "unzip"),
]
COMMANDS = (
    "accelerate",
    "git",
    "gndpo-report",
    "lint-imports",
    "make",
    "pip",
    "pytest",
    "python",
    "ruff",
    "torchrun",
    "vllm",
)


def read_blocks(path: Path) -> list[tuple[str, str]]:
    """Language and text of the fenced blocks, and commands within sentences as blocks of one line."""
    text = path.read_text()
    fence = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
    blocks = [(language, code) for _, language, code in fence.findall(text)]
    spans = re.findall(r"`([^`\n]+)`", fence.sub("", text))
    return blocks + [("bash", span) for span in spans if span.split()[0] in COMMANDS and " " in span]


BLOCKS = [
    pytest.param(language, text, id=f"{path.name}-{number}-{language}")
    for path in DOCS
    for number, (language, text) in enumerate(read_blocks(path), start=1)
]


def expand_braces(word: str) -> list[str]:
    match = re.search(r"\{([^{}]+,[^{}]+)\}", word)
    if not match:
        return [word]
    alternatives = [word[: match.start()] + part + word[match.end() :] for part in match[1].split(",")]
    return list(itertools.chain.from_iterable(map(expand_braces, alternatives)))


def split_commands(script: str) -> list[list[str]]:
    """The words of each command, as bash would pass them on. Anything but commands, assignments and loops is an error."""
    script = script.replace("\\\n", " ")
    for placeholder, value in PLACEHOLDERS.items():
        script = script.replace(placeholder, value)

    def unroll(loop: re.Match) -> str:
        return "".join(loop[3].replace(f"${loop[1]}", value) for value in loop[2].split())

    script = re.sub(r"^for (\w+) in (.*?); do\n(.*?)^done$", unroll, script, flags=re.MULTILINE | re.DOTALL)
    variables, commands = {}, []
    for line in script.splitlines():
        words = shlex.split(string.Template(line).safe_substitute(variables), comments=True)
        words = words[1:] if words[:1] == ["export"] else words
        while words and (assignment := re.fullmatch(r"(\w+)=(.*)", words[0])):
            variables[assignment[1]] = assignment[2]
            words = words[1:]
        if words:
            commands.append([part for word in words for part in expand_braces(word)])
    return commands


def check_training(arguments: list[str]) -> None:
    if "--deepspeed" in arguments:  # parsed, it would start a process group
        at = arguments.index("--deepspeed")
        json.loads((ROOT / arguments[at + 1]).read_text())
        arguments = arguments[:at] + arguments[at + 2 :]
    train_gndpo.parse_arguments([*arguments, "--use_cpu", "True", "--output_dir", "nowhere"])


class Parsed(Exception):
    pass


def check_script(path: str, arguments: list[str], monkeypatch) -> None:
    """Run a script, or a module by its name, up to the point where it has parsed its arguments."""
    parse_known_args = argparse.ArgumentParser.parse_known_args

    def parse_and_stop(parser, *args, **kwargs):
        _, unknown = parse_known_args(parser, *args, **kwargs)
        assert not unknown, f"{path} does not know {unknown}"
        raise Parsed

    with monkeypatch.context() as context:
        context.setattr(sys, "argv", [path, *arguments])
        context.setattr(argparse.ArgumentParser, "parse_known_args", parse_and_stop)
        with pytest.raises(Parsed):
            run = runpy.run_path if path.endswith(".py") else runpy.run_module
            run(path, run_name="__main__")


def check_install(requirements: list[str]) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    for requirement in requirements:
        name, extras = re.fullmatch(r"([\w.-]+)(?:\[([\w,]+)\])?", requirement).groups()
        assert name in (".", config["metadata"]["name"]), requirement
        for extra in extras.split(",") if extras else []:
            assert extra in config["options.extras_require"], extra


def check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        name, is_variable, _ = argument.partition("=")
        assert re.search(rf"^{name} \?=" if is_variable else rf"^{name}:", makefile, re.MULTILINE), argument


def check_pytest(arguments: list[str], pytestconfig) -> None:
    tests = pytestconfig._parser.parse_known_args([*arguments]).file_or_dir
    assert tests or "-m" in arguments, "this would run all tests"
    for test in tests:
        path, *names = test.split("::")
        text = (ROOT / path).read_text() if names else (ROOT / path).exists()
        assert all(re.search(rf"^def {name}\b", text, re.MULTILINE) for name in names) if names else text, test


def check_command(words: list[str], monkeypatch, pytestconfig) -> None:
    if any(words[: len(other.split())] == other.split() for other in OTHERS):
        return
    match words:
        case ["accelerate", "launch", *arguments]:
            launch = launch_command_parser().parse_args(arguments)
            load_config_from_file(launch.config_file)
            assert launch.training_script == "examples/train_gndpo.py"
            check_training(launch.training_script_args)
        case ["torchrun", *arguments]:
            launch = get_args_parser().parse_args(arguments)
            assert launch.training_script == "examples/train_gndpo.py"
            check_training(launch.training_script_args)
        case ["python" | ".venv/bin/python", "-m", "pytest", *arguments]:
            check_pytest(arguments, pytestconfig)
        case ["python", "-m", module, *arguments] if module.startswith("benchmarks."):
            check_script(module, arguments, monkeypatch)
        case ["python" | ".venv/bin/python", script, *arguments] if script.startswith(("examples/", "benchmarks/")):
            check_script(script, arguments, monkeypatch)
        case ["gndpo-report", *arguments]:
            build_parser().parse_args(arguments)
        case ["make", *arguments]:
            check_make(arguments)
        case ["pip", "install", *requirements]:
            check_install([requirement for requirement in requirements if requirement != "-e"])
        case _:
            pytest.fail(f"No check for the command: {shlex.join(words)}")


def check_python(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize("language, text", BLOCKS)
def test_blocks_and_commands_are_ones_that_their_readers_understand(language, text, monkeypatch, pytestconfig):
    monkeypatch.chdir(ROOT)
    match language:
        case "bash":
            for words in split_commands(text):
                check_command(words, monkeypatch, pytestconfig)
        case "text":  # what a terminal shows
            for prompt in re.findall(r"^\$ (.*)$", text, re.MULTILINE):
                for words in split_commands(prompt):
                    check_command(words, monkeypatch, pytestconfig)
        case "python":
            check_python(text)
        case "diff":
            for side in "-+":
                check_python("".join(line[1:] for line in text.splitlines(True) if line[0] in (" ", side)))
        case "json":
            json.loads(text if text.startswith("{") else f"{{{text}}}")
        case "yaml":
            yaml.safe_load(text)
        case "bibtex":
            check_citation(text)
        case _:
            pytest.fail(f"No check for a block of {language or 'no language'}:\n{text}")


def check_citation(entry: str) -> None:
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert paper["title"] in entry and str(paper["year"]) in entry
    identifiers = [identifier["value"].removeprefix("arXiv:") for identifier in paper["identifiers"]]
    assert all(identifier in entry for identifier in identifiers)
    for author in paper["authors"]:
        assert author.get("name") == "others" or f"{author['given-names']} {author['family-names']}" in entry


@pytest.mark.parametrize(
    "language, text, message",
    [
        ("bash", "pythn examples/evaluate.py", "No check for the command: pythn"),
        ("bash", "make tset", "tset"),
        ("bash", "pip install -e '.[maths]'", "maths"),
        ("bash", "python -m benchmarks.cost.memory_table --gpu-count 8", "gpu-count"),
        ("bash", "if true; then\n    make test\nfi", "No check for the command: if"),
        ("python", "from gndpo_trl import GNDPOTrain", "GNDPOTrain"),
        ("", "anything", "No check for a block of no language"),
    ],
)
def test_what_nobody_would_understand_is_named(language, text, message, monkeypatch, pytestconfig):
    with pytest.raises((AssertionError, pytest.fail.Exception), match=message):
        test_blocks_and_commands_are_ones_that_their_readers_understand(language, text, monkeypatch, pytestconfig)


@pytest.fixture
def readers_folder(tmp_path, checkpoints, monkeypatch) -> Path:
    """A working directory in which the names of the documentation are tiny models, data and adapters."""
    names = {
        "Qwen/Qwen3-0.6B": "qwen3-student",
        "Qwen/Qwen3-4B": "qwen3-teacher",
        "path/to/mathematician": "qwen3-teacher",
        "path/to/programmer": "qwen3-teacher",
        "OpenGVLab/InternVL3_5-1B-HF": "internvl-student",
    }
    for name, checkpoint in names.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(checkpoints[checkpoint])
    question = [{"role": "user", "content": "what is one plus two ?"}]
    rows = [{"prompt": question, "solution": "three", "teacher": ("math", "code")[i % 2]} for i in range(16)]
    data = tmp_path / "trl-lib" / "DeepMath-103K"
    data.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(data / "train.parquet")
    tokens = tmp_path / "runs" / "digits" / "gndpo-seed20" / "token_scores"
    tokens.mkdir(parents=True)
    row = {"tokens": ["3", "+", "4"], "scores": [-1.0, None, 0.5], "advantages": [-0.7, 0.0, 0.7]}
    Dataset.from_list([row]).to_parquet(tokens / "train_00010.parquet")
    model, processor = tiny_models.build_internvl()
    adapter = LoraConfig(r=2, target_modules=["q_proj"])
    tiny_models.save(get_peft_model(model, adapter), processor, tmp_path / "runs" / "1b-gndpo-lora")
    monkeypatch.chdir(tmp_path)

    def on_a_cpu(*arguments, **options) -> GNDPOConfig:
        options |= {"use_cpu": True, "bf16": False}
        GNDPOConfig(*arguments, **options)  # as it stands there
        return GNDPOConfig(*arguments, **{**options, "max_steps": 1, "max_completion_length": 16, "logging_steps": 1})

    monkeypatch.setattr(gndpo_trl, "GNDPOConfig", on_a_cpu)
    return tmp_path


def programs(path: Path) -> list[str]:
    """The Python of a page, in its order; of a difference, what it leads to."""
    codes = []
    for language, code in read_blocks(path):
        if language == "python":
            codes.append(code)
        elif language == "diff":
            codes.append("".join(line[1:] for line in code.splitlines(True) if line[0] != "-"))
    return codes


PROGRAMS = {path.name: codes for path in DOCS if (codes := programs(path))}
for documented in (GNDPOTrainer, Teacher):
    examples = doctest.DocTestParser().get_examples(documented.__doc__)
    PROGRAMS[documented.__name__] = ["import torch\n", *(example.source for example in examples)]


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_python_of_a_page_runs(name, readers_folder):
    from trl.rewards import accuracy_reward

    dataset = Dataset.from_parquet(str(readers_folder / "trl-lib" / "DeepMath-103K" / "train.parquet"))
    # What the shorter pieces leave to the reader.
    namespace = {"dataset": dataset, "accuracy_reward": accuracy_reward, "Teacher": Teacher}
    namespace["log_probs"] = torch.eye(len(tiny_models.build_tokenizer())).log_softmax(-1)
    for code in PROGRAMS[name]:
        exec(compile(code, name, "exec"), namespace)
    trainer = namespace.get("trainer")
    if any("trainer.train()" in code for code in PROGRAMS[name]) and name != "README.md":
        assert trainer.state.global_step == 1 and "score/mean" in trainer.state.log_history[0]


def strings_of_the_package() -> list[str]:
    """Every string in the sources, with … in place of what is filled in."""
    strings = []
    for path in (ROOT / "gndpo_trl").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Constant(value=str(value)):
                    strings.append(value)
                case ast.JoinedStr(values=values):
                    strings.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in values))
    return strings


def test_troubleshooting_quotes_what_is_really_said():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quotes = re.findall(r"^> (.*)$", page, re.MULTILINE)
    strings = strings_of_the_package()
    assert len(quotes) > 20
    for quote in quotes:
        parts = [re.escape(part.strip()) for part in quote.split("…") if part.strip()]
        pattern = re.compile(r"\s*.*?\s*".join(parts))
        assert any(pattern.match(text.lstrip("… ")) for text in strings), f"nothing says: {quote}"


@pytest.mark.parametrize("page", ["quickstart.md", "troubleshooting.md"])
def test_metrics_that_a_page_advises_to_watch_are_logged(page):
    text = (ROOT / "docs" / page).read_text()
    groups = "advantages|completions|sampling|score|student|teacher|time"
    metrics = {span.split("{")[0] for span in re.findall(rf"`((?:{groups})/[\w/{{,}}]+)`", text)}
    assert metrics
    sources = "".join(strings_of_the_package()) + Path(trl.trainer.grpo_trainer.__file__).read_text()
    assert [metric for metric in metrics if metric not in sources] == []


class Fetched(html.parser.HTMLParser):
    """Collects what a browser would fetch to show a page."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag in ("script", "img", "iframe"):
            self.addresses.append(attributes.get("src"))
        elif tag == "link" and attributes.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(attributes.get("href"))


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stdout + build.stderr
    return folder


def test_the_site_has_all_pages_and_fetches_nothing(site):
    pages = {path.with_suffix(".html").name for path in (ROOT / "docs").glob("*.md")}
    assert pages | {"index.html", "contributing.html", "changelog.html"} <= {path.name for path in site.glob("*.html")}
    for path in site.glob("*.html"):
        page = Fetched()
        page.feed(path.read_text())
        assert page.addresses
        assert [address for address in page.addresses if address and re.match(r"\w+:|//", address)] == [], path.name


def test_the_api_page_shows_docstrings_as_they_are_meant(site):
    page = (site / "api.html").read_text()
    for field in re.findall(r"^        (\w+) \(`", GNDPOConfig.__doc__, re.MULTILINE):
        assert f"<dt><code>{field}</code> (<code>" in page, f"{field} is not listed"
    assert "<em>Parameters that control the teacher</em>" in page
    assert "<code>torch.Tensor</code> of shape <code>(B, T)</code>" in page
    assert re.search(r"<li><code>loss_type</code>: Defaults to", page)
    assert "Args:" not in page and "[!NOTE]" not in page and "[<code>" not in page and "&gt; Parameters" not in page
    assert '<a class="autorefs autorefs-internal" ' in page
