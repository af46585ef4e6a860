"""Chat templates of strangers: Jinja in its immutable sandbox, with a meter that bounds time and memory.

What it is: `ChatTemplate`, compiled once from a model's `chat_template`, with the helpers that transformers gives
templates (raise_exception, strftime_now, tojson, loop controls, the generation tag, trimmed blocks).
What it is not: knowledge of messages or tokens (`puna.text.chat`). Nothing but `chat` imports this module, and only
when a template is used, because importing jinja2 takes longer than rendering.
What is surprising: no thread, signal or tracer watches the template. Every way in which a template can make a value
or repeat itself (operators, filters, calls, literals, slices, loop rounds, output) is routed through a meter that
counts steps, characters and seconds and raises when one of them runs out; what could be huge in a single step is
computed before it is done. That is why filters, methods and globals are allowed by name: an unknown one may be a bomb.
"""

from __future__ import annotations

import functools
import json
import re
import threading
import time
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes, pass_context
from jinja2.environment import Template
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.utils import concat as join_output
from jinja2.visitor import NodeTransformer

from puna.errors import ChatFormatError

MAX_TEMPLATE_CHARS = 64 << 10
"""The longest template that is compiled; Llama 4's, the longest of the family, has 9 thousand characters."""

MAX_STEPS = 500_000
"""Operations, loop rounds and list elements of one rendering; a thousand messages through Llama 3.1's take 30,000."""

MAX_SECONDS = 2.0
"""Wall time of one rendering; an honest one takes a millisecond."""

_BASE_CHARS = 4 << 20
_CHARS_PER_INPUT_CHAR = 200  # a template touches each message's text a dozen times, and slices the list of them
_BASE_OUTPUT = 1 << 20
_OUTPUT_PER_INPUT_CHAR = 4
_MAX_INT_BITS = 4096
_MAX_WIDTH = 64

_FILTERS = re.findall(
    r"\w+",
    "abs capitalize count d default dictsort e escape first float format indent int items join last length list lower "
    "map max min reject rejectattr replace reverse safe select selectattr sort string title trim unique upper",
)

_METHODS = frozenset(
    re.findall(
        r"\w+",
        "capitalize casefold count endswith find get index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
        "isspace istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace rfind rindex "
        "rpartition rsplit rstrip split splitlines startswith strip swapcase title upper values",
    )
)

