# SPDX-License-Identifier: Apache-2.0
"""Checks the English of pages, docstrings and errors: length, sentences, headings, form and banned turns.

Counted as a page's words are those of its text and of the tables that are written by hand. Not counted are numbers, code, formulas, comments, and the tables that tools write, between their marks.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path


ROOT = Path(__file__).parents[1]
PACKAGE = "emerging_optimizers"
ALL_WORDS = 8000  # of the pages in docs together
PAGE_WORDS = {"README.md": 900, "docs/apidocs/internals.md": 900}
OF_ROOT = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
SENTENCE_WORDS = 40
CODE_COLUMNS = 88

# What makes or checks an error, and the place of the rule among its arguments; an option has a text without a rule.
RULES = {"refusal": 0, "require": 1, "require_agreement": None, "option_field": None}
RULES |= dict.fromkeys(("ValueError", "TypeError", "RuntimeError", "ImportError", "PicklingError"), 0)
# The place of the remedy, of those that take it by itself.
REMEDIES = {"refusal": 2, "require": 3, "require_agreement": 2, "Rule": 2}
# Functions that end a program with an error, as raise does.
ENDS = ("exit", "error")
# Folders whose errors have the same form.
OTHER_CODE = ("benchmarks", "examples", "experiments", "tools")

# A turn of this project's first pages, and what to write instead.
BANNED = {
    r"\b(?:bytes?|bits?|ms|milliseconds|seconds|nats|FLOPs?|GFLOP|steps|numbers?|entr(?:y|ies)|state|messages?|collectives?|rounds?|words?|ideas?) an? "
    r"(?:parameter|rank|step|byte|column|row|element|matrix|replica|page|second|sentence|token|round|group)\b": "per",
    r"\b(?:says?|said|tells?|told|asks?|knows?|known by itself)\b": "return, store, raise, find",
    r"\b(?:goes?|went|gone|going) on\b": "continue",
    r"\b(?:lies|lie) (?:so|in|on|there|beside)\b": "is",
    r"\btravels?\b": "is sent",
    r"\brefus(?:e|es|ed|al)\b": "reject",
    r"\banew\b": "again, new",
    r"\balike\b": "equally, the same",
    r"\bput right\b": "override, correct",
    r"(?-i:\bpieces?\b)": "shard, part",
    r"\bat hand\b": "available",
    r"\bput in (?:its|their) place\b": "replace",
    r"\bbut for\b": "except",
    r"\bthat of (?:that|those|these)\b|\bthose of (?:that|those|these)\b": "repeat the noun",
    r"\bthe lower the\b|\bthe wider the\b": "use a lower rate for wider models",
    r"\bmoods?\b": "noise",
    r"\bmeets?\b": "has, gets",
    r"\bfor one[.,;]": "for example",
    r"\b(?:who|nobody|somebody) (?:should|prefers|wants|has|are)\b": "address the reader: you",
    r"\bgives? another result\b|\bis another one\b": "gives a different result",
    r"\bmade so\b|\bis so\b|\bdoes so\b|\bdo so\b": "repeat the verb",
    r"\bwhere nothing else is\b": "unless stated otherwise",
    r"\bas yet\b|\bby now\b": "yet, now",
}
_BANNED = {re.compile(turn, re.IGNORECASE): instead for turn, instead in BANNED.items()}


def without_code(text: str) -> str:
    """Return a page without code, displayed formulas, comments and generated tables; lines keep their numbers."""
    for made in (
        r"^( *)```.*?^\1```$",
        r"^<!-- (\w+), by tools/[\w.]+ -->$.*?^<!-- end of \1 -->$",
        r"^<!-- (?:methods|variants) -->\n(?:\|[^\n]*\n)*",  # by experiments/gpt2/figures.py
        r"<!--.*?-->",
        r"^\$\$$.*?^\$\$$",
        r"(?<=\n\n) {4}[^\n]*\n(?: {4}[^\n]*\n|\n(?= {4}))*",  # code by indentation
    ):
        text = re.sub(made, lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "]", text)


def count(text: str) -> int:
    """Return the number of words of a page; of a table, those of its cells. A word has a letter: no number is one."""
    without_formulas = re.sub(r"\$[^$\n]+\$", "", without_code(text))
    return sum(any(map(str.isalpha, word)) for word in without_formulas.replace("|", " ").split())


def banned(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the complaint of each banned turn; what is in backticks, in quotes or a formula is no prose."""
    quiet = re.sub(r"``.+?``|`[^`]+`|\"[^\"\n]*\"|\$[^$\n]+\$", lambda found: "x" * len(found[0]), text)
    for turn, instead in _BANNED.items():
        for found in turn.finditer(re.sub(r"(?<=\S)\n(?=\S)", " ", quiet)):
            yield text.count("\n", 0, found.start()) + 1, f'"{found[0]}": write {instead}'


