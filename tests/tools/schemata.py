"""Mutants of Python and Cython source: each a small fault, all of them in one text behind a switch.

A mutant changes a token (an operator, a comparison, a constant, `min`, `break`, ...), negates a
condition, or drops a statement. `rewrite` puts every mutant beside what it replaces, and the call
`_mutant(number)` says which of them is in force:

    total += x[j]       becomes     if _mutant(1):
                                        total -= x[j]
                                    else:
                                        total += x[j]

    while k < count:    becomes     while (
                                        (1 if k <= count else 0) if _mutant(2)
                                        else (1 if k < count else 0)):

Not mutated is what the compiler resolves, so that no switch can reach it: sizes of arrays, members
of an enum, conditions on a fused type, the step of a range, C code. Types in declarations and casts
are left alone, too.
"""

import io
import re
import tokenize
from collections import Counter
from typing import NamedTuple

OPERATORS = {
    "+": ["-"], "-": ["+"], "*": ["+", "-"], "/": ["*"], "//": ["%", "*"], "%": ["//"],
    "<": ["<=", ">="], "<=": ["<", ">"], ">": [">=", "<="], ">=": [">", "<"],
    "==": ["!="], "!=": ["=="], "&": ["|"], "|": ["&"], "<<": [">>"], ">>": ["<<"],
    "+=": ["-=", "="], "-=": ["+=", "="], "*=": ["+=", "="], "//=": ["*=", "="], "%=": ["="],
    "|=": ["&=", "="], "&=": ["|=", "="], ">>=": ["="], "<<=": ["="],
}  # fmt: skip
WORDS = {
    "and": "or", "or": "and", "True": "False", "False": "True", "min": "max", "max": "min",
    "break": "continue", "continue": "break", "any": "all", "all": "any",
}  # fmt: skip

COMPILED = re.compile(r"\b(floating|real|Direction|Written) is\b")  # resolved by Cython
FUNCTION = re.compile(r"(?:def|cp?def)\b[^(=]*?(\w+)\(.*:$", re.DOTALL)
BLOCKS = ("cdef extern", "cdef enum", "cdef struct", "ctypedef")  # what stands in them is no code
NO_CODE = {
    "import", "from", "cimport", "include", "class", "with", "try", "except", "finally", "else",
    "global", "pass", "@", "assert",
}  # fmt: skip
KEYWORDS = {
    "return",
    "if",
    "else",
    "elif",
    "while",
    "in",
    "is",
    "and",
    "or",
    "not",
    "for",
    "lambda",
}
CONDITION = re.compile(r" *(if|elif|while)\b")
SWITCH = 'cdef extern from "mutants.h" nogil:\n    bint _mutant(int number) noexcept\n\n'
PYTHON_SWITCH = "from bn_cy._mutants import chosen as _mutant\n"


class Region(NamedTuple):
    """What is written twice: a whole statement, or an expression, from one offset to another."""

    start: int
    stop: int
    statement: bool


class Mutant(NamedTuple):
    """A fault: pieces of a region and what stands there instead; and what a reader wants to see."""

    file: str
    function: str
    line: int
    before: str
    after: str
    region: Region
    edits: tuple

    def __str__(self):
        return f"{self.file}: {self.function}\n- {self.before}\n+ {self.after}"


class Token(NamedTuple):
    text: str
    kind: int
    start: int
    stop: int


