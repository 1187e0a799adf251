"""Build the compiled modules of bn_cy; everything else about the package is in pyproject.toml.

Environment variables that change the build:

BN_CY_OPENMP=0       no OpenMP: every kernel runs in one thread
BN_CY_DEBUG=1        no optimization, debug information, and every index checked
BN_CY_SANITIZE=...   what the compiler's -fsanitize= takes, such as address,undefined or thread; to
                     be run with the sanitizer's library preloaded
BN_CY_BOUNDSCHECK=1  every index of a typed memoryview is checked; 6 to 13 times slower
BN_CY_COVERAGE=1     GCC counts how often each line of Cython runs, for gcov
CFLAGS               are stronger than our -O3 and -g0, and weaker than what the bits of the
                     results and the instruction sets depend on; what would break the bits is an
                     error
CC, LDFLAGS, ...     as for every setuptools build

`pip install -e ".[dev]"` builds in place; `python setup.py build_ext --inplace` then builds again
what has changed.
"""

import os
import re
import shlex
import sys
import tempfile
import time
import zlib
from pathlib import Path

from Cython.Build import cythonize
from Cython.Compiler import Options
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

PACKAGE = Path("bn_cy")
KERNELS = "bn_cy.kernels."  # and the name of the variant
SHARED = "bn_cy._cyutility"  # Cython's own code, such as memoryviews, once for all modules

SERIAL = os.environ.get("BN_CY_OPENMP", "") == "0"
DEBUG, SANITIZE, BOUNDSCHECK, COVERAGE = (
    "" if os.environ.get(name, "") == "0" else os.environ.get(name, "")
    for name in ("BN_CY_DEBUG", "BN_CY_SANITIZE", "BN_CY_BOUNDSCHECK", "BN_CY_COVERAGE")
)
CHECKED = DEBUG or BOUNDSCHECK
CFLAGS = shlex.split(os.environ.get("CFLAGS", ""))

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": bool(CHECKED),
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
}

# A typed memoryview has room for so many dimensions, one more than any of ours has. It is handed on
# by value: with Cython's eight, copies were 4 to 5 % of the kernels' instructions in a short call.
Options.buffer_max_dims = 4

# Contraction into FMA and reassociation would give every instruction set its own rounding.
GCC_FLAGS = ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
MSVC_FLAGS = ["/Od", "/Zi"] if DEBUG else ["/O2"]
MSVC_FLAGS += ["/fp:precise"]

# GCC's -Ofast and -ffast-math, Clang's -ffp-model=fast, and what they are made of.
BREAK_BITS = re.compile(
    "-Ofast|-ff(ast-math|p-model=(fast|aggressive)|inite-math-only)|-fno-signed-zeros"
    "|-f(unsafe-math-optimizations|associative-math|reciprocal-math)"
)

# What a special build links, too.
LINKED_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"] if SANITIZE else []
LINKED_FLAGS += ["--coverage"] if COVERAGE else []

# Debug information would be two thirds of a wheel. Above -O1 a compiler counts for one line what it
# has moved to another, and takes minutes for the checks of a sanitizer.
SPECIAL = DEBUG or SANITIZE or COVERAGE
OPTIMIZATION = ["-O0", "-g3"] if DEBUG else ["-O1", "-g1"] if SPECIAL else ["-O3", "-g0"]
SPECIAL_FLAGS = list(LINKED_FLAGS)
SPECIAL_FLAGS += ["-fno-wrapv"] if SANITIZE else []  # Python has its modules built with the other
SPECIAL_FLAGS += ["-DBN_CY_BOUNDSCHECK"] if CHECKED else []

# The names of functions are a sixth of a module; profilers and debuggers want them in a checkout.
STRIP = ["-Wl,--strip-all"]

# Each if the compiler takes it. GCC gives up on loops over eight rows of doubles, which might
# overlap the sums, after ten checks. Twice unrolled, a loop of one vector does not depend on where
# in a cache line it happens to begin, which was worth a third of its time. And loops that clear or
# copy stay loops: as memset they are `rep stosb` from 2 KB on, which is slow to begin. Where a jump
# leads is aligned without regard to how much that fills: short rows depended on it.
GCC_TUNING = [
    ["--param=vect-max-version-for-alias-checks=100"],
    ["-funroll-loops", "--param=max-unroll-times=2"],
    ["-fno-tree-loop-distribute-patterns"],
    ["-falign-jumps=16"],
]

GCC_VARIANTS = {
    "v2": ["-march=x86-64-v2"],
    "v3": ["-march=x86-64-v3"],
    "v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
}
# MSVC has no switch for v2: the baseline of x64 stands in.
MSVC_VARIANTS = {"v2": [], "v3": ["/arch:AVX2"], "v4": ["/arch:AVX512"]}

