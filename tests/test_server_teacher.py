"""A teacher behind a server, with a small server in its place; `vllm_engine/test_server_teacher.py` has the real one."""

import io
import math
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import tiny_models
import torch
from datasets import Dataset
from helpers import assert_same_gradients, gradients, make_rollout
from PIL import Image, ImageDraw
from stand_in_server import StandInServer, unknown
from transformers import AutoTokenizer, TrainerCallback

from gndpo_trl.grpo.checkpoints import RunCannotGoOn
from gndpo_trl.grpo.rollouts import valid_tokens
from gndpo_trl.teachers import LocalTeacher, ServerTeacher
from gndpo_trl.teachers.compatibility import describe
from gndpo_trl.teachers.served.questions import Picture, Question, split
from gndpo_trl.teachers.served.servers import ServerError


NOBODY = "http://localhost:9"  # the port of the discard service, which nobody runs


@pytest.fixture
def serve(checkpoints):
    servers = []

    def start(path: str = checkpoints["qwen3-teacher"], **options) -> StandInServer:
        servers.append(StandInServer(path, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def make_served(make_trainer):
    """Trainers with a teacher behind a server; the servers' URLs and fields of the configuration."""

    def make(*urls: str, **options):
        return make_trainer(teacher_server_url=list(urls), **{"teacher_server_timeout": 20.0, **options})

    return make


class Stop(TrainerCallback):
    """Stops a server after a number of steps."""

    def __init__(self, server: StandInServer, after: int):
        self.server, self.after = server, after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            self.server.stop()


def rows_of(trainer, count: int = 8) -> list[dict]:
    return [trainer.train_dataset[index // 2] for index in range(count)]


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# What it answers


def test_it_scores_as_the_same_teacher_here(make_served, make_trainer, serve):
    server = serve()
    trainer, local = make_served(server.url), make_trainer()
    rollout = {**make_rollout(trainer), "rows": rows_of(trainer)}
    mask = valid_tokens(rollout)
    assert mask.sum(-1).unique().numel() > 1  # of several lengths
    found, expected = (one.teacher.per_token_logps(rollout) for one in (trainer, local))
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5)


def test_a_run_is_that_with_the_same_teacher_here(make_served, make_trainer, serve):
    runs = []
    for make in (lambda: make_served(serve().url), make_trainer):
        runs.append(make())  # seeds
        runs[-1].train()
    names = [name for name in runs[1].state.log_history[0] if name.startswith(("score/", "teacher/", "advantages/"))]
    assert len(names) > 8
    for name in names:
        assert logged(runs[0], name) == pytest.approx(logged(runs[1], name), abs=1e-4), name


def test_a_teacher_of_another_family_gets_its_own_tokens(make_served, make_trainer, serve, checkpoints):
    server, path = serve(checkpoints["other-teacher"]), checkpoints["other-teacher"]
    options = {"teacher_alignment": "text", "share_prompts": False}
    trainer = make_served(server.url, teacher_model_name_or_path=path, **options)
    local = make_trainer(teacher_model=path, **options)
    rollout = {**make_rollout(trainer), "rows": rows_of(trainer)}
    found, expected = (one.teacher.per_token_logps(rollout) for one in (trainer, local))
    mask = rollout["completion_mask"].bool()
    assert mask.sum() > 2 * expected[mask].isnan().sum()
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5, equal_nan=True)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert all(tokenizer.decode(row).startswith("<turn>user\nwhat is") for row in server.rows[-8:])
    with pytest.raises(ValueError, match='disagree.*`teacher_model_name_or_path`, and set `teacher_alignment="text"`'):
        make_served(server.url)


def test_pictures_of_a_teacher_of_another_family(make_trainer, serve, checkpoints):
    server = serve(checkpoints["qwen25vl-teacher"], max_model_len=4096)
    options = {"teacher_alignment": "text", "teacher_model_name_or_path": checkpoints["qwen25vl-teacher"]}
    trainer = make_trainer("internvl", teacher_server_url=[server.url], **options)
    local = make_trainer("internvl", **options)
    rollout = {**make_rollout(trainer), "rows": rows_of(trainer)}
    found, expected = (one.teacher.per_token_logps(rollout) for one in (trainer, local))
    mask = rollout["completion_mask"].bool()
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-5)


def test_the_server_works_while_the_student_is_scored(make_served, serve):
    server, scored = serve(), threading.Event()
    trainer = make_served(server.url, share_prompts=False)
    trainer._per_token_logps = lambda *args, score=trainer._per_token_logps: (score(*args), scored.set())[0]
    waited = []

    def wait(path, body, answer):
        waited.append(scored.wait(timeout=10))
        return answer

    server.misbehave = wait
    make_rollout(trainer)
    assert waited and all(waited)


def test_a_row_is_asked_for_once_and_truncated_ones_never(make_served, serve):
    server = serve()
    trainer = make_served(server.url)
    rollout = {**make_rollout(trainer), "rows": rows_of(trainer)}
    doubled = {name: torch.cat([rollout[name]] * 2) for name in rollout if name.startswith(("prompt_", "completion_"))}
    doubled["completion_mask"][3] = doubled["completion_mask"][11] = 0
    server.requests.clear()
    logps = trainer.teacher.per_token_logps({**doubled, "rows": 2 * rollout["rows"]})
    mask = doubled["completion_mask"].bool()
    assert len(server.rows) == len(set(server.rows)) <= 7
    assert torch.equal(logps[:8][mask[:8]], logps[8:][mask[8:]]) and logps[mask].isfinite().all()


def transparent() -> Image.Image:
    """Black lines on nothing."""
    image = Image.new("RGBA", (40, 24), (0, 0, 0, 0))
    ImageDraw.Draw(image).line([(2, 2), (30, 20)], fill=(0, 0, 0, 255), width=3)
    return image


def turned() -> bytes:
    """A file of a camera that was held sideways."""
    file, exif = io.BytesIO(), Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6
    tiny_models.draw_image(2).save(file, "JPEG", exif=exif)
    return file.getvalue()


def test_pictures_reach_the_server_as_the_student_sees_them(make_trainer, serve, checkpoints, tmp_path):
    """In messages and columns, as paths, bytes and images, for the student's prompt and for the teacher's own."""
    server = serve(checkpoints["qwen25vl-teacher"], max_model_len=4096)
    words = {"type": "text", "text": "what is the sum ?"}
    path = str(tmp_path / "picture.png")
    tiny_models.draw_image(1).save(path)
    by_path = [{"role": "user", "content": [{"type": "image", "image": path}, words]}]
    own_prompt = [{"role": "user", "content": [{"type": "image", "path": path}, words, words]}]
    of_column = [{"role": "user", "content": [words, {"type": "image"}]}]
    rows = {
        "messages": {"prompt": by_path},
        "column": {"prompt": of_column, "images": [transparent()]},
        "turned": {"prompt": of_column, "images": [{"bytes": turned(), "path": None}]},
        "own prompt": {"prompt": of_column, "images": [tiny_models.draw_image(0)], "teacher_prompt": own_prompt},
        "own images": {
            "prompt": of_column,
            "images": [tiny_models.draw_image(0)],
            "teacher_prompt": of_column,
            "teacher_images": [transparent()],
        },
    }
    expected = [path, transparent(), turned(), path, transparent()]
    trainer = make_trainer("qwen25vl", teacher_server_url=[server.url], teacher_server_timeout=20.0)
    questions = [
        trainer.teacher._question(
            {
                "prompt_ids": torch.tensor([[11, 12]]),
                "prompt_mask": torch.ones(1, 2),
                "completion_ids": torch.tensor([[13]]),
                "completion_mask": torch.ones(1, 1),
                "rows": [row],
            },
            0,
        )
        for row in rows.values()
    ]
    for name, question, picture in zip(rows, questions, expected, strict=True):
        assert question.pictures == (Picture.of(picture),), name
        with pytest.raises(ServerError, match="placeholders for 0 alone"):  # a prompt without a place for it
            trainer.teacher.model.request([question])
    assert Picture.of(turned()).size[0] < Picture.of(turned()).size[1]  # upright
    assert Picture.of(transparent()).pixels[-3:] == b"\xff\xff\xff"


def test_a_run_on_pictures_in_messages_is_that_with_the_same_teacher_here(make_trainer, serve, checkpoints, tmp_path):
    server = serve(checkpoints["qwen25vl-teacher"], max_model_len=4096)
    rows = []
    for number in range(4):
        tiny_models.draw_image(number).save(tmp_path / f"{number}.png")
        parts = [{"type": "image", "image": str(tmp_path / f"{number}.png")}, {"type": "text", "text": "what is it ?"}]
        rows.append({"prompt": [{"role": "user", "content": parts}]})
    data = {"trainer_options": {"train_dataset": Dataset.from_list(rows)}}
    trainer = make_trainer("qwen25vl", teacher_server_url=[server.url], teacher_server_timeout=20.0, **data)
    local = make_trainer("qwen25vl", **data)
    server.requests.clear()
    rollout = {**make_rollout(trainer), "rows": rows_of(trainer)}
    assert {path for path, _ in server.requests} == {"/inference/v1/generate"}
    mask = valid_tokens(rollout)
    found, expected = (one.teacher.per_token_logps(rollout) for one in (trainer, local))
    assert mask.any() and not found[mask].isnan().any()
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-4)
    # Without its pictures, such a prompt is not asked about at all.
    with pytest.raises(RunCannotGoOn, match="has 0 pictures for the teacher, and placeholders for others"):
        trainer.teacher.per_token_logps({**rollout, "rows": [{"prompt": "text"}] * 8})


