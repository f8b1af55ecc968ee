"""The chains of the members, read from their source: the table of the map is made of them.

`python tests/chains.py` prints the table.
"""

import ast
import functools
import inspect
import math
import warnings

import jax.numpy as jnp
import optax

import adam_jax
from adam_jax import optimizers

# Options that show what the default chain of a member leaves out.
OPTIONS = {"sgd": {"momentum": 0.9}, "rmsprop": {"centered": True, "momentum": 0.9}}


def members():
    """The optimizers of the package, in their order."""
    return {
        name: thing
        for name, thing in vars(optimizers).items()
        if inspect.isfunction(thing)
        and thing.__module__ == optimizers.__name__
        and not name.startswith("_")
    }


def stages(name, **options):
    """The stages of a member as text, in their order, with its defaults and these options."""
    member = members()[name]
    function = ast.parse(inspect.getsource(member)).body[0]
    chain = function.body[-1].value
    assert ast.unparse(chain.func) == "optax.chain", f"{name} must return optax.chain(...)"
    names = [argument.arg for argument in function.args.args]
    defaults = function.args.defaults
    given = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
    given |= zip((a.arg for a in function.args.kwonlyargs), function.args.kw_defaults, strict=True)
    given |= {option: ast.Constant(value) for option, value in options.items()}
    chain = _Filled(given).visit(chain)
    return [ast.unparse(stage) for stage in chain.args]


class _Filled(ast.NodeTransformer):
    """Arguments by their values, and of what depends on options only what is chosen."""

    def __init__(self, given):
        self.given = given

    def visit_Name(self, node):
        return self.given.get(node.id, node)

    def visit_IfExp(self, node):
        return self.visit(node.body if _value(self.visit(node.test)) else node.orelse)

    def visit_BoolOp(self, node):
        return ast.Constant(_value(self.generic_visit(node)))

    def visit_Attribute(self, node):
        """The module of a stage is not part of its public name."""
        if isinstance(node.value, ast.Name) and node.value.id == "correction":
            return ast.Name(node.attr)
        return node

    def visit_Call(self, node):
        starred = [
            stage
            for argument in map(self.visit, node.args)
            for stage in (argument.value.elts if isinstance(argument, ast.Starred) else [argument])
        ]
        node = ast.Call(self.visit(node.func), starred, [*map(self.visit, node.keywords)])
        if isinstance(node.func, ast.Name) and node.func.id.startswith("_"):
            return ast.Constant(_value(node))  # a helper that chooses an argument
        called = getattr(adam_jax, ast.unparse(node.func), None)
        if called is None:
            return node
        defaults = inspect.signature(called).parameters
        node.keywords = [
            keyword
            for keyword in node.keywords
            if not _is_default(keyword.value, defaults[keyword.arg].default)
        ]
        if len(node.args) == 1 and _is_default(node.args[0], next(iter(defaults.values())).default):
            node.args = []
        return node


def _is_default(node, default):
    """What is switched off or on by default is left out of a row; numbers are not."""
    if not isinstance(node, ast.Constant) or node.value != default:
        return False
    return node.value is None or isinstance(node.value, bool) or node.value == 0


def _value(node):
    """What an expression of constants is."""
    with warnings.catch_warnings(action="ignore", category=SyntaxWarning):  # 1 is None
        return eval(ast.unparse(node), vars(optimizers))


def built(text, learning_rate):
    """The optimizer that a row of the table is, made of public names only."""
    names = {name: getattr(adam_jax, name) for name in adam_jax.__all__}
    names |= {"optax": optax, "functools": functools, "math": math, "jnp": jnp}
    chain = f"optax.chain({text.replace(' ▸ ', ', ')})"
    return eval(chain, {**names, "learning_rate": learning_rate, "__builtins__": {"float": float}})


def rows():
    """The call of each member, its options and its chain as text."""
    for name in members():
        options = [{}, OPTIONS[name]] if name in OPTIONS else [{}]
        for given in options:
            call = ", ".join(f"{option}={value}" for option, value in given.items())
            yield (
                name,
                given,
                f"{name}({call})" if call else name,
                " ▸ ".join(stages(name, **given)),
            )


def table():
    return "\n".join(
        [
            "| member | chain |",
            "|---|---|",
            *(f"| `{call}` | `{text}` |" for *_, call, text in rows()),
        ]
    )


if __name__ == "__main__":
    print(table())
