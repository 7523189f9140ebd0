"""Every message that users of the library can meet, from its sources: raises, warnings, reasons.

A message is a template: its own words, with `…` for what varies. Where a helper raises what its caller
says (`expect(condition, reason)`, `_whole("window", ...)`), the callers' words are put in.
"""

import ast
import functools
import itertools
import re
from typing import NamedTuple

VARIES = "…"
_MOST = 40  # alternatives of one text; beyond, what has too many varies
_DEPTH = 4  # of callers
# A function that returns a reason, or None for no objection, by its annotation.
_REASON = re.compile(r"\bstr \| None|Match \| str")
# Reasons that come as a sentence of their own in what is printed of a report.
_ALSO_REASONS = {("surgery/fuse.py", "__str__")}
_ALSO_RAISE = {("setup.py", "say"), ("surgery/fuse.py", "Refusal"), ("surgery/fold.py", "Unfolded")}
# What users see around a message that is raised without.
_NETWORK = f"model: expected a CAS-ViT network, got one where {VARIES}: "
_PROGRAM = "the exported program cannot be evaluated: "
_OPERATION = f"{_PROGRAM}operation {VARIES} ({VARIES}): "


class Message(NamedTuple):
    text: str
    kind: str  # "raise", "warn" or "reason"
    path: str  # below the package, or below the root
    where: str  # the function
    line: int