def test_rows_with_and_without_pictures(make_trainer, serve, checkpoints, image_dataset):
    server = serve(checkpoints["qwen25vl-teacher"], max_model_len=4096)
    rows = [{**row, "images": row["images"] if index in (1, 2) else []} for index, row in enumerate(image_dataset)]
    data = {"trainer_options": {"train_dataset": Dataset.from_list(rows, features=image_dataset.features)}}
    options = {"shuffle_dataset": False, "max_steps": 3, **data}
    trainer = make_trainer("qwen25vl", teacher_server_url=[server.url], teacher_server_timeout=20.0, **options)
    local = make_trainer("qwen25vl", **options)
    server.requests.clear()
    rollout = make_rollout(trainer)
    assert {path for path, _ in server.requests} == {"/inference/v1/generate", "/v1/completions"}
    rollout["rows"] = rows_of(trainer)
    mask = valid_tokens(rollout)
    found, expected = (one.teacher.per_token_logps(rollout) for one in (trainer, local))
    torch.testing.assert_close(found[mask], expected[mask], rtol=0, atol=1e-4)
    trainer.train()
    assert logged(trainer, "teacher/unknown_tokens") == [0, 0, 0]


def test_pictures_are_tried_in_the_template_of_the_student(serve, checkpoints, recwarn):
    server = serve(checkpoints["qwen25vl-teacher"], max_model_len=4096)
    student = describe("model", checkpoints["qwen25vl-student"])
    template, refusal = student.processing_class.chat_template, "{{ raise_exception('not this') }}"
    demands = "{% if messages[0].role != 'system' or style is not defined %}" + refusal + "{% endif %}"
    student.processing_class.chat_template, student.template_kwargs = demands + template, {"style": "short"}
    ServerTeacher(server.url).check(student)
    assert server.pictures and not [warning for warning in recwarn if "NOT checked" in str(warning.message)]
    student.processing_class.chat_template = refusal
    with pytest.warns(UserWarning, match="NOT checked whether the teacher's server reads images as the student does"):
        ServerTeacher(server.url).check(student)


