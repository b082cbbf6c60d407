"""scripts/predict.py as a user calls it, in processes of its own, against local stand-ins for TensorFlow Serving."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import aib_tf
from aib_tf import export
from tests.serving import servers
from tests.serving.conftest import CLASSES

ROOT = Path(__file__).resolve().parents[2]


def predict(server, *arguments, model="small"):
    command = [sys.executable, str(ROOT / "scripts" / "predict.py"), f"--server={server.address}", f"--model={model}"]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A PNG, a JPEG of another size, and a text file."""
    folder = tmp_path_factory.mktemp("pictures")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 48, 3)).astype(np.uint8)
    Image.fromarray(pixels[:32, :32]).save(folder / "one.png")
    Image.fromarray(pixels).save(folder / "two.jpg")
    (folder / "three.png").write_text("no picture")
    return [folder / name for name in ("one.png", "two.jpg", "three.png")]


def expected(models, signature, files, **inputs):
    """What the model answers without a server between."""
    model = models["small"][1]
    image_bytes = [file.read_bytes() for file in files]
    if signature == "serve_bytes":
        return model.predict(signature, {"image_bytes": image_bytes})
    return model.predict(signature, model.predict("preprocess", {"image_bytes": image_bytes}) | inputs)


def strict_json(text):
    """Reads JSON as strict readers do, which know no NaN."""

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    return json.loads(text, parse_constant=refuse)


def assert_rows_hold(rows, outputs):
    """Each row of the JSON has each output of its image."""
    for index, row in enumerate(rows):
        for name, value in outputs.items():
            if name == "class_name":
                assert row[name] == value[index].decode()
            else:
                np.testing.assert_allclose(row[name], value[index], rtol=1e-4, atol=1e-6, err_msg=name)


def test_a_table_tells_the_class_of_each_picture_and_files_at_fault_are_named_and_left_out(models, pictures):
    one, two, text = pictures
    missing = one.with_name("missing.png")
    with servers.GrpcStandIn(models) as server:
        result = predict(server, *[one] * 33, text, missing, one.parent, two)
    assert result.returncode == 0, result.stderr
    answer = expected(models, "serve_bytes", [one, two])
    heading, *rows = result.stdout.splitlines()
    assert heading.split() == ["file", "class", "probability"]
    for file, row in zip((one, two), (rows[0], rows[-1]), strict=True):
        index = (one, two).index(file)
        label = answer["label"][index]
        assert row.split() == [str(file), CLASSES[label], f"{answer['probabilities'][index, label]:.1%}"]
    assert rows[:33] == rows[:1] * 33
    assert len(rows) == 34
    assert f"{missing}: there is no such file; it is left out." in result.stderr
    assert f"{one.parent}: it cannot be read (Is a directory); it is left out." in result.stderr
    assert f"{text}: the model refused it (Unknown image file format" in result.stderr
    # The metadata, 32 pictures, the other 3, and these one by one.
    assert len(server.requests) == 6


def test_json_of_predict_mc_holds_all_outputs_as_numbers(models, pictures):
    with servers.RestStandIn(models) as server:
        result = predict(
            server, "--signature=predict_mc", "--samples=5", "--seed=3", "--format=json", "--version=1", *pictures[:2]
        )
    assert result.returncode == 0, result.stderr
    rows = strict_json(result.stdout)
    assert [row["file"] for row in rows] == [str(file) for file in pictures[:2]]
    assert_rows_hold(rows, expected(models, "predict_mc", pictures[:2], samples=5, seed=3))
    assert all(row["probability"] == max(row["probabilities"]) for row in rows)


