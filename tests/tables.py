"""What the tests range over: members, storages and stages. A new one is entered here."""

import chains

from adam_jax import storage

MEMBERS = chains.members()

# --- Storages -------------------------------------------------------------------------------------

STORAGES = {
    "cast": storage.cast("bfloat16"),
    "stochastic": storage.stochastic(),
    "int8": storage.int8(),
    "int4": storage.int4(),
    "factored": storage.factored(),
    "block_mean": storage.block_mean(),
}


def keeping(*how):
    """The options that keep both moments in one storage, or m in one and v in another.

    A storage that is for one moment alone keeps that one. Each is given by its name, or as it is;
    other names are dtypes, and without any the moments are kept as they are computed.
    """
    how = [STORAGES.get(one, one) if isinstance(one, str) else one for one in how]
    moments = "mu", "nu"
    if len(how) == 1:
        only = getattr(how[0], "only", None)
        moments = moments if only is None else (only,)
        how *= len(moments)
    return {f"{moment}_storage": one for moment, one in zip(moments, how, strict=False)}