def test_a_placeholder_that_the_student_samples_is_unknown_to_the_teacher(make_trainer, serve, checkpoints):
    """With what follows: a server would look for a picture, or read it as text."""
    server = serve(checkpoints["qwen25vl-teacher"], max_model_len=4096)
    trainer = make_trainer("qwen25vl", teacher_server_url=[server.url], teacher_server_timeout=20.0)
    rollout = {**make_rollout(trainer), "rows": rows_of(trainer)}
    rollout["completion_ids"][0, 2] = trainer.model.config.image_token_id
    rollout["completion_mask"][0] = 1
    trainer.teacher.max_unknown = 1.0
    logps = trainer.teacher.per_token_logps(rollout)
    assert logps[0, :2].isfinite().all() and logps[0, 2:].isnan().all()


def test_requests_are_bounded():
    rows = [Question(tuple(range(length)), 1) for length in (5, 5, 3, 20, 1, 1)]
    assert [[len(row.ids) for row in part] for part in split(rows, 10)] == [[5, 5], [3], [20], [1, 1]]
    image = Question((1,), 1, (Picture.of(tiny_models.draw_image(0)),))
    assert list(split([rows[0], image, rows[1]], 100)) == [[image], [rows[0], rows[1]]]


def test_another_prompt_for_the_teacher(make_served, serve):
    """As a teacher that wraps this one would hand it over."""
    server = serve()
    trainer = make_served(server.url)
    rollout = {**make_rollout(trainer), "rows": rows_of(trainer)}
    own = trainer._tokenizer(["one plus one", "what is the sum ?"] * 4, return_tensors="pt", padding=True)
    server.requests.clear()
    trainer.teacher.per_token_logps({**rollout, "prompt_ids": own["input_ids"], "prompt_mask": own["attention_mask"]})
    assert {row[:3] for row in server.rows} == {
        tuple(trainer._tokenizer(p)["input_ids"][:3]) for p in ("one plus one", "what is the")
    }


def test_two_servers_share_the_rows_and_the_other_goes_on_alone(make_served, serve):
    servers = [serve(), serve()]
    trainer = make_served(*(server.url for server in servers), max_steps=3, per_device_train_batch_size=8)
    trainer.teacher.request_tokens = 1  # a request for each row
    for server in servers:
        server.requests.clear()
    rollout = make_rollout(trainer)
    assert all(server.rows for server in servers)
    assert len({*servers[0].rows} & {*servers[1].rows}) == 1  # whose answers are compared
    servers[0].stop()
    trainer.train()
    assert trainer.state.global_step == 3 and logged(trainer, "teacher/unknown_tokens") == [0, 0, 0]
    assert rollout["advantages"].isfinite().all()


def test_a_server_that_is_busy_is_asked_again(make_served, serve):
    server = serve()
    trainer = make_served(server.url)
    refusals = [(503, "starting"), (502, b"<html>")]
    server.misbehave = lambda path, body, answer: refusals.pop() if refusals else answer
    trainer.train()
    assert not refusals and trainer.state.global_step == 2


# The likeliest tokens


@pytest.fixture
def make_exact(make_trainer, serve, checkpoints):
    """Trainers with the exact estimator, and a teacher behind a server (whose URLs come first) or here."""

    def make(family: str, *urls: str, **options):
        served = {"teacher_server_url": list(urls), "teacher_server_timeout": 20.0} if urls else {}
        options = {"estimator": "exact", "per_device_train_batch_size": 8, "max_steps": 1, **served, **options}
        return make_trainer(family, **options)

    return make


@pytest.mark.parametrize("options", [{"estimator": "exact"}, {"estimator": "sampled", "score_baseline": "expected"}])
@pytest.mark.parametrize("family", ["qwen3", "qwen25vl"])
def test_with_all_tokens_gradients_are_those_of_the_same_teacher_here(make_exact, serve, checkpoints, family, options):
    server = serve(checkpoints[f"{family}-teacher"], max_model_len=4096, max_logprobs=10_000)
    trainer = make_exact(family, server.url, teacher_top_k=10_000, **options)
    vocab_size = server.model.config.get_text_config().vocab_size
    assert trainer.teacher.model.num_known == min(vocab_size, trainer.model.config.get_text_config().vocab_size)
    assert_same_gradients(gradients(trainer), gradients(make_exact(family, **options)))