def long_sentences(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the complaint of each sentence outside of tables that is too long."""
    for block in re.finditer(r"(?:^(?![#|]|\s*$).*\n?)+", text, re.MULTILINE):
        for item in re.split(r"^ *(?:[-*]|\d+\.) ", block[0], flags=re.MULTILINE):
            for sentence in re.split(r"[.:!?][*)\"]*\s", item):
                if (words := count(sentence)) > SENTENCE_WORDS:
                    line = text.count("\n", 0, block.start() + block[0].find(sentence)) + 1
                    start = " ".join(sentence.split()[:6])
                    yield line, f'"{start} ...": a sentence of {words} words, {SENTENCE_WORDS} at most'


def headings(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the complaint of each heading that is a question, a sentence or long."""
    for found in re.finditer(r"^#+ (.+)$", text, re.MULTILINE):
        rule = "must name a task or a thing, in at most 8 words and without a mark at its end"
        is_question = re.match(r"(?:What|How|Why|Where|When|Who|Which) ", found[1])
        if is_question or found[1][-1] in ".!?:;" or len(found[1].split()) > 8:
            yield text.count("\n", 0, found.start()) + 1, f'heading "{found[1]}" {rule}'


def wide_code(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the complaint of each line of fenced code that the page's column does not show whole."""
    for block in re.finditer(r"^```(?!\{).*?^```$", text, re.DOTALL | re.MULTILINE):
        first = text.count("\n", 0, block.start()) + 1
        for index, line in enumerate(block[0].splitlines()):
            if len(line) > CODE_COLUMNS:
                yield first + index, f"code of {len(line)} columns, {CODE_COLUMNS} at most"


def of_page(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the complaint of each breach of the rules in a page."""
    prose = without_code(text)
    yield from banned(prose)
    yield from long_sentences(prose)
    yield from headings(prose)
    yield from wide_code(text)


def of_errors(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the complaint of each error of a module that does not read "X must be Y, got Z. Use W."."""
    tree = ast.parse(text)
    raised = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and "remedy" in ast.unparse(node.targets[0]).lower():
            yield from _of_remedy(node.value)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in REMEDIES:
                yield from (each for remedy in node.args[REMEDIES[name] :][:1] for each in _of_remedy(remedy))
            elif node.args and (node in raised or name in ENDS):
                yield from _of_whole(node.args[0])


def _of_whole(node: ast.expr) -> Iterator[tuple[int, str]]:
    """Yield the line and the complaint of an error with a rule or a value that has another form."""
    text = _shown(node)
    form = r", got (?:(?!: [a-z]).)+?\. [A-Z](?:(?!: [a-z]|; ).)*\.$"
    if re.search(r"\b(?:must|got)\b", text) and not re.search(form, text):
        yield node.lineno, f'error "{text[:40]}...": must read "X must be Y, got Z. Use W."'


def _of_remedy(node: ast.expr) -> Iterator[tuple[int, str]]:
    """Yield the line and the complaint of a remedy that is not written as sentences. A value, {}, may be one."""
    text = _shown(node)
    if text != "{}" and not re.match(r"[A-Z{](?:(?!: [a-z]|; ).)*\.(?: ?\{\})?$", text):
        yield node.lineno, f'remedy "{text[:40]}...": must be sentences, from a capital to a full stop'


def _shown(node: ast.expr) -> str:
    """Return the text of an expression, with {} for values."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_shown, node.values))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _shown(node.left) + _shown(node.right)
    return "{}"


def of_module(text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the complaint of each banned turn in the docstrings' first lines and the errors of a module."""
    yield from of_errors(text)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            for _, complaint in banned(first):
                yield getattr(node, "lineno", 1), complaint
            nouns = r"(?:The|A|An|Whether|What|How|Where|Which|One|As|For) "
            shown = any("property" in ast.unparse(each) for each in getattr(node, "decorator_list", ()))
            if isinstance(node, ast.FunctionDef) and not shown and re.match(nouns, first):
                yield node.lineno, f'"{first[:30]}...": begin with a verb, such as Return'
        elif isinstance(node, ast.Call) and (name := ast.unparse(node.func).rpartition(".")[2]) in RULES:
            for each in _texts(node):
                for _, complaint in banned(each):
                    yield node.lineno, complaint
            place = RULES[name]
            rule = " ".join(_texts(node.args[place])) if place is not None and len(node.args) > place else ""
            if rule.strip(" ,.") not in ("", "got") and not re.search(r"\bmust\b", rule):
                yield node.lineno, f'error "{rule[:40]}...": must have the rule, "X must be Y"'


def _texts(node: ast.AST) -> list[str]:
    """Return the strings in an expression."""
    return [each.value for each in ast.walk(node) if isinstance(each, ast.Constant) and isinstance(each.value, str)]


def pages(root: Path = ROOT) -> list[Path]:
    """Return the pages of the documentation."""
    return [*sorted((root / "docs").glob("*.md")), *sorted((root / "docs" / "apidocs").glob("*.md"))]


def complaints(root: Path = ROOT) -> list[str]:
    """Return all breaches of the rules, each with its file and line."""
    total = total_words(root)
    found = [f"docs: {total} words, {ALL_WORDS} at most"] if total > ALL_WORDS else []
    for path in [*pages(root), *(root / name for name in OF_ROOT)]:
        name, text = str(path.relative_to(root)), path.read_text(encoding="utf-8")
        found += [f"{name}:{line}: {complaint}" for line, complaint in of_page(text)]
        if count(text) > (limit := PAGE_WORDS.get(name, ALL_WORDS)):
            found.append(f"{name}: {count(text)} words, {limit} at most")
    written = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]["extend-exclude"]
    for folder in (PACKAGE, *OTHER_CODE):
        for path in sorted((root / folder).rglob("*.py")):
            name = path.relative_to(root)
            if any(fnmatch(part, pattern) for part in name.parts for pattern in written):
                continue  # what a command has written there
            text = path.read_text(encoding="utf-8")
            complaints_of = of_module if folder == PACKAGE else of_errors
            found += [f"{name}:{line}: {complaint}" for line, complaint in complaints_of(text)]
    return found


def total_words(root: Path = ROOT) -> int:
    """Return the number of words of all pages of the documentation."""
    return sum(count(path.read_text(encoding="utf-8")) for path in pages(root))


if __name__ == "__main__":
    if sys.argv[1:] == ["--count"]:
        for path in [*pages(), ROOT / "README.md"]:
            print(f"{count(path.read_text(encoding='utf-8')):6} {path.relative_to(ROOT)}")
        print(f"{total_words():6} docs")
    else:
        found = complaints()
        print(*found, sep="\n")
        sys.exit(f"{len(found)} complaints, see CONTRIBUTING.md" if found else 0)
