"""What is told of a model is read from its folder, and must make sense."""

import json
from pathlib import Path

import pytest

from gemma_mtp_mlx.checkpoint import read_config
from gemma_mtp_mlx.config import ModelConfig
from gemma_mtp_mlx.serve.card import Card
from tests.text_model import write_text_model


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"top_k": "many"}, "generation_config.json: top_k is 'many'; it must be a number"),
        ({"temperature": -1}, "temperature is -1"),
        ({"top_p": 7}, "top_p is 7"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    tmp_path: Path, settings: dict[str, object], says: str
) -> None:
    folder = write_text_model(tmp_path)
    config = ModelConfig.from_dict(read_config(folder))
    (folder / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=says):
        Card.of(folder, config, "")
    (folder / "generation_config.json").unlink()
    assert Card.of(folder, config, "").sampling == {}