_CONTAINERS: tuple[type[Collection[Any]], ...] = (
    list,
    tuple,
    set,
    frozenset,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


class _LimitError(TemplateError):
    """A limit was reached."""


class _Meter:
    """What one rendering may still spend."""

    def __init__(self, input_chars: int) -> None:
        self.steps = MAX_STEPS
        self.chars = _BASE_CHARS + _CHARS_PER_INPUT_CHAR * input_chars
        self.output = _BASE_OUTPUT + _OUTPUT_PER_INPUT_CHAR * input_chars
        self.deadline = time.monotonic() + MAX_SECONDS

    def step(self, count: int = 1) -> None:
        self.steps -= count
        if self.steps < 0:
            raise _LimitError(f"it takes more than {MAX_STEPS} steps")
        if time.monotonic() > self.deadline:
            raise _LimitError(f"it takes more than {MAX_SECONDS:g} seconds")

    def reserve(self, chars: int) -> None:
        """Raises, before anything is built, where a value of so many characters would exceed what is left."""
        if chars > self.chars:
            raise _LimitError("it builds too much text")

    def weigh(self, value: Any) -> Any:
        """Charge a new value, with everything in it counted as often as printing would show it, and return it."""
        self.step()
        stack = [value]
        while stack:
            item = stack.pop()
            if isinstance(item, str):
                self.chars -= len(item)
                self.reserve(0)
            elif isinstance(item, int):
                if item.bit_length() > _MAX_INT_BITS:
                    raise _LimitError("it computes with enormous integers")
            elif isinstance(item, dict):
                self.step(2 * len(item))
                stack.extend(item.keys())
                stack.extend(item.values())
            elif isinstance(item, _CONTAINERS):
                self.step(len(item))
                stack.extend(item)
        return value


def _length(value: Any) -> int:
    """The length of a value as text."""
    return len(value if isinstance(value, str) else str(value))


def _check_replace(meter: _Meter, text: Any, old: Any, new: Any, *_: Any, **__: Any) -> None:
    text, old = str(text), str(old)
    meter.reserve(len(text) + (text.count(old) if old else len(text) + 1) * _length(new))


def _check_items(meter: _Meter, items: Any) -> None:
    """A text taken as the list of its characters."""
    if isinstance(items, str) and len(items) > meter.steps:
        raise _LimitError(f"it takes more than {MAX_STEPS} steps")


def _check_join(meter: _Meter, items: Any, separator: Any) -> None:
    _check_items(meter, items)
    # A generator has no length; its elements are charged one by one, and are fewer than the steps left.
    meter.reserve((len(items) if hasattr(items, "__len__") else meter.steps) * _length(separator))


def _check_split(meter: _Meter, text: str, separator: Any = None, *_: Any) -> None:
    parts = text.count(separator) if isinstance(separator, str) and separator else len(text) // 2
    if parts > meter.steps:
        raise _LimitError(f"it takes more than {MAX_STEPS} steps")


def _check_format(meter: _Meter, text: str, values: Iterable[Any]) -> None:
    # A name in parentheses may hold anything, so where there is one every long number counts as a width.
    if re.search(r"\d{3}|\*" if "%(" in text else r"%[^%a-zA-Z]*(\d{3}|\*)", text):
        raise _LimitError("it formats with a width of three digits or more")
    meter.reserve(text.count("%") * sum(map(_length, values)))


class _Namespace(Namespace):
    """Jinja's namespace() whose printed form does not spell out what it holds (a namespace may hold itself)."""

    def __repr__(self) -> str:
        return "<Namespace>"


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`: marks the assistant's text for training; its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Metered(NodeTransformer):
    """Wraps every expression whose work does not pass a hook of the environment, and every loop's items."""

    def _weighed(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, "puna_weigh", [], [], None, None, lineno=node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        return self._weighed(node)

    # These two make only a truth value, but looking through long texts takes time.
    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        return self._weighed(node)

    def visit_Test(self, node: nodes.Test) -> nodes.Node:  # noqa: N802
        return self._weighed(node)

    def visit_List(self, node: nodes.List) -> nodes.Node:  # noqa: N802
        return self._weighed(node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:  # noqa: N802
        return self._weighed(node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:  # noqa: N802
        return self._weighed(node) if node.ctx == "load" else self.generic_visit(node)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        return self._weighed(node) if isinstance(node.arg, nodes.Slice) else self.generic_visit(node)

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802
        self.generic_visit(node)
        node.iter = nodes.Filter(node.iter, "puna_rounds", [], [], None, None, lineno=node.lineno)
        return node


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, narrowed to what chat templates use, every operation on the meter."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
            # Constants are not folded: compiling must not compute what rendering would be charged for.
            optimized=False,
        )
        self.meter = _Meter(0)
        self.now = datetime.min
        self.filters = {name: self._metered(name, self.filters[name]) for name in _FILTERS}
        self.filters["tojson"] = self._to_json
        self.filters["puna_weigh"] = pass_context(lambda context, value: self.meter.weigh(value))
        self.filters["puna_rounds"] = pass_context(lambda context, items: self._rounds(items))
        self._helpers: dict[str, Any] = {
            "range": self.globals["range"],  # the sandbox's: at most 100,000 long
            "dict": dict,
            "namespace": _Namespace,
            "raise_exception": self._raise_exception,
            "strftime_now": self._strftime_now,
        }
        self.globals.clear()
        self.globals.update(self._helpers)

    def _rounds(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.meter.step()
            yield item

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        skip = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or environment comes first

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            given = args[skip:]
            if name == "replace":
                _check_replace(self.meter, *given, **{"new": "", **kwargs} if len(given) < 3 else kwargs)
            elif name == "join":
                _check_join(self.meter, given[0], given[1] if len(given) > 1 else kwargs.get("d", ""))
            elif name == "indent":
                width = given[1] if len(given) > 1 else kwargs.get("width", 4)
                if (width if isinstance(width, int) else _length(width)) > _MAX_WIDTH:
                    raise _LimitError(f"it indents by more than {_MAX_WIDTH}")
                self.meter.reserve(_length(given[0]) * (_MAX_WIDTH + 1))
            elif name == "format":
                _check_format(self.meter, str(given[0]), [*given[1:], *kwargs.values()])
            elif name in ("list", "sort", "unique"):
                _check_items(self.meter, given[0])
            result = function(*args, **kwargs)
            return self._rounds(result) if isinstance(result, Iterator) else self.meter.weigh(result)

        return metered

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    self.meter.reserve(len(value) * times)
                    if not isinstance(value, str):
                        self.meter.step(max(0, len(value) * times))
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > _MAX_INT_BITS:
                raise _LimitError("it computes with enormous integers")
        elif operator == "%" and isinstance(left, str):
            values = right.values() if isinstance(right, dict) else right if isinstance(right, tuple) else (right,)
            _check_format(self.meter, left, values)
        return self.meter.weigh(super().call_binop(context, operator, left, right))

    def is_safe_callable(self, obj: Any) -> bool:
        if isinstance(obj, Macro | LoopContext) or any(obj is helper for helper in self._helpers.values()):
            return True
        if isinstance(obj, types.BuiltinMethodType | types.MethodType):
            owner = obj.__self__
            if isinstance(owner, LoopContext):
                return obj.__name__ in ("cycle", "changed")
            return isinstance(owner, (str, dict, *_CONTAINERS)) and obj.__name__ in _METHODS
        return False

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        meter = __self.meter
        meter.step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str) and name == "replace" and len(args) >= 2:
            _check_replace(meter, owner, *args)
        elif isinstance(owner, str) and name == "join" and args:
            _check_join(meter, args[0], owner)
        elif isinstance(owner, str) and name in ("split", "rsplit", "splitlines"):
            _check_split(meter, owner, *args, *kwargs.values())
        return meter.weigh(super().call(__context, __obj, *args, **kwargs))

    def concat(self, parts: Iterable[str]) -> str:
        """The text of a macro or a block: charged before it is put together."""
        parts = list(parts)
        self.meter.step()
        total = sum(map(len, parts))
        self.meter.reserve(total)
        self.meter.chars -= total
        return join_output(parts)

    def _to_json(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> Any:
        """transformers' tojson: plain JSON, not Jinja's, which escapes it for HTML."""
        self.meter.weigh(value)
        if indent is not None and not (isinstance(indent, int) and 0 <= indent <= _MAX_WIDTH):
            raise _LimitError(f"it indents JSON by more than {_MAX_WIDTH}")
        if any(_length(separator) > _MAX_WIDTH for separator in separators or ()):
            raise _LimitError(f"it separates JSON by more than {_MAX_WIDTH} characters")
        return self.meter.weigh(
            json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        )

    @staticmethod
    def _raise_exception(message: object) -> None:
        raise TemplateError(str(message)[:1000])

    def _strftime_now(self, form: str) -> str:
        if len(form) > _MAX_WIDTH or re.search(r"%[^a-zA-Z%]*\d", form):  # glibc pads to a given width
            raise _LimitError("it asks for an odd form of the date")
        return self.now.strftime(form)


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, *, origin: str) -> None:
        """origin: where the template came from, for error messages.

        Raises ChatFormatError for a template that is too long or no Jinja.
        """
        self.origin = origin
        if len(source) > MAX_TEMPLATE_CHARS:
            raise self._error(f"it is longer than {MAX_TEMPLATE_CHARS} characters")
        self._lock = threading.Lock()
        self._environment = _Environment()
        try:
            tree = _Metered().visit(self._environment.parse(source))
            code = self._environment.compile(tree)
            self._template = Template.from_code(self._environment, code, self._environment.make_globals(None))
        except (Exception, RecursionError) as error:
            raise self._error(str(error)[:1000]) from error

    def render(self, variables: Mapping[str, Any], *, input_chars: int, now: datetime) -> str:
        """The rendered text. input_chars: the length of all message texts, to which limits are proportional; now: what
        strftime_now tells the template.

        Raises ChatFormatError where the template fails, refuses the messages, or exceeds a limit.
        """
        with self._lock:  # the meter and the date belong to one rendering
            self._environment.now = now
            meter = self._environment.meter = _Meter(input_chars)
            parts: list[str] = []
            try:
                # generate() streams, so output is stopped at its limit and not first put together.
                for part in self._template.generate(variables):
                    meter.step()
                    meter.output -= len(part)
                    if meter.output < 0:
                        raise _LimitError("its output is too long")
                    parts.append(part)
            except SecurityError as error:
                raise self._error(f"it does what a chat template may not: {str(error)[:500]}") from error
            except Exception as error:
                # A stranger's program may fail in any way; whatever it raises is the template's failure.
                raise self._error(f"{str(error)[:1000] or type(error).__name__}") from error
        return "".join(parts)

    def _error(self, what: str) -> ChatFormatError:
        return ChatFormatError(
            f"The chat template of {self.origin} cannot be used: {what.rstrip('.')}.",
            remedy="Check the roles and their order, replace the template, or run the model without one (--raw).",
        )
