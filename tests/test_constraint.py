"""A text that follows its masks obeys grammar and budget; masks follow from tokens alone."""

import json
import random
import re
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from mlx_lm.tokenizer_utils import TokenizerWrapper, load

from gemma_mtp_mlx import SamplingParams, hub
from gemma_mtp_mlx.constraint import (
    Constraint,
    Thinking,
    _Place,
    apply_masks,
    constraint_for,
    grammar_tokenizer,
)

V = 4100  # a little more than the tokenizer's
EOS = frozenset([1, 5])
START, END = (2000, 2001), (3000, 3000, 3001)
THINKING = Thinking(START, END)
FILLER = 1234

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b c"]}, "maxItems": 2},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}
REGEX = r"(ab|[x-z]{2,3})(-[0-9]{2}){0,2}[é/]?"
LARK = 'start: item ("," item){0,2}\nitem: /[0-9]{1,3}/ | "none"'
GBNF = 'root ::= "[" item (", " item)? "]"\nitem ::= [a-z] [0-9]+ | "\\"q/\\""'
KINDS = [
    SamplingParams(json_schema=SCHEMA),
    SamplingParams(regex=REGEX),
    SamplingParams(grammar=LARK),
    SamplingParams(grammar=GBNF),
]


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerWrapper:
    return load(hub.builtin())


@pytest.fixture(scope="module")
def grammars(tokenizer: TokenizerWrapper) -> LLTokenizer:
    return grammar_tokenizer(tokenizer, V, EOS)


def _made(
    grammars: LLTokenizer,
    params: SamplingParams,
    thinking: Thinking | None = None,
    prompt: Sequence[int] = (10, 11),
    tokens: Sequence[int] = (),
) -> Constraint:
    made = constraint_for(params, prompt, grammars, thinking)
    assert made is not None
    made.advance(tokens)
    return made


