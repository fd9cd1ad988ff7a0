"""The runs on a pretrained pair: a GGUF file is read, layers are left out, and the command goes its whole way, all tiny."""

import sys
from pathlib import Path

import gguf
import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.arms import pretrained


SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_letters() -> list[str]:
    """The 256 letters that GPT-2's vocabulary has for bytes."""
    kept = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in kept] + [chr(256 + index) for index in range(256 - len(kept))]


def build_llama(tokens: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def write_gguf(model: LlamaForCausalLM, tokens: list[str], path: Path) -> None:
    """As llama.cpp's converter does, which stores the two halves of each head's queries and keys interleaved."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIALS else 1 for token in tokens])  # control, normal
    writer.add_token_merges(["h e", "Ġ t"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def add(name: str, weight: torch.Tensor, heads: int | None = None) -> None:
        array = weight.detach().numpy()
        if heads is not None:
            array = array.reshape(heads, 2, -1, config.hidden_size).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(name, np.ascontiguousarray(array))

    add("token_embd.weight", model.model.embed_tokens.weight)
    add("output_norm.weight", model.model.norm.weight)
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        add(f"blk.{index}.attn_q.weight", attention.q_proj.weight, config.num_attention_heads)
        add(f"blk.{index}.attn_k.weight", attention.k_proj.weight, config.num_key_value_heads)
        add(f"blk.{index}.attn_v.weight", attention.v_proj.weight)
        add(f"blk.{index}.attn_output.weight", attention.o_proj.weight)
        add(f"blk.{index}.ffn_gate.weight", mlp.gate_proj.weight)
        add(f"blk.{index}.ffn_up.weight", mlp.up_proj.weight)
        add(f"blk.{index}.ffn_down.weight", mlp.down_proj.weight)
        add(f"blk.{index}.attn_norm.weight", layer.input_layernorm.weight)
        add(f"blk.{index}.ffn_norm.weight", layer.post_attention_layernorm.weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def original():
    return build_llama(len(SPECIALS) + 256 + 2)


@pytest.fixture(scope="module")
def model_file(original, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(original, [*SPECIALS, *byte_letters(), "he", "Ġt"], path)
    return path


@pytest.fixture(scope="module")
def folder(model_file, tmp_path_factory):
    path = tmp_path_factory.mktemp("unpacked") / "tiny"
    pretrained.unpack(model_file, path)
    return path


def test_an_unpacked_file_is_the_model_that_was_written(original, folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert not hasattr(model.config, "quantization_config")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    ids = tokenizer.apply_chat_template(
        pretrained.to_messages("the"), add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )["input_ids"]
    text = "<|im_start|>system\nAnswer briefly.<|im_end|>\n<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids[0]) == text and ids[0, 0] == 1
    torch.testing.assert_close(model(ids).logits, original(ids).logits)


def test_the_student_lacks_layers_of_the_middle(original, folder):
    student, teacher, _ = pretrained.load_pair(folder, 1)
    assert len(student.model.layers) == student.config.num_hidden_layers == 3 and len(teacher.model.layers) == 4
    for layer, index in zip(student.model.layers, (0, 1, 3), strict=True):
        torch.testing.assert_close(layer.mlp.up_proj.weight, original.model.layers[index].mlp.up_proj.weight)
    ids = torch.arange(3, 15).unsqueeze(0)
    with torch.no_grad():
        cached = student(ids[:, :6], use_cache=True).past_key_values
        rest = student(ids[:, 6:], past_key_values=cached).logits
        torch.testing.assert_close(rest, student(ids).logits[:, 6:])
        assert not torch.allclose(student(ids).logits, teacher(ids).logits, atol=1e-2)


@pytest.mark.parametrize("number", [0, 2])
def test_a_student_keeps_its_last_layer(number, folder):
    with pytest.raises(ValueError, match=f"--left_out {number} does not fit a model of 4 layers"):
        pretrained.load_pair(folder, number)


def test_a_teacher_is_at_no_distance_from_itself(folder):
    student, teacher, tokenizer = pretrained.load_pair(folder, 1)
    evaluate = pretrained.build_evaluation(tokenizer, teacher, ["the sum", "a longer question?"])
    own, other = evaluate(teacher), evaluate(student)
    assert abs(own["reverse_kl"]) < 1e-6 and own["agreement"] == 1
    assert other["reverse_kl"] > 0.01 and other["agreement"] < 1 and 1 <= other["length"] <= pretrained.MAX_NEW_TOKENS
    assert evaluate(student) == other  # the same samples again


def test_prompts_are_many_and_none_of_a_run_is_held_out():
    prompts = pretrained.build_prompts()
    train, held_out = pretrained.split_prompts(1)
    assert len(set(prompts)) == len(prompts) > 250 and sorted(train + held_out) == sorted(prompts)
    assert len(held_out) == 32 and pretrained.split_prompts(2)[1] != held_out


@pytest.mark.processes
def test_the_command_runs_its_arms_and_resumes(model_file, tmp_path, monkeypatch, capsys):
    results = tmp_path / "rows.parquet"
    command = ["pretrained.py", "--smoke", "--model_file", str(model_file), "--left_out", "1", "--seeds", "1"]
    command += ["--output_dir", str(tmp_path / "out"), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", [*command, "--arms", "exact", "distillation"])
    assert pretrained.main() == 0
    rows = pd.read_parquet(results).set_index("arm")
    for arm, row in rows.iterrows():
        assert row["model"] == "tiny" and list(row["eval_step"]) == [1, 2] and row["reverse_kl"] > 0
        assert len(row["grad_norm"]) == 2 and min(row["grad_norm"]) > 0 and row["peak_bytes"] > 0
        assert len(row["step_seconds"]) == len(row["generation_seconds"]) == 1
        assert 0 < row["generation_seconds"][0] < row["step_seconds"][0]
        assert len(row["clamped"]) == (2 if arm == "exact" else 0)
    assert pretrained.main() == 0
    assert "2 of 2 cells are there, 0 to run" in capsys.readouterr().out and len(pd.read_parquet(results)) == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model_file", "nothing.gguf"], "--model_file nothing.gguf is not there: give a GGUF file"),
        (["--model_file", "FILE", "--smoke", "--results", str(pretrained.RESULTS)], "--smoke needs another --results"),
    ],
)
def test_what_cannot_run_is_refused(arguments, message, model_file, monkeypatch, capsys):
    arguments = [str(model_file) if word == "FILE" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["pretrained.py", *arguments])
    with pytest.raises(SystemExit):
        pretrained.main()
    assert message in capsys.readouterr().err


def test_a_missing_reader_is_named(model_file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["pretrained.py", "--model_file", str(model_file)])
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SystemExit):
        pretrained.main()
    assert "is read with the package gguf: pip install gguf" in capsys.readouterr().err