VARIANTS = (*GCC_VARIANTS, "plain")

# What the kernels say is inline is inlined, all of it, and nothing else: their views vanish so, and
# the loops end up in functions of their own, in which the row pointers fit the registers.
# Other compilers decide for themselves; with the first flag Clang would inline nothing at all.
GCC_INLINING = [
    "-fno-inline-functions",
    "-fno-inline-functions-called-once",
    "-fno-inline-small-functions",
    "--param=early-inlining-insns=60",
    "--param=max-inline-insns-single=3000",
    "--param=large-function-growth=3000",
    "--param=inline-unit-growth=300",
]

# (compile, link) flags, in the order in which they are tried.
GCC_OPENMP = [(["-fopenmp"], ["-fopenmp"]), (["-Xpreprocessor", "-fopenmp"], ["-lomp"])]
MSVC_OPENMP = [(["/openmp"], [])]

TRIVIAL_PROGRAM = "int main(void) { return 0; }\n"
GCC_PROGRAM = """\
#if !defined(__GNUC__) || defined(__clang__)
#error "another compiler"
#endif
int main(void) { return 0; }
"""
OPENMP_PROGRAM = """\
#include <omp.h>
int main(void) { return omp_get_max_threads() < 1; }
"""


def builds(compiler, program, compile_flags, link_flags=()):
    """Tell whether the compiler takes the flags and makes an executable of the C program."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.c")
        source.write_text(program)
        try:
            objects = compiler.compile([str(source)], folder, extra_postargs=list(compile_flags))
            compiler.link_executable(objects, "probe", folder, extra_postargs=list(link_flags))
        except (CompileError, LinkError):
            return False
    return True


def find_openmp(compiler, candidates):
    """Return the first (compile, link) flags that give OpenMP, or None."""
    for compile_flags, link_flags in candidates:
        if builds(compiler, OPENMP_PROGRAM, compile_flags, link_flags):
            return compile_flags, link_flags
    return None


def choose_variants(compiler, platform, candidates):
    """Return the kernel variants that this compiler can build for this platform."""
    if not platform.endswith(("x86_64", "amd64")):
        return {"plain": []}
    accepted = {
        name: flags
        for name, flags in candidates.items()
        if builds(compiler, TRIVIAL_PROGRAM, flags)
    }
    return accepted or {"plain": []}


def configure(ext, flags, linking, openmp, variants):
    """Give one module its flags, and tell it by macros how the package is being built."""
    compile_flags, link_flags = openmp or ([], [])
    ext.extra_compile_args = flags + compile_flags
    ext.extra_link_args = [*link_flags, *linking]
    ext.define_macros = [
        ("BN_CY_FLAGS", c_string(ext.extra_compile_args)),
        ("BN_CY_VARIANTS", c_string(variants)),
    ]
    if openmp:
        ext.define_macros.append(("BN_CY_OPENMP", "1"))


def c_string(words):
    text = " ".join(words).replace("\\", r"\\").replace('"', r"\"")
    return f'"{text}"'


def refuse_what_breaks_the_bits(flags):
    """Stop where CFLAGS ask for sums in another order, whose bits depend on the processor."""
    wrong = [flag for flag in flags if BREAK_BITS.match(flag)]
    if wrong:
        sys.exit(
            f"bn_cy: CFLAGS has {' '.join(wrong)}, with which results depend on the processor; "
            "build without"
        )


class BuildExtensions(build_ext):
    """Probe the compiler, drop the variants it cannot build, translate and compile the rest."""

    def finalize_options(self):
        super().finalize_options()
        if self.parallel is None:
            self.parallel = os.cpu_count()
        self.in_checkout = self.inplace  # setuptools changes its own while it builds
        if self.in_checkout:  # where pip would have the objects, they are gone after the build
            base = Path(self.get_finalized_command("build").build_base)
            kind = f"{self.plat_name}-{sys.implementation.cache_tag}"
            self.build_temp, self.build_lib = (
                str(base / f"{part}.{kind}") for part in ("temp", "inplace")
            )

    def run(self):
        self.started = time.time()
        super().run()

    def copy_extensions_to_source(self):
        """Date the modules by the beginning of the build: a later source is not in them."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            os.utime(self.ext_path_in_source(ext), (self.started, self.started))

    def ext_path_in_source(self, ext):
        return self.get_ext_filename(self.get_ext_fullname(ext.name))

    def build_extensions(self):
        msvc = self.compiler.compiler_type == "msvc"
        refuse_what_breaks_the_bits(CFLAGS)
        common = MSVC_FLAGS if msvc else OPTIMIZATION + CFLAGS + GCC_FLAGS + SPECIAL_FLAGS
        tuning = []  # of the kernels
        for flags in [] if msvc or SANITIZE or DEBUG else GCC_TUNING:
            tuning += flags if builds(self.compiler, TRIVIAL_PROGRAM, flags) else []
        if not (SANITIZE or DEBUG) and builds(self.compiler, GCC_PROGRAM, GCC_INLINING):
            tuning += GCC_INLINING
        linking = list(LINKED_FLAGS)
        if not (self.in_checkout or SPECIAL) and builds(self.compiler, TRIVIAL_PROGRAM, [], STRIP):
            linking += STRIP
        variants = choose_variants(
            self.compiler, self.plat_name, MSVC_VARIANTS if msvc else GCC_VARIANTS
        )
        openmp = None
        if not SERIAL:
            openmp = find_openmp(self.compiler, MSVC_OPENMP if msvc else GCC_OPENMP)
        self.announce_choice(variants, openmp)

        kernels = {KERNELS + name: tuning + flags for name, flags in variants.items()}
        self.extensions[:] = [
            ext for ext in self.extensions if ext.name in kernels or KERNELS not in ext.name
        ]
        for ext in self.extensions:
            configure(ext, common + kernels.get(ext.name, []), linking, openmp, variants)
        self.translate()
        super().build_extensions()

    def announce_choice(self, variants, openmp):
        self.warn(f"bn_cy: kernels for {', '.join(variants)}")
        if openmp is None:
            reason = "BN_CY_OPENMP=0" if SERIAL else "the compiler has no OpenMP"
            self.warn(f"bn_cy: SERIAL build, every kernel runs in one thread ({reason})")
        else:
            self.warn(f"bn_cy: OpenMP with {' '.join(openmp[0])}")

    def translate(self):
        """Turn every .pyx into C, under the build folder."""
        translated = cythonize(
            self.extensions,
            build_dir=self.build_temp,
            compiler_directives=DIRECTIVES,
            shared_utility_qualified_name=SHARED,
            nthreads=os.cpu_count() or 1,
            emit_linenums=bool(COVERAGE),
        )
        for ext, result in zip(self.extensions, translated, strict=True):
            ext.sources = result.sources
            if COVERAGE:
                confine_line_numbers(Path(result.sources[0]))