@pytest.mark.parametrize("family", ["qwen3", "qwen25vl"])
def test_the_likeliest_tokens_are_those_of_the_same_teacher_here(make_exact, serve, checkpoints, family):
    server = serve(checkpoints[f"{family}-teacher"], max_model_len=4096)
    trainer, local = make_exact(family, server.url, teacher_top_k=4), make_exact(family, teacher_top_k=4)
    server.requests.clear()
    rollout = {**make_rollout(trainer), "rows": rows_of(trainer)}
    bodies = [body.get("sampling_params", body) for path, body in server.requests if path != "/v1/models"]
    assert bodies and all(body["prompt_logprobs"] == 5 for body in bodies)
    found, expected = (one.teacher.hidden_states(rollout, one._hidden_states) for one in (trainer, local))
    for ours, theirs in zip(found.rows, expected.rows, strict=True):
        for mine, its in zip(ours, theirs, strict=True):
            pairs = [sorted((int(id), logp) for id, logp in one.tolist()) for one in (mine, its)]
            assert [id for id, _ in pairs[0]] == [id for id, _ in pairs[1]]
            assert [logp for _, logp in pairs[0]] == pytest.approx([logp for _, logp in pairs[1]], abs=1e-4)
    trained = [gradients(make_exact(family, *urls, teacher_top_k=4)) for urls in ([server.url], [])]
    assert_same_gradients(*trained)


def test_a_server_and_a_model_here_share_the_rows(make_exact, serve, checkpoints, text_dataset):
    server = serve(max_logprobs=10_000)
    names = ["far" if row % 3 else "near" for row in range(len(text_dataset))]
    options = {"trainer_options": {"train_dataset": text_dataset.add_column("teacher", names)}}
    near, far = checkpoints["qwen3-student"], checkpoints["qwen3-teacher"]
    both = {"near": near, "far": ServerTeacher(server.url, top_k=10_000)}
    found = gradients(make_exact("qwen3", teacher_model=both, **options))
    assert server.rows
    assert_same_gradients(found, gradients(make_exact("qwen3", teacher_model={"near": near, "far": far}, **options)))


def test_a_server_that_gives_fewer_log_probs_is_found_at_the_start(make_exact, serve):
    server = serve(max_logprobs=10)
    assert make_exact("qwen3", server.url, teacher_top_k=9).teacher.model.num_known == 10
    with pytest.raises(ValueError, match=r"`teacher_top_k` is 10, .* `--max-logprobs 11` or more.*max allowed: 10"):
        make_exact("qwen3", server.url, teacher_top_k=10)
    server.misbehave = fewer
    with pytest.raises(ValueError, match="gives the log-probs of 8 tokens at a position where 9 were asked for"):
        make_exact("qwen3", server.url, teacher_top_k=8)
    with pytest.raises(ValueError, match="`estimator` is 'exact'.*ServerTeacher only knows.*set `teacher_top_k`"):
        make_exact("qwen3", server.url)


def fewer(path, body, answer):
    """Leaves out one of the likeliest tokens at each position."""
    for choice in answer[1].get("choices", []):
        for position in filter(None, choice["prompt_logprobs"] or []):
            del position[[*position][-1]]
    return answer


def without_ids(path, body, answer):
    """Names tokens by their text."""
    for choice in answer[1].get("choices", []):
        choice["prompt_logprobs"] = [
            position and {f"token {id}": entry for id, entry in position.items()}
            for position in choice["prompt_logprobs"]
        ]
    return answer


