"""Pictures in whatever form the data have them, and what is made of them."""

import base64
import http.server
import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from PIL import Image

from gndpo_trl.grpo import pictures
from gndpo_trl.grpo.pictures import look_at, open_picture, pictures_of, with_open_pictures
from gndpo_trl.teachers.prompts import images_of


LEFT_HALF_BLACK = Image.fromarray(np.repeat(np.array([[0] * 4 + [255] * 4], dtype=np.uint8), 6, axis=0))


def as_file(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def assert_left_half_black(picture: Image.Image) -> None:
    assert picture.mode == "RGB" and picture.size == (8, 6)
    pixels = np.asarray(picture).astype(int)
    assert pixels[:, :4].max() < 8 and pixels[:, 4:].min() > 247


def test_every_form_gives_the_same_pixels(tmp_path):
    content, path = as_file(LEFT_HALF_BLACK), tmp_path / "half.png"
    path.write_bytes(content)
    array, text = np.asarray(LEFT_HALF_BLACK), base64.b64encode(content).decode()
    forms = [LEFT_HALF_BLACK, path, str(path), f"file://{path}", content, bytearray(content)]
    forms += [{"bytes": content, "path": "elsewhere.png"}, {"bytes": None, "path": str(path)}, {"path": str(path)}]
    forms += [f"data:image/png;base64,{text}", array, array[:, :, None], np.stack([array] * 3, axis=2)]
    forms += [np.stack([array] * 3), torch.as_tensor(np.stack([array] * 3)), base64.b64encode(as_noise()).decode()]
    for form in forms[:-1]:
        assert_left_half_black(open_picture(form))
    assert open_picture(forms[-1]).size == (30, 30)


def as_noise() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    return as_file(Image.fromarray(noise))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "La", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV"])
def test_every_mode_of_eight_bits_is_kept_as_it_looks(mode):
    between = {"La": "LA", "PA": "P", "RGBa": "RGBA"}.get(mode, mode)
    assert_left_half_black(open_picture(LEFT_HALF_BLACK.convert(between).convert(mode)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "La", "PA", "P"])
def test_transparent_parts_are_white(mode):
    image = Image.new("LA", (8, 6), (0, 0))  # black and transparent, as many drawings are stored
    image.paste((0, 255), (0, 0, 4, 6))
    if mode == "P":  # a palette with a transparent entry
        image = Image.fromarray(np.asarray(LEFT_HALF_BLACK) // 255).convert("P")
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.info["transparency"] = 1
    elif mode == "PA":
        image = image.convert("RGBA").convert("PA")
    else:
        image = image.convert(mode)
    assert_left_half_black(open_picture(image))


def test_pictures_are_turned_as_their_tag_says(tmp_path):
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6  # to be turned by 90 degrees clockwise
    turned = LEFT_HALF_BLACK.rotate(90, expand=True)
    content = as_file(turned, "JPEG", quality=100, exif=exif)
    assert_left_half_black(open_picture(content))
    assert_left_half_black(open_picture(Image.open(io.BytesIO(content))))
    assert_left_half_black(open_picture(open_picture(content)))  # once


@pytest.mark.parametrize(
    "picture, message",
    [
        (Image.fromarray(np.zeros((4, 4), dtype=np.uint16)), r"mode 'I;16' has more than the 8 bits"),
        (Image.new("I", (4, 4)), "mode 'I' has more than the 8 bits"),
        (Image.new("F", (4, 4)), "mode 'F' has more than the 8 bits"),
        (np.zeros((4, 4, 3)), "array of float64.*Scale it to 0-255"),
        (torch.zeros(3, 4, 4), "array of float32"),
        (np.zeros((4, 4, 3), dtype=np.int64), "array of int64"),
        (np.zeros((6, 6, 5), dtype=np.uint8), r"array of shape \(6, 6, 5\)"),
        (Image.new("RGB", (0, 4)), "it has 0x4 pixels"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "without a pixel"),
        (b"no picture", "does not open"),
        (as_noise()[:-900], "does not open"),
        ("nowhere/one.png", "no file 'nowhere/one.png'. Correct the path; a relative one starts at"),
        ("/dev/zero", "no file '/dev/zero'"),
        ("x!" * 5000, "neither a path nor base64"),
        ("data:image/svg+xml,<svg/>", "Give one of base64"),
        ("s3://bucket/one.png", "no file"),
        ({"bytes": None, "path": None}, "is no picture. Give"),
        (None, "is no picture"),
        (7, "is no picture"),
    ],
)
def test_what_is_no_picture_is_refused(picture, message):
    with pytest.raises(ValueError, match=message):
        open_picture(picture)


def test_a_picture_that_would_fill_the_memory_is_not_decoded(monkeypatch):
    content = as_file(Image.new("L", (300, 200)))
    for limit in (59_999, 20_000):  # Pillow warns at the one and raises at the other
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match="pixels"):
            look_at(content)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60_000)
    assert look_at(content).size == (300, 200)


