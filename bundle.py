# Copyright 2026 The MDE-Edit authors. Licensed under the Apache License, Version 2.0.
"""How the pipeline travels: as one self-contained file, made from its modules.

`make bundle` writes it for `examples/community`; `save_pretrained` puts it beside the weights, so that a saved model
brings the code that loads it.
"""

import ast
import json
import sys
from pathlib import Path
from typing import Any


def imported_modules(path: Path) -> dict[Path, ast.Module]:
    """The module at `path` and those beside it that it needs (`from .name import ...`), parsed, in order of need."""
    found: dict[Path, ast.Module] = {}

    def visit(module: Path) -> None:
        if module not in found:
            tree = ast.parse(module.read_text(encoding="utf-8"))
            for node in tree.body:
                if isinstance(node, ast.ImportFrom) and node.level:
                    visit(module.with_name(f"{node.module}.py"))
            found[module] = tree

    visit(path)
    return found


def self_contained_source(path: Path) -> str:
    """The module at `path` with the modules beside it that it imports, as one module.

    Bodies are copied as they stand, in the order in which they need each other; imports are merged. A module without
    relative imports, such as the result itself, comes back unchanged.

    Raises:
        ValueError: two modules define the same top-level name, which one file cannot hold.
    """
    trees = imported_modules(path)
    if len(trees) == 1:
        return path.read_text(encoding="utf-8")

    plain, members, bodies, owners = set(), {}, [], {}
    for module, tree in trees.items():
        lines = module.read_text(encoding="utf-8").splitlines()
        for node in tree.body:
            nodes = [node] if hasattr(node, "name") else getattr(node, "targets", [])
            for name in (getattr(n, "name", None) or getattr(n, "id", "") for n in nodes):
                if owners.setdefault(name, module) != module:
                    raise ValueError(f"{name!r} is defined in {owners[name].name} and in {module.name}: rename one.")
            if isinstance(node, ast.Import):
                plain.update(ast.unparse(node).removeprefix("import ").split(", "))
            elif isinstance(node, ast.ImportFrom) and not node.level:
                members.setdefault(node.module, set()).update(ast.unparse(alias) for alias in node.names)
            if isinstance(node, (ast.Import, ast.ImportFrom)) or node is tree.body[0]:
                lines[node.lineno - 1 : node.end_lineno] = [None] * (node.end_lineno - node.lineno + 1)
        license_line = lines.pop(0)
        body = "\n".join(line for line in lines if line is not None).strip("\n")
        about = "".join(f"# {line}".rstrip() + "\n" for line in ast.get_docstring(tree).splitlines())
        rule = "# " + "=" * 117 + "\n"
        bodies.append(f"{rule}# {module.name}\n#\n{about}{rule}\n\n{body}\n")
    names = ", ".join(module.name for module in trees)
    docstring = f'"""{ast.get_docstring(trees[path])}\n\nGenerated from {names}: change those.\n"""\n'
    imports = [(name.split(".")[0], f"import {name}") for name in sorted(plain)]
    imports += [(m.split(".")[0], f"from {m} import {', '.join(sorted(members[m]))}") for m in sorted(members)]
    standard, foreign = ("\n".join(i for m, i in imports if (m in sys.stdlib_module_names) == s) for s in (True, False))
    return f"{license_line}\n{docstring}\n{standard}\n\n{foreign}\n\n\n" + "\n\n".join(bodies)


class CarriesItsCode:
    """Mixin of a diffusers pipeline: components shared as they are, and a saved pipeline that any machine can load.

    A class states `source_file`, its module's `__file__`, and `module_name`, under which a saved pipeline has the code;
    `check_parts(pipeline, fault)` raises `ValueError` for a pipeline whose components it cannot take, `fault` or not,
    and `check_index(index)` for a `model_index.json` of such.
    """

    source_file: Path
    module_name: str

    @classmethod
    def from_pipe(cls, pipeline, **kwargs):
        """A pipeline with the components of another pipeline of its family, shared, in the dtypes they have.

        Unlike [`DiffusionPipeline.from_pipe`], which casts them, and so the source pipeline, to float32 unless told
        otherwise. With `dtype` (`torch_dtype` before diffusers 0.40) the shared components are cast to that.
        """
        if any(kwargs.get(name) is not None for name in ("dtype", "torch_dtype", "custom_pipeline")):
            return super().from_pipe(pipeline, **kwargs)
        if not hasattr(pipeline, "components"):
            raise ValueError(
                f"`from_pipe` takes a pipeline, not {pipeline!r}: `{cls.__name__}.from_pretrained` loads a folder."
            )
        components, options = cls._get_signature_keys(cls)
        missing = sorted(set(components) - set(pipeline.components) - set(cls._optional_components))
        cls.check_parts(pipeline, f"it has no {', '.join(missing)}" if missing else None)
        shared = {k: v for k, v in pipeline.components.items() if k in components}
        shared.update({k: pipeline.config[k] for k in options if k in pipeline.config})
        pipe = cls(**{**shared, **kwargs})
        pipe.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        return pipe

    def save_config(self, save_directory, **kwargs) -> None:
        """Write `model_index.json` and, beside it, the code it names: what is saved loads again by
        `DiffusionPipeline.from_pretrained(save_directory, trust_remote_code=True)`, with or without this package."""
        super().save_config(save_directory, **kwargs)
        index = Path(save_directory) / self.config_name
        content = {**json.loads(index.read_text()), "_class_name": self._index_name()}
        index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
        code = self_contained_source(self.source_file)
        Path(save_directory, f"{self.module_name}.py").write_text(code, encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file, **kwargs) -> dict[str, Any]:
        # Whoever loads through this class has the code: the copy in the model's folder is for those who have not, and
        # would ask for their trust.
        config = super()._dict_from_json_file(json_file, **kwargs)
        cls.check_index(config)  # before the weights are downloaded
        if config.get("_class_name") == cls._index_name():
            config["_class_name"] = cls._index_name()[1]
        return config

    @classmethod
    def _index_name(cls) -> list[str]:
        """`_class_name` of a saved pipeline's index: module and class. A subclass is saved as the class whose code this
        is."""
        owner = next(c for c in cls.__mro__ if "source_file" in vars(c))
        return [cls.module_name, owner.__name__]
