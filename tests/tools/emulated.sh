#!/usr/bin/env bash
# The self-test on processors that this machine is not, in QEMU's user mode: the plain build on
# aarch64, and the variant v2 on a Nehalem of 2008.
#     bash tests/tools/emulated.sh
# needs Debian on x86-64, its packages qemu-user and gcc-aarch64-linux-gnu, and a `python` of the
# minor version of Debian's, with bn_cy installed, Cython and setuptools. Python and NumPy for
# aarch64 are fetched as packages into a folder that goes away; the system's own are not touched.
set -euo pipefail

checkout=$(cd "$(dirname "$0")/../.." && pwd)
python=$(cd / && python -c 'import sys; print(sys.executable)')
version=$(cd / && python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
work=$(mktemp -d)
root=$work/root # of an aarch64 system
libraries=$root/usr/lib/aarch64-linux-gnu
trap 'rm -rf "$work"' EXIT

# apt with a state of its own, for another architecture, as an ordinary user: foreign_apt ARGUMENT...
foreign_apt() {
    apt-get -qq -o APT::Architecture=arm64 -o APT::Architectures::=arm64 \
        -o APT::Sandbox::User="$(id -un)" -o Dir::State="$work/apt" \
        -o Dir::State::status="$work/apt/status" -o Dir::Cache="$work/apt/cache" "$@"
}

fetch_aarch64() {
    local package
    mkdir -p "$work"/apt/lists/partial "$work"/apt/cache/archives/partial "$root"
    : >"$work/apt/status"
    foreign_apt update
    foreign_apt install --download-only -y --no-install-recommends \
        libgomp1 libpython3-dev python3-minimal python3-numpy
    for package in "$work"/apt/cache/archives/*.deb; do
        dpkg-deb -x "$package" "$root"
    done
}

# The setup.py of the checkout, told by Python's own configuration for aarch64 what it builds for.
cross_build() {
    local configuration=_sysconfigdata__aarch64-linux-gnu
    mkdir "$work/configuration" "$work/checkout"
    cp "$root/usr/lib/python$version/$configuration.py" "$work/configuration"
    tar -c -C "$checkout" --exclude=./build --exclude=./.git --exclude=./.venv . \
        | tar -x -C "$work/checkout"
    (
        cd "$work/checkout"
        env _PYTHON_HOST_PLATFORM=linux-aarch64 _PYTHON_SYSCONFIGDATA_NAME=$configuration \
            PYTHONPATH="$work/configuration" CC="aarch64-linux-gnu-gcc --sysroot=$root" \
            CFLAGS="-I$root/usr/include/python$version" \
            "$python" setup.py -q build --build-lib "$work/aarch64" >"$work/build.log" 2>&1
    ) || { tail -n 40 "$work/build.log"; return 1; }
}

on_aarch64() {
    env PYTHONPATH="$work/aarch64" qemu-aarch64 -L "$root" \
        -E LD_LIBRARY_PATH="$libraries:$libraries/blas:$libraries/lapack" \
        "$root/usr/bin/python$version" "$@"
}

# NumPy's OpenBLAS takes this Nehalem for something newer unless it is told.
on_nehalem() {
    env OPENBLAS_CORETYPE=Nehalem qemu-x86_64 -cpu Nehalem "$python" "$@"
}

# Run the self-test, whose last line must name machine and variant: self_test HOW MACHINE VARIANT
self_test() {
    (cd / && "$1" -m bn_cy) | tee "$work/report"
    tail -n 1 "$work/report" | grep -q -- "$2.* | $3 of .*self-test passed"
}

qemu-aarch64 --version | head -n 1
aarch64-linux-gnu-gcc --version | head -n 1
printf '\n=== v2 on a Nehalem\n'
self_test on_nehalem x86_64 v2
printf '\n=== plain on aarch64\n'
fetch_aarch64
cross_build
self_test on_aarch64 aarch64 plain