def test_a_table_of_predict_mc_has_the_deviation_and_the_bits(models, pictures):
    with servers.GrpcStandIn(models) as server:
        result = predict(server, "--signature=predict_mc", pictures[0])
    assert result.returncode == 0, result.stderr
    answer = expected(models, "predict_mc", pictures[:1], samples=32, seed=0)
    label = answer["label"][0]
    mean, deviation = (answer[name][0, label] for name in ("probabilities", "probabilities_stddev"))
    bits = [f"{answer[name][0]:.3f}" for name in ("entropy_bits", "mutual_information_bits")]
    heading, row = result.stdout.splitlines()
    assert heading.split("  ")[-2:] == ["entropy (bits)", "mutual information (bits)"]
    assert row.split() == [str(pictures[0]), CLASSES[label], f"{mean:.1%}", "+-", f"{deviation:.1%}", *bits]


def test_an_overlay_draws_the_attention_and_leaves_the_json_alone(models, pictures, tmp_path):
    picture = tmp_path / "attention.png"
    with servers.RestStandIn(models) as server:
        result = predict(server, f"--overlay={picture}", "--format=json", *pictures)
    assert result.returncode == 0, result.stderr
    assert f"Drawn in {picture}." in result.stderr
    rows = strict_json(result.stdout)
    answer = expected(models, "explain", pictures[:2])
    assert {"rate_bits", "attention", "attention_image", "attention_quantized", "anchor_index"} <= answer.keys()
    assert_rows_hold(rows, answer)
    with Image.open(picture) as drawn:
        assert drawn.width > 300  # two columns
        assert len(drawn.convert("RGB").getcolors(2**24)) > 1000


def test_of_several_attentions_the_deepest_is_drawn_with_bytes_for_pixels_too(tmp_path, pictures):
    model = aib_tf.models.build("vgg_att2", (32, 32, 3), 10, width=0.0625)
    export.saved_model(model, tmp_path / "att2", image_dtype="uint8")
    with servers.GrpcStandIn(servers.load({"att2": tmp_path / "att2"})) as server:
        result = predict(server, f"--overlay={tmp_path / 'att2.png'}", pictures[0], model="att2")
    assert result.returncode == 0, result.stderr
    heading, row, drawn = result.stdout.splitlines()
    assert heading.split() == ["file", "class", "probability"]
    assert row.split()[0] == str(pictures[0])
    assert drawn == f"Drawn in {tmp_path / 'att2.png'}."
    assert (tmp_path / "att2.png").stat().st_size > 1000


def test_json_has_null_where_the_model_has_no_number(tmp_path):
    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string, "image_bytes")])
    def serve_bytes(image_bytes):
        count = tf.size(image_bytes)
        return {
            "class_name": tf.fill([count], 'a "class"'),
            "label": tf.zeros([count], tf.int64),
            "probabilities": tf.fill([count, 2], float("nan")),
        }

    module = tf.Module()
    module.serve_bytes = serve_bytes
    tf.saved_model.save(module, str(tmp_path / "nan" / "1"), signatures={"serve_bytes": serve_bytes})
    with servers.RestStandIn(servers.load({"nan": tmp_path / "nan"})) as server:
        result = predict(server, "--format=json", __file__, model="nan")
    assert result.returncode == 0, result.stderr
    assert strict_json(result.stdout) == [
        {"file": __file__, "class_name": 'a "class"', "probability": None, "label": 0, "probabilities": [None, None]}
    ]


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (
            ["--server=localhost:1", "--retries=0", "one.png"],
            1,
            "The gRPC server at localhost:1 is not available, tried once",
        ),
        (["--samples=5", "one.png"], 2, "--samples is for signatures that draw samples"),
        (["--overlay=a.png", "--signature=serve_bytes", "one.png"], 2, "--overlay needs the attention"),
        (["three.png", "missing.png"], 2, "None of the files is a picture that the model reads"),
    ],
)
def test_what_cannot_be_done_is_one_message(models, pictures, arguments, code, message):
    files = {file.name: str(file) for file in pictures}
    with servers.GrpcStandIn(models) as server:
        result = predict(server, *(files.get(argument, argument) for argument in arguments))
    assert result.returncode == code
    assert result.stderr.splitlines()[-1].startswith(f"predict.py: {message}")
    assert result.stdout == ""