def confine_line_numbers(path):
    """Let a line number of Cython code count for the one line of C below it: whatever else Cython
    writes would pass for the lines that follow."""
    lines = []
    for line in path.read_text().splitlines():
        below = len(lines) > 1 and re.match(r'#line .*\.(pyx|pxi|pxd)"', lines[-2])
        if below and not line.startswith("#line"):
            lines.append(f'#line {len(lines) + 2} "{path.as_posix()}"')
        lines.append(line)
    path.write_text("\n".join(lines) + "\n")


def extension(source):
    """Describe the module of one .pyx; its flags are added when the compiler is known.

    What it includes and cimports is known to Cython, which writes its C again where that changed.
    """
    name = ".".join(source.with_suffix("").parts)
    return Extension(
        name, [source.as_posix()], depends=["setup.py"], include_dirs=[PACKAGE.as_posix()]
    )


def extensions():
    """Describe all modules: those of the package, and a variant of the kernels each."""
    variants = [PACKAGE / "kernels" / f"{name}.pyx" for name in VARIANTS]
    sources = [*variants, *sorted(PACKAGE.glob("*.pyx"))]  # what takes longest is begun first
    cython_code = Extension(SHARED, [SHARED.replace(".", "/") + ".c"], depends=["setup.py"])
    return [*map(extension, sources), cython_code]


def long_description():
    """Return the README for a package index, where relative links lead nowhere: a link becomes its
    text and its path, and a picture goes with its caption."""
    text = Path("README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[[^]]*\]\((?!https?:).*?\n\n", "", text, flags=re.DOTALL)
    return re.sub(r"\[([^]]*)\]\((?!https?:)([^)]*)\)", r"\1 (\2)", text)


def kind_of_build():
    """Name the folder of this kind of build: the objects of one never pass for those of another."""
    asked = {
        "serial": SERIAL,
        "debug": DEBUG,
        f"sanitize-{SANITIZE}": SANITIZE,
        "boundscheck": BOUNDSCHECK,
        "coverage": COVERAGE,
    }
    names = [name for name in asked if asked[name]] or ["default"]
    compiler = [os.environ.get(name, "") for name in ("CC", "CFLAGS", "CPPFLAGS", "LDFLAGS")]
    if any(compiler):
        names.append(f"{zlib.crc32(repr(compiler).encode()):08x}")
    return "-".join(names)


# Processes that translate in parallel may import this file again.
if __name__ == "__main__":
    setup(
        long_description=long_description(),
        long_description_content_type="text/markdown",
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtensions},
        options={"build": {"build_base": f"build/{kind_of_build()}"}},
    )
