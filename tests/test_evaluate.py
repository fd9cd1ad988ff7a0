"""`examples/evaluate.py`: completions of text and image-text checkpoints, their numbers, the table and the files."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate as script
import numpy as np
import pytest
import tiny_models
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser


SCRIPT = Path(__file__).parents[1] / "examples" / "evaluate.py"
SOLUTIONS = ["3", "3", "3", r"\frac{8}{2}", "3", "3", "4", "3"]


def save_parrot(path: Path, *words: str) -> str:
    """A checkpoint that completes every prompt with `words`: its residual stream holds the last token, nothing else."""
    tokenizer = tiny_models.build_tokenizer(extra_words=("<think>", "</think>", "\\boxed{3}", "\\boxed{4}"))
    model, _ = tiny_models.build_qwen3(width=64, tokenizer=tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                parameter.zero_()
        torch.nn.init.eye_(model.model.embed_tokens.weight)
        for last, following in zip(["assistant", *words], words, strict=False):
            model.lm_head.weight[tokenizer.convert_tokens_to_ids([following]), tokenizer.vocab[last]] = 1
    return tiny_models.save(model, tokenizer, path)


@pytest.fixture(scope="module")
def random_models(tmp_path_factory) -> dict[str, str]:
    """One checkpoint of each kind with weights so large that its completions, and their lengths, differ."""
    paths = {}
    for family in ("qwen3", "internvl"):
        model, processing_class = tiny_models.BUILDERS[family]()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= 8 if parameter.dim() > 1 else 1
        paths[family] = tiny_models.save(model, processing_class, tmp_path_factory.mktemp("random") / family)
    return paths


@pytest.fixture(scope="module")
def text_data(tmp_path_factory) -> str:
    """Questions of different lengths, in no order."""
    rows = [
        {
            "prompt": [{"role": "user", "content": "what is " + " plus ".join(["one"] * (1 + 3 * index % 8)) + " ?"}],
            "solution": solution,
        }
        for index, solution in enumerate(SOLUTIONS)
    ]
    path = str(tmp_path_factory.mktemp("text") / "test.parquet")
    Dataset.from_list(rows).to_parquet(path)
    return path


@pytest.fixture(scope="module")
def image_data(tmp_path_factory) -> str:
    """Questions with one or two images, of different lengths."""
    rows = []
    for index in range(6):
        images = [tiny_models.draw_image(index + k) for k in range(1 + index % 2)]
        text = "what is the sum " + "of one " * (index % 4)
        parts = [{"type": "text", "text": text}, *({"type": "image", "text": ""} for _ in images)]
        rows.append({"prompt": [{"role": "user", "content": parts}], "images": images, "solution": "3"})
    path = str(tmp_path_factory.mktemp("images"))
    DatasetDict(test=Dataset.from_list(rows)).save_to_disk(path)
    return path


def arguments(models: list[str], data: str, output_dir: Path, *options: str) -> list[str]:
    return [
        *("--model_name_or_path", *models, "--dataset_name", data, "--output_dir", str(output_dir)),
        *("--dtype", "float32", "--max_new_tokens", "8", *options),
    ]


def run(*args, **kwargs) -> None:
    script.main(*TrlParser((script.EvaluationArguments,)).parse_args_and_config(arguments(*args, **kwargs)))


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.processes
def test_checkpoints_compared_on_the_command_line(text_data, tmp_path):
    right = save_parrot(tmp_path / "right" / "out", "<think>", "one", "</think>", "\\boxed{3}", "<|im_end|>")
    wrong = save_parrot(tmp_path / "wrong" / "out", "\\boxed{4}", "<|im_end|>")
    endless = save_parrot(tmp_path / "endless" / "out", "one", "one")
    command = [sys.executable, str(SCRIPT), *arguments([right, wrong, endless], text_data, tmp_path / "results")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr

    table = {line.split()[0]: line for line in result.stdout.splitlines() if "[" in line}
    assert list(table) == ["right-out", "wrong-out", "endless-out"]
    assert "75.0 [" in table["right-out"] and "-50.0 [" in table["wrong-out"] and "-75.0 [" in table["endless-out"]

    summary = json.loads((tmp_path / "results" / "summary.json").read_text())
    assert summary["num_questions"] == 8 and summary["arguments"]["seed"] == 0
    results = summary["checkpoints"]
    means = {
        name: [result[key]["mean"] for key in ("accuracy", "difference_to_first", "format")]
        for name, result in results.items()
    }
    assert means == {"right-out": [0.75, 0, 1], "wrong-out": [0.25, -0.5, 0], "endless-out": [0, -0.75, 0]}
    low, high = results["wrong-out"]["difference_to_first"]["interval"]
    assert -1 <= low < -0.5 < high < 0.5
    assert [result["tokens"] for result in results.values()] == [5, 2, 8]
    assert [result["truncated"] for result in results.values()] == [0, 0, 1]
    assert [result["unparsed_answers"] for result in results.values()] == [0, 0, 1]

    lines = read_lines(tmp_path / "results" / "right-out.jsonl")
    assert [line["index"] for line in lines] == list(range(8))
    assert [line["solution"] for line in lines] == SOLUTIONS
    assert [line["correct"] for line in lines] == [solution == "3" for solution in SOLUTIONS]
    assert (
        lines[1].items()
        >= {
            "question": "what is one plus one plus one plus one ?",
            "completion": "<think> one </think> \\boxed{3}",
            "answer": "3",
            "format": True,
            "tokens": 5,
        }.items()
    )


@pytest.mark.parametrize("family", ["qwen3", "internvl"])
def test_batches_do_not_change_completions_or_their_order(random_models, text_data, image_data, tmp_path, family):
    data = text_data if family == "qwen3" else image_data
    run([random_models[family]], data, tmp_path / "one", "--batch_size", "1")
    run([random_models[family]], data, tmp_path / "four", "--batch_size", "4")
    run([random_models[family]], data, tmp_path / "first", "--max_samples", "3")
    one, four, first = (read_lines(tmp_path / name / f"{family}.jsonl") for name in ("one", "four", "first"))
    assert one == four
    assert one[:3] == first
    assert len({line["completion"] for line in one}) > 3
    assert {line["truncated"] for line in one} == {True, False}


def test_images_reach_the_model(random_models, image_data, tmp_path):
    rows = DatasetDict.load_from_disk(image_data)["test"].to_list()
    for row in rows:
        row["images"] = [tiny_models.draw_image(5)] * len(row["images"])
    DatasetDict(test=Dataset.from_list(rows)).save_to_disk(tmp_path / "data")
    run([random_models["internvl"]], image_data, tmp_path / "before")
    run([random_models["internvl"]], str(tmp_path / "data"), tmp_path / "after")
    before, after = (read_lines(tmp_path / name / "internvl.jsonl") for name in ("before", "after"))
    assert [line["question"] for line in before] == [line["question"] for line in after]
    assert [line["completion"] for line in before] != [line["completion"] for line in after]


def test_rows_without_images_are_answered_as_apart(random_models, image_data, tmp_path):
    rows = DatasetDict.load_from_disk(image_data)["test"].to_list()
    for row in rows:
        row["prompt"][0]["content"] = row["prompt"][0]["content"][0]["text"]  # before which its images come
        row["images"] = [tiny_models.draw_image(len(row["images"]))]
    for index in (0, 1, 3):
        rows[index]["images"] = []
    parts = {"mixed": rows, "text": [{**row, "images": None} for row in rows if not row["images"]]}
    for name, part in parts.items():
        dataset = Dataset.from_list(part)
        DatasetDict(test=dataset if name == "mixed" else dataset.remove_columns("images")).save_to_disk(
            tmp_path / name
        )
        run([random_models["internvl"]], str(tmp_path / name), tmp_path / f"{name}-results", "--batch_size", "3")
    mixed, text = (read_lines(tmp_path / f"{name}-results" / "internvl.jsonl") for name in parts)
    assert [mixed[index]["completion"] for index in (0, 1, 3)] == [line["completion"] for line in text]


def test_adapters_are_merged_into_their_base_model(checkpoints, text_data, tmp_path):
    base = checkpoints["qwen3-student"]
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=64, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = tiny_models.save(adapted.merge_and_unload(), AutoTokenizer.from_pretrained(base), tmp_path / "merged")
    run([base, str(tmp_path / "adapter"), merged], text_data, tmp_path / "results")
    names = [Path(base).name, "adapter", "merged"]
    plain, adapter, merged = (read_lines(tmp_path / "results" / f"{name}.jsonl") for name in names)
    assert adapter == merged != plain


def save_thinker(path: Path) -> str:
    """A checkpoint that answers after a thought, or at once where its chat template adds `plus` for no thinking."""
    answer = ["\\boxed{3}", "<|im_end|>"]
    save_parrot(path, "<think>", "one", "</think>", *answer, "plus", *answer)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template += "{% if enable_thinking is defined and not enable_thinking %}plus{% endif %}"
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("where", ["command line", "recipe"])
def test_chat_template_kwargs_reach_the_prompts(text_data, tmp_path, where):
    thinker = save_thinker(tmp_path / "thinker")
    options = ["--chat_template_kwargs", '{"enable_thinking": false}']
    if where == "recipe":
        (tmp_path / "recipe.yaml").write_text("chat_template_kwargs:\n  enable_thinking: false\n")
        options = ["--config", str(tmp_path / "recipe.yaml")]
    run([thinker], text_data, tmp_path / "thinking")
    run([thinker], text_data, tmp_path / "not", *options)
    thinking, not_thinking = (read_lines(tmp_path / name / "thinker.jsonl")[0] for name in ("thinking", "not"))
    assert thinking["completion"] == "<think> one </think> \\boxed{3}"
    assert not_thinking["completion"] == "\\boxed{3}"
    summary = json.loads((tmp_path / "not" / "summary.json").read_text())
    assert summary["arguments"]["chat_template_kwargs"] == {"enable_thinking": False}


def test_chat_template_kwargs_reach_the_prompts_of_image_text_models(random_models, image_data, tmp_path):
    model = Path(shutil.copytree(random_models["internvl"], tmp_path / "internvl"))
    with open(model / "chat_template.jinja", "a") as template:
        template.write("{% if enable_thinking is defined and not enable_thinking %}plus{% endif %}")
    run([str(model)], image_data, tmp_path / "thinking")
    run([str(model)], image_data, tmp_path / "not", "--chat_template_kwargs", '{"enable_thinking": false}')
    thinking, not_thinking = (read_lines(tmp_path / name / "internvl.jsonl") for name in ("thinking", "not"))
    assert [line["completion"] for line in thinking] != [line["completion"] for line in not_thinking]


@pytest.mark.parametrize("value", ["enable_thinking=false", "[1]"])
def test_chat_template_kwargs_that_are_no_object_are_named(text_data, tmp_path, value):
    with pytest.raises(ValueError, match="`chat_template_kwargs` is .*enable_thinking.*: false"):
        run(["nowhere"], text_data, tmp_path, "--chat_template_kwargs", value)


@pytest.fixture
def evaluate_from_hub(text_data, tmp_path):
    """`evaluate_from_hub(models, *options)` without network, from a hub cache in `tmp_path`: one completion of each."""
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for name in ("HF_HUB_CACHE", "HF_MODULES_CACHE"):
        env.pop(name, None)

    def evaluate(models: list[str], *options: str) -> list[str]:
        command = [sys.executable, str(SCRIPT), *arguments(models, text_data, tmp_path / "results", *options)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
        assert result.returncode == 0, result.stderr
        files = [tmp_path / "results" / f"{Path(model).name}.jsonl" for model in models]
        return [read_lines(file)[0]["completion"] for file in files]

    return evaluate


def test_a_revision_from_the_hub(evaluate_from_hub, tmp_path):
    """Of a checkpoint, and of the base model of an adapter in a folder."""
    repository = tmp_path / "hub" / "models--owner--parrot"
    (repository / "refs").mkdir(parents=True)
    for name, commit, answer in (("main", 40 * "0", "\\boxed{3}"), ("v1", 40 * "1", "\\boxed{4}")):
        (repository / "refs" / name).write_text(commit)
        save_parrot(repository / "snapshots" / commit, answer, "<|im_end|>")
    base = AutoModelForCausalLM.from_pretrained(repository / "snapshots" / (40 * "1"))
    adapter = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = "owner/parrot"
    adapter.save_pretrained(tmp_path / "adapter")
    completions = evaluate_from_hub(["owner/parrot", str(tmp_path / "adapter")], "--revision", "v1")
    assert completions == ["\\boxed{4}", "\\boxed{4}"]


REMOTE_CODE = """
from transformers import Qwen3Config, Qwen3ForCausalLM


