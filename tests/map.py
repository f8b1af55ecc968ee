"""The map of the package, made from its source: modules, public names, and what each is.

`python tests/map.py > adam_jax/README.md` writes it down.
"""

import ast
import importlib
import inspect
from pathlib import Path

import chains

import adam_jax

PACKAGE = Path(adam_jax.__file__).parent

# In the order that the data flows, then what surrounds a chain, then what all of them use.
FLOW = {
    "The signal": ["average", "signal"],
    "The pipeline": ["rules", "moments", "correction", "direction", "updates", "rounding"],
    "Between two steps": ["storage"],
    "Whole optimizers": ["optimizers"],
    "Around a chain": ["fusion", "backward", "sharding", "lazy", "basis", "tasks", "from_optax"],
    "Used by all": ["_ownership", "_checks", "_numerics", "_jit", "_random"],
}
NAMESPACES = ("rules", "storage", "basis", "tasks", "backward")  # modules that are public names

HEAD = f"""\
# The map

`python tests/map.py` prints this file from the source, and `tests/test_docs.py` compares the two.
The [README](../README.md) says how to use the package, [CONTRIBUTING](../.github/CONTRIBUTING.md)
how to add to it, the [changelog](CHANGELOG.md) what has changed.

{"".join(f"    {line}" for line in inspect.getdoc(adam_jax).splitlines()[-1:])}

Every gradient leaf becomes one `Moments`, and a stage is a function of one leaf, mapped over the
tree. Public names are written as after `import adam_jax`, without the `adam_jax.`; files and names
that begin with an underscore are for the package itself. No file imports one that imports it.
"""


def first_line(thing):
    """What a docstring says first."""
    return inspect.getdoc(thing).splitlines()[0]


def public():
    """Every public name, as it is written after `adam_jax.`, and what it names.

    What has two names, such as `squared` and `rules.squared`, is listed by the shorter.
    """
    names = {name: getattr(adam_jax, name) for name in adam_jax.__all__}
    known = {id(thing) for thing in names.values()}
    for namespace in NAMESPACES:
        module = names.pop(namespace)
        for name in getattr(module, "__all__", vars(module)):
            thing = getattr(module, name)
            documented = inspect.isfunction(thing) or inspect.isclass(thing)
            here = getattr(thing, "__module__", "").startswith(module.__name__)
            if documented and here and not name.startswith("_") and id(thing) not in known:
                names[f"{namespace}.{name}"] = thing
    return names


def modules():
    """The name of every module without `adam_jax.`, and so "" for the package itself."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def full(module):
    return f"adam_jax.{module}" if module else "adam_jax"


def imports():
    """For every module the modules of the package that it imports, anywhere in it."""
    known = {full(module) for module in modules()}
    graph = {}
    for module in modules():
        source = Path(importlib.import_module(full(module)).__file__).read_text()
        found = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} has a relative import"
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                # A package whose modules are imported is not itself imported for its names.
                found |= inside & known if inside <= known else (inside & known) | {node.module}
        graph[full(module)] = found & known
    return graph


def _entry(module, depth=0):
    """A module, its public names, and the modules in it."""
    thing = importlib.import_module(full(module))
    path = Path(thing.__file__).relative_to(PACKAGE)
    is_package = path.name == "__init__.py"
    link = f"{path.parent}/" if is_package else f"{path}"
    text = f"{link if not depth else path.name}"
    lines = [f"{'  ' * depth}- [{text}]({link}): {first_line(thing)}"]
    for name, named in public().items():
        if getattr(named, "__module__", None) == thing.__name__:  # which a module has not
            lines.append(f"{'  ' * (depth + 1)}- `{name}`: {first_line(named)}")
    if is_package:
        inside = [other for other in modules() if other.rpartition(".")[0] == module]
        lines += [line for other in inside for line in _entry(other, depth + 1)]
    return lines


def text():
    """The whole file."""
    parts = [HEAD]
    for title, names in FLOW.items():
        parts.append(f"## {title}\n")
        parts.append("\n".join(line for name in names for line in _entry(name)) + "\n")
        if names == ["optimizers"]:
            parts.append(f"### The chains\n\nWith their defaults.\n\n{chains.table()}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(text(), end="")
