"""A PATH on which every cloud is a fake, and a clean, pushed repository: nothing real is reached."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake.sh")
CLOUDS = ("gcloud", "kubectl", "xpk", "ssh", "scp", "srun", "scontrol", "docker")
TOOLS = (
    *(
        "bash",
        "env",
        "git",
        "sed",
        "grep",
        "sleep",
        "mktemp",
        "true",
        "rm",
        "cat",
        "cut",
        "sort",
        "uniq",
        "tr",
        "date",
        "dirname",
    ),
    *("head", "tail", "hostname", "mkdir", "mv", "flock", "setsid", "nohup", "tar", "gzip", "uname", "cp", "chmod"),
)
GIT = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}


def git(folder, *words):
    """Run git as somebody."""
    who = ("-c", "user.name=n", "-c", "user.email=n@example.com", "-c", "init.defaultBranch=main")
    subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True, env={**os.environ, **GIT})


def make_repository(folder):
    """A repository with the launch scripts and a config, committed and pushed to a bare one beside it."""
    repository = folder / "repository"
    shutil.copytree(ROOT / "launch", repository / "launch")
    (repository / "configs").mkdir()
    shutil.copy(ROOT / "configs/quickstart.yaml", repository / "configs")
    git(folder, "init", "--quiet", "--bare", "remote.git")
    git(repository, "init", "--quiet")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "--message=all")
    git(repository, "remote", "add", "origin", str(folder / "remote.git"))
    git(repository, "push", "--quiet", "origin", "main")
    return repository


class Outcome:
    """What a script left: exit code, both outputs, and what it asked of the clouds."""

    def __init__(self, code, out, err, calls):
        self.code, self.out, self.err, self.calls = code, out, err, calls

    def __repr__(self):
        return f"exit code {self.code}\n{self.out}\n{self.err}\n" + "\n".join(" ".join(call) for call in self.calls)


class Cloud:
    """Runs launch scripts where all clouds are fakes; `says` sets what they answer."""

    def __init__(self, folder, repository):
        self.folder, self.repository = folder / "cloud", repository
        self.home, binaries = folder / "home", folder / "bin"
        for made in (self.folder, self.home, binaries):
            made.mkdir()
        for name in CLOUDS:
            (binaries / name).symlink_to(FAKE)
        for name in TOOLS:
            if found := shutil.which(name):
                (binaries / name).symlink_to(found)
        self.binaries = binaries
        self.environment = {
            "PATH": str(binaries),
            "HOME": str(self.home),
            "FAKE": str(self.folder),
            "MTP_JAX_TICK": "0.01",
            "MTP_JAX_BACKOFF": "0",
            **GIT,
        }

    def says(self, kind, *words):
        """The next answers to one kind of call; see fake.sh."""
        (self.folder / f"next.{kind}").write_text("".join(f"{word}\n" for word in words))

    def has(self, state, *, owner="", kind="v5litepod-16", workers=2):
        """A slice that is there before the script starts."""
        (self.folder / "tpu").write_text(f"{state}|{kind}|{workers}|{owner}\n")

    @property
    def slice(self):
        """What is left of the slice: its line, or None."""
        path = self.folder / "tpu"
        return path.read_text().strip() if path.exists() else None

    def calls(self):
        """All calls so far, each as its words."""
        path = self.folder / "calls"
        return [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []

    def start(self, script, *words, **environment):
        """Start a script in a process group of its own, as a terminal does."""
        return subprocess.Popen(
            ["bash", str(self.repository / "launch" / script), *map(str, words)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.repository,
            env={**self.environment, **environment},
            start_new_session=True,
        )

    def finish(self, process, timeout=30):
        """Wait for a script."""
        try:
            out, err = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return Outcome(process.returncode, out, err, self.calls())

    def run(self, script, *words, **environment):
        """Run a script to its end."""
        return self.finish(self.start(script, *words, **environment))

    def interrupt(self, script, *words, after, **environment):
        """Press Ctrl-C once a call whose words hold `after` has been made."""
        process = self.start(script, *words, **environment)
        deadline = time.monotonic() + 20
        while not any(after in " ".join(call) for call in self.calls()):
            if process.poll() is not None or time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL) if process.poll() is None else None
                raise AssertionError(f"never called {after}: {self.finish(process)}")
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        return self.finish(process)
