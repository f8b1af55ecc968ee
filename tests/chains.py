"""The stages of an optimizer, read from the optimizer itself: the README's table is made of them.

`python tests/chains.py` prints the table.
"""

import inspect

import adam_jax
from adam_jax import optimizers

# The members whose default chain leaves out what makes them: with the option that shows it.
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


def stages(update):
    """The names of the stages that an `update` function is chained of, as the data flows."""
    inside = inspect.getclosurevars(update).nonlocals
    if "update_fns" in inside:  # optax.chain
        return [name for part in inside["update_fns"] for name in stages(part)]
    if "tx" in inside:  # optax.with_extra_args_support around a transformation without them
        return stages(inside["tx"].update)
    if "stage" in inside:  # a stateless stage of adam_jax knows its name
        return [inside["stage"]]
    factory = update.__qualname__.split(".")[0]
    if factory == "scale_by_moments":
        return [f"scale_by_moments({_moments(inside)})"]
    return [factory if update.__module__.startswith("adam_jax") else f"optax.{factory}"]


def _moments(inside):
    """The arguments of scale_by_moments that tell one member from another."""
    rule = getattr(inside["rule"], "func", inside["rule"])
    arguments = []
    if inside["b1"] is None or inside["b2"] is None:
        arguments += ["None" if inside[b] is None else b for b in ("b1", "b2")]
    if rule is not adam_jax.squared:
        arguments.append(f"second_moment={rule.__name__}")
    return ", ".join(arguments)


def table():
    rows = ["| member | chain |", "|---|---|"]
    for name, factory in members().items():
        options = OPTIONS.get(name, {})
        call = f"{name}({', '.join(f'{k}={v}' for k, v in options.items())})" if options else name
        chain = " ▸ ".join(stages(factory(1e-3, **options).update)).replace("()", "")
        rows.append(f"| `{call}` | `{chain}` |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table())
