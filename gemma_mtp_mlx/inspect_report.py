"""What `inspect` prints: tables for people, in GB of 10^9 bytes, and one object for programs."""

from collections.abc import Iterator, Sequence
from typing import Any

from gemma_mtp_mlx import memory
from gemma_mtp_mlx.footprint import Footprint, Room, drafter_size_name, features, size_name
from gemma_mtp_mlx.inspection import (
    CACHE,
    DRAFTS,
    HUB,
    ROWS,
    DrafterFacts,
    Inspection,
    Source,
    TargetFacts,
)

_WHERE = {CACHE: ", in the hub's cache", HUB: ", on the hub and not downloaded"}
_LAYOUTS = {
    "text": "text model",
    "conditional": "multimodal (conditional generation), of which the text model is used",
    "unified": "multimodal (unified), of which the text model is used",
    "drafter": "drafter",
}
Row = Sequence[str]


def lines(found: Inspection) -> Iterator[str]:
    """Yield what was found."""
    if found.target is None:
        assert found.drafter is not None
        yield from _drafter(found.drafter)
        yield ""
        if found.drafter.converted_bytes is not None:
            yield f"Converted with -q (4 bits): {_size(found.drafter.converted_bytes)}"
        yield "A drafter runs with its target: inspect that one, with --draft-model naming this."
        return
    yield from _target(found.target)
    yield ""
    if found.drafter is None:
        yield f"Drafter: {found.note}"
    else:
        yield from _drafter(found.drafter)
    yield ""
    yield from _reads(found, found.target)
    yield ""
    yield from _fits(found)


def _target(target: TargetFacts) -> Iterator[str]:
    config = target.config
    size = size_name(config)
    yield f"{target.source.name}: Gemma 4 {size or 'of unknown size'}{_where(target.source)}"
    sliding = sum(layer.sliding for layer in config.layers)
    yield (
        f"  Structure: {len(config.layers)} layers, {len(config.layers) - sliding} full and "
        f"{sliding} sliding over {config.sliding_window} tokens; hidden size {config.hidden_size}; "
        f"vocabulary of {config.vocab_size}; contexts up to {config.max_position_embeddings}"
    )
    if words := features(config):
        yield f"  Also: {'; '.join(words)}"
    yield f"  Layout: {_layout(target.source)}"
    if target.skipped:
        left = (f"{count} of {reason}" for reason, count in target.skipped.items())
        yield f"  Tensors left out: {', '.join(left)}"
    yield ""
    yield from _weights("Weights", target.footprint)


def _drafter(drafter: DrafterFacts) -> Iterator[str]:
    config = drafter.config
    size = drafter_size_name(config)
    whose = f"Gemma 4 {size}" if size else f"a target of hidden size {config.backbone_hidden_size}"
    yield f"{drafter.source.name}: drafter for {whose}{_where(drafter.source)}"
    head = "the whole vocabulary"
    if config.use_ordered_embeddings:
        head = f"the best {config.centroid_intermediate_top_k} of {config.num_centroids} clusters"
    yield (
        f"  Structure: {len(config.text.layers)} layers; hidden size {config.text.hidden_size}; "
        f"draws from {head}"
    )
    yield f"  Layout: {_layout(drafter.source)}"
    yield ""
    yield from _weights("Weights of the drafter", drafter.footprint)


def _where(source: Source) -> str:
    return _WHERE.get(source.where, "")


def _layout(source: Source) -> str:
    words = {"published": "as published", "per_layer": "with per_layer_config"}
    return f"{_LAYOUTS[source.layout]}; config.json {words[source.config_layout]}"


def _weights(title: str, footprint: Footprint) -> Iterator[str]:
    rows = [
        (group.name, _size(group.nbytes), f"{group.bits:.2f}", ", ".join(group.formats))
        for group in footprint.groups
    ]
    formats = dict.fromkeys(group.formats[0] for group in footprint.groups)
    last = "" if len(formats) > 1 else next(iter(formats))
    rows.append(("all", _size(footprint.weights_bytes), f"{footprint.bits:.2f}", last))
    yield from _table((title, "size", "bits", "format"), rows)


def _reads(found: Inspection, target: TargetFacts) -> Iterator[str]:
    depths = [k for k in DRAFTS if k == 0 or found.drafter is not None]
    title = "Weights read a round"
    head = (title, *("no drafts" if k == 0 else f"{k} drafts" for k in depths))
    rows = [(_rows(rows), *(_size(found.round_bytes(rows, k)) for k in depths)) for rows in ROWS]
    yield from _table(head, rows)
    yield "  No drafts: plain decoding, one token a row. Else a verify pass and its draft steps."
    if target.config.num_experts:
        yield "  Experts are taken as chosen uniformly; real routing repeats itself and reads less."
    yield ""
    read = [found.kv_read_bytes(context) for context in found.contexts]
    head = ("Keys and values read a row", *(f"{c} tokens" for c in found.contexts))
    passes = [("by a verify pass", *(_size(verify) for verify, _ in read))]
    if found.drafter is not None:
        passes.append(("by a draft step", *(_size(draft) for _, draft in read)))
    yield from _table(head, passes)


