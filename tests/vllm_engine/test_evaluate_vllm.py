"""The evaluation script with `--use_vllm`, against the same script with transformers."""

import json

import evaluate
import pytest
import vllm


@pytest.mark.parametrize("family", ["qwen3", "internvl"])
def test_the_same_completions(checkpoints, engines, tmp_path, monkeypatch, text_dataset, image_dataset, family):
    monkeypatch.setattr(vllm, "LLM", lambda path, **options: engines(path, **options))
    dataset = (text_dataset if family == "qwen3" else image_dataset).select(range(4))
    dataset.add_column("solution", ["1", "2", "3", "4"]).to_parquet(tmp_path / "test.parquet")
    completions = []
    for use_vllm in (True, False):
        output_dir = tmp_path / str(use_vllm)
        evaluate.main(
            evaluate.EvaluationArguments(
                model_name_or_path=[checkpoints[f"{family}-teacher"]],
                dataset_name=str(tmp_path),
                output_dir=str(output_dir),
                max_new_tokens=8,
                dtype="float32",
                use_vllm=use_vllm,
                device=None if use_vllm else "cpu",
            )
        )
        lines = (output_dir / f"{family}-teacher.jsonl").read_text().splitlines()
        completions.append([(row["completion"].strip(), row["tokens"]) for row in map(json.loads, lines)])
    assert completions[0] == completions[1]