@pytest.fixture
def site():
    """Serves a picture under /, one that never ends under /large, and one that comes drop by drop under /slow."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(404 if self.path == "/none" else 200)
            self.end_headers()
            try:
                if self.path == "/":
                    self.wfile.write(as_file(LEFT_HALF_BLACK))
                while self.path in ("/large", "/slow"):
                    self.wfile.write(b"0" * (2**16 if self.path == "/large" else 1))
                    time.sleep(0.05 if self.path == "/slow" else 0)
            except OSError:  # the other side has given up
                pass

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://localhost:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_urls_are_fetched_if_asked_for_and_within_limits(site, monkeypatch):
    with pytest.raises(ValueError, match="is a URL, and nothing is fetched unless `fetch_image_urls` is set"):
        open_picture(f"{site}/")
    assert_left_half_black(open_picture(f"{site}/", fetch=True))
    monkeypatch.setattr(pictures, "FETCH_BYTES", 2**20)
    monkeypatch.setattr(pictures, "FETCH_SECONDS", 1)
    start = time.monotonic()
    for page, message in (("large", "more than 1 MiB"), ("slow", "takes longer than 1 s"), ("none", "404")):
        with pytest.raises(ValueError, match=message):
            open_picture(f"{site}/{page}", fetch=True)
    assert time.monotonic() - start < 5


def test_pictures_of_a_row_in_the_order_of_its_prompt():
    def user(*parts):
        return [{"role": "user", "content": list(parts)}]

    text, gap = {"type": "text", "text": "?"}, {"type": "image"}
    assert pictures_of({"prompt": "?"}) is None
    assert pictures_of({"prompt": user(text), "images": []}) is None
    assert pictures_of({"prompt": user(text), "image": None}) is None
    assert pictures_of({"prompt": user(gap, text, gap), "images": ["a", "b"]}) == ["a", "b"]
    assert pictures_of({"prompt": [{"role": "user", "content": "?"}], "image": "a"}) == ["a"]
    forms = [{"image": "a"}, {"url": "b"}, {"path": "c"}, {"image_url": {"url": "e"}}, {"image_url": "f"}]
    parts = [{"type": "image_url" if "image_url" in form else "image", **form} for form in forms]
    assert pictures_of({"prompt": user(*parts, text)}) == ["a", "b", "c", "e", "f"]
    assert pictures_of({"prompt": user({"type": "image", "base64": "AA=="})}) == ["data:image;base64,AA=="]
    # Arrow gives all parts the same keys.
    filled = [{"type": "image", "text": None, "image": "a"}, {"type": "image", "text": None, "image": None}]
    filled += [{"type": "text", "text": "?", "image": None}]
    assert pictures_of({"prompt": user(*filled), "images": ["b"]}) == ["a", "b"]
    with pytest.raises(ValueError, match="does not match"):
        pictures_of({"prompt": user(gap, text), "images": ["a", "b"]})


def test_all_pictures_of_a_row_are_opened_and_each_once(tmp_path):
    path = str(tmp_path / "half.png")
    LEFT_HALF_BLACK.save(path)
    message = {"role": "user", "content": [{"type": "image", "path": path}, {"type": "text", "text": "?"}]}
    row = {"prompt": [message], "teacher_prompt": [message], "teacher_images": [path], "images": [path], "image": path}
    opened = {}
    row = with_open_pictures({**row, "answer": 3}, opened=opened)
    parts = [row[name][0]["content"][0] for name in ("prompt", "teacher_prompt")]
    found = [*row["images"], row["image"], *row["teacher_images"], *(part["image"] for part in parts)]
    assert_left_half_black(found[0])
    assert all(picture is found[0] for picture in found) and len(opened) == 1
    assert row["answer"] == 3 and message["content"][0] == {"type": "image", "path": path}
    assert with_open_pictures(row)["images"][0] is found[0]
    with pytest.raises(ValueError, match="a picture in `image`: there is no file"):
        with_open_pictures({"prompt": "?", "image": "none.png"})


def as_png_path(image: Image.Image, folder) -> str:
    path = str(folder / f"{len(list(folder.iterdir()))}.png")
    image.save(path)
    return path


@pytest.mark.parametrize("family", ["internvl", "qwen25vl"])
def test_student_and_teacher_get_the_same_pixels_from_every_form(make_trainer, family, tmp_path):
    """A drawing on a transparent ground: TRL alone would put it on black, and read it from columns of lists only."""
    drawing = Image.merge("LA", [Image.new("L", (24, 24)), Image.linear_gradient("L").resize((24, 24))])
    white = Image.new("RGB", (24, 24), "white")
    white.paste(0, mask=drawing.getchannel("A"))
    path, text = as_png_path(drawing, tmp_path), {"type": "text", "text": "what is the sum ?"}
    content, words = Path(path).read_bytes(), [{"role": "user", "content": "what is the sum ?"}]

    def in_message(**part):
        return {"prompt": [{"role": "user", "content": [{"type": "image", **part}, text]}]}

    forms = [{"prompt": words, "images": [white]}, {"prompt": words, "images": [drawing]}]
    forms += [{"prompt": words, "image": path}, {"prompt": words, "images": [{"bytes": content, "path": None}]}]
    forms += [
        in_message(image=drawing),
        in_message(image=path),
        in_message(url=path, text=None),
        in_message(path=path),
    ]
    forms += [in_message(base64=base64.b64encode(content).decode()), {**in_message(image=None), "images": [content]}]
    trainer = make_trainer(family)
    trainer.model.train()
    found = []
    for row in forms:
        rows = [{**row}, {**row}]
        pixels = trainer._generate_and_score_completions(rows)["pixel_values"]
        (of_teacher,) = images_of(rows[0])
        assert np.asarray(of_teacher).tolist() == np.asarray(white).tolist()
        found.append(pixels)
    for pixels in found:
        torch.testing.assert_close(pixels, found[0], rtol=0, atol=0)


def test_pictures_in_the_messages_of_the_teachers_prompt(make_trainer, image_dataset, tmp_path):
    own = [tiny_models.draw_image(index).convert("P") for index in (7, 8)]
    words = {"type": "text", "text": "what is two plus two ?"}
    parts = [{"type": "image", "path": as_png_path(image, tmp_path)} for image in own]
    rows = {
        "column": {"teacher_prompt": [{"role": "user", "content": words["text"]}], "teacher_images": own},
        "messages": {"teacher_prompt": [{"role": "user", "content": [*parts, words]}]},
        "both": {
            "teacher_prompt": [{"role": "user", "content": [parts[0], {"type": "image"}, words]}],
            "teacher_images": own[1:],
        },
    }
    trainer = make_trainer("qwen25vl")
    read = {}
    trainer.teacher.start = lambda question: read.update(question)
    trainer.model.train()
    expected = None
    for row in rows.values():
        batch = [{**image_dataset[0], **row} for _ in range(2)]
        trainer._generate_and_score_completions(batch)
        assert len(images_of(batch[0])) == 2
        expected = expected or (read["pixel_values"], read["prompt_ids"])
        torch.testing.assert_close((read["pixel_values"], read["prompt_ids"]), expected, rtol=0, atol=0)