class Module:
    """One parsed source file."""

    def __init__(self, path, source):
        self.path = path
        self.tree = ast.parse(source)
        self.nodes = list(ast.walk(self.tree))
        self.parents = {c: p for p in self.nodes for c in ast.iter_child_nodes(p)}
        self.functions = {}
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef):
                self.functions.setdefault(node.name, []).append(node)
        self.constants = {
            target.id: node.value
            for node in self.tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        self.imported = {  # name here: (last part of the module's name, name there)
            alias.asname or alias.name: ((node.module or "").split(".")[-1], alias.name)
            for node in self.nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def function_around(self, node):
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, ast.FunctionDef):
                return node
        return None


def stem(path):
    parts = path.removesuffix(".py").split("/")
    return parts[-2] if parts[-1] == "__init__" and len(parts) > 1 else parts[-1]


class Collector:
    """Messages of Python sources, by path."""

    def __init__(self, sources):
        self.modules = [Module(path, source) for path, source in sources.items()]
        self.calls = {}  # by the function's bare name: (module, call)
        for module in self.modules:
            for node in module.nodes:
                if isinstance(node, ast.Call):
                    self.calls.setdefault(_called(node), []).append((module, node))

    def messages(self):
        """All of them, and of raises without words of their own path, function and line."""
        found, wordless = [], []
        for module in self.modules:
            for node in module.nodes:
                for kind, call in self._sayings(module, node):
                    around = module.function_around(node)
                    where = around.name if around else ""
                    said = []
                    arguments = [*call.args, *(k.value for k in call.keywords)]
                    for argument in arguments[:1] if kind == "warn" else arguments:
                        said += self.texts(argument, module, around)
                    for text in self._as_seen(module, call, map(_tidy, said)):
                        found.append(Message(text, kind, module.path, where, node.lineno))
                    if not any(map(_has_words, said)) and _called(call) not in (
                        "Refusal",
                        "Unfolded",
                    ):
                        wordless.append((module.path, where, node.lineno))
            for message in self._reasons(module):
                found.append(message)
        return list({(m.kind, m.path, m.text): m for m in reversed(found)}.values())[::-1], wordless

    def _sayings(self, module, node):
        """The calls in which this statement or expression says something."""
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if _called(node.exc) != "AssertionError":
                yield "raise", node.exc
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Name):
            if node.exc.id[:1].isupper() or node.exc.id.startswith("_"):  # a class, not a variable
                yield "raise", ast.Call(node.exc, [], [])
        elif isinstance(node, ast.Call):
            if _called(node) == "warn":
                yield "warn", node
            elif (module.path, _called(node)) in _ALSO_RAISE:
                yield "raise", node

    def _as_seen(self, module, call, said):
        for text in said:
            if not _has_words(text):
                continue
            if _called(call) == "NetworkUnsupported":
                yield _NETWORK + text
            elif _called(call) == "Unsupported" and not text.startswith("operation"):
                inside = stem(module.path) == "operations"
                yield (_OPERATION if inside else _PROGRAM) + text
            elif _called(call) == "Unsupported":
                yield _PROGRAM + text
            else:
                yield text

    def _reasons(self, module):
        for name, functions in module.functions.items():
            for function in functions:
                annotation = "" if function.returns is None else ast.unparse(function.returns)
                if not _REASON.search(annotation) and (module.path, name) not in _ALSO_REASONS:
                    continue
                for node in _own(function):
                    if not isinstance(node, ast.Return) or node.value is None:
                        continue
                    value = node.value
                    parts = value.elts if isinstance(value, ast.Tuple) else [value]
                    for part in parts:
                        if isinstance(part, ast.Call):  # the reasons of that function
                            continue
                        for text in self.texts(part, module, function):
                            if " " in text.replace(VARIES, "").strip():
                                yield Message(_tidy(text), "reason", module.path, name, node.lineno)

    def texts(self, node, module, function, depth=_DEPTH, visited=frozenset()):
        """What an expression may read, as templates; [] where it is no text at all."""

        def inner(part):
            return self.texts(part, module, function, depth, visited)

        if isinstance(node, ast.Constant):
            if isinstance(node.value, str):
                return [node.value]
            return [] if node.value is None else [VARIES]
        if isinstance(node, ast.JoinedStr):
            return _joined([inner(part) or [VARIES] for part in node.values])
        if isinstance(node, ast.FormattedValue):
            plain = node.conversion == -1 and node.format_spec is None
            return (inner(node.value) if plain else None) or [VARIES]
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return _joined([inner(node.left) or [VARIES], inner(node.right) or [VARIES]])
        if isinstance(node, ast.IfExp):
            return _distinct(inner(node.body) + inner(node.orelse))
        if isinstance(node, ast.BoolOp):
            return _distinct(text for value in node.values for text in inner(value))
        if isinstance(node, ast.Name):
            return self._named(node.id, module, function, depth, visited)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._returned(node.func.id, module, depth, visited)
        return [VARIES]

    def _named(self, name, module, function, depth, visited):
        """Of a variable: what is assigned to it, what callers give, or a constant."""
        key = (module.path, function.name if function else "", name)
        if key in visited or depth == 0:
            return [VARIES]
        visited = visited | {key}
        found = []
        if function is not None:
            for node, value in _values_of(function).get(name, ()):
                texts = self.texts(value, module, function, depth, visited) if value else [VARIES]
                found += _joined([[VARIES], texts]) if isinstance(node, ast.AugAssign) else texts
            if found:
                return _distinct(found)
            parameters = [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]
            if name in parameters:
                return self._given(name, module, function, depth, visited) or [VARIES]
        if name in module.constants:
            return self.texts(module.constants[name], module, None, depth, visited)
        if name in module.imported:
            source, there = module.imported[name]
            for other in self.modules:
                if stem(other.path) == source and there in other.constants:
                    return self.texts(other.constants[there], other, None, depth, visited)
        return [VARIES]

    def _given(self, name, module, function, depth, visited):
        """What the callers of a function give for one of its parameters."""
        parameters = [a.arg for a in function.args.args]
        method = bool(parameters) and parameters[0] in ("self", "cls")
        parameters = parameters[method:]
        defaults = dict(zip(reversed(parameters), reversed(function.args.defaults), strict=False))
        keyword_only = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
        defaults |= {a.arg: d for a, d in keyword_only if d is not None}
        found = []
        for caller, call in self.calls.get(function.name, ()):
            if not _reaches(caller, call, module):
                continue
            given = dict(zip(parameters, call.args, strict=False))
            given |= {k.arg: k.value for k in call.keywords}
            value = given.get(name, defaults.get(name))
            if value is None or isinstance(value, ast.Starred):
                found.append(VARIES)
                continue
            around = caller.function_around(call)
            found += self.texts(value, caller, around, depth - 1, visited)
        return _distinct(found)

    def _returned(self, name, module, depth, visited):
        """What a private helper of the same file returns, if that is text."""
        functions = module.functions.get(name, ())
        key = (module.path, name, "returned")
        if not name.startswith("_") or len(functions) != 1 or depth == 0 or key in visited:
            return [VARIES]
        (function,) = functions
        if function.returns is None or ast.unparse(function.returns) not in ("str", "str | None"):
            return [VARIES]
        returns = [n.value for n in _own(function) if isinstance(n, ast.Return) and n.value]
        texts = [self.texts(v, module, function, depth - 1, visited | {key}) for v in returns]
        return _distinct(itertools.chain(*texts)) or [VARIES]


def _called(call):
    """The bare name of what is called."""
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _reaches(caller, call, module):
    """Whether a call of a function's name is one of the function in this module."""
    if isinstance(call.func, ast.Name):
        if call.func.id in caller.functions and caller is not module:
            return False
        source = caller.imported.get(call.func.id, (stem(caller.path), ""))[0]
        return caller is module or source == stem(module.path)
    base = call.func.value
    if isinstance(base, ast.Name) and base.id not in ("self", "cls"):
        return base.id == stem(module.path)
    return caller is module


@functools.cache
def _own(function):
    """The nodes of a function without those of functions inside."""
    found, unread = [], list(reversed(function.body))
    while unread:
        node = unread.pop()
        found.append(node)
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            unread += reversed(list(ast.iter_child_nodes(node)))
    return found


