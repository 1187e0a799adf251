"""Build the compiled modules of bn_cy; everything else about the package is in pyproject.toml.

Environment variables that change the build:

BN_CY_OPENMP=0       no OpenMP: every kernel runs in one thread
BN_CY_SANITIZE=...   what the compiler's -fsanitize= takes, such as address,undefined or thread; to
                     be run with the sanitizer's library preloaded
BN_CY_BOUNDSCHECK=1  every index of a typed memoryview is checked; 6 to 13 times slower
BN_CY_COVERAGE=1     GCC counts how often each line of Cython runs, for gcov
CC, CFLAGS, ...      as for every setuptools build
"""

import os
import re
import tempfile
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

PACKAGE = Path("bn_cy")
KERNELS = "bn_cy.kernels."  # and the name of the variant
SHARED = "bn_cy._cyutility"  # Cython's own code, such as memoryviews, once for all modules

SERIAL = os.environ.get("BN_CY_OPENMP", "") == "0"
SANITIZE, BOUNDSCHECK, COVERAGE = (
    "" if os.environ.get(name, "") == "0" else os.environ.get(name, "")
    for name in ("BN_CY_SANITIZE", "BN_CY_BOUNDSCHECK", "BN_CY_COVERAGE")
)

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": bool(BOUNDSCHECK),
    "wraparound": False,
    "initializedcheck": False,
    "cdivision": True,
}

# Contraction into FMA and reassociation would give every instruction set its own rounding.
GCC_FLAGS = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
MSVC_FLAGS = ["/O2", "/fp:precise"]

# What a special build adds; without one there is no debug information, two thirds of a wheel.
# Above -O1 a compiler counts for one line what it has moved to another, and takes minutes for the
# checks of a sanitizer.
LINKED_FLAGS = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"] if SANITIZE else []
LINKED_FLAGS += ["--coverage"] if COVERAGE else []
SPECIAL_FLAGS = LINKED_FLAGS + (["-g1"] if LINKED_FLAGS else ["-g0"])
SPECIAL_FLAGS += ["-O1"] if LINKED_FLAGS else []
SPECIAL_FLAGS += ["-fno-wrapv"] if SANITIZE else []  # Python has its modules built with the other
SPECIAL_FLAGS += ["-DBN_CY_BOUNDSCHECK"] if BOUNDSCHECK else []

# Each if the compiler takes it. GCC gives up on loops over eight rows of doubles, which might
# overlap the sums, after ten checks. Twice unrolled, a loop of one vector does not depend on where
# in a cache line it happens to begin, which was worth a third of its time.
GCC_TUNING = [
    ["--param=vect-max-version-for-alias-checks=100"],
    ["-funroll-loops", "--param=max-unroll-times=2"],
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


def configure(ext, flags, openmp, variants):
    """Give one module its flags, and tell it by macros how the package is being built."""
    compile_flags, link_flags = openmp or ([], [])
    ext.extra_compile_args = flags + compile_flags
    ext.extra_link_args = link_flags + LINKED_FLAGS
    ext.define_macros = [
        ("BN_CY_FLAGS", c_string(ext.extra_compile_args)),
        ("BN_CY_VARIANTS", c_string(variants)),
    ]
    if openmp:
        ext.define_macros.append(("BN_CY_OPENMP", "1"))


def c_string(words):
    return '"{}"'.format(" ".join(words))


class BuildExtensions(build_ext):
    """Probe the compiler, drop the variants it cannot build, translate and compile the rest."""

    def finalize_options(self):
        super().finalize_options()
        if self.parallel is None:
            self.parallel = os.cpu_count()

    def build_extensions(self):
        msvc = self.compiler.compiler_type == "msvc"
        common = list(MSVC_FLAGS) if msvc else GCC_FLAGS + SPECIAL_FLAGS
        tuning = []  # of the kernels
        for flags in [] if msvc or SANITIZE else GCC_TUNING:
            tuning += flags if builds(self.compiler, TRIVIAL_PROGRAM, flags) else []
        if not SANITIZE and builds(self.compiler, GCC_PROGRAM, GCC_INLINING):
            tuning += GCC_INLINING
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
            configure(ext, common + kernels.get(ext.name, []), openmp, variants)
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


def extension(source, shared):
    """Describe the module of one .pyx; its flags are added when the compiler is known."""
    name = ".".join(source.with_suffix("").parts)
    depends = [path.as_posix() for path in shared]
    return Extension(name, [source.as_posix()], depends=depends, include_dirs=[PACKAGE.as_posix()])


def extensions():
    """Describe all modules: those of the package, and a variant of the kernels each."""
    variants = [PACKAGE / "kernels" / f"{name}.pyx" for name in VARIANTS]
    rooms = [path for path in (PACKAGE / "kernels").glob("*.p*") if path not in variants]
    shared = [*PACKAGE.glob("*.pxd"), *PACKAGE.glob("*.h"), *rooms]
    sources = [*variants, *sorted(PACKAGE.glob("*.pyx"))]  # what takes longest is begun first
    cython_code = Extension(SHARED, [SHARED.replace(".", "/") + ".c"])
    return [*(extension(source, shared) for source in sources), cython_code]


# Processes that translate in parallel may import this file again.
if __name__ == "__main__":
    # One folder for each kind of build: the objects of one never pass for those of another.
    asked = {
        "serial": SERIAL,
        f"sanitize-{SANITIZE}": SANITIZE,
        "boundscheck": BOUNDSCHECK,
        "coverage": COVERAGE,
    }
    kind = "-".join(name for name in asked if asked[name]) or "default"
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildExtensions},
        options={"build": {"build_base": f"build/{kind}"}},
    )
