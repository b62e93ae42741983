"""One contender's process: load once, then one turn per line of stdin, one JSON line back.

    python -m bench.peers.worker NAME --model DIR

What the contender itself prints goes to stderr.
"""

import argparse
import json
import os
import sys
import traceback
from importlib import import_module
from typing import Any, TextIO

from bench.peers.contenders import Clock, Contender

MODULES = {"ours": "ours", "mlx_lm": "lm", "mlx_vlm": "vlm", "transformers": "hf"}


def main() -> None:
    """Serve turns until stdin ends."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", type=Contender.parse)
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        module = import_module(f"bench.peers.{MODULES[args.name.program]}")
        adapter = module.Adapter(args.model, args.name.drafts)
    except ModuleNotFoundError as error:
        _answer(answers, {"skipped": f"{error.name} is not installed"})
        return
    except Exception as error:
        traceback.print_exc()
        _answer(answers, {"skipped": _one_line(error)})
        return
    _answer(answers, {"versions": adapter.versions})
    for line in sys.stdin:
        try:
            _answer(answers, _turn(adapter, json.loads(line)))
        except Exception as error:
            traceback.print_exc()
            _answer(answers, {"error": _one_line(error)})


def _turn(adapter: Any, asked: dict[str, Any]) -> dict[str, Any]:
    if "ways_for" in asked:
        return {"ways": adapter.ways(asked["ways_for"])}
    clock = Clock(len(asked["prompts"]))
    drafting = adapter.run(asked["prompts"], asked["max_tokens"], asked["way"], clock)
    if lacking := clock.missing(asked["max_tokens"]):
        raise ValueError(f"{lacking} of the tokens asked for did not come")
    return clock.record(drafting)


def _answer(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0]


if __name__ == "__main__":
    main()