@pytest.mark.parametrize("misbehave, message", [(fewer, "where 5 were asked for"), (without_ids, "of another token")])
def test_a_server_whose_answer_lacks_tokens_ends_the_run(make_exact, serve, misbehave, message, tmp_path):
    server = serve()
    trainer = make_exact("qwen3", server.url, teacher_top_k=4, max_steps=3, output_dir=str(tmp_path / "out"))

    class Begin(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            server.misbehave = misbehave

    trainer.add_callback(Begin())
    with pytest.raises(RunCannotGoOn, match=f"(?s){server.url}.*{message}.*ended after step 1"):
        trainer.train()


def test_likeliest_tokens_with_unknown_log_probs_leave_the_loss(make_exact, serve):
    server = serve()
    trainer = make_exact("qwen3", server.url, teacher_top_k=4)
    trainer.teacher.max_unknown = 0.5

    def forget(path, body, answer):
        """The log-prob of one of the other tokens."""
        for choice in answer[1].get("choices", []):
            for position in (choice["prompt_logprobs"] or [])[5::5]:
                position[[*position][1]]["logprob"] = None
        return answer

    server.misbehave = forget
    found = gradients(trainer)
    assert all(gradient.isfinite().all() for gradient in found.values())
    assert max(gradient.abs().max() for gradient in found.values()) > 1e-3
    assert trainer.state.log_history[0]["teacher/unknown_tokens"] > 0


def test_likeliest_tokens_that_the_teacher_rules_out_are_at_the_bound(make_exact, serve):
    """vLLM writes minus infinity as -9999."""
    server = serve()
    trainer = make_exact("qwen3", server.url, teacher_top_k=4)

    def rule_out(path, body, answer):
        for choice in answer[1].get("choices", []):
            for position in filter(None, choice["prompt_logprobs"] or []):
                position[min([*position][1:], key=lambda id: position[id]["logprob"])]["logprob"] = -9999.0
        return answer

    server.misbehave = rule_out
    rollout = {**make_rollout(trainer), "rows": rows_of(trainer)}
    states = trainer.teacher.hidden_states(rollout, trainer._hidden_states)
    assert torch.cat(states.rows)[..., 1].isneginf().any()
    assert all(gradient.isfinite().all() for gradient in gradients(trainer).values())


@pytest.mark.parametrize("family", ["qwen3", "qwen25vl"])
def test_a_killed_server_and_the_middle_of_a_generation_batch(make_exact, serve, checkpoints, tmp_path, family):
    path = checkpoints[f"{family}-teacher"]
    server = serve(path, max_model_len=4096)
    # What makes scores of the tokens of the batch comes with the checkpoint: the server is not asked again, without pictures.
    options = {"save_strategy": "steps", "save_steps": 1, "num_iterations": 2, "teacher_top_k": 4, "max_steps": 4}
    whole = make_exact(family, server.url, output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    parts = {**options, "output_dir": str(tmp_path / "parts"), "teacher_server_timeout": 1.0}
    killed = make_exact(family, server.url, **parts)
    killed.add_callback(Stop(server, after=1))
    with pytest.raises(RunCannotGoOn, match="ended after step 2"):
        killed.train()
    port = server.server_address[1]
    serve(path, max_model_len=4096, port=port)
    make_exact(family, server.url, **{**parts, "max_steps": 3}).train(resume_from_checkpoint=True)
    resumed = make_exact(family, server.url, **parts)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    if family == "qwen3":
        for name, parameter in whole.model.state_dict().items():
            assert torch.equal(parameter, resumed.model.state_dict()[name]), name


# Log-probs that it does not have


@pytest.mark.parametrize("logprob", [None, math.nan, -9999.0])
def test_unknown_log_probs_leave_the_loss_and_are_counted(make_served, serve, logprob):
    server = serve()
    trainer = make_served(server.url)
    trainer.teacher.max_unknown = 0.5
    server.misbehave = lambda path, body, answer: unknown(answer, logprob)
    rollout = make_rollout(trainer)
    mask = rollout["completion_mask"].bool()
    lengths = rollout["prompt_mask"].sum(-1, keepdim=True)
    lost = mask & ((torch.arange(mask.size(1)) + lengths) % 5 == 0)
    assert lost.any() and torch.equal(valid_tokens(rollout), mask & ~lost)
    assert trainer._metrics["train"]["teacher/unknown_tokens"] == [lost.sum().item()]
    assert rollout["advantages"].isfinite().all()


def test_a_row_with_nan_leaves_the_others_their_answers(make_served, serve):
    """vLLM cannot write NaN down, and refuses the whole request."""
    server = serve()
    trainer = make_served(server.url)
    rollout = {**make_rollout(trainer), "rows": rows_of(trainer)}
    broken = server.rows[-1]

    def refuse(path, body, answer):
        has_nan = broken in [tuple(row) for row in body["prompt"]]
        return (400, {"error": {"message": "Out of range float values are not JSON compliant"}}) if has_nan else answer

    server.misbehave = refuse
    trainer.teacher.max_unknown = 1.0
    logps = trainer.teacher.per_token_logps(rollout)
    mask = rollout["completion_mask"].bool()
    for row in range(8):
        ids = [rollout[f"{part}_ids"][row][rollout[f"{part}_mask"][row].bool()] for part in ("prompt", "completion")]
        is_broken = tuple(torch.cat(ids).tolist()) == broken
        assert logps[row][mask[row]].isnan().all() if is_broken else logps[row][mask[row]].isfinite().all()


def test_too_many_unknown_log_probs_end_the_run(make_served, serve):
    server = serve()
    trainer = make_served(server.url)
    server.misbehave = lambda path, body, answer: unknown(answer)
    with pytest.raises(RunCannotGoOn, match=rf"{server.url} has no finite log-prob for \d+ of \d+ tokens"):
        trainer.train()


def test_ids_beyond_the_servers_vocabulary_are_not_sampled_and_not_asked_for(make_served, serve, tmp_path):
    student = tiny_models.save(*tiny_models.build_qwen3(seed=0, vocab_size=48), tmp_path / "padded")
    server = serve()
    trainer = make_served(server.url, model=student)
    size = server.model.config.vocab_size
    assert trainer.teacher.vocab_size == size < 48
    assert set(range(size, 48)) <= set(trainer.generation_config.suppress_tokens)
    rollout = {**make_rollout(trainer), "rows": rows_of(trainer)}
    rollout["completion_ids"][0, 2] = 47  # as another sampler might
    rollout["completion_mask"][0] = 1
    trainer.teacher.max_unknown = 1.0
    logps = trainer.teacher.per_token_logps(rollout)
    assert logps[0, :2].isfinite().all() and logps[0, 2:].isnan().all()


# A server that goes away


def test_a_server_that_stays_away_ends_the_run_with_a_checkpoint(make_served, serve, tmp_path):
    server = serve()
    options = {"max_steps": 4, "teacher_server_timeout": 1.0, "output_dir": str(tmp_path / "out")}
    trainer = make_served(server.url, **options)
    trainer.add_callback(Stop(server, after=2))
    with pytest.raises(RunCannotGoOn) as error:
        trainer.train()
    assert f"{server.url} has not answered for 1 seconds" in str(error.value)
    assert "ended after step 2, which is saved in" in str(error.value)
    assert [path.name for path in Path(options["output_dir"]).glob("checkpoint-*")] == ["checkpoint-2"]

    # It comes back, goes away before the next step, and comes back.
    again = serve(port=server.server_address[1])
    assert again.url == server.url
    resumed = make_served(server.url, **options)
    again.stop()
    resumed._save_checkpoint = None  # which would replace the one that there is
    with pytest.raises(RunCannotGoOn, match="ended after step 2"):
        resumed.train(resume_from_checkpoint=True)
    serve(port=server.server_address[1])
    resumed = make_served(server.url, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4


def test_a_run_that_has_saved_its_last_step_saves_nothing_more(make_served, serve, tmp_path):
    server = serve()
    options = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "out"), "max_steps": 4}
    trainer = make_served(server.url, teacher_server_timeout=1.0, **options)
    trainer.add_callback(Stop(server, after=1))
    saved = []
    save = trainer._save_checkpoint
    trainer._save_checkpoint = lambda *args, **kwargs: (saved.append(trainer.state.global_step), save(*args, **kwargs))
    with pytest.raises(RunCannotGoOn, match="ended after step 1"):
        trainer.train()
    assert saved == [1]


def test_nothing_is_saved_before_the_first_step(make_served, serve, tmp_path):
    server = serve()
    trainer = make_served(server.url, teacher_server_timeout=1.0, output_dir=str(tmp_path / "out"))
    server.stop()
    with pytest.raises(RunCannotGoOn, match=server.url) as error:
        trainer.train()
    assert "is saved" not in str(error.value) and not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_server_that_refuses_a_request_ends_the_run_at_once(make_served, serve):
    server = serve()
    trainer = make_served(server.url, teacher_server_timeout=600.0)
    server.misbehave = lambda path, body, answer: (404, {"error": {"message": "The model `teacher` does not exist."}})
    with pytest.raises(RunCannotGoOn, match=rf"{server.url} refuses /v1/completions with status 404.*does not exist"):
        trainer.train()


def test_a_server_that_hangs_ends_the_run(make_served, serve):
    server, end = serve(), threading.Event()
    trainer = make_served(server.url, teacher_server_timeout=1.0)
    server.misbehave = lambda path, body, answer: (end.wait(20), answer)[1]
    with pytest.raises(RunCannotGoOn, match="has not answered for 1 seconds.*its answer has not come to an end"):
        trainer.train()
    end.set()


def shift(path, body, answer):
    for choice in answer[1]["choices"]:
        choice["prompt_logprobs"] = [None, *choice["prompt_logprobs"][:-1]]
    return answer


def read_another(path, body, answer):
    for choice in answer[1]["choices"]:
        choice["prompt_token_ids"] = [*choice["prompt_token_ids"][:-1], 1]
    return answer


@pytest.mark.parametrize("misbehave", [shift, read_another])
def test_a_server_that_reads_another_prompt_ends_the_run(make_served, serve, misbehave):
    server = serve()
    trainer = make_served(server.url)
    server.misbehave = misbehave
    with pytest.raises(RunCannotGoOn, match="reads something else than it was sent"):
        trainer.train()


def test_an_interrupt_ends_a_run_whose_server_hangs(make_served, serve):
    server, asked, end = serve(), threading.Event(), threading.Event()
    trainer = make_served(server.url)

    def hang(path, body, answer):
        asked.set()
        end.wait(20)
        return answer

    def interrupt():
        asked.wait(20)
        interrupted.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    server.misbehave, interrupted = hang, []
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert time.monotonic() - interrupted[0] < 5  # of a timeout of 20 seconds
    end.set()


def test_a_row_that_is_longer_than_the_server_takes_ends_the_run(make_served, serve):
    server = serve(max_model_len=16)
    trainer = make_served(server.url)
    with pytest.raises(RunCannotGoOn, match=r"have \d+ and \d tokens, but .* holds 16.*--max-model-len"):
        trainer.train()


# What is refused at the start


def test_nobody_at_the_url(make_served):
    with pytest.raises(ValueError, match=rf"{NOBODY} has not answered for 0.5 seconds.*connection attempts failed"):
        make_served(NOBODY, teacher_server_timeout=0.5)


def test_another_kind_of_server(make_served, serve):
    server = serve()
    server.misbehave = lambda path, body, answer: (200, b"<html>Welcome</html>")
    with pytest.raises(ValueError, match=rf"{server.url} answers /v1/models with no JSON, so it is no vLLM server"):
        make_served(server.url)
    server.misbehave = lambda path, body, answer: (200, {"hello": "world"})
    with pytest.raises(ValueError, match=rf"{server.url}.*does not answer as vLLM does: KeyError\('data'\)"):
        make_served(server.url)


def test_a_key(make_served, serve, monkeypatch):
    server = serve()
    server.misbehave = lambda path, body, answer: (401, {"error": "Unauthorized"})
    with pytest.raises(ValueError, match="status 401.*`VLLM_API_KEY`"):
        make_served(server.url)
    server.misbehave = lambda path, body, answer: answer
    server.headers.clear()
    monkeypatch.setenv("VLLM_API_KEY", "secret\n")  # as `$(cat key)` does not, and a file of variables does
    make_served(server.url)
    assert {headers["Authorization"] for headers in server.headers} == {"Bearer secret"}


def test_other_tokens_are_named(make_served, serve, tmp_path):
    model, tokenizer = tiny_models.build_qwen3(seed=1)
    vocabulary = tokenizer.get_vocab()
    text = tokenizer.backend_tokenizer.to_str()
    one, two = vocabulary["seven"], vocabulary["eight"]
    text = text.replace(f'"seven":{one}', f'"SEVEN":{one}').replace(f'"eight":{two}', f'"EIGHT":{two}')
    tokenizer._tokenizer = tokenizer.backend_tokenizer.from_str(text)
    server = serve(tiny_models.save(model, tokenizer, tmp_path / "other"))
    with pytest.raises(ValueError, match=f"id {one} is 'seven' to the student and 'SEVEN' to the vLLM server at"):
        make_served(server.url)
    # And where the tokenizer is given, by that.
    with pytest.raises(ValueError, match=f"disagree on 2 of .*id {one} is 'seven' to the student and 'SEVEN' to the"):
        make_served(server.url, teacher_model_name_or_path=str(tmp_path / "other"))


def test_a_server_that_says_nothing_of_its_tokens(make_served, serve, checkpoints):
    """As behind a proxy that lets `/v1` through."""
    server = serve()
    server.misbehave = lambda path, body, answer: (404, {"detail": "Not Found"}) if path == "/detokenize" else answer
    with pytest.raises(ValueError, match="refuses /detokenize with status 404.*Pass the teacher's tokenizer"):
        make_served(server.url)
    make_served(server.url, teacher_model_name_or_path=checkpoints["qwen3-teacher"])


def test_a_teacher_that_has_no_log_probs_at_all(make_served, serve):
    server = serve()
    server.misbehave = lambda path, body, answer: unknown(answer, -9999.0, every=1)
    with pytest.raises(ValueError, match=f"{server.url} has no log-probs for tokens as common"):
        make_served(server.url)


def test_a_student_that_reads_images_needs_a_server_that_does(make_trainer, serve):
    server = serve()  # of a model of text, without the endpoint
    with pytest.raises(ValueError, match="refuses /inference/v1/generate with status 404.*`--enable-scale-out`"):
        make_trainer("internvl", teacher_server_url=server.url)


def test_a_tokenizer_that_is_given_decides(make_served, serve, checkpoints):
    server = serve()
    server.misbehave = lambda path, body, answer: (200, {"prompt": "?"}) if path == "/detokenize" else answer
    with pytest.raises(ValueError, match="pass the teacher's tokenizer as `teacher_processing_class`"):
        make_served(server.url)
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["qwen3-teacher"])
    make_served(server.url, trainer_options={"teacher_processing_class": tokenizer})
    make_served(server.url, teacher_model_name_or_path=checkpoints["qwen3-teacher"])