@functools.cache
def _values_of(function):
    """By variable: each statement that sets it, and the value; None for one that cannot be told."""
    found = {}
    for node in _own(function):
        if isinstance(node, ast.Assign):
            pairs = [pair for target in node.targets for pair in _unpacked(target, node.value)]
        elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
            pairs = _unpacked(node.target, node.value)
        elif isinstance(node, ast.For) and isinstance(node.iter, ast.Tuple):
            pairs = [pair for row in node.iter.elts for pair in _unpacked(node.target, row)]
        elif isinstance(node, ast.For):
            pairs = _unpacked(node.target, None)
        else:
            continue
        for name, value in pairs:
            found.setdefault(name, []).append((node, value))
    return found


def _unpacked(target, value):
    if isinstance(target, ast.Name):
        return [(target.id, value)]
    if not isinstance(target, ast.Tuple):
        return []
    same = isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)
    values = value.elts if same else [None] * len(target.elts)
    return [pair for t, v in zip(target.elts, values, strict=True) for pair in _unpacked(t, v)]


def _joined(parts):
    """Every way to put one alternative of each part one behind the other."""
    texts = [""]
    for alternatives in parts:
        if len(texts) * len(alternatives) > _MOST:
            alternatives = [VARIES]
        texts = [text + more for text in texts for more in alternatives]
    return _distinct(texts)


def _distinct(texts):
    return list(dict.fromkeys(re.sub(f"{VARIES}+", VARIES, text) for text in texts))


def _tidy(text):
    return re.sub(f"{VARIES}+", VARIES, " ".join(text.split()))


def _has_words(text):
    return bool(re.search(r"[A-Za-z]{2,}", text))


def of_package(package, root):
    """The messages of the package and of setup.py, where that is there; and the wordless raises."""
    sources = {
        path.relative_to(package).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(package.rglob("*.py"))
    }
    if (root / "setup.py").is_file():
        sources["setup.py"] = (root / "setup.py").read_text(encoding="utf-8")
    return Collector(sources).messages()


# The native library ------------------------------------------------------------------------------

_STRING = r'"(?:[^"\\]|\\.)*"'


def of_native(folder):
    """The messages of csrc: checks of operators, exceptions, and the reasons that functions return."""
    found = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cpp", ".cu")):
        source = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
        name = f"csrc/{path.relative_to(folder).as_posix()}"
        for match in re.finditer(
            r"STD_TORCH_CHECK\(|std::invalid_argument\(|\breturn\b|snprintf\(", source
        ):
            word = match.group()
            end = ";" if word == "return" else ")"
            arguments = _arguments(source[match.end() :], end)
            line = source.count("\n", 0, match.start()) + 1
            if word == "STD_TORCH_CHECK(":
                texts = ["".join(map(_native_text, arguments[1:]))]
            elif word == "std::invalid_argument(":
                texts = ["".join(map(_native_text, arguments[0].split(" + ")))]
            elif word == "snprintf(":
                texts = [re.sub("%[a-z]+", VARIES, _native_text(arguments[2]))]
            else:  # each branch of a conditional is a reason of its own
                texts = map(_native_return, arguments[0].split(" ? ")[-1].split(" : "))
            for text in map(_tidy, texts):
                words = re.findall(r"[A-Za-z]{2,}", text)
                if len(words) < 2 or "%" in text or "\\" in text:
                    continue
                # `check` puts this before what the functions of csrc/cuda return.
                cuda = name.startswith("csrc/cuda/") and word in ("return", "snprintf(")
                text = f"CUDA kernels: {text}" if cuda else text
                found.append(Message(text, "native", name, "", line))
    carried = f"CUDA kernels: {VARIES}"
    return [m for m in dict.fromkeys(found) if m.text != carried and " " in m.text]


def _arguments(source, end):
    """What stands up to the closing character, split at commas that are in no brackets."""
    parts, depth, part = [], 0, ""
    for token in re.findall(rf"{_STRING}|'.'|.", source, re.DOTALL):
        if depth == 0 and token == end:
            break
        depth += (token in ("(", "[", "{")) - (token in (")", "]", "}"))
        if token == "," and depth == 0 and end == ")":
            parts.append(part)
            part = ""
        else:
            part += token
    return [" ".join(p.split()) for p in [*parts, part]]


def _native_text(argument):
    """Literals joined; anything else varies."""
    literals = re.findall(_STRING, argument)
    wrapped = re.fullmatch(rf"std::string\(({_STRING})\)", argument)
    if wrapped:
        return ast.literal_eval(wrapped[1])
    if literals and " ".join(literals) == argument:
        return "".join(map(ast.literal_eval, literals))
    return VARIES


def _native_return(expression):
    """The text of a returned expression, of literals and what is added to them; "" for others."""
    if "asm" in expression or not re.search(_STRING, expression):
        return ""
    whole = re.sub(rf"^\w+\(({_STRING})\)$", r"\1", expression)
    return "".join(_native_text(part.strip()) for part in whole.split(" + "))