def _fits(found: Inspection) -> Iterator[str]:
    room = found.room()
    head = ("Keys and values held", *(f"{context} tokens" for context in found.contexts))
    rows = [
        (_rows(n), *(_size(room.kv_bytes(n, context)) for context in found.contexts)) for n in ROWS
    ]
    yield from _table(head, rows)
    yield ""
    of = "(--memory)" if found.memory_given else "on this device"
    yield f"Memory: {_size(found.memory_bytes)} for MLX {of}"
    yield from _verdicts(found, room, "As it is")
    if not found.is_converted:
        yield from _verdicts(found, found.room(converted=True), "Converted with -q (4 bits)")


def _verdicts(found: Inspection, room: Room, what: str) -> Iterator[str]:
    parts = [f"{_size(room.weights_bytes)} of weights"]
    if room.drafter_bytes:
        parts.append(f"{_size(room.drafter_bytes)} of drafter")
    parts.append(f"{_size(memory.RESERVED)} for a pass")
    yield f"{what}: {', '.join(parts)}"
    context = found.contexts[0]
    for rows in ROWS:
        spare, longest = room.spare_bytes(rows, context), room.largest_context(rows)
        verdict = f"fits, with {_size(spare)} to spare"
        if spare < 0:
            verdict = f"does not fit, {_size(-spare)} too much,"
        most = f"at most {longest} tokens a row" if longest else "no context fits"
        if longest == room.longest:
            most = f"up to its {longest} tokens"
        yield f"  {_rows(rows):6}  {verdict} at {context} tokens a row; {most}"


def _table(head: Row, rows: Sequence[Row]) -> Iterator[str]:
    """Yield a table's lines, indented below its head: numbers to the right, words to the left."""
    indented = [head, *((f"  {row[0]}", *row[1:]) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*indented, strict=True)]
    for row in indented:
        cells = [
            cell.ljust(width) if i == 0 or head[i] == "format" else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count} rows"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def as_json(found: Inspection) -> dict[str, Any]:
    """Return everything that was found, for JSON: sizes in bytes, contexts in tokens."""
    shown: dict[str, Any] = {
        "memory_bytes": found.memory_bytes,
        "reserved_bytes": memory.RESERVED,
        "target": None,
        "drafter": None if found.drafter is None else _drafter_json(found.drafter),
    }
    target = found.target
    if target is None:
        return shown
    shown["target"] = {
        **_part_json(target),
        "size": size_name(target.config),
        "features": list(features(target.config)),
        "skipped_tensors": target.skipped,
    }
    shown["weights_read"] = [
        {"rows": rows, "drafts": k, "bytes": round(found.round_bytes(rows, k))}
        for rows in ROWS
        for k in DRAFTS
        if k == 0 or found.drafter is not None
    ]
    read = {context: found.kv_read_bytes(context) for context in found.contexts}
    shown["kv_read"] = [
        {"context": context, "verify_bytes": verify, "draft_step_bytes": draft}
        for context, (verify, draft) in read.items()
    ]
    shown["memory"] = _room_json(found, found.room())
    shown["memory_converted"] = (
        None if found.is_converted else _room_json(found, found.room(converted=True))
    )
    return shown


def _drafter_json(drafter: DrafterFacts) -> dict[str, Any]:
    return {**_part_json(drafter), "size": drafter_size_name(drafter.config)}


def _part_json(part: TargetFacts | DrafterFacts) -> dict[str, Any]:
    reads = part.footprint.reads
    return {
        "name": part.source.name,
        "where": part.source.where,
        "layout": part.source.layout,
        "config_layout": part.source.config_layout,
        "weights_bytes": part.footprint.weights_bytes,
        "bits_per_weight": part.footprint.bits,
        "converted_bytes": part.converted_bytes,
        "groups": [
            {
                "name": group.name,
                "formats": list(group.formats),
                "weights": group.weights,
                "bytes": group.nbytes,
                "bits_per_weight": group.bits,
            }
            for group in part.footprint.groups
        ],
        "reads": {
            "fixed_bytes": reads.fixed_bytes,
            "token_bytes": reads.token_bytes,
            "part_bytes": reads.part_bytes,
            "parts": reads.parts,
            "parts_per_token": reads.parts_per_token,
        },
    }


def _room_json(found: Inspection, room: Room) -> dict[str, Any]:
    return {
        "weights_bytes": room.weights_bytes,
        "drafter_bytes": room.drafter_bytes,
        "rows": [
            {
                "rows": rows,
                "largest_context": room.largest_context(rows),
                "contexts": [
                    {
                        "context": context,
                        "kv_bytes": room.kv_bytes(rows, context),
                        "needed_bytes": room.needed_bytes(rows, context),
                        "spare_bytes": room.spare_bytes(rows, context),
                        "fits": room.spare_bytes(rows, context) >= 0,
                    }
                    for context in found.contexts
                ],
            }
            for rows in ROWS
        ],
    }