def _bits(row: np.ndarray) -> set[int]:
    bits = np.unpackbits(row.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def _allowed(constraint: Constraint, drafts: Sequence[int] = ()) -> set[int] | None:
    """What may follow the drafts, None for anything."""
    words = constraint.masks(drafts)
    if words is None or (words[-1] == 0xFFFFFFFF).all():
        return None
    assert words.shape == (len(drafts) + 1, -(-V // 32)) and words.dtype == np.uint32
    return _bits(words[-1])


def _matches(params: SamplingParams, text: str) -> bool:
    if params.regex is not None:
        return re.fullmatch(params.regex, text) is not None
    if params.grammar == LARK:
        return re.fullmatch(r"([0-9]{1,3}|none)(,([0-9]{1,3}|none)){0,2}", text) is not None
    if params.grammar is not None:
        item = r'([a-z][0-9]+|"q/")'
        return re.fullmatch(rf"\[{item}(, {item})?\]", text) is not None
    found = json.loads(text)
    return (
        list(found) == ["name", "count", "tags"]
        and len(found["name"]) <= 6
        and 0 <= found["count"] <= 99
        and set(found["tags"]) <= {"a", "b c"}
    )


@pytest.mark.parametrize("params", KINDS)
@pytest.mark.parametrize("seed", range(15))
def test_any_walk_through_the_masks_matches_the_grammar(
    grammars: LLTokenizer, tokenizer: TokenizerWrapper, params: SamplingParams, seed: int
) -> None:
    rng, constraint, tokens = random.Random(seed), _made(grammars, params), []
    while not EOS & set(tokens):
        allowed = _allowed(constraint)
        assert allowed is not None and constraint.active(1)
        tokens.append(rng.choice(sorted(allowed)))
        constraint.advance(tokens[-1:])
        assert len(tokens) < 300
    assert _matches(params, tokenizer.decode(tokens[:-1]))
    assert constraint.masks([7]) is None and not constraint.active(16)


def _draft(rng: random.Random, constraint: Constraint, tokens: list[int], length: int) -> list[int]:
    """Draft mostly what is allowed, sometimes an EOS or anything."""
    drafts: list[int] = []
    for _ in range(length):
        allowed = _allowed(constraint, drafts)
        any_token = rng.choice([1, 5, *START, *END, rng.randrange(V)])
        if rng.random() < 0.15 or allowed is None:
            drafts.append(any_token)
        else:
            drafts.append(rng.choice(sorted(allowed)))
    return drafts


@pytest.mark.parametrize("thinking", [None, THINKING, Thinking((22, 23), (24,))])
@pytest.mark.parametrize("params", [*KINDS, SamplingParams(regex="[0-9]{3,4}"), SamplingParams()])
@pytest.mark.parametrize("seed", range(3))
def test_masks_of_drafts_are_those_of_a_text_that_has_them(
    grammars: LLTokenizer, params: SamplingParams, thinking: Thinking | None, seed: int
) -> None:
    budget = seed * 3 if thinking and seed < 2 else None
    rules = {"json_schema": params.json_schema, "regex": params.regex, "grammar": params.grammar}
    params = SamplingParams(**rules, thinking_budget=budget)
    if not any([*rules.values(), budget is not None]):
        return
    rng, tokens = random.Random(seed), []
    constraint = _made(grammars, params, thinking)
    while len(tokens) < 40 and not EOS & set(tokens):
        drafts = _draft(rng, constraint, tokens, 5)
        words = constraint.masks(drafts)
        good = 0  # drafts that were allowed
        for i in range(6):
            row = np.full(-(-V // 32), 0xFFFFFFFF, np.uint32) if words is None else words[i]
            if i > good or EOS & set(drafts[:i]):
                assert (row == 0xFFFFFFFF).all()
                continue
            alone = _made(grammars, params, thinking, tokens=tokens + drafts[:i]).masks([])
            np.testing.assert_array_equal(
                row, alone[0] if alone is not None else 0xFFFFFFFF + 0 * row
            )
            good += i < 5 and drafts[i] in _bits(row)
        taken = drafts[: rng.randint(0, good)] or _draft(random.Random(0), constraint, tokens, 0)
        taken = taken or [min(_allowed(constraint) or {FILLER}, key=lambda t: (t in EOS, t))]
        constraint.advance(taken)
        tokens += taken


def test_the_end_is_allowed_when_the_grammar_is_complete(
    grammars: LLTokenizer, tokenizer: TokenizerWrapper
) -> None:
    a, b = tokenizer.encode("a")[-1], tokenizer.encode("b")[-1]
    constraint = _made(grammars, SamplingParams(regex="ab?"))
    assert EOS.isdisjoint(_allowed(constraint) or EOS)
    assert _allowed(constraint, [a]) == {b, *EOS}
    assert _allowed(constraint, [a, b]) == EOS
    for eos in EOS:
        assert _allowed(constraint, [a, eos]) is None
        assert _allowed(constraint, [a, b, eos, eos, a]) is None
        assert _allowed(constraint, [eos]) is None
    assert _allowed(constraint, [b, a]) is None
    assert _allowed(constraint, [a]) == {b, *EOS}
    assert max(_allowed(_made(grammars, SamplingParams(regex="(?s:.)*"))) or {V}) < 4096


def test_a_text_that_broke_the_rules_is_an_error(grammars: LLTokenizer) -> None:
    for tokens in ([FILLER], [1]):
        constraint = _made(grammars, SamplingParams(regex="[0-9]+"), tokens=tokens)
        assert constraint.active(1)
        for _ in range(2):
            with pytest.raises(ValueError, match=f"^token {tokens[0]} is not what had to follow$"):
                constraint.masks([])
    forced = _made(grammars, SamplingParams(thinking_budget=0), THINKING, tokens=[*START, 1])
    with pytest.raises(ValueError, match=r"^token 1 is"):
        forced.masks([])


def test_a_parser_that_gives_up_is_an_error_where_it_does(
    grammars: LLTokenizer, tokenizer: TokenizerWrapper
) -> None:
    # What follows "xy" is more than these limits let a matcher keep in mind.
    many = range(300)
    lark = 'start: "x" ("z" "x" | "y" many)\nmany: ' + " | ".join(f"c{i}" for i in many)
    lark += "".join(f'\nc{i}: "{"q" * (i + 1)}" "w"' for i in many)
    limits = LLParserLimits(max_items_in_row=20)
    matcher = LLMatcher(grammars, LLMatcher.grammar_from_lark(lark), log_level=0, limits=limits)
    constraint = Constraint(grammars, matcher, None, None, _Place("text"))
    x, y, z, q = (tokenizer.encode(text)[-1] for text in "xyzq")
    before = [constraint.masks(drafts) for drafts in ([], [x], [x, z])]
    assert _allowed(constraint, [x, y]) is None
    assert _allowed(constraint, [x, y, q]) is None
    after = [constraint.masks(drafts) for drafts in ([], [x], [x, z])]
    for words, again in zip(before, after, strict=True):
        np.testing.assert_array_equal(words, again)
    constraint.advance([x])
    assert _allowed(constraint, [y]) is None
    np.testing.assert_array_equal(constraint.masks([z]), before[2][1:])
    constraint.advance([y])
    assert constraint.active(1)
    with pytest.raises(ValueError, match=r"^Parser Error: [^\n]* 301 items; max is 20[^\n]*$"):
        constraint.masks([q])


def test_a_text_that_cannot_be_completed_does_not_end_as_if_it_were(
    grammars: LLTokenizer, tokenizer: TokenizerWrapper
) -> None:
    x = tokenizer.encode("x")[-1]
    constraint = _made(grammars, SamplingParams(grammar='start: "x" NONE\nNONE: /[^\\s\\S]/'))
    assert EOS.isdisjoint(_allowed(constraint, [x]) or EOS)
    constraint.advance([x])
    with pytest.raises(ValueError, match=r"^no text can match it$"):
        constraint.masks([])


@pytest.mark.parametrize("budget", [0, 1, 5])
@pytest.mark.parametrize("end", [(3000,), END])
@pytest.mark.parametrize("in_prompt", [True, False])
def test_thinking_ends_when_its_budget_is_spent(
    grammars: LLTokenizer, budget: int, end: tuple[int, ...], in_prompt: bool
) -> None:
    thinking, params = Thinking(START, end), SamplingParams(thinking_budget=budget)
    prompt, tokens = ([10, *START], []) if in_prompt else ([10], [FILLER, *START])
    constraint = _made(grammars, params, thinking, prompt, tokens)
    thought = []
    for _ in range(budget + len(end)):
        allowed = _allowed(constraint)
        thought.append(FILLER if allowed is None else next(iter(allowed)))
        assert allowed is None or len(allowed) == 1
        constraint.advance(thought[-1:])
    assert thought == [FILLER] * budget + list(end)
    assert constraint.masks([FILLER] * 9) is None
    # A second thought has nothing left to spend.
    assert _allowed(constraint, START) == {end[0]}


@pytest.mark.parametrize(
    "budget, thought, allowed",
    [
        (2, [FILLER, 3000], {3000}),  # the end has begun, and goes on
        (2, [3000, 3000], {3001}),
        (3, [3000, 3000, 3000], {3001}),  # of three, the last two begin it
        (2, [3000, FILLER], {3000}),
        (3, [3000, 3000, FILLER], {3000}),
        (2, [FILLER], None),
        (2, END, None),
        (4, [3000, *END, FILLER, FILLER], None),
        (3, [*END, FILLER, *START], {3000}),
        (4, [*END, *START], None),
        (4, [*END, *START, 3000], {3000}),
    ],
)
def test_an_end_that_has_begun_is_continued(
    grammars: LLTokenizer, budget: int, thought: Sequence[int], allowed: set[int] | None
) -> None:
    params = SamplingParams(thinking_budget=budget)
    assert _allowed(_made(grammars, params, THINKING, tokens=[*START, *thought])) == allowed
    assert _allowed(_made(grammars, params, THINKING), [*START, *thought]) == allowed
    assert _allowed(_made(grammars, params, THINKING, [10, *START, *thought])) == allowed


@pytest.mark.parametrize(
    "prompt, forced",
    [
        ([*START], True),
        ([*START, FILLER], True),
        ([10, *START, 1, 10], False),  # an earlier turn was cut off in its thinking
        ([*START, *END], False),
        ([START[1], START[0]], False),
        ([START[0], *START], True),
    ],
)
def test_a_prompt_may_end_in_thinking(
    grammars: LLTokenizer, prompt: list[int], forced: bool
) -> None:
    budgeted = _made(grammars, SamplingParams(thinking_budget=0), THINKING, prompt)
    assert _allowed(budgeted) == ({END[0]} if forced else None)
    ruled = _made(grammars, SamplingParams(regex="[0-9]"), THINKING, prompt)
    assert (_allowed(ruled) is None) == forced
    if not forced:  # what the turn has thought already, it does not think again
        assert (START[0] in (_allowed(ruled) or ())) == (END[-1] not in prompt)


def test_the_grammar_waits_for_thinking_to_end(
    grammars: LLTokenizer, tokenizer: TokenizerWrapper
) -> None:
    one, two, three = (tokenizer.encode(text)[-1] for text in "123")
    digits = set(tokenizer.encode("0123456789")[-10:])
    constraint = _made(grammars, SamplingParams(regex="[0-9]{3}"), THINKING)
    assert _allowed(constraint) == digits | {START[0]}
    assert _allowed(constraint, START[:1]) == {START[1]}
    assert _allowed(constraint, START) is None
    assert _allowed(constraint, [*START, *END[:2]]) is None
    assert _allowed(constraint, [*START, *END]) == digits
    assert _allowed(constraint, [*START, *END, one, two, three]) == EOS
    assert _allowed(constraint, [one]) == digits
    # A start whose tokens the grammar knows too.
    constraint = _made(
        grammars,
        SamplingParams(regex="[0-9]{3}", thinking_budget=1),
        Thinking((one, two), (three,)),
    )
    assert _allowed(constraint) == digits
    assert _allowed(constraint, [one]) == digits
    assert _allowed(constraint, [one, three]) == digits
    assert _allowed(constraint, [one, three, one]) == EOS
    assert _allowed(constraint, [two, one, two]) == EOS
    assert _allowed(constraint, [one, two]) is None
    assert _allowed(constraint, [one, two, two]) == {three}
    assert _allowed(constraint, [one, two, three, one, two]) == digits
    assert _allowed(constraint, [one, two, three, one, two, three]) == EOS


@pytest.mark.parametrize("length", range(1, 17))
@pytest.mark.parametrize("regex", [None, "[0-9]{1,30}"])
@pytest.mark.parametrize("budget", [None, 0, 4])
def test_active_is_false_only_if_nothing_can_be_constrained(
    grammars: LLTokenizer, length: int, regex: str | None, budget: int | None
) -> None:
    if regex is None and budget is None:
        return
    params = SamplingParams(regex=regex, thinking_budget=budget)
    texts = [[], START[:1], START, [*START, *END[:2]], [*START, *END], [*START, *END[:1], FILLER]]
    for tokens in texts[: -1 if budget == 0 else None]:
        constraint = _made(grammars, params, THINKING, tokens=tokens)
        # Every shortest way to a constraint.
        ways = [w for i in range(3) for w in ([*START[i:], *[FILLER] * 16], [*END[i:], *START])]
        ways += [[FILLER] * 16]
        found = any(constraint.masks(way[: length - 1]) is not None for way in ways)
        assert constraint.active(length) == found


@pytest.mark.parametrize(
    "params, told",
    [
        (SamplingParams(regex="a(b"), "unclosed group"),
        (SamplingParams(regex="(?=a)a"), "look-ahead"),
        (SamplingParams(regex=r"[^\s\S]"), "no text can match"),
        (SamplingParams(grammar="start: foo"), '1(8): unknown name: "foo"'),
        (SamplingParams(grammar='start: "a\n'), "1(10): lexer error"),
        (SamplingParams(grammar=""), "start"),
        (SamplingParams(grammar="root ::= ("), "Expected ')' at line 1"),
        (SamplingParams(grammar='x ::= "a"\nroot ::= foo'), "'foo' not found"),
        (SamplingParams(json_schema={"type": "objekt"}), "objekt"),
        (SamplingParams(json_schema={"not": {"type": "string"}}), '["not"]'),
        (SamplingParams(json_schema={"enum": []}), "Unsatisfiable"),
        (SamplingParams(json_schema={"enum": {1, 2}}), "not JSON"),
    ],
)
def test_a_grammar_that_does_not_compile_is_refused_in_one_line(
    grammars: LLTokenizer, params: SamplingParams, told: str
) -> None:
    with pytest.raises(ValueError, match=r"^(regex|grammar|json_schema): [^\n]+; [^\n]+$") as error:
        constraint_for(params, [10], grammars, None)
    assert told in str(error.value)
    assert "state>" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("schema", [{}, {"type": "object"}])
def test_any_json_object_in_any_usual_layout(
    grammars: LLTokenizer, tokenizer: TokenizerWrapper, schema: dict[str, str]
) -> None:
    for text in ('{"a":1,"b":[]}', '{"a": 1, "b": []}', '{\n  "a": 1,\n\t"b": [\n\n]\n}'):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        constraint = _made(grammars, SamplingParams(json_schema=schema), tokens=tokens)
        assert _allowed(constraint) == EOS
    for text in ("[1", "7", "{" + 33 * " " + "}"):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        with pytest.raises(ValueError, match="had to follow"):
            _made(grammars, SamplingParams(json_schema=schema), tokens=tokens).masks([])
    lenient = {"not": {}, "type": "integer", "x-guidance": {"lenient": True}}
    assert _allowed(_made(grammars, SamplingParams(json_schema=lenient)))


def test_who_asks_for_nothing_is_not_constrained(grammars: LLTokenizer) -> None:
    assert constraint_for(SamplingParams(), [*START], grammars, THINKING) is None
    with pytest.raises(ValueError, match="thinking_budget is 3"):
        constraint_for(SamplingParams(thinking_budget=3), [10], grammars, None)


def test_thinking_is_what_the_tokenizer_says() -> None:
    inner = load(hub.builtin())._tokenizer
    assert Thinking.of(TokenizerWrapper(inner)) is None
    inner.add_special_tokens({"additional_special_tokens": ["<|channel>", "<channel|>"]})
    thought = inner.encode("thought", add_special_tokens=False)
    assert Thinking.of(TokenizerWrapper(inner)) == Thinking((4096, *thought), (4097,))


@pytest.mark.parametrize("size, eos", [(V, []), (V, [1, 5000]), (4000, [1])])
def test_a_tokenizer_of_another_model_is_refused(
    tokenizer: TokenizerWrapper, size: int, eos: list[int]
) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        grammar_tokenizer(tokenizer, size, frozenset(eos))


@pytest.mark.parametrize("size", [32, 33, 37, 64, 100])
def test_masks_keep_the_bits_of_what_they_allow(size: int) -> None:
    rng = np.random.default_rng(size)
    allowed = rng.random((2, 3, size)) < 0.3
    allowed[1, 1] = True
    packed = np.zeros((2, 3, -(-size // 32) * 32), bool)
    packed[..., :size] = allowed
    words = np.packbits(packed, axis=-1, bitorder="little").view("<u4")
    logits = mx.random.normal((2, 3, size), key=mx.random.key(size))
    logits[..., 5] = -0.0
    result = apply_masks(logits, mx.array(words))
    expected = np.where(allowed, np.array(logits), -np.inf).astype(np.float32)
    np.testing.assert_array_equal(np.array(result.view(mx.uint32)), expected.view(np.uint32))
