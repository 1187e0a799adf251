"""The pages for users: their code runs, their output is what they say, their links lead somewhere.

A block of Python runs after those above it on its page, in one namespace; a block with prompts must
print what stands there. A block that imports a library of NEIGHBOURS runs where that is installed.
A block that begins with "# reference." quotes a source: test_derivation.py looks it up. One that
begins with "# setup.py" is a file: test_capi.py runs it.
"""

import ast
import doctest
import pkgutil
import re

import pytest
from conftest import CHECKOUT

import bn_cy

DOCS = CHECKOUT / "docs"
PAGES = [CHECKOUT / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEIGHBOURS = {
    "autograd",
    "dask",
    "flax",
    "jax",
    "keras",
    "mpi4py",
    "onnx",
    "onnxruntime",
    "safetensors",
    "tensorflow",
    "torch",
}
MODULES = {module.name for module in pkgutil.iter_modules(bn_cy.__path__) if not module.ispkg}
LINK = re.compile(r"!?\[[^]]*\]\(([^)\s]+)\)|href=\"([^\"]+)\"")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def blocks_of(page):
    """Yield (number of the line before, source) for every block that is to run."""
    text = page.read_text("utf-8")
    for match in BLOCK.finditer(text):
        if not match[1].startswith(("# reference.", "# setup.py")):
            yield text[: match.start(1)].count("\n"), match[1]


def is_session(source):
    return source.startswith(">>>")


def code_of(source):
    """Return the code of a block, without prompts and output."""
    if not is_session(source):
        return source
    return "".join(example.source for example in doctest.DocTestParser().get_examples(source))


def neighbours_of(source):
    """Return which of NEIGHBOURS a block imports: `import torch`, `from bn_cy import torch`."""
    names = set()
    for node in ast.walk(ast.parse(code_of(source))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            path = getattr(node, "module", None) or ""
            names.update(path.split("."), *(alias.name.split(".") for alias in node.names))
    return names & NEIGHBOURS


def wanted():
    """Yield each page with nothing, and once more with each set of neighbours that it wants."""
    for page in PAGES:
        sets = {frozenset(neighbours_of(source)) for _, source in blocks_of(page)}
        for names in sorted(sets, key=sorted):
            yield pytest.param(page, names, id="-".join([page.stem, *sorted(names)]))


def run_block(page, line, source, namespace):
    if is_session(source):
        test = doctest.DocTestParser().get_doctest(source, {}, page.name, str(page), line)
        test.globs = namespace
        doctest.DebugRunner(optionflags=doctest.ELLIPSIS).run(test, clear_globs=False)
    else:  # with its own lines in tracebacks
        exec(compile("\n" * line + source, str(page), "exec"), namespace)


@pytest.mark.parametrize(("page", "neighbours"), list(wanted()))
def test_blocks_of_a_page(page, neighbours, monkeypatch, tmp_path, settings):
    for name in sorted(neighbours):
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    namespace = {"__name__": "__main__"}
    for line, source in blocks_of(page):
        if neighbours_of(source) <= neighbours:
            run_block(page, line, source, namespace)


@pytest.mark.parametrize("name", sorted(MODULES - {"reference", "sync"}))
def test_examples_in_docstrings(name, settings):
    """Those of `reference` and `graph` run in their own tests; that of `sync` wants mpiexec."""
    module = pytest.importorskip(f"bn_cy.{name}", exc_type=ImportError)
    failed, attempted = doctest.testmod(module)
    assert attempted or name.startswith("_")
    assert not failed


def anchors_of(page):
    """Return the anchors of a page's headings, as the hosts of repositories make them."""
    text = CODE.sub("", page.read_text("utf-8"))
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in HEADING.findall(text)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_of_a_page(page):
    """Relative links and pictures; nothing is asked of the network."""
    for groups in LINK.findall(CODE.sub("", page.read_text("utf-8"))):
        target, _, anchor = "".join(groups).partition("#")
        if target.startswith(("http:", "https:")):
            continue
        to = page if not target else page.parent / target
        assert to.exists(), target
        assert not anchor or anchor in anchors_of(to), f"{target}#{anchor}"


def test_the_index_names_every_page():
    pages = {path.name for path in DOCS.iterdir() if path.suffix in (".md", ".rst")}
    index = (DOCS / "index.md").read_text("utf-8")
    assert set(re.findall(r"^- \[.*?\]\((\w+\.\w+)\)", index, re.MULTILINE)) == pages - {"index.md"}