class ParrotConfig(Qwen3Config):
    model_type = "remote_parrot"


class ParrotForCausalLM(Qwen3ForCausalLM):
    config_class = ParrotConfig
"""


def test_a_checkpoint_with_its_own_code(evaluate_from_hub, tmp_path):
    path = save_parrot(tmp_path / "parrot", "\\boxed{3}", "<|im_end|>")
    (tmp_path / "parrot" / "parrot.py").write_text(REMOTE_CODE)
    config_file = tmp_path / "parrot" / "config.json"
    auto_map = {"AutoConfig": "parrot.ParrotConfig", "AutoModelForCausalLM": "parrot.ParrotForCausalLM"}
    own = {"model_type": "remote_parrot", "architectures": ["ParrotForCausalLM"], "auto_map": auto_map}
    config_file.write_text(json.dumps({**json.loads(config_file.read_text()), **own}))
    assert evaluate_from_hub([path], "--trust_remote_code") == ["\\boxed{3}"]


def test_bootstrap_interval():
    generator = np.random.default_rng(0)
    small, large = ((generator.random(size) < 0.7).astype(float) for size in (200, 3200))
    for values in (small, large):
        low, high = script.bootstrap_interval(values, num_samples=2000, seed=0)
        half = 1.96 * values.std() / np.sqrt(len(values))
        assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
        assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert script.bootstrap_interval(np.ones(5), num_samples=100, seed=0) == [1, 1]
    assert script.bootstrap_interval(small, 100, seed=1) == script.bootstrap_interval(small, 100, seed=1)


def test_bootstrap_intervals_cover_the_true_rate():
    generator = np.random.default_rng(0)
    intervals = [script.bootstrap_interval(1.0 * (generator.random(200) < 0.4), 500, seed) for seed in range(300)]
    assert 0.91 < np.mean([low <= 0.4 <= high for low, high in intervals]) < 0.98


@pytest.mark.parametrize(
    "paths, names",
    [
        (["Qwen/Qwen3-0.6B", "runs/opd/"], ["Qwen3-0.6B", "opd"]),
        (["runs/opd/checkpoint-5", "runs/gndpo/checkpoint-5"], ["opd-checkpoint-5", "gndpo-checkpoint-5"]),
        (["out", "runs/out"], ["out", "runs-out"]),
    ],
)
def test_names_tell_checkpoints_apart(paths, names):
    assert script.checkpoint_names(paths) == names


@pytest.mark.parametrize(
    "change, options, message",
    [
        ({"solution": None}, [], r"no column \['solution'\], only \['prompt'\]"),
        ({}, ["--dataset_split", "val"], r"`dataset_split` is 'val'.*\['test'\]"),
        ({"prompt": "what?"}, [], "row 0: `prompt` is 'what\\?'. Give a list of messages"),
        ({"solution": " "}, [], "row 0: `solution` is ' '"),
        ({}, ["--max_samples", "0"], "`max_samples` is 0"),
        ({}, ["--model_name_or_path", "nowhere", "nowhere/"], "names a checkpoint twice"),
    ],
)
def test_bad_input_is_named_before_a_model_is_loaded(tmp_path, change, options, message):
    row = {"prompt": [{"role": "user", "content": "what?"}], "solution": "3", **change}
    row = {column: value for column, value in row.items() if value is not None}
    DatasetDict(test=Dataset.from_list([row])).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match=message):
        run(["nowhere"], str(tmp_path / "data"), tmp_path / "out", *options)


def test_an_empty_split_is_named(text_data, tmp_path):
    Dataset.from_parquet(text_data).select([]).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match='"test" corresponds to no data'):  # the message of `datasets`
        run(["nowhere"], str(tmp_path / "test.parquet"), tmp_path / "out")


def test_text_models_are_refused_for_images(checkpoints, image_data, tmp_path):
    models = [checkpoints["internvl-student"], checkpoints["qwen3-student"]]
    with pytest.raises(ValueError, match="qwen3-student is a text model"):
        run(models, image_data, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_has_to_be_installed(text_data, tmp_path):
    with pytest.raises(ImportError, match="`use_vllm` is set, but vLLM is not installed"):
        run(["nowhere"], text_data, tmp_path, "--use_vllm")
