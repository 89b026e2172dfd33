"""Renders chat templates in a process of its own, where a hostile one can do no more than be killed.

It is run as a script, so that nothing of llmkit is loaded: a line of JSON in, a line of JSON out. Templates come with
downloaded weights and are programs; they run in Jinja's immutable sandbox, on plain data, with little memory.
"""

import datetime
import json
import sys
from typing import Any, NoReturn


def main(max_bytes: int) -> None:
    """Answer requests until the input ends. ``max_bytes`` of memory at most, where the system can bound it."""
    _bound_memory(max_bytes)
    environment = _environment()
    compiled: dict[str, Any] = {}
    for line in sys.stdin:
        try:
            request = json.loads(line)
            _end_after(2 * request["seconds"])
            source = request["template"]
            if source not in compiled:
                compiled.clear()
                compiled[source] = environment.from_string(source)
            reply = {"text": _render(compiled[source], request["variables"], request["max_chars"])}
        except Exception as error:  # whatever a template raises is its own fault, and is told as such
            compiled.clear()
            reply = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        _end_after(0)
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


def _bound_memory(max_bytes: int) -> None:
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file can be written
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_after(seconds: float) -> None:
    """End this process then, should the one that asked be dead and unable to; 0 takes it back."""
    if sys.platform != "win32":
        import signal

        signal.setitimer(signal.ITIMER_REAL, seconds)


def _render(template: Any, variables: dict[str, Any], max_chars: int) -> str:
    parts, size = [], 0
    for part in template.generate(**variables):
        size += len(part)
        if size > max_chars:
            raise ValueError(f"more than {max_chars} characters come out of it")
        parts.append(part)
    return "".join(parts)


def _environment() -> Any:
    """Jinja as ``transformers`` sets it up for chat templates: its whitespace rules, loop controls and helpers."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks what the assistant says; it shows what stands inside."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Namespace(jinja2.utils.Namespace):
        """Without names that begin with an underscore, which lead into the interpreter."""

        def __init__(*given: Any, **names: Any) -> None:
            itself, *pairs = given
            jinja2.utils.Namespace.__init__(itself)
            for name, value in dict(*pairs, **names).items():
                itself[name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"the name {name!r} is not allowed")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.exceptions.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form),
        "dict": lambda *pairs, **names: dict(*pairs, **names),
        "namespace": Namespace,
    }
    return environment


def _as_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As ``json.dumps``: Jinja's own filter writes ``<`` and ``>`` for web pages."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main(int(sys.argv[1]))
