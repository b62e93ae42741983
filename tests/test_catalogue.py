"""The published names: each short name is a repository, each target has its own drafter."""

import pytest

from gemma_mtp_mlx.catalogue import (
    SIZES,
    drafter_repository,
    is_drafter,
    is_qat,
    repository,
    size_of,
)


@pytest.mark.parametrize(
    "short, name",
    [
        ("gemma4:26b", "mlx-community/gemma-4-26b-a4b-it-4bit"),
        ("gemma4:26b-a4b", "mlx-community/gemma-4-26b-a4b-it-4bit"),
        ("Gemma4:26B-A4B-8bit", "mlx-community/gemma-4-26b-a4b-it-8bit"),
        ("gemma4:e4b-8bit", "mlx-community/gemma-4-e4b-it-8bit"),
        ("GEMMA4:12B", "mlx-community/gemma-4-12B-it-4bit"),
        ("gemma4:31b-bf16", "google/gemma-4-31B-it"),
        ("gemma4:e4b-qat", "mlx-community/gemma-4-E4B-it-qat-4bit"),
        ("gemma4:26b-qat-8bit", "mlx-community/gemma-4-26B-A4B-it-qat-8bit"),
        ("gemma4:e2b-qat-bf16", "google/gemma-4-E2B-it-qat-q4_0-unquantized"),
    ],
)
def test_a_short_name_is_a_repository(short: str, name: str) -> None:
    assert repository(short) == name


@pytest.mark.parametrize(
    "short", ["gemma4:7b", "gemma4", "gemma4:", "gemma3:12b", "gemma4:e4b-3bit"]
)
def test_an_unknown_short_name_lists_the_known(short: str) -> None:
    with pytest.raises(ValueError, match=f"no short name {short}; .*gemma4:e2b.*gemma4:31b.*-qat"):
        repository(short)


PLAIN, QAT = "-it-assistant", "-it-qat-q4_0-unquantized-assistant"


@pytest.mark.parametrize(
    "name, drafter",
    [
        ("google/gemma-4-E2B-it", "E2B" + PLAIN),
        ("google/gemma-4-26B-A4B-it@main", "26B-A4B" + PLAIN),
        ("google/gemma-4-12B-it-qat-q4_0-unquantized", "12B" + QAT),
        ("google/gemma-4-31B-it-qat-q4_0-gguf", "31B" + QAT),
        ("google/gemma-4-E4B-it-qat-w4a16-ct", "E4B" + QAT),
        ("google/gemma-4-E4B-it-qat-mobile-ct", "E4B" + QAT),
        ("mlx-community/gemma-4-e4b-it-4bit", "E4B" + PLAIN),
        ("mlx-community/Gemma-4-E4B-IT-bf16", "E4B" + PLAIN),
        ("mlx-community/gemma-4-26b-a4b-it-mxfp8", "26B-A4B" + PLAIN),
        ("mlx-community/gemma-4-12B-it-OptiQ-4bit", "12B" + PLAIN),
        ("mlx-community/gemma-4-E2B-it-qat-nvfp4", "E2B" + QAT),
        ("unsloth/gemma-4-31B-it-qat-GGUF", "31B" + QAT),
        ("unsloth/gemma-4-26b-a4b-it-UD-MLX-4bit", "26B-A4B" + PLAIN),
        ("lmstudio-community/gemma-4-31B-it-MLX-4bit", "31B" + PLAIN),
        ("someone/gemma-4-31B-it-oQ4e-mtp", "31B" + PLAIN),
        ("google/gemma-4-E4B", None),
        ("mlx-community/gemma-4-26b-a4b-mxfp8", None),
        ("google/gemma-4-E2B-it-assistant", None),
        ("someone/gemma-4-E4B-it-abliterated-4bit", None),
        ("someone/gemma-4-E4B-italian", None),
        ("someone/my-gemma-4-E4B-it", None),
        ("google/gemma-3-12b-it", None),
        ("google/gemma-4-E4Bx-it", None),
        ("", None),
    ],
)
def test_each_copy_of_a_target_has_the_drafter_of_its_own_training(
    name: str, drafter: str | None
) -> None:
    assert drafter_repository(name) == (drafter and f"google/gemma-4-{drafter}")


def test_every_published_name_is_known() -> None:
    for size in SIZES:
        for name in [*size.published(), *size.copies().values()]:
            assert size_of(name) == size.name
            assert is_qat(name) == ("-qat" in name)
            assert is_drafter(name) == name.endswith("-assistant")
            assert (drafter_repository(name) is None) == is_drafter(name)
            if not is_drafter(name):
                assert drafter_repository(name) == size.drafter(qat=is_qat(name))
                assert drafter_repository(name) in size.published()
    assert "google/gemma-4-26B-A4B-it-qat-w4a16-ct" not in SIZES[3].published()


def test_what_is_no_gemma_4_has_no_size() -> None:
    assert size_of("google/gemma-4-E4B") == "E4B"
    assert size_of("meta/llama-3-8b") is None
    assert not is_qat("meta/llama-qat")
