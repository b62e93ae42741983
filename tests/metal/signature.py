"""The signature of a kernel's text: its buffers and what else it asks for."""

import re
from typing import NamedTuple

_KERNEL = re.compile(r"\[\[kernel\]\] void (\w+)\(\n(.*?)\) \{\n", re.DOTALL)
_PARAMETER = re.compile(
    r"\s*(?P<type>.+?)(?P<mark>[*&]?) (?P<name>\w+) \[\[(?P<attribute>[^\]]+)\]\]"
)
_INSTANCE = re.compile(r"\ntemplate \[\[host_name\(.*?\)\]\] \[\[kernel\]\] decltype\(\w+(<.*>)\)")


class Parameter(NamedTuple):
    """One parameter of a kernel."""

    type: str  # as written, without a pointer's or reference's mark
    mark: str  # "*", "&" or ""
    name: str
    attribute: str  # "buffer(0)", "thread_position_in_grid", ...

    @property
    def is_buffer(self) -> bool:
        return self.attribute.startswith("buffer(")

    @property
    def element(self) -> str:
        """Its type without address space and const."""
        return self.type.split()[-1]


class Signature(NamedTuple):
    """What a kernel is called, and its parameters."""

    name: str
    arguments: str  # of its template: "<bfloat16_t, 3>", or nothing
    parameters: tuple[Parameter, ...]
    body_line: int  # of the text: where the body begins

    @property
    def buffers(self) -> tuple[Parameter, ...]:
        return tuple(p for p in self.parameters if p.is_buffer)


def parse_signature(text: str) -> Signature:
    """Read the signature of a text from MLX; only the kernel itself is marked as one."""
    found = _KERNEL.search(text)
    assert found is not None, "no kernel in the text"
    parameters = tuple(Parameter(**m.groupdict()) for m in _PARAMETER.finditer(found[2]))
    assert len(parameters) == found[2].count("[["), found[2]
    instance = _INSTANCE.search(text)
    return Signature(
        found[1],
        instance[1] if instance else "",
        parameters,
        text.count("\n", 0, found.end()) + 1,
    )
