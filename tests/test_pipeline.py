"""The paper's comparison in small: data, three arms from their own recipes, one table; all of it through the scripts."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_geometry import build_geometry


ROOT = Path(__file__).parents[1]

TINY = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "use_vllm": False,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "num_generations": 4,
    "max_completion_length": 8,
    "per_device_eval_batch_size": 4,
    "eval_steps": 1,
    "max_steps": 2,
    "report_to": "none",
}


@pytest.fixture
def run(tmp_path):
    """`run(script, **options)` starts a script as a user does; the tiny processor is registered by an import hook."""
    (tmp_path / "sitecustomize.py").write_text("import tiny_models\n")
    path = f"{tmp_path}:{ROOT / 'tests'}:{ROOT}"

    def run(script: str, *positional: str, **options) -> str:
        arguments = [*positional, *(part for key, value in options.items() for part in (f"--{key}", str(value)))]
        result = subprocess.run(
            [sys.executable, str(ROOT / "examples" / script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
            cwd=tmp_path,
            timeout=300,
        )
        assert result.returncode == 0, result.stdout
        return result.stdout

    return run


@pytest.mark.processes
def test_from_problems_to_the_table(run, tmp_path, checkpoints):
    build_geometry(num_train=16, num_test=4).save_to_disk(tmp_path / "source")
    student, teacher = checkpoints["internvl-student"], checkpoints["internvl-teacher"]
    data = tmp_path / "data"
    output = run("prepare_geometry3k.py", dataset_name="source", output_dir=data, model_name_or_path=student)
    assert sorted(path.name for path in data.iterdir()) == ["test.parquet", "train.parquet"]
    assert output.split("written\n")[1].split() == ["train", "16", "0", "16", "test", "4", "0", "4"]

    for algorithm in ("gspo", "opd", "gndpo"):
        options = {"dataset_name": data, "model_name_or_path": student, "output_dir": tmp_path / algorithm, **TINY}
        # tiny models sample placeholders of images, too
        options["generation_kwargs"] = json.dumps({"suppress_tokens": list(range(3, 11))})
        if algorithm != "gspo":
            options["teacher_model_name_or_path"] = teacher
        run("train_gndpo.py", "--config", str(ROOT / f"recipes/internvl3_5/1b/{algorithm}.yaml"), **options)
        state = json.loads((tmp_path / algorithm / "trainer_state.json").read_text())
        assert state["global_step"] == 2
        for name in ("boxed_accuracy_reward", "think_format_reward"):
            validations = sum(f"eval_rewards/{name}/mean" in entry for entry in state["log_history"])
            assert validations == 3  # before training, and after each step
            assert sum(f"rewards/{name}/mean" in entry for entry in state["log_history"]) == 2
        assert any("score/mean" in entry for entry in state["log_history"]) == (algorithm != "gspo")

    arms = [str(tmp_path / algorithm) for algorithm in ("gspo", "opd", "gndpo")]
    output = run(
        "evaluate.py",
        *("--model_name_or_path", student, *arms),
        dataset_name=data,
        output_dir=tmp_path / "evaluation",
        max_new_tokens=8,
        dtype="float32",
        device="cpu",
    )
    table = output[output.index("accuracy %") :].splitlines()
    assert [line.split()[0] for line in table[1:5]] == ["internvl-student", "gspo", "opd", "gndpo"]
    summary = json.loads((tmp_path / "evaluation" / "summary.json").read_text())
    assert summary["num_questions"] == 4 and len(summary["checkpoints"]) == 4
