"""Check an exported pair against transformers and mlx-lm: python -m training.verify --pair DIR.

Raises on the first check that fails: missing or unexpected weights, logits of the training
modules that differ from transformers' by more than 1e-4, text that does not round trip,
assisted generation that does not give the target's own greedy text, or mlx-lm giving another
greedy text than transformers.
"""

import argparse
from pathlib import Path

import mlx.core as mx
import mlx_lm
import torch
from jinja2.exceptions import TemplateError
from mlx_lm.generate import generate_step
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Gemma4AssistantForCausalLM, Gemma4ForCausalLM

from training.drafter import DRAFTER_SIZE, Drafter, drafter_places, shared_of
from training.target import FULL, SLIDING, Size, Target

TOLERANCE = 1e-4
PROMPTS = (
    "import os\n\n\ndef read_text(path):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
)
CHAT = [{"role": "user", "content": "Write the function `is_empty`: Return True if it is empty."}]
ROUND_TRIP = "def f(x_1):\n\t# é 漢 😀\r\n\n        return x_1[0] == 12345  \n\n\n  "
LONG_TOKENS, GREEDY_TOKENS = 384, 64


class Pair:
    """The exported pair in transformers' classes, float32, with no weight missing or left over."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder / "target")
        self.target = load_checked(Gemma4ForCausalLM, folder / "target")
        self.drafter = load_checked(Gemma4AssistantForCausalLM, folder / "drafter")


def load_checked(cls: type, folder: Path) -> nn.Module:
    """Load a checkpoint in float32 and raise on missing or unexpected tensors."""
    model, info = cls.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {name: keys for name, keys in info.items() if keys}
    if wrong:
        raise ValueError(f"{folder}: {wrong}")
    return model.eval()


def load_lean(model: nn.Module, folder: Path) -> nn.Module:
    """Load an export into a training module in float32."""
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name: x.float() for name, x in tensors.items()})
    return model.eval()


def require_close(name: str, ours: Tensor, theirs: Tensor) -> None:
    """Raise unless two tensors agree within TOLERANCE; print the difference."""
    difference = (ours - theirs).abs().max().item()
    print(f"{name}: largest difference {difference:.2e}")
    if not difference <= TOLERANCE:
        raise ValueError(f"{name} differs by {difference}, bound {TOLERANCE}")


def check_tokenizer(pair: Pair) -> None:
    """Check the round trip, the template's text and that unknown roles raise."""
    tokenizer = pair.tokenizer
    ids = tokenizer(ROUND_TRIP).input_ids
    if tokenizer.decode(ids[1:]) != ROUND_TRIP or ids[0] != tokenizer.bos_token_id:
        raise ValueError(f"text does not round trip: {tokenizer.decode(ids)!r}")
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    expected = f"<bos><|turn>user\n{CHAT[0]['content']}<turn|>\n<|turn>model\n"
    if text != expected:
        raise ValueError(f"chat template gives {text!r}")
    try:
        tokenizer.apply_chat_template([{"role": "robot", "content": "x"}], tokenize=False)
    except TemplateError as error:
        print(f"unknown role: {error}")
    else:
        raise ValueError("an unknown role was accepted")


@torch.no_grad()
def check_logits(pair: Pair, folder: Path, ids: Tensor) -> None:
    """Check the training modules' logits against transformers', past the sliding window."""
    lean = load_lean(Target(Size()), folder / "target")
    memory = lean.memory(ids)
    out = pair.target(ids, output_hidden_states=True)
    require_close("target logits", lean.logits(memory.hidden), out.logits)
    require_close("target hidden", memory.hidden, out.hidden_states[-1])
    drafter = load_lean(Drafter(DRAFTER_SIZE, Size().hidden), folder / "drafter")
    for n in (1, 60, 128, 129, 130, 300, ids.shape[1] - 1):
        check_draft_steps(pair, lean, drafter, ids, n)


def check_draft_steps(pair: Pair, lean: Target, drafter: Drafter, ids: Tensor, n: int) -> None:
    """Check two draft steps of row n: all rows at once here, one row at a time in transformers."""
    memory = lean.memory(ids)
    embedded, hidden = (lean.embed(ids), nn.functional.pad(memory.hidden, (0, 0, 1, 0))[:, :-1])
    their_hidden = memory.hidden[:, n - 1 : n]
    kv = {
        kind: (memory.keys[kind][:, None, :n], memory.values[kind][:, None, :n])
        for kind in (FULL, SLIDING)
    }
    by_type, shared = drafter_places(drafter.size, ids.shape[1]), shared_of(memory)
    for k in range(2):
        state, hidden = drafter.step(embedded, hidden, shared, by_type)
        out = pair.drafter(
            inputs_embeds=torch.cat([embedded[:, n : n + 1], their_hidden], dim=-1),
            position_ids=torch.tensor([[n]]),
            shared_kv_states=kv,
        )
        their_hidden = out.last_hidden_state
        require_close(f"draft row {n} step {k + 1}", drafter.logits(state)[:, n], out.logits[:, 0])
        require_close(f"fed-back row {n} step {k + 1}", hidden[:, n], their_hidden[:, 0])


def check_generation(pair: Pair, folder: Path) -> None:
    """Check that plain, assisted and mlx-lm generation give the same greedy text; print it."""
    model, _ = mlx_lm.load(str(folder / "target"))
    model.set_dtype(mx.float32)
    chat = pair.tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    for prompt in (*PROMPTS, chat.removeprefix("<bos>")):
        ids = pair.tokenizer(prompt, return_tensors="pt").input_ids
        settings = {"max_new_tokens": GREEDY_TOKENS, "do_sample": False}
        plain = pair.target.generate(ids, **settings)[0].tolist()
        assisted = pair.target.generate(ids, assistant_model=pair.drafter, **settings)[0].tolist()
        if assisted != plain:
            raise ValueError(f"assisted generation differs on {prompt!r}")
        ours = mlx_greedy(model, ids[0].tolist(), len(plain) - ids.shape[1])
        if ours != plain[ids.shape[1] :]:
            raise ValueError(f"mlx-lm differs on {prompt!r}: {pair.tokenizer.decode(ours)!r}")
        print(f"--- {len(ours)} tokens, the same from all three\n{pair.tokenizer.decode(plain)}")


def mlx_greedy(model: object, prompt: list[int], count: int) -> list[int]:
    """Return mlx-lm's greedy continuation of a prompt."""
    steps = generate_step(mx.array(prompt), model, max_tokens=count)
    return [int(token) for token, _ in steps]


def main() -> None:
    """Parse the command line and run every check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pair", type=Path, required=True, help="holds target/ and drafter/")
    parser.add_argument(
        "--text", type=Path, default=Path(torch.__file__), help="text of 384 tokens"
    )
    args = parser.parse_args()
    pair = Pair(args.pair)
    check_tokenizer(pair)
    ids = pair.tokenizer(args.text.read_text(), return_tensors="pt").input_ids[:, :LONG_TOKENS]
    check_logits(pair, args.pair, ids)
    check_generation(pair, args.pair)
    sizes = {str(p.relative_to(args.pair)): p.stat().st_size for p in args.pair.rglob("*.*")}
    print(sizes, "total", sum(sizes.values()))


if __name__ == "__main__":
    main()
