"""Whatever is written in a recipe, an override, a cluster or a sweep file: a value or one error.

Never a traceback, and never another value than was typed.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz import examples
from hypothesis import given
from hypothesis import strategies as st

from nlscale.cluster.machines import Cluster, load_cluster
from nlscale.config import recipe, trees
from nlscale.config.keys import keys_of
from nlscale.config.scalars import NULLS
from nlscale.errors import UserError
from nlscale.scaling.sweep.spec import read_sweep

KEYS = [key.replace(".N", ".0") for key in recipe.all_keys()]
ODD = [
    *(
        "007",
        "1_1",
        "12:30",
        "0x1f",
        "1e3",
        "1e999",
        ".inf",
        "-.nan",
        "-0",
        "+5",
        "1.",
        ".5",
        "0.0",
    ),
    *(
        "null",
        "~",
        "",
        "yes",
        "off",
        "True",
        "!!int 3",
        "!!python/object:os.system x",
        "<<",
        "=",
        "-",
    ),
    *("[1,2", "{a: b}", "[]", "{}", "'x", '"\\x00"', "a # b", "a: b", "&a [*a]", "*a", "|", ">-"),
    *(
        "${train.steps}",
        "${",
        "${oc.env:HOME}",
        "${a}${b}",
        "$HOME/x",
        "~root/x",
        "s3://b",
        "%YAML 2.0",
    ),
    *(
        "9" * 25,
        "1" + "0" * 400,
        "\u2028",
        "\udcff",
        "\x00",
        "\x1b[2J",
        "\ufeff",
        "١٢",
        "a\tb",
        "a\nb",
    ),
    *("16 steps", "8M tokens", "30 minutes", "0 steps", "1e9 tokens", "hope", "bf16", "[mixer]"),
]
VALUES = st.one_of(
    st.sampled_from(ODD),
    st.integers(-(10**21), 10**21).map(str),
    st.floats().map(repr),
    st.text(max_size=12),
    st.text(alphabet="0123456789_.:eE+-xob[]{},'\"#&*!|>%@` \n~$", max_size=12),
)


def value_or_error(read: Callable[[], Any]) -> Any:
    """What is read, or None where one line says why not."""
    try:
        return read()
    except UserError as error:
        assert str(error) and "Traceback" not in str(error)
        return None


def get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[int(part)] if part.isdigit() else getattr(config, part)
    return config


@examples(120)
@given(st.sampled_from(KEYS), VALUES)
def test_an_override_is_what_was_typed_or_refused(key: str, text: str) -> None:
    loaded = value_or_error(
        lambda: recipe.load(None, ["levels=[1]", "data.dir=x", f"{key}={text}"]).config
    )
    if loaded is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        written = Path(folder) / "config.yaml"
        recipe.write(loaded, written, imports=True)
        assert recipe.load(written).config == loaded
    found = get(loaded, key)
    if isinstance(found, str) or text in NULLS or trees.load(text) is None:
        return  # a text has its own test; a preset may stand for null
    if isinstance(found, bool):
        assert text.strip().strip("'\"").lower() in (
            *("true", "yes", "on", "1"),
            *("false", "no", "off", "0"),
        ) or text.startswith(("${", "!!"))
    elif isinstance(found, int | float) and re.fullmatch(r"[-+0-9.eE_]+", text):
        assert found == float(text)
        assert not re.match(r"[-+]?0[0-9_]", text)
    else:
        assert found is not None


LINES = st.sampled_from(
    [
        *[f"{key}: {{}}" for key in ("train", "model", "levels", "run", "data")],
        *["train:", "  steps: 3", "data: {dir: x}", "  - 1", "levels: [1, 4]", "- a", "...", "---"],
        *["run: {dir: 007}", "model: &m {layers: 2}", "train: *m", "<<: {train: {steps: 1}}"],
    ]
)


def files(keys: list[str]) -> st.SearchStrategy[str]:
    """Texts of files: keys with odd values, lines in any order, and any characters."""
    names = sorted({part for key in keys for part in key.split(".") if part != "N"})
    line = st.builds(
        lambda depth, name, value: f"{'  ' * depth}{name}: {value}",
        st.integers(0, 2),
        st.sampled_from(names),
        VALUES,
    )
    return st.one_of(
        st.lists(st.one_of(line, LINES), max_size=8).map("\n".join), st.text(max_size=40)
    )


def read_file(text: str, read: Callable[[Path], Any]) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "some.yaml"
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        return value_or_error(lambda: read(path))


@examples(250)
@given(files(recipe.all_keys()))
def test_a_recipe_is_read_or_refused(text: str) -> None:
    read_file(text, recipe.load)


@examples(250)
@given(files(keys_of(Cluster)), st.booleans())
def test_a_cluster_file_is_read_or_refused(text: str, whole: bool) -> None:
    if whole:  # so that it gets as far as what is odd
        text = (
            "name: c\nnodes: 2\ngpus_per_node: 8\ninter_node_gbit: 1\ngpu_memory_gib: 80\n" + text
        )
    read_file(text, load_cluster)


AXES = st.dictionaries(
    st.one_of(st.sampled_from(["size", "tokens", "run.seed", "model.mixer", "a"]), VALUES),
    st.recursive(
        VALUES.map(trees.Plain),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(
                    ["parameters", "per_parameter", "head_dim", "width_per_layer", "train.steps"]
                ),
                inner,
                max_size=3,
            ),
        ),
        max_leaves=5,
    ),
    max_size=3,
)


@examples(250)
@given(AXES, files(["recipe", "dir", "set", "axes", "workers", "build_data", "search", "compare"]))
def test_a_sweep_file_is_read_or_refused(axes: dict[str, Any], rest: str) -> None:
    text = f"recipe: quickstart\ndir: x\naxes: {trees.dump(axes)}\n"
    read_file(text, read_sweep)
    read_file(text + rest, read_sweep)
    read_file(rest, read_sweep)


def test_every_key_with_odd_values() -> None:
    for number, key in enumerate(KEYS):
        for text in ODD[number % 7 :: 7]:  # every value with some keys
            overrides = ["levels=[1]", "data.dir=x", f"{key}={text}"]
            value_or_error(lambda given=overrides: recipe.load(None, given))