def test_servers_of_different_models(make_served, serve, checkpoints):
    server, other = serve(), serve(checkpoints["qwen3-student"])
    other.model.lm_head.weight.data.mul_(5)
    with pytest.raises(ValueError, match=rf"different models: for the same tokens, {other.url} gives log-probs"):
        make_served(server.url, other.url)
    other.misbehave = lambda path, body, answer: (200, {"data": [{"id": "another"}]})
    with pytest.raises(ValueError, match=rf"{server.url} runs 'teacher' and {other.url} runs 'another'"):
        make_served(server.url, other.url)


def test_servers_that_come_to_differ_end_the_run(make_served, serve, tmp_path):
    """One that is restarted with another model, or loses its weights: found by a row of each batch that both are asked."""
    servers = [serve() for _ in range(3)]
    trainer = make_served(*(server.url for server in servers), max_steps=8)
    trainer.teacher.request_tokens = 1  # a request for each row

    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                servers[1].model.lm_head.weight.data.mul_(5)

    trainer.add_callback(Change())
    with pytest.raises(
        RunCannotGoOn, match="different models: for the same tokens, .* on average.*ended after step [3-5]"
    ):
        trainer.train()


@pytest.mark.parametrize("options", [{}, {"estimator": "exact", "teacher_top_k": 4}])
def test_a_server_that_has_lost_its_weights_ends_the_run_with_a_checkpoint(make_served, serve, options):
    server = serve()
    trainer = make_served(server.url, max_steps=4, **options)

    class Wake(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                server.model.lm_head.weight.data.zero_()

    trainer.add_callback(Wake())
    message = (
        r"gives each of \d+ tokens the same log-prob, -3.497 nats \(that of one token among 33.*ended after step 2"
    )
    with pytest.raises(RunCannotGoOn, match=message):
        trainer.train()


def test_one_of_several_models_is_chosen_by_name(make_served, serve, checkpoints):
    server = serve()
    base = {"id": "base", "root": "somewhere/base", "max_model_len": 256}
    adapter = {"id": "teacher", "root": "somewhere/adapter", "parent": "base", "max_model_len": None}
    server.cards = [base, adapter]
    with pytest.raises(ValueError, match=r"serves several models: 'base', 'teacher' \(an adapter on 'base'\)\. Name"):
        make_served(server.url)
    with pytest.raises(
        ValueError, match="`teacher_server_model` is 'techer', but the vLLM server at .* serves 'base'"
    ):
        make_served(server.url, teacher_server_model="techer")
    server.requests.clear()
    teacher = make_served(server.url, teacher_server_model="teacher").teacher
    assert {body["model"] for _, body in server.requests if body is not None} == {"teacher"}
    assert teacher.model.max_model_len == 256  # that of its base
    # Two names of one model are no question.
    server.cards = [base, {**base, "id": "also"}]
    assert make_served(server.url).teacher.model.name == "base"
    server.cards = []
    with pytest.raises(ValueError, match="does not answer as vLLM does"):
        make_served(server.url)


def test_a_name_without_a_server(make_trainer, checkpoints):
    with pytest.raises(ValueError, match="`teacher_server_model` is 'teacher', but `teacher_server_url` is not set"):
        make_trainer(teacher_server_model="teacher", teacher_model=checkpoints["qwen3-teacher"])


@pytest.fixture
def with_code(tmp_path) -> tuple[Path, Path]:
    """Folder of a model that comes with code, and the file that this writes when it runs."""
    folder, proof = tmp_path / "with_code", tmp_path / "ran"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}')
    (folder / "own.py").write_text(
        f"open({str(proof)!r}, 'w').close()\nfrom transformers import PretrainedConfig\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    return folder, proof


def test_what_a_server_says_of_itself_is_never_loaded(make_served, serve, with_code):
    folder, proof = with_code
    server = serve()
    server.cards = [{"id": str(folder), "root": str(folder), "max_model_len": 256}]
    make_served(server.url, trust_remote_code=True)
    assert not proof.exists()


def test_student_and_teacher_are_trusted_apart(make_trainer, serve, with_code):
    folder, proof = with_code
    for served in ({}, {"teacher_server_url": [serve().url]}):
        options = {"teacher_model_name_or_path": str(folder), **served}
        with pytest.raises(ValueError, match="contains custom code"):
            make_trainer(trust_remote_code=True, **options)
        assert not proof.exists()
    with pytest.raises(ValueError):  # for want of a tokenizer
        make_trainer(teacher_model_init_kwargs={"trust_remote_code": True}, **options)
    assert proof.exists()


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/", "http://0.0.0.0:8000"])
@pytest.mark.parametrize("kind", ["field", "object", "one of several"])
def test_the_sampling_server_is_not_the_teacher(make_trainer, url, kind):
    """The sampler's default place is `http://0.0.0.0:8000`."""
    options = {"use_vllm": True, "vllm_mode": "server"}
    if kind == "field":
        options["teacher_server_url"] = [NOBODY, url]
    else:
        options["teacher_model"] = ServerTeacher([NOBODY, url])
    if kind == "one of several":
        options["teacher_model"] = {"served": options["teacher_model"]}
    with pytest.raises(ValueError, match=f"has '{url.rstrip('/')}', where the student is sampled from"):
        make_trainer(**options)


def test_logits_in_place_of_log_probs(make_served, serve):
    server = serve()

    def add(path, body, answer):
        for choice in answer[1].get("choices", []):
            for position in (choice["prompt_logprobs"] or [None])[1:]:
                for entry in position.values():
                    entry["logprob"] += 4.0
        return answer

    server.misbehave = add
    with pytest.raises(ValueError, match="gives logits in place of log-probs.*--logprobs-mode raw_logprobs"):
        make_served(server.url)


def test_a_context_that_holds_no_completion(make_served, serve):
    with pytest.raises(ValueError, match="`max_completion_length` is 40, but .* holds 32 tokens.*--max-model-len"):
        make_served(serve(max_model_len=32).url, max_completion_length=40)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"teacher_server_url": ["localhost:8000"]}, r"'localhost:8000', which is no URL.*`http://host:8000`"),
        ({"teacher_server_url": "http://host:8000/v1"}, "Leave out the `/v1`"),
        ({"teacher_server_url": [NOBODY, NOBODY + "/"]}, "more than once"),
        ({"teacher_server_url": []}, "is an empty list"),
        ({"teacher_server_url": NOBODY, "teacher_offload": True}, "`teacher_offload` is set, but the teacher runs"),
        (
            {"teacher_server_url": NOBODY, "teacher_model_init_kwargs": {"dtype": "float32"}},
            "init_kwargs` is set, but",
        ),
        (
            {
                "teacher_server_url": NOBODY,
                "use_vllm": True,
                "vllm_mode": "server",
                "vllm_server_base_url": NOBODY + "/",
            },
            "where the student is sampled from.*Serve the teacher at another URL",
        ),
        ({"teacher_server_url": NOBODY, "teacher_server_timeout": 0.0}, "`teacher_server_timeout` is 0.0.*positive"),
        ({"teacher_server_url": NOBODY, "teacher_server_timeout": 1e4}, r"shorter than `ddp_timeout` \(1800\)"),
    ],
)
def test_mistakes_in_the_configuration(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(**options)


def test_two_teachers_are_one_too_many(make_trainer, checkpoints):
    with pytest.raises(ValueError, match="given twice.*`teacher_server_url` is 'http://localhost:9'"):
        make_trainer(teacher_server_url=NOBODY, teacher_model=LocalTeacher(checkpoints["qwen3-teacher"]))
