"""The servers that are compared, and the one folder that all of them load.

The folder is in the conditional-generation layout, the only one that mlx_vlm drafts with, which
mlx_lm and this project read too. Its end of sequence is the padding token, which is never
generated, so that every answer has the length asked for.
"""

import json
import shutil
from pathlib import Path

from bench.peers.contenders import Contender
from bench.peers.layout import write_conditional
from bench.serving.processes import Server, free_port

DEFAULT_RUNS = ("ours-auto", "ours-k0", "mlx_lm", "mlx_vlm", "mlx_vlm-k0")
PACKAGES = {"ours": "mlx-gemma-mtp", "mlx_lm": "mlx-lm", "mlx_vlm": "mlx-vlm"}
_QUEUE = "4096"  # more than ever wait: nobody is sent away


def contender(name: str) -> Contender:
    """Read a name as `bench.compare` does. Raises: ValueError if it has no server."""
    found = Contender.parse(name)
    if found.program not in PACKAGES:
        raise ValueError(f"{name}: {found.program} is measured by bench.compare, it has no server")
    return found


def start(contender: Contender, folder: Path, rows: int) -> Server:
    """Start a contender's server with room for that many rows."""
    port = free_port()
    common = ["--model", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    drafts = contender.drafts
    if contender.program == "ours":
        depth = "auto" if drafts is None else str(drafts)
        command = ["-m", "gemma_mtp_mlx", "serve", *common, "--max-batch", str(rows)]
        command += ["--max-queue", _QUEUE, "--num-draft-tokens", depth]
    elif contender.program == "mlx_lm":
        command = ["-m", "mlx_lm", "server", *common, "--decode-concurrency", str(rows)]
        command += ["--prompt-concurrency", str(rows)]
    else:
        command = ["-m", "mlx_vlm.server", *common, "--max-num-seqs", str(rows)]
        if drafts:
            drafter = ["--draft-model", str(folder / "drafter")]
            command += [*drafter, "--draft-block-size", str(drafts + 1)]
    return Server(command, port)


async def model_name(contender: Contender, server: Server, folder: Path) -> str:
    """Return what a request has to call the model; the peers take the path they were given."""
    return await server.served_name() if contender.program == "ours" else str(folder)


def write_endless(model: Path, folder: Path) -> None:
    """Write a pair whose texts never end by themselves into an existing folder.

    Raises: ValueError if the model has no drafter beside it or its tokenizer no padding token.
    """
    if not (model / "drafter").is_dir():
        raise ValueError(f"{model} has no drafter in it; give a pair as `convert` writes it")
    write_conditional(model, folder)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    if not settings.get("pad_token"):
        raise ValueError(f"{model}: its tokenizer has no padding token")
    added = json.loads((model / "tokenizer.json").read_text())["added_tokens"]
    never = next(token["id"] for token in added if token["content"] == settings["pad_token"])
    settings["eos_token"] = settings["pad_token"]
    config = json.loads((folder / "config.json").read_text())
    # mlx_lm takes the size of the vocabulary from outside text_config, and has a default for it.
    config |= {"eos_token_id": [never], "vocab_size": config["text_config"]["vocab_size"]}
    for name, content in (
        ("tokenizer_config.json", settings),
        ("config.json", config),
        ("generation_config.json", {"eos_token_id": [never]}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    for name in ("tokenizer.json", "chat_template.jinja"):
        if (model / name).is_file():
            shutil.copy(model / name, folder / name)
    (folder / "drafter").symlink_to((model / "drafter").resolve())
