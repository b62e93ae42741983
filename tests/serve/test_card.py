"""What is told of a model is read from its folder, and must make sense."""

import json
from pathlib import Path

import pytest

from gemma_mtp_mlx import hub
from gemma_mtp_mlx.checkpoint import read_config
from gemma_mtp_mlx.cli import main
from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.serve.card import Card
from tests.text_model import write_text_model


def card(folder: Path) -> Card:
    return Card.of(folder, ModelConfig.from_dict(read_config(folder)), "")


def test_packing_changes_bytes_and_no_count(tmp_path: Path) -> None:
    plain, packed = hub.builtin(), tmp_path / "packed"
    argv = ["convert", "--hf-path", str(plain), "--mlx-path", str(packed), "-q"]
    assert main([*argv, "--draft-hf-path", "none"]) == 0
    before, after = card(plain), card(packed)
    assert (before.packing, after.packing) == ("BF16", "int4")
    assert before.weights == after.weights == before.weights_bytes / 2
    assert after.weights_bytes < before.weights_bytes / 2
    assert before.info == after.info


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"top_k": "many"}, "generation_config.json: top_k is 'many'; it must be a number"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 7}, "top_p is 7"),
        ({"max_new_tokens": 0}, "max_new_tokens is '0'; it must be a whole number above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, settings: dict[str, object], says: str
) -> None:
    folder = write_text_model(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=says):
        card(folder)
    (folder / "generation_config.json").unlink()
    assert card(folder).sampling == {}