def logical_lines(text):
    """Yield the tokens of each logical line, without comments and line breaks."""
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    python = text.replace("except? ", "except  ")  # the only word of Cython that is no token
    noise = (tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    line = []
    for token in tokenize.generate_tokens(io.StringIO(python).readline):
        if token.type == tokenize.NEWLINE:
            yield line
            line = []
        elif token.type not in noise:
            start, stop = (starts[row - 1] + column for row, column in (token.start, token.end))
            line.append(Token(token.string, token.type, start, stop))


def parts(tokens, mark):
    """Split tokens at those marks that no bracket encloses."""
    depth, part, found = 0, [], []
    for token in tokens:
        depth += (token.text in "([{") - (token.text in ")]}")
        if token.text == mark and depth == 0:
            found.append(part)
            part = []
        else:
            part.append(token)
    return [*found, part]


def expressions(line):
    """Return the parts of a header or a declaration that may be written twice."""
    first = line[0].text
    if first in ("if", "elif", "while"):
        return [line[1:-1]]
    if first == "for":
        iterable = parts(line[:-1], "in")[1]
        if iterable[0].text in ("range", "prange"):
            positional = [part for part in parts(iterable[2:-1], ",") if len(parts(part, "=")) == 1]
            return positional[:2]  # the step has to be a constant
        return [iterable]
    values = line
    if line[-1].text == ":":  # a function: its defaults, which only `def` has
        values = line[3:-2] if first == "def" else []
    return [sides[1] for part in parts(values, ",") if len(sides := parts(part, "=")) == 2]


def regions(line):
    """Yield the regions of a logical line with their tokens."""
    first = line[0].text
    if first in NO_CODE or (len(line) == 1 and line[0].kind == tokenize.STRING):
        return
    if first in ("if", "elif", "while", "for", "def", "cdef", "cpdef"):
        for tokens in expressions(line):
            if tokens:
                yield Region(tokens[0].start, tokens[-1].stop, False), tokens
    else:
        yield Region(line[0].start, line[-1].stop, True), line


def is_operand_end(token):
    return token.text in (")", "]", "}") or (
        token.kind in (tokenize.NAME, tokenize.NUMBER, tokenize.STRING)
        and token.text not in KEYWORDS
    )


def without_casts(tokens):
    """Yield each token and the one before it; of a cast, a `<` where no number ends, nothing."""
    previous, cast = Token("", tokenize.OP, 0, 0), False
    for token in tokens:
        if not cast and token.text == "<" and not is_operand_end(previous):
            cast = True
        if not cast:
            yield previous, token
        elif token.text == ">":
            cast = False
        if not cast:
            previous = Token("", tokenize.OP, 0, 0) if token.text == ">" else token


def changed_number(text):
    if re.fullmatch(r"[\d_]+|0[xX][\da-fA-F_]+", text):
        value = int(text, 0)
        return [str(value + 1), *([str(value - 1)] if value else [])]
    return [f"({text} + 1)", *([f"({text} / 2)"] if float(text) else [])]


def changes(tokens):
    """Yield the edits of every mutant of some tokens: tuples of (start, stop, new text)."""
    pairs = list(without_casts(tokens))
    for (previous, token), (_, after) in zip(pairs, [*pairs[1:], (None, None)], strict=True):
        here = token.start, token.stop
        if token.kind == tokenize.NUMBER:
            for new in changed_number(token.text):
                yield ((*here, new),)
        elif token.text in OPERATORS and is_operand_end(previous):
            for new in OPERATORS[token.text]:
                yield ((*here, new),)
        elif token.text == "-":
            yield ((*here, ""),)
        elif token.text in WORDS:
            yield ((*here, WORDS[token.text]),)
        elif token.text == "is" and after.text == "not":
            yield ((token.start, after.stop, "is"),)
        elif token.text == "is":
            yield ((*here, "is not"),)
        elif token.text == "not" and after.text == "in":
            yield ((token.start, after.stop, "in"),)
        elif token.text == "not" and previous.text != "is":
            yield ((*here, ""),)


def of_region(region, tokens, first):
    """Yield the edits of every mutant of a region in a line that begins with the word `first`."""
    if first in ("if", "elif", "while"):
        yield ((region.start, region.start, "not ("), (region.stop, region.stop, ")"))
    if region.statement and (first != "return" or len(tokens) == 1):
        yield ((region.start, region.stop, "pass"),)
    yield from changes(tokens)


def edited(text, start, stop, edits):
    """Return a piece of a text with edits that lie in it, which are in order."""
    pieces = []
    for begin, end, new in edits:
        pieces += [text[start:begin], new]
        start = end
    return "".join([*pieces, text[start:stop]])


def shown(text, edits):
    """Return the source lines that edits touch, as they are and as they become; of a statement
    that is dropped the first alone."""
    start = text.rfind("\n", 0, edits[0][0]) + 1
    stop = text.find("\n", edits[-1][1])
    before, after = text[start:stop], edited(text, start, stop, edits)
    return " ".join(before.split()), " ".join(after.split())


def mutants_of(file, text):
    """Return all mutants of a file."""
    found, seen = [], Counter()
    function, skipped = "module", None
    for line in logical_lines(text):
        indent = line[0].start - (text.rfind("\n", 0, line[0].start) + 1)
        source = text[line[0].start : line[-1].stop]
        if skipped is not None and indent > skipped:
            continue
        skipped = indent if source.startswith(BLOCKS) else None
        if skipped is not None:
            continue
        header = FUNCTION.match(source)
        function = header[1] if header else function
        if line[0].text in ("if", "elif") and COMPILED.search(source):
            continue
        for region, tokens in regions(line):
            for edits in of_region(region, tokens, line[0].text):
                before, after = shown(text, edits)
                seen[function, before, after] += 1
                number = seen[function, before, after]
                place = function if number == 1 else f"{function} ({number})"
                row = text.count("\n", 0, edits[0][0]) + 1
                found.append(Mutant(file, place, row, before, after, region, edits))
    return found


def switched(text, region, numbered):
    """Return a region with its mutants, each behind its switch."""
    original = text[region.start : region.stop]
    variants = [
        (number, edited(text, region.start, region.stop, mutant.edits))
        for number, mutant in numbered
    ]
    line = text.rfind("\n", 0, region.start) + 1
    if not region.statement:
        # Of a choice between conditions that are objects in part, Cython makes an object of a bint.
        form = "(1 if {} else 0)" if CONDITION.match(text, line) else "({})"
        chain = " else ".join(
            f"{form.format(new)} if _mutant({number})" for number, new in variants
        )
        return f"({chain} else {form.format(original)})"
    indent = " " * (region.start - line)
    chain = f"\n{indent}el".join(
        f"if _mutant({number}):\n{indent}    {new}" for number, new in variants
    )
    return f"{chain}\n{indent}else:\n{indent}    {original}"


def rewrite(text, numbered):
    """Return the source with mutants, pairs of a number and a `Mutant`, behind their switches."""
    groups = {}
    for number, mutant in numbered:
        groups.setdefault(mutant.region, []).append((number, mutant))
    edits = [
        (region.start, region.stop, switched(text, region, group))
        for region, group in sorted(groups.items())
    ]
    return edited(text, 0, len(text), edits)


def with_switch(file, text):
    """Return the source with the switch declared before its first import."""
    switch = PYTHON_SWITCH if file.endswith(".py") else SWITCH
    first = re.search(r"^(from|import) ", text, re.MULTILINE).start()
    return text[:first] + switch + text[first:]
