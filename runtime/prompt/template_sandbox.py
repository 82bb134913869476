"""A Jinja environment for templates that nobody has looked at: what transformers gives them, within
bounds of time and memory (template_budget.py), and nothing that reaches outside.

Jinja's sandbox keeps a template from the interpreter. What it leaves open is how much is computed:
operators, calls, filters, tests, output and passes through loops all pay here before they act.
Jinja lets most of these be intercepted; the others (slices, ``~``, comparisons, loops) get a filter
of ours put around them in the syntax tree before it is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from lvlm.runtime.prompt import literal_text, template_filters, template_functions
from lvlm.runtime.prompt.template_budget import budget

SOURCE = 200_000  # characters of a template, and
NODES = 20_000  # of its syntax tree: to compile more takes seconds; known ones have a few thousand

_STR = (
    "capitalize casefold center count endswith expandtabs find format format_map index isalnum "
    "isalpha isascii isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle "
    "isupper join ljust lower lstrip partition removeprefix removesuffix replace rfind rindex "
    "rjust rpartition rsplit rstrip split splitlines startswith strip swapcase title upper zfill"
)
METHODS: dict[type, frozenset[str]] = {
    str: frozenset(_STR.split()),
    dict: frozenset(("copy", "get", "items", "keys", "values")),
    list: frozenset(("copy", "count", "index")),
    tuple: frozenset(("count", "index", "grouper", "list")),  # the latter two of groupby
}


_FRAME = ("_loop_vars", "_block_vars")


class Sandbox(ImmutableSandboxedEnvironment):
    """Compile and render inside ``template_budget.spending``."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            finalize=_output,
        )
        self.filters: dict[str, Callable[..., Any]] = template_filters.filters(self.filters) | _OWN  # type: ignore[arg-type,assignment]
        self.tests: dict[str, Callable[..., Any]] = template_filters.tests(self.tests)  # type: ignore[arg-type,assignment]
        for name in ("lipsum", "dict", "namespace"):
            del self.globals[name]
        self.globals.update({"dict": _Dict(), "namespace": _Namespace})

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """The texts of a macro, a block or the whole, put together."""
        pieces = []
        for part in parts:
            budget().make(len(part))
            pieces.append(part)
        return "".join(pieces)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > SOURCE:
            raise TemplateSyntaxError(f"it is longer than {SOURCE} characters", 1)
        tree = super()._parse(source, name, filename)
        if _metered(tree)[1] > NODES:
            raise TemplateSyntaxError(f"it has more than {NODES} parts", 1)
        return tree

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        # Jinja's own gives a value that raises when it is used, but is printed as nothing
        raise SecurityError(f"access to {attribute!r} of {type(obj).__name__}")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if not super().is_safe_attribute(obj, attr, value):
            return False
        if isinstance(obj, int | float | bytes | range):
            return False
        allowed = [names for kind, names in METHODS.items() if isinstance(obj, kind)]
        return not allowed or any(attr in names for names in allowed)

    def getitem(self, obj: Any, argument: Any) -> Any:
        budget().weigh(argument)  # it is hashed
        if isinstance(argument, str) and not (isinstance(obj, dict) and argument in obj):
            argument = literal_text.shown(argument)
        return super().getitem(obj, argument)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        template_functions.pay_operator(operator, left, right)
        made = partial(super().call_binop, context, operator)
        if operator == "%" and isinstance(left, str) and literal_text.has_hidden([left, right]):
            return template_functions.checked(literal_text.percent(left, right, made))
        return template_functions.checked(made(left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        # Jinja's own, inside of loops and blocks
        frame = {name: kwargs.pop(name) for name in _FRAME if name in kwargs}
        args = tuple(template_functions.plain(args))
        owner = template_functions.pay_call(__obj, args, kwargs)
        if owner is not None and literal_text.has_hidden([owner, args, kwargs]):
            made = literal_text.called(owner, __obj.__name__, args, kwargs)
            return template_functions.checked(made)
        made = super().call(__context, __obj, *args, **kwargs, **frame)
        return template_functions.checked(made)

    def call_filter(self, name: str, *args: Any, **kwargs: Any) -> Any:
        if name in _OWN:  # map() calls filters by name
            raise SecurityError(f"the filter {name!r}")
        return super().call_filter(name, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        return template_functions.bounded_format(self, value)


class _Namespace(Namespace):
    """Jinja's, without names that begin with an underscore, as in transformers."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that it may have a "self"
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _check_name(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<namespace>"


def _check_name(name: object) -> None:
    if not isinstance(name, str) or name.startswith("_"):
        raise SecurityError(f"{name!r} as a name in a namespace")


class _Dict:
    """Makes mappings, as ``dict`` does, but is not the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Generation(jinja2.ext.Extension):
    """``{% generation %}`` marks text to train on; here its body is text like any other."""

    tags = {"generation"}  # noqa: RUF012 - the type is Jinja's

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


# What the syntax tree gets put in

_EACH, _STEP, _LOOKED, _TAKEN, _JOINED = "each()", "step()", "looked()", "taken()", "joined()"
_COMPARED = "compared()"


def _output(value: object) -> object:
    """Value that ``{{ }}`` prints."""
    return template_functions.printed(value)


def _each(value: Any, cost: int) -> Any:
    """Items that a loop goes through: every item is work, also one that the loop's ``if`` skips."""
    if hasattr(value, "__len__"):
        budget().work(1 + cost * len(value))
        return value
    return _counted(value, cost)


def _counted(values: Any, cost: int) -> Iterator[Any]:
    for value in values:
        budget().work(cost)
        yield value


def _step(cost: int) -> None:
    budget().work(cost)


def _looked(value: Any) -> Any:
    """Value that is hashed."""
    budget().weigh(value)
    return value


def _compared(value: Any) -> Any:
    budget().weigh(value)
    return literal_text.shown(value)


def _taken(value: Any) -> Any:
    """Value that a slice made."""
    return template_functions.checked(value)


def _joined(values: tuple[Any, ...]) -> str:
    return "".join([str(template_functions.printed(value)) for value in values])


def _at_run_time(function: Callable[..., Any]) -> Callable[..., Any]:
    """The filter as one that Jinja does not evaluate while it compiles."""

    @jinja2.pass_context
    def called(_: Context, *args: Any) -> Any:
        return function(*args)

    return called


_OWN: dict[str, Callable[..., Any]] = {
    _EACH: _at_run_time(_each),
    _STEP: _at_run_time(_step),
    _LOOKED: _at_run_time(_looked),
    _COMPARED: _at_run_time(_compared),
    _TAKEN: _at_run_time(_taken),
    _JOINED: _at_run_time(_joined),
}
_REFUSED = (
    nodes.Include,
    nodes.Import,
    nodes.FromImport,
    nodes.Extends,
    nodes.EvalContextModifier,
)


def _metered(node: nodes.Node) -> tuple[nodes.Node, int]:
    """The node with what counts put around all parts that Jinja computes by itself, and how many
    nodes there are."""
    if isinstance(node, _REFUSED):
        what = type(node).__name__.lower()
        raise TemplateSyntaxError(f"{what} has no use in a chat template", node.lineno)
    size, test = 1, 0
    for field in node.fields:
        value = getattr(node, field, None)
        if isinstance(value, nodes.Node):
            made, inside = _metered(value)
            setattr(node, field, made)
            size += inside
            test = inside if field == "test" else test
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, nodes.Node):
                    value[index], inside = _metered(item)
                    size += inside
    return _wrapped(node, size, test), size


def _wrapped(node: nodes.Node, size: int, test: int) -> nodes.Node:
    if isinstance(node, nodes.For):
        node.iter = _filter(node.iter, _EACH, 1 + test)
    if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock | nodes.Block):
        counts = _filter(nodes.Const(size), _STEP)
        node.body.insert(0, nodes.ExprStmt(counts, lineno=node.lineno))
    elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return _filter(node, _TAKEN)
    elif isinstance(node, nodes.Concat):
        return _filter(nodes.Tuple(node.nodes, "load"), _JOINED)
    elif isinstance(node, nodes.Compare):
        node.expr = _looked_at(node.expr, _COMPARED)
        for operand in node.ops:
            operand.expr = _looked_at(operand.expr, _COMPARED)
    elif isinstance(node, nodes.Pair):
        node.key = _looked_at(node.key, _LOOKED)
    return node


def _looked_at(node: nodes.Expr, how: str) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _filter(node, how)


def _filter(node: nodes.Node, name: str, *args: object) -> nodes.Filter:
    assert isinstance(node, nodes.Expr)
    return nodes.Filter(node, name, [nodes.Const(arg) for arg in args], [], None, None)
