"""`scripts/convert.py` as a user calls it."""

import keras
import numpy as np
import pytest

import aib_tf
from aib_tf import convert
from tests.scripts.test_scripts import script


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A model, and a checkpoint of it as from several GPUs."""
    model = aib_tf.models.build("vgg_aib_qt", (32, 32, 3), 4, width=0.0625, latent_dim=8, num_anchors=5, seed=0)
    path = tmp_path_factory.mktemp("released") / "best_acc.tar"
    convert.write_checkpoint(path, {f"module.{name}": array for name, array in convert.to_pytorch(model).items()})
    return model, path


def test_checkpoint_becomes_a_model_and_the_model_a_checkpoint(released, tmp_path):
    model, path = released
    converted, back = tmp_path / "model.keras", tmp_path / "back.pth"
    result = script("convert", f"--checkpoint={path}", "--model=vgg_aib_qt", f"--output={converted}")
    assert result.returncode == 0, result.stderr
    assert "vgg_aib_qt" in result.stdout
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype("float32")
    loaded = keras.saving.load_model(converted)
    np.testing.assert_allclose(loaded.explain(images)["logits"], model.explain(images)["logits"], rtol=1e-5, atol=1e-6)
    result = script("convert", f"--keras={converted}", f"--output={back}")
    assert result.returncode == 0, result.stderr
    for name, array in convert.read_checkpoint(back).items():
        np.testing.assert_array_equal(array, convert.to_pytorch(model)[name])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=vgg_aib"], 'The arrays look like those of aib_tf.models.build("vgg_aib_qt"'),
        (["--model=vgg_abi"], "Received: name='vgg_abi'"),
        (["--image_size=big"], "Received: image_size=['big']"),
        (["--image_size=16,16"], "needs 32x32 pixels"),
        (["--ema"], "has no moving average"),
        (["--keras=also.keras"], "Give one of --checkpoint and --keras"),
        (["--classes=7"], "of another shape (2): decode.2.weight (4, 8) instead of (7, 8)"),
    ],
)
def test_mistakes_end_in_a_message_and_no_file(released, tmp_path, arguments, message):
    _, path = released
    output = tmp_path / "model.keras"
    result = script("convert", f"--checkpoint={path}", f"--output={output}", *arguments)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not output.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cos\nsystem\n(S'echo hacked'\ntR.", "asks for os.system"),
        (b"\x80\x02cposix\nsystem\nX\x0b\x00\x00\x00echo hacked\x85R.", "asks for posix.system"),
        (b"no checkpoint at all", "This is not a checkpoint"),
    ],
)
def test_a_file_that_wants_to_run_code_or_is_none_is_refused(tmp_path, content, message):
    path = tmp_path / "evil.tar"
    path.write_bytes(content)
    result = script("convert", f"--checkpoint={path}", f"--output={tmp_path / 'model.keras'}")
    assert result.returncode != 0
    assert "evil.tar" in result.stderr
    assert message in result.stderr
    assert "hacked" not in result.stdout
    assert "Traceback" not in result.stderr
