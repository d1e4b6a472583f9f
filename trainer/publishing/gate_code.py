"""The gate's rule on code: only this package's own unmodified files may run on a stranger's machine."""

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from llava_llama31.trainer.publishing.contents import EXPORT_AGAIN, Contents, GateFinding


MAX_CODE_FILES = 5
CODE_MAY_IMPORT = frozenset(
    (
        "torch",
        "transformers",
        "numpy",
        "PIL",
        "__future__",
        "base64",
        "collections",
        "contextlib",
        "dataclasses",
        "enum",
    )
    + ("functools", "itertools", "json", "logging", "math", "os", "pathlib", "re", "shutil", "typing", "warnings")
)
# names in torch and transformers that fetch, build or run other code, however they are reached
CODE_MAY_NOT_NAME = frozenset(
    ("hub", "cpp_extension", "multiprocessing", "load_library", "dynamic_module_utils", "trust_remote_code", "package")
    + ("subprocess", "socket", "importlib", "builtins", "sys", "pickle", "ctypes", "urllib", "requests", "runpy")
    + ("load", "save", "read_bytes", "write_bytes", "rmtree", "unlink", "chmod", "symlink_to", "import_module")
)
CODE_MAY_NOT_CALL = frozenset(
    ("eval", "exec", "compile", "open", "input", "breakpoint", "getattr", "setattr", "delattr", "globals", "locals")
    + ("vars",)
)
DUNDERS_ALLOWED = frozenset(("__init__", "__name__", "__file__", "__all__", "__class__"))
OS_MAY_NOT_CALL = re.compile(
    r"system|popen|startfile|environ\w*|getenv\w*|putenv|fork\w*|kill\w*|(exec|spawn|posix_spawn)\w*"
)


def own_code() -> dict[str, Path]:
    """Name -> path of the code files that this package ships with a model."""
    files: dict[str, Path] = {}
    for package in ("llava_llama31", "llava_llama31.processing"):
        spec = importlib.util.find_spec(package)
        assert spec is not None and spec.origin is not None
        files |= {path.name: path for path in Path(spec.origin).resolve().parent.glob("*_llava_llama31.py")}
    return files


def check_code(contents: Contents) -> Iterator[GateFinding]:
    """Remote code is this package's own; otherwise name its first violation of the import law."""
    code = {file: path for file, path in contents.files.items() if path.suffix == ".py"}
    own = own_code()
    if len(code) > MAX_CODE_FILES:
        last = sorted(code)[-1]
        yield GateFinding(
            "code", last, f"is one of {len(code)} code files; the limit is {MAX_CODE_FILES}", f"remove {last}"
        )
    for file, path in code.items():
        if file not in own:
            yield GateFinding("code", file, "is not one of this package's code files", f"remove {file}")
        elif path.read_bytes() != own[file].read_bytes():
            problems = code_problems(contents.read(file) or "", {Path(name).stem for name in own})
            what = "differs from this version's file" + (f": {problems[0]}" if problems else "")
            yield GateFinding("code", file, what, f"{EXPORT_AGAIN}; or publish with the version in manifest.json")


def code_problems(source: str, siblings: set[str]) -> list[str]:
    """How a file that goes to the Hub violates the import law."""
    try:
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.expr | ast.stmt | ast.keyword)]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [f"is not valid Python: {error}"]
    problems = []
    for node in nodes:
        line = f"line {node.lineno}"
        match node:
            case ast.Import(names=names):
                problems += [f"{line}: imports {name.name}" for name in names if not _may_import(name.name)]
            case ast.ImportFrom(module=module, level=level, names=names):
                name = module or ""
                if level and (level > 1 or name not in siblings):
                    problems.append(f"{line}: {'.' * level}{name} is not a file in the same folder")
                elif not level and not all(_may_import(f"{name}.{alias.name}") for alias in names):
                    problems.append(f"{line}: imports from {name}")
            case ast.Name(id=name) if name in CODE_MAY_NOT_CALL or _is_forbidden_dunder(name):
                problems.append(f"{line}: uses {name}")
            case ast.Attribute(value=ast.Name(id="os"), attr=name) if OS_MAY_NOT_CALL.fullmatch(name):
                problems.append(f"{line}: uses os.{name}")
            case ast.Attribute(attr=name) if name in CODE_MAY_NOT_NAME or _is_forbidden_dunder(name):
                problems.append(f"{line}: uses .{name}")
            case ast.keyword(arg="trust_remote_code"):
                problems.append(f"{line}: passes trust_remote_code")
    return problems


def _may_import(name: str) -> bool:
    """Whether a dotted name may be imported; from `os` only what may be used as os.NAME, from `io` only BytesIO."""
    root, *rest = name.split(".")
    if root == "os" and any(OS_MAY_NOT_CALL.fullmatch(part) for part in rest):
        return False
    if root == "io":  # its `open` is the one that is forbidden
        return rest == ["BytesIO"]
    return root in CODE_MAY_IMPORT and CODE_MAY_NOT_NAME.isdisjoint(rest)


def _is_forbidden_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__") and name not in DUNDERS_ALLOWED
