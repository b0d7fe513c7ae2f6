"""The one file of Python that an export to Hugging Face carries, put together from our own modules.

`nlscale.checkpoint.export.modeling`, the plain-torch classes of the model's mixers and what they
import of nlscale become one module that imports torch and transformers alone. The same sources
give the same file, byte for byte.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from nlscale.errors import UserError
from nlscale.model.mixers.table import mixer

MODELING_FILE = "modeling_nlscale.py"
AUTO_MAP = {
    "AutoConfig": "modeling_nlscale.NlscaleConfig",
    "AutoModelForCausalLM": "modeling_nlscale.NlscaleForCausalLM",
}
"""In config.json: the class of that file that each of transformers' makes."""
_MODELING = "nlscale.checkpoint.export.modeling"
_TABLE = "nlscale.model.mixers.table"
"""The one module that is not copied: the file carries some mixers, and says so in its place."""
_HEADER = '''"""A model trained by nlscale {version}: all the code that transformers needs of it.

Put together by `nlscale checkpoint export --to huggingface` from
{modules};
mend it there, not here. It needs torch and transformers, and nlscale it does not need.
"""

from __future__ import annotations

{imports}'''
_CHOICE = '''
def plain_mixer(name: str) -> type[PlainMixer]:
    """The class of a mixer that this file carries."""
    return {{{classes}}}[name]
'''


def modeling_source(names: Iterable[str]) -> str:
    """The file for a model of the mixers of these names, which have classes in plain torch.

    Raises:
        UserError: one of the classes is made of a module that cannot be carried.
    """
    names = sorted(set(names))
    made: dict[str, tuple[str, str]] = {}  # module and class
    for name in names:
        plain_by = mixer(name).plain_by
        assert plain_by is not None, "nlscale.model.mixers.table.plain_mixer refuses it before"
        module, _, class_ = plain_by.partition(":")
        made[name] = module, class_
    parts: dict[str, _Part] = {}
    for first in (*dict.fromkeys(module for module, _ in made.values()), _MODELING):
        _collect(first, parts)
    imports = _written({line for part in parts.values() for line in part.imports})
    modules = ",\n".join(f"    {name}" for name in parts)
    head = _HEADER.format(version=version("nlscale"), modules=modules, imports=imports)
    last = parts.pop(_MODELING)
    bodies = [part.body for part in parts.values()]
    classes = ", ".join(f'"{name}": {class_}' for name, (_, class_) in made.items())
    bodies += [_CHOICE.format(classes=classes).strip("\n"), last.body]
    text = "\n\n\n".join([head, *bodies]) + "\n"
    _check_names(text, ", ".join(dict.fromkeys(module for module, _ in made.values())))
    return text


class _Part:
    """What a module adds: its statements, what it imports from elsewhere and from us."""

    def __init__(self, name: str, path: Path) -> None:
        text = path.read_text(encoding="utf-8")
        lines, tree = text.splitlines(), ast.parse(text)
        self.imports: set[tuple[str, str]] = set()  # module, and what of it; "": itself
        self.needs: list[str] = []
        dropped: set[int] = set()
        for number, node in enumerate(tree.body):
            is_docstring = number == 0 and ast.get_docstring(tree) is not None
            if isinstance(node, ast.Import | ast.ImportFrom):
                self._import(name, node)
            elif not is_docstring:
                continue
            assert node.end_lineno is not None
            dropped |= set(range(node.lineno - 1, node.end_lineno))
        kept = [line for number, line in enumerate(lines) if number not in dropped]
        self.body = "\n".join(kept).strip("\n")

    def _import(self, name: str, node: ast.Import | ast.ImportFrom) -> None:
        if isinstance(node, ast.Import):
            self.imports |= {(ast.unparse(alias), "") for alias in node.names}
            return
        module = node.module or ""
        if module == "__future__":
            return
        if node.level or _is_ours(name, module):
            if node.level or any(alias.asname for alias in node.names):
                raise UserError(
                    f"{name} imports {'.' * node.level}{module} in a way that a file cannot carry; "
                    f"write: from package.module import Name"
                )
            self.needs += [module] if module != _TABLE else []
        else:
            self.imports |= {(module, ast.unparse(alias)) for alias in node.names}


def _collect(name: str, parts: dict[str, _Part]) -> None:
    """Adds a module after those that it needs."""
    if name in parts:
        return
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(f"there is no source of {name}, which an export has to carry")
    part = _Part(name, Path(spec.origin))
    for needed in part.needs:
        if not needed.rpartition(".")[2].startswith(("plain", "configuration")):
            raise UserError(
                f"{name} imports {needed}, which an export cannot carry: a mixer in plain torch is "
                f"made of torch, nlscale.model.plain and modules of names that begin with plain"
            )
        _collect(needed, parts)
    parts[name] = part


def _is_ours(name: str, module: str) -> bool:
    """Of nlscale, or of the package that the importing module is of."""
    return module.partition(".")[0] in {"nlscale", name.partition(".")[0]}


def _written(imports: set[tuple[str, str]]) -> str:
    """Imports as a person would write them: Python's own first, one line a module."""
    lines: dict[tuple[bool, bool, str], list[str]] = {}
    for module, name in imports:
        foreign = module.partition(".")[0] not in sys.stdlib_module_names
        lines.setdefault((foreign, bool(name), module), []).append(name)
    text, before = "", False
    for (foreign, parts, module), names in sorted(lines.items()):
        text += "\n" if text and foreign and not before else ""
        inside = ", ".join(sorted(names, key=lambda name: (not name.isupper(), name.lower())))
        text += f"from {module} import {inside}\n" if parts else f"import {module}\n"
        before = foreign
    return text.rstrip()


def _check_names(text: str, modules: str) -> None:
    """Raises UserError: two of the modules call different things the same."""
    kinds = (ast.FunctionDef, ast.ClassDef)
    names = [node.name for node in ast.parse(text).body if isinstance(node, kinds)]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(
            f"{modules} and a module that is carried beside it both define "
            f"{min(twice)}; give one another name"
        )
