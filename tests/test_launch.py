"""The launchers: their commands, and their behaviour with fake clouds and clusters."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

LAUNCH = pathlib.Path(__file__).parents[1] / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
BASH = shutil.which("bash")
# What shells like to take apart.
AWKWARD = [
    "--note=two words",
    "it's",
    '"',
    "$HOME `id` $(id) *",
    "a\\b;c&d|e",
    "",
    "--workdir=/x y/z",
]

pytestmark = pytest.mark.skipif(BASH is None, reason="the launchers are bash scripts")

# The program's stand-in, run as `python -m MODULE FLAGS`: writes its arguments and its environment
# down, then does what the file `does` beside it says for this process and attempt.
STUB = """#!{python}
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
flags = dict(part.lstrip("-").partition("=")[::2] for part in sys.argv[3:])
me = flags.get("process_id") or os.environ.get("SLURM_PROCID") or os.environ.get("TPU_HOST", "0")
names = ("JAX_", "SLURM_", "NOTE")
env = {{key: value for key, value in os.environ.items() if key.startswith(names)}}
interruptible = signal.getsignal(signal.SIGINT) == signal.default_int_handler
seen = {{"argv": sys.argv[1:], "env": env, "interruptible": interruptible}}
attempt = len(list(here.glob(f"seen-{{me}}-*")))
(here / f"seen-{{me}}-{{attempt}}").write_text(json.dumps(seen))
def told(number, frame):
    print("told", number, flush=True)
    time.sleep(0.3)
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, told)
signal.signal(signal.SIGINT, told)
print(f"process {{me}} attempt {{attempt}}", flush=True)
(here / f"ready-{{me}}-{{attempt}}").touch()
exec((here / "does").read_text())
"""


def _run(command, **options):
    options = {"capture_output": True, "text": True, "timeout": 60} | options
    return subprocess.run([str(part) for part in command], check=False, **options)


def _wait_until(condition, *, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def _executable(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def stub(tmp_path):
    """A folder with spaces and quotes in its name and a fake program."""
    folder = tmp_path / "a 'stub'"
    folder.mkdir()
    _executable(folder / "python", STUB.format(python=sys.executable))
    (folder / "does").write_text("")
    return folder


def _seen(folder, process=0, attempt=0):
    return yaml.safe_load((folder / f"seen-{process}-{attempt}").read_text())


def _environment(*paths, **values):
    """This process's environment without variables that affect the launchers."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "JAX_", "MODULE"))}
    path = os.pathsep.join([*map(str, paths), own["PATH"]])
    return own | {"PATH": path} | {name: str(value) for name, value in values.items()}


# Of all scripts.


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_explain_themselves_and_stop_at_errors(script):
    assert _run([BASH, "-n", script]).returncode == 0
    assert os.access(script, os.X_OK)
    assert "set -euo pipefail" in script.read_text()
    shown = _run([script, "--help"])
    assert shown.returncode == 0
    assert f"launch/{script.name}" in shown.stdout
    options = set(re.findall(r"^    (--\w+)(?:=\*)?(?: \||\))", script.read_text(), re.M))
    assert "--dry_run" in options
    assert not {option for option in options if option not in shown.stdout}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_pass_shellcheck(script):
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    shellcheck = beside if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    found = _run([shellcheck, script])
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["local.sh"], "expected '--'"),
        (["local.sh", "--", "--workdir=x"], "--processes must be"),
        (["local.sh", "--processes=2x", "--", "--workdir=x"], "--processes must be"),
        (["local.sh", "--processes=0", "--", "--workdir=x"], ">= 1"),
        (["local.sh", "--processes=1", "--", "--config=x"], "no --workdir"),
        (["local.sh", "--process=1", "--", "--workdir=x"], "unknown option '--process=1'"),
        (["slurm.sh", "--nodes=", "--", "--workdir=x"], "--nodes must be"),
        (["slurm.sh", "--", "--config=x"], "no --workdir"),
        (["slurm.sh", "--workdir=x"], "unknown option '--workdir=x'"),
        (["tpu_pod.sh"], "unknown action ''"),
        (["tpu_pod.sh", "start", "--name=N"], "--name must be"),
        (["tpu_pod.sh", "start", "--name=n"], "expected --zone"),
        (["tpu_pod.sh", "create", "--name=n", "--zone=z"], "expected --type"),
        (["tpu_pod.sh", "create", "--name=n", "--zone=z", "--type=v99-8"], "give --runtime"),
        (["tpu_pod.sh", "start", "--name=n", "--zone=z", "--", "--workdir=x"], "--workdir=/FOLDER"),
        (
            ["tpu_pod.sh", "stop", "--name=n", "--zone=z", "--", "--workdir=/x"],
            "takes no program arguments",
        ),
        (["tpu_pod.sh", "stop", "--name=n", "--zone=z", "--env=A B=1"], "--env must be"),
    ],
)
def test_bad_usage_is_refused_by_name(arguments, message):
    refused = _run([LAUNCH / arguments[0], *arguments[1:]], env=_environment())
    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stdout == ""


# local.sh


def _local(stub, *arguments, does="", **options):
    (stub / "does").write_text(does)
    command = [LAUNCH / "local.sh", *arguments, "--", f"--workdir={stub}/runs"]
    return _run(command, env=_environment(PYTHON=stub / "python"), **options)


def test_local_dry_run_prints_what_a_shell_reads_back():
    command = [LAUNCH / "local.sh", "--processes=2", "--devices=4", "--dry_run", "--", *AWKWARD]
    lines = _run(command, env=_environment()).stdout.splitlines()
    ports = set()
    for process, line in enumerate(lines):
        words = shlex.split(line.removesuffix(" 2>&1 &"))
        assert words[:3] == ["env", "JAX_PLATFORMS=cpu", "JAX_NUM_CPU_DEVICES=4"]
        assert words[3:7] == ["python", "-m", "fsdfm_jax.main", "--distributed"]
        ports.add(words[7])
        assert words[8:] == [
            "--num_processes=2",
            f"--process_id={process}",
            *AWKWARD,
            f">>/x y/z/logs/process-{process}.log",
        ]
    assert len(lines) == 2
    assert re.fullmatch(r"--coordinator=localhost:\d{5}", ports.pop())
    assert not ports


def test_local_gives_each_process_its_own_accelerators():
    command = [LAUNCH / "local.sh", "--processes=2", "--accelerators=2", "--dry_run", "--"]
    first, second = _run([*command, "--workdir", "x"], env=_environment()).stdout.splitlines()
    assert "env JAX_LOCAL_DEVICE_IDS=0,1 " in first.replace("\\", "")
    assert "env JAX_LOCAL_DEVICE_IDS=2,3 " in second.replace("\\", "")


def test_local_runs_every_process_with_its_arguments_and_log(stub):
    does = "print('written by', me)"
    ended = _local(stub, "--processes=3", "--devices=2", *["--grace=1"], does=does)
    assert ended.returncode == 0, ended.stderr
    ports = set()
    for process in range(3):
        seen = _seen(stub, process)
        assert seen["argv"][:3] == ["-m", "fsdfm_jax.main", "--distributed"]
        assert f"--process_id={process}" in seen["argv"]
        assert seen["argv"][-1] == f"--workdir={stub}/runs"
        assert seen["env"]["JAX_NUM_CPU_DEVICES"] == "2"
        ports.add(seen["argv"][3])
        log = (stub / "runs" / "logs" / f"process-{process}.log").read_text()
        assert f"written by {process}" in log
    assert len(ports) == 1
    # The terminal shows the first process, whole and once.
    assert ended.stdout.count("written by 0") == 1
    assert "written by 1" not in ended.stdout
    again = _local(stub, "--processes=1", "--devices=1", does="print('last', end='')")
    assert "attempt 1" not in again.stdout.replace("process 0 attempt 1", "")
    assert "written by" not in again.stdout


def test_local_ends_all_when_one_fails_and_returns_its_code(stub):
    does = "if me == '1': sys.exit(7)\ntime.sleep(60)"
    began = time.monotonic()
    ended = _local(stub, "--processes=3", "--devices=1", "--grace=1", does=does)
    assert ended.returncode == 7
    assert time.monotonic() - began < 20
    assert "process 1 exited with code 7" in ended.stderr
    assert "told 15" in (stub / "runs/logs/process-2.log").read_text()


@pytest.mark.parametrize("first", [2, 134])
def test_local_does_not_run_again_what_must_be_fixed(stub, first):
    # In either order: 2 gives the reason, and the other process only lost its coordinator.
    does = f"if me == '1': time.sleep(1)\nsys.exit({first} if me == '0' else {136 - first})"
    ended = _local(stub, "--processes=2", "--devices=1", "--restarts=3", "--grace=5", does=does)
    assert ended.returncode == 2
    assert "exited with code 2, see" in ended.stderr
    assert "restart" not in ended.stderr
    assert not (stub / "seen-0-1").exists()


def test_local_kills_what_does_not_listen(stub):
    does = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif me == '0': sys.exit(3)\ntime.sleep(60)"
    )
    began = time.monotonic()
    ended = _local(stub, "--processes=2", "--devices=1", "--grace=1", does=does)
    assert ended.returncode == 3
    assert time.monotonic() - began < 20


def test_local_runs_again_after_failures_as_often_as_asked(stub):
    does = "if me == '1' and attempt < 2: sys.exit(143 - attempt)"
    ended = _local(stub, "--processes=2", "--devices=1", "--restarts=2", "--grace=1", does=does)
    assert ended.returncode == 0, ended.stderr
    assert (stub / "seen-1-2").exists()
    assert not (stub / "seen-1-3").exists()
    assert (
        _local(stub, "--processes=1", "--devices=1", "--restarts=1", does="sys.exit(9)").returncode
        == 9
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_local_passes_a_signal_on_and_does_not_run_again(stub, name):
    number = getattr(signal, name)
    (stub / "does").write_text("time.sleep(60)")
    command = [LAUNCH / "local.sh", "--processes=2", "--devices=1", "--restarts=3", "--"]
    with subprocess.Popen(
        [*command, f"--workdir={stub}/runs"],
        env=_environment(PYTHON=stub / "python"),
        stdout=subprocess.DEVNULL,
        # A shell in the background, in which the tests may run, has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as launcher:
        _wait_until(lambda: (stub / "ready-0-0").exists() and (stub / "ready-1-0").exists())
        launcher.send_signal(number)
        assert launcher.wait(20) == 128 + number
    for process in range(2):
        log = (stub / "runs/logs" / f"process-{process}.log").read_text()
        assert log.count(f"told {number.value}") == 1
        assert _seen(stub, process)["interruptible"]
    assert not (stub / "seen-0-1").exists()


def test_local_second_signal_ends_everything_at_once(stub):
    (stub / "does").write_text(
        "signal.signal(signal.SIGTERM, lambda *_: print('saving', flush=True))\n"
        "(here / f'pid-{me}').write_text(str(os.getpid()))\n"
        "while not (here / f'end-{me}').exists(): time.sleep(0.05)"
    )
    command = [LAUNCH / "local.sh", "--processes=2", "--devices=1", "--", f"--workdir={stub}/runs"]
    with subprocess.Popen(
        command, env=_environment(PYTHON=stub / "python"), stdout=subprocess.DEVNULL
    ) as launcher:
        _wait_until(lambda: all((stub / f"pid-{process}").exists() for process in range(2)))
        logs = [stub / f"runs/logs/process-{process}.log" for process in range(2)]
        launcher.send_signal(signal.SIGTERM)
        _wait_until(lambda: all("saving" in log.read_text() for log in logs))
        assert launcher.poll() is None
        launcher.send_signal(signal.SIGTERM)
        try:
            assert launcher.wait(10) == 128 + signal.SIGKILL
        finally:
            for process in range(2):
                (stub / f"end-{process}").touch()
    for process in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((stub / f"pid-{process}").read_text()), 0)


TOY = """
import sys
import jax
from fsdfm_jax.parallel import processes
flags = dict(part.lstrip("-").partition("=")[::2] for part in sys.argv[1:])
processes.initialize(flags["coordinator"], int(flags["num_processes"]), int(flags["process_id"]))
said = processes.everyone_says(str(10 + jax.process_index()))
print("found", jax.process_count(), jax.local_device_count(), jax.device_count(), *said)
"""


def test_local_processes_find_each_other(tmp_path):
    (tmp_path / "toy.py").write_text(TOY)
    ended = _run(
        [LAUNCH / "local.sh", "--processes=2", "--devices=3", "--", f"--workdir={tmp_path}/runs"],
        env=_environment(PYTHON=sys.executable, MODULE="toy", PYTHONPATH=tmp_path),
        cwd=tmp_path,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for process in range(2):
        log = (tmp_path / f"runs/logs/process-{process}.log").read_text()
        assert "found 2 3 6 10 11" in log


# slurm.sh

# Starts its script as a job of the allocation that the flags ask for.
SBATCH = """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$FAKE/sbatch"
for flag in "$@"; do
  shift
  case $flag in
    --nodes=*) export SLURM_JOB_NUM_NODES=${flag#*=} ;;
    --ntasks-per-node=*) export SLURM_NTASKS_PER_NODE=${flag#*=} ;;
    --gpus-per-node=*) export SLURM_GPUS_ON_NODE=${flag#*=} ;;
    *.sh) script=$flag; break ;;
  esac
done
export SLURM_JOB_ID=77
cp "$script" "$FAKE/slurm_script" # as SLURM does: the script runs from a copy
bash "$FAKE/slurm_script" "$@"
"""
# Runs every task; the highest exit code is its own, as with the real one.
SRUN = """#!/usr/bin/env bash
printf '%s\\0' "$@" >"$FAKE/srun"
output=
while [[ $1 == --* ]]; do [[ $1 != --output=* ]] || output=${1#*=}; shift; done
trap 'kill -TERM "${pids[@]}"' TERM
for ((id = 0; id < SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE; id++)); do
  SLURM_PROCID=$id SLURM_LOCALID=$((id % SLURM_NTASKS_PER_NODE)) "$@" >>"${output/\\%t/$id}" 2>&1 &
  pids+=("$!")
done
highest=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  ((code <= highest)) || highest=$code
done
exit "$highest"
"""


@pytest.fixture
def slurm(stub, tmp_path):
    """A function that runs slurm.sh on a fake cluster."""
    commands = tmp_path / "bin"
    commands.mkdir()
    _executable(commands / "sbatch", SBATCH)
    _executable(commands / "srun", SRUN)
    _executable(commands / "scontrol", '#!/usr/bin/env bash\necho "$@" >"$FAKE/scontrol"\n')
    (tmp_path / "fake").mkdir()

    def run(*arguments, does="", **environment):
        (stub / "does").write_text(does)
        everything = _environment(
            commands, PYTHON=stub / "python", FAKE=tmp_path / "fake", **environment
        )
        return _run([LAUNCH / "slurm.sh", *arguments], env=everything)

    run.fake = tmp_path / "fake"
    return run


def _words(path):
    return path.read_text().split("\0")[:-1]


def test_slurm_submits_itself_and_starts_a_task_per_gpu(slurm, stub):
    more = [*AWKWARD[:-1], f"--workdir={stub}/runs"]
    options = ["--nodes=2", "--gpus=2", "--time=1:00:00", "--sbatch=--comment=a b", "--restarts=3"]
    ended = slurm(*options, "--", *more)
    assert ended.returncode == 0, ended.stderr
    assert _words(slurm.fake / "sbatch") == [
        "--nodes=2",
        "--ntasks-per-node=2",
        "--gpus-per-node=2",
        "--time=1:00:00",
        "--comment=a b",
        str(LAUNCH / "slurm.sh"),
        "--restarts=3",
        "--",
        *more,
    ]
    words = _words(slurm.fake / "srun")
    program = words.index(str(stub / "python"))
    assert words[program + 1 :] == ["-m", "fsdfm_jax.main", "--distributed", *more]
    # Killing at the first exit code would cut off the saves of the others.
    assert {"--kill-on-bad-exit=0", "--gpu-bind=none"} <= set(words[:program])
    for task in range(4):
        seen = _seen(stub, task)
        assert seen["argv"] == words[program + 1 :]
        assert "JAX_LOCAL_DEVICE_IDS" not in seen["env"]  # JAX takes GPU SLURM_LOCALID
        assert f"process {task}" in (stub / f"runs/logs/process-{task}.log").read_text()
    assert not (slurm.fake / "scontrol").exists()


def test_slurm_asks_for_the_signal_before_the_limit_and_to_be_requeued():
    asked = re.findall(r"^#SBATCH (\S+)", (LAUNCH / "slurm.sh").read_text(), re.M)
    assert {"--signal=TERM@120", "--requeue", "--open-mode=append"} <= set(asked)


def test_slurm_task_per_node_takes_all_its_gpus(slurm, stub):
    ended = slurm("--nodes=2", "--gpus=4", "--per_node", "--", "--workdir", f"{stub}/runs")
    assert ended.returncode == 0, ended.stderr
    assert "--ntasks-per-node=1" in _words(slurm.fake / "sbatch")
    for task in range(2):
        assert _seen(stub, task)["env"]["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3"


@pytest.mark.parametrize(
    ("code", "restarted", "requeued"),
    [(143, 0, True), (143, 2, False), (1, 0, False), (2, 0, False), (134, 0, False)],
)
def test_slurm_requeues_what_saved_itself(slurm, stub, code, restarted, requeued):
    ended = slurm(
        *["--gpus=2", "--restarts=2", "--", f"--workdir={stub}/runs"],
        does=f"if me == '1': sys.exit({code})",
        SLURM_RESTART_COUNT=restarted,
    )
    assert ended.returncode == code
    assert (slurm.fake / "scontrol").exists() == requeued
    if requeued:
        assert (slurm.fake / "scontrol").read_text() == "requeue 77\n"


def test_slurm_does_not_requeue_what_was_cancelled(slurm, stub, tmp_path):
    (stub / "does").write_text("time.sleep(60)")
    environment = _environment(
        tmp_path / "bin",
        PYTHON=stub / "python",
        FAKE=slurm.fake,
        SLURM_JOB_ID=5,
        SLURM_JOB_NUM_NODES=1,
        SLURM_NTASKS_PER_NODE=1,
    )
    command = [LAUNCH / "slurm.sh", "--", f"--workdir={stub}/runs"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    ) as job:
        _wait_until(lambda: (stub / "ready-0-0").exists())
        os.killpg(job.pid, signal.SIGTERM)
        assert job.wait(20) == 143
    assert not (slurm.fake / "sbatch").exists()  # inside an allocation nothing is submitted
    assert not (slurm.fake / "scontrol").exists()


def test_slurm_dry_run_prints_both_commands():
    command = [LAUNCH / "slurm.sh", "--gpus=2", "--per_node", "--dry_run", "--", *AWKWARD]
    submitted, started = _run(command, env=_environment()).stdout.splitlines()
    assert shlex.split(submitted)[-len(AWKWARD) :] == AWKWARD
    words = shlex.split(started)
    assert words[:2] == ["JAX_LOCAL_DEVICE_IDS=0,1", "srun"]
    assert "--output=/x y/z/logs/process-%t.log" in words
    assert words[-len(AWKWARD) :] == AWKWARD


def test_slurm_says_where_it_belongs(stub):
    environment = _environment() | {"PATH": str(_only(stub, "bash", "awk", "env"))}
    refused = _run([LAUNCH / "slurm.sh", "--", "--workdir=x"], env=environment)
    assert refused.returncode == 2
    assert "sbatch is not on PATH" in refused.stderr


def _only(folder, *names):
    """A folder for PATH with only these commands."""
    place = folder / "only"
    place.mkdir()
    for name in names:
        (place / name).symlink_to(shutil.which(name))
    return place


# tpu_pod.sh

# A cloud in the folder FAKE: `state` of the queued resource, and a home for each of two hosts of
# each slice. Words of every call go to a file in `calls`; commands of `ssh` are run. `fail-VERB`
# holds how many calls of VERB fail.
GCLOUD = """#!/usr/bin/env bash
set -e
mkdir -p "$FAKE/calls"
printf '%s\\0' "$@" >"$FAKE/calls/$(date +%s%N)-$$"
[[ "$1 $2" == "compute tpus" ]]
kind=$3 verb=$4
shift 4
if [[ -e $FAKE/fail-$verb ]]; then # as often as it says
  left=$(($(cat "$FAKE/fail-$verb") - 1))
  if ((left)); then echo "$left" >"$FAKE/fail-$verb"; else rm "$FAKE/fail-$verb"; fi
  echo "ERROR: (gcloud) connection lost" >&2
  exit 255
fi
case "$kind $verb" in
  "queued-resources describe")
    if [[ ! -e $FAKE/state ]]; then echo "ERROR: (gcloud) NOT_FOUND: no such thing" >&2; exit 1; fi
    cat "$FAKE/state" ;;
  "queued-resources create") echo ACTIVE >"$FAKE/state" ;;
  "queued-resources delete")
    for pid in $(cat "$FAKE"/host-*/fsdfm_run/pid); do
      kill -KILL -- "-$(ps -o pgid= -p "$pid" | tr -d ' ')" 2>/dev/null || true
    done
    rm -rf "$FAKE"/host-* "$FAKE/state" ;;
  "tpu-vm scp")
    for host in 0 1; do
      mkdir -p "$FAKE/host-${2%%:*}-$host"
      cp "$1" "$FAKE/host-${2%%:*}-$host/${2#*:}"
    done ;;
  "tpu-vm ssh")
    node=$1 hosts="0 1"
    for flag in "$@"; do
      case $flag in
        --worker=[0-9]) hosts=${flag#*=} ;;
        --command=*) command=${flag#*=} ;;
      esac
    done
    for host in $hosts; do
      mkdir -p "$FAKE/host-$node-$host"
      cd "$FAKE/host-$node-$host"
      HOME=$PWD TPU_HOST=$node-$host bash -c "$command"
    done ;;
esac
"""
# `uv venv` and `uv pip install` put the program's stand-in where Python would be.
UV = """#!/usr/bin/env bash
[[ $1 == venv ]] || exit 0
mkdir -p fsdfm_env/bin
printf '#!/usr/bin/env bash\\nexec "%s" "$@"\\n' "$STUB/python" >fsdfm_env/bin/python
chmod +x fsdfm_env/bin/python
"""


def _kill_group(pid):
    """Kill a program of `start` together with the shell that waits for it."""
    os.killpg(os.getpgid(pid), signal.SIGKILL)


@pytest.fixture
def cloud(stub, tmp_path):
    """A function that runs tpu_pod.sh on a fake cloud, without long pauses."""
    commands = tmp_path / "bin"
    commands.mkdir()
    _executable(commands / "gcloud", GCLOUD)
    _executable(commands / "uv", UV)
    fake = tmp_path / "cloud"

    def command(action, *arguments):
        options = ["--name=pod", "--zone=z", "--poll=0", "--settle=0", "--grace=10"]
        return [str(LAUNCH / "tpu_pod.sh"), action, *options, *arguments]

    def run(action, *arguments, does=None):
        if does is not None:
            (stub / "does").write_text(does)
        return _run(command(action, *arguments), env=run.environment)

    run.command, run.fake = command, fake
    run.environment = _environment(commands, FAKE=fake, STUB=stub)
    yield run
    for pid in fake.glob("host-*/fsdfm_run/pid"):
        if not pid.with_name("exit").exists():
            _kill_group(int(pid.read_text()))


def _calls(cloud, *verbs):
    """Arguments of the calls of gcloud, those of `queued-resources VERB` or `tpu-vm VERB`."""
    calls = [_words(path) for path in sorted((cloud.fake / "calls").iterdir())]
    return [call[4:] for call in calls if call[3] in verbs]


def test_tpu_pod_runs_from_nothing_to_the_end_on_all_hosts(cloud, stub):
    more = [*AWKWARD[:-1], "--workdir=/shared/x"]
    options = ["--type=v5litepod-16", "--slices=2", "--spot", "--project=p", "--env=NOTE=a 'b'"]
    ended = cloud("run", *options, "--setup=touch 'mounted here'", "--", *more)
    assert ended.returncode == 0, ended.stderr
    assert _calls(cloud, "create") == [
        [
            *["pod", "--zone=z", "--project=p", "--node-count=2", "--node-prefix=pod"],
            *["--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite"],
            *["--spot", "--quiet"],
        ]
    ]
    for call in _calls(cloud, "ssh", "scp"):
        assert {"--worker=all", "--zone=z", "--project=p"} <= set(call)
    for host in ("pod-0-0", "pod-0-1", "pod-1-0", "pod-1-1"):
        seen = _seen(stub, host)
        assert seen["argv"] == ["-m", "fsdfm_jax.main", "--distributed", *more]
        assert seen["env"]["NOTE"] == "a 'b'"
        home = cloud.fake / f"host-{host}"
        assert (home / "fsdfm_jax/fsdfm_jax/main.py").is_file()
        assert f"process {host}" in (home / "fsdfm_run/log").read_text()
        assert (home / "mounted here").exists()


RUN = ("run", "--type=v6e-8", "--", "--workdir=/x")


def test_tpu_pod_comes_back_after_a_preemption(cloud):
    # The first program takes its slice away.
    does = (
        "fake = pathlib.Path(os.environ['FAKE'])\n"
        "if attempt == 0 and me == 'pod-1': (fake / 'state').write_text('SUSPENDED')\n"
        "time.sleep(0 if attempt else 60)"
    )
    ended = cloud(*RUN, does=does)
    assert ended.returncode == 0, ended.stderr
    assert "pod is SUSPENDED" in ended.stderr
    assert len(_calls(cloud, "create")) == 2
    assert _calls(cloud, "delete") == [["pod", "--zone=z", "--force", "--quiet"]]


def test_tpu_pod_restarts_a_failed_program_as_often_as_allowed(cloud, stub):
    does = "if me == 'pod-0': sys.exit(5)\ntime.sleep(60)"
    ended = cloud("run", "--type=v6e-8", "--restarts=1", "--", "--workdir=/x", does=does)
    assert ended.returncode == 5
    assert "told 15" in (cloud.fake / "host-pod-1/fsdfm_run/log").read_text()
    assert (stub / "seen-pod-1-1").exists()
    assert not (stub / "seen-pod-1-2").exists()
    assert len(_calls(cloud, "create")) == 1  # the slice was still there


def test_tpu_pod_does_not_restart_what_must_be_fixed(cloud, stub):
    # The host that exits with 2 is not the first to end, and one keeps waiting.
    does = (
        "if me == 'pod-0-0': sys.exit(134)\n"
        "if me == 'pod-1-0': time.sleep(1); sys.exit(2)\n"
        "time.sleep(60)"
    )
    options = ["--type=v6e-8", "--slices=2", "--settle=3"]
    ended = cloud("run", *options, "--", "--workdir=/x", does=does)
    assert ended.returncode == 2, ended.stderr
    assert "you must fix something" in ended.stderr
    assert not (stub / "seen-pod-0-0-1").exists()
    # No host is left behind that still waits for the others.
    assert "told 15" in (cloud.fake / "host-pod-1-1/fsdfm_run/log").read_text()


def _start_by_hand(cloud):
    assert cloud("create", "--type=v6e-8").returncode == 0
    assert cloud("install").returncode == 0
    assert cloud("start", "--", "--workdir=/x", does="time.sleep(60)").returncode == 0


def test_tpu_pod_run_stops_nothing_before_every_host_has_answered(cloud, stub):
    _start_by_hand(cloud)
    # The first look at the state fails, as do the first two at the hosts.
    (cloud.fake / "fail-describe").write_text("1")
    (cloud.fake / "fail-ssh").write_text("2")
    with subprocess.Popen(
        cloud.command(*RUN), env=cloud.environment, stderr=subprocess.PIPE, text=True
    ) as run:
        _wait_until(lambda: not list(cloud.fake.glob("fail-*")))
        assert cloud("stop").returncode == 0
        assert run.wait(30) == 143
        said = run.stderr.read()
    assert "already running on pod" in said
    assert len(_calls(cloud, "create")) == len(_calls(cloud, "scp")) == 1
    for host in ("pod-0", "pod-1"):
        assert not (stub / f"seen-{host}-1").exists()


def test_tpu_pod_run_leaves_alone_what_does_not_answer(cloud, stub):
    _start_by_hand(cloud)
    (cloud.fake / "fail-ssh").write_text("1000")
    ended = cloud(*RUN)
    assert ended.returncode == 1
    assert "in 10 attempts" in ended.stderr
    assert "nothing was stopped" in ended.stderr
    (cloud.fake / "fail-ssh").unlink()
    assert cloud("status").stdout.count("running") == 2
    assert not (stub / "seen-pod-0-1").exists()


def test_tpu_pod_stop_saves_and_ends_the_run(cloud, stub):
    (stub / "does").write_text("time.sleep(60)")
    with subprocess.Popen(cloud.command(*RUN), env=cloud.environment) as run:
        _wait_until(lambda: (stub / "ready-pod-1-0").exists())
        assert run.poll() is None
        status = cloud("status")
        assert status.stdout.splitlines()[0] == "pod ACTIVE"
        assert status.stdout.count("running") == 2
        # A second `run` watches what is there, and a second `start` is refused.
        with subprocess.Popen(cloud.command(*RUN), env=cloud.environment) as second:
            twice = cloud("start", "--", "--workdir=/x")
            assert twice.returncode != 0
            assert "already running" in twice.stderr
            assert cloud("stop").returncode == 0
            assert run.wait(30) == 143
            assert second.wait(30) == 143
    for host in ("pod-0", "pod-1"):
        assert "told 15" in (cloud.fake / f"host-{host}/fsdfm_run/log").read_text()
    assert not (stub / "seen-pod-0-1").exists()
    assert cloud("status").stdout.count("stopped") == 2
    assert cloud("delete").returncode == 0
    assert not (cloud.fake / "state").exists()


def test_tpu_pod_sees_hosts_that_lost_their_program(cloud, stub):
    _start_by_hand(cloud)
    host = cloud.fake / "host-pod-1/fsdfm_run"
    pid = int((host / "pid").read_text())
    # As after a reboot: neither the program nor the shell that waits for it is left.
    _kill_group(pid)
    _wait_until(lambda: "lost" in cloud("status").stdout)
    assert cloud("watch").returncode == 1
    (host / "exit").touch()  # for the fixture: nothing is left to kill


def test_tpu_pod_does_not_take_an_error_for_a_missing_slice(cloud):
    broken = GCLOUD.replace("NOT_FOUND: no such thing", "PERMISSION_DENIED: not yours")
    _executable(pathlib.Path(shutil.which("gcloud", path=cloud.environment["PATH"])), broken)
    shown = cloud("status")
    assert shown.returncode == 1
    assert "PERMISSION_DENIED" in shown.stderr


def test_tpu_pod_dry_run_needs_no_gcloud_and_prints_what_a_shell_reads_back(stub):
    only = _only(stub, "bash", "awk", "env", "dirname", "cat", "rm")
    command = [LAUNCH / "tpu_pod.sh", "run", "--name=pod", "--zone=z", "--type=v5p-128"]
    tail = ["--", *AWKWARD]
    refused = _run([*command, *tail], env={"PATH": str(only)})
    assert refused.returncode == 2
    assert "gcloud is not on PATH" in refused.stderr
    shown = _run([*command, "--setup=echo 'a b'", "--dry_run", *tail], env={"PATH": str(only)})
    assert shown.returncode == 0, shown.stderr
    words = shlex.split(shown.stdout)
    assert "--runtime-version=v2-alpha-tpuv5" in words
    assert "--command=echo 'a b'" in words
    (start,) = [word for word in words if word.startswith("--command=program=")]
    program = shlex.split(start.removeprefix("--command="))[0].removeprefix("program=")
    assert shlex.split(program)[-len(AWKWARD) :] == AWKWARD
    verbs = [words[at + 3 : at + 5] for at, word in enumerate(words) if word == "gcloud"]
    assert verbs == [
        ["queued-resources", "describe"],
        ["queued-resources", "create"],
        ["tpu-vm", "ssh"],  # ends what may still run
        ["tpu-vm", "ssh"],  # --setup
        ["tpu-vm", "scp"],
        ["tpu-vm", "ssh"],  # installs
        ["tpu-vm", "ssh"],  # starts
        ["queued-resources", "describe"],
        ["tpu-vm", "ssh"],  # looks
    ]


# gke_jobset.yaml

FILLED = {
    "JOB_NAME": "fsdfm",
    "IMAGE": "registry/image:1",
    "SLICES": "2",
    "ACCELERATOR": "tpu-v5-lite-podslice",
    "TOPOLOGY": "4x8",
    "HOSTS_PER_SLICE": "8",
    "CHIPS_PER_HOST": "4",
    "RESTARTS": "10",
    "CLAIM": "runs",
    "QUEUE": "",
    "ARGUMENTS": """--config=configs/tiny.py:smoke --workdir=/runs/x --note="it's 2 words: #1" """,
}


def _manifest():
    text = (LAUNCH / "gke_jobset.yaml").read_text().replace("${NAME}", "")
    placeholder = re.compile(r"\$\{?([A-Za-z_]\w*)\}?")  # as envsubst sees them
    assert set(placeholder.findall(text)) == set(FILLED)
    return yaml.safe_load(placeholder.sub(lambda found: FILLED[found[1]], text))


def test_jobset_is_what_gke_needs_for_tpu_slices():
    manifest = _manifest()
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    metadata = manifest["metadata"]
    assert metadata["name"] == "fsdfm"
    assert metadata["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert metadata["labels"]["kueue.x-k8s.io/queue-name"] == ""  # a string, and not null
    (slices,) = manifest["spec"]["replicatedJobs"]
    assert slices["replicas"] == 2
    job = slices["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 8
    assert job["backoffLimit"] == 0
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x8",
    }
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy needs
    assert pod["terminationGracePeriodSeconds"] >= 120
    (container,) = pod["containers"]
    assert container["resources"] == {"limits": {"google.com/tpu": 4}}
    claims = {v["name"]: v.get("persistentVolumeClaim") for v in pod["volumes"]}
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert claims["runs"] == {"claimName": "runs"}
    assert mounted["runs"] == "/runs"
    assert set(mounted) == set(claims)


def test_jobset_restarts_whole():
    spec = _manifest()["spec"]
    assert spec["failurePolicy"]["maxRestarts"] == 10
    assert spec["failurePolicy"]["restartStrategy"] == "BlockingRecreate"


def _job_message(rules, *, code=None, condition=None):
    """The message of Kubernetes' Job controller for the first rule that a pod matches, or None."""
    for index, rule in enumerate(rules):
        assert rule["action"] == "FailJob"
        matched = f"matching FailJob rule at index {index}"
        if "onExitCodes" in rule and code is not None:
            asked = rule["onExitCodes"]
            assert (asked["containerName"], asked["operator"]) == ("train", "In")
            if code in asked["values"]:
                return f"Container train for pod default/x failed with exit code {code} {matched}"
        for wanted in rule.get("onPodConditions", []):
            assert wanted["status"] == "True"
            if wanted["type"] == condition:
                return f"Pod default/x has condition {condition} {matched}"
    return None


@pytest.mark.parametrize(
    ("failure", "action"),
    [
        ({"code": 2}, "FailJobSet"),
        ({"code": 2, "condition": "DisruptionTarget"}, "FailJobSet"),
        ({"code": 143}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"code": 137, "condition": "DisruptionTarget"}, "RestartJobSetAndIgnoreMaxRestarts"),
        ({"code": 1}, "RestartJobSet"),
        ({"code": 134}, "RestartJobSet"),
    ],
)
def test_jobset_ends_for_good_when_a_restart_does_not_help(failure, action):
    spec = _manifest()["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    message = _job_message(job["podFailurePolicy"]["rules"], **failure)
    taken = "RestartJobSet"  # what JobSet does where no rule applies
    for rule in spec["failurePolicy"]["rules"]:
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
        if message and any(re.search(p, message) for p in rule["onJobFailureMessagePatterns"]):
            taken = rule["action"]
            break
    assert taken == action


def _container():
    """Command of the container, as a list of words."""
    pod = _manifest()["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return [*container["command"], *container["args"]]


def test_jobset_runs_the_program_with_awkward_arguments(stub):
    ended = _run(_container(), env=_environment(stub))
    assert ended.returncode == 0, ended.stderr
    assert _seen(stub)["argv"][2:] == [
        "--distributed",
        "--config=configs/tiny.py:smoke",
        "--workdir=/runs/x",
        "--note=it's 2 words: #1",
    ]


def test_jobset_passes_a_signal_on_to_a_program_that_does_not_handle_it(stub):
    # As Python where it prepares or loads: as the container's first process it would never end.
    (stub / "does").write_text(
        "signal.signal(signal.SIGTERM, signal.SIG_DFL)\n(here / 'listens').touch()\ntime.sleep(60)"
    )
    # In a container's place a namespace of processes, where this system lets one make it.
    alone = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child"]
    namespace = (
        pathlib.Path("/proc/thread-self/children").exists()
        and shutil.which("unshare") is not None
        and _run([*alone, "true"]).returncode == 0
    )
    command = [*(alone if namespace else []), *_container()]
    with subprocess.Popen(command, env=_environment(stub)) as outer:
        _wait_until(lambda: (stub / "listens").exists())
        first = outer.pid
        if namespace:
            first = int(pathlib.Path(f"/proc/{first}/task/{first}/children").read_text())
        os.kill(first, signal.SIGTERM)
        try:
            assert outer.wait(10) == 143
        finally:
            outer.kill()


def test_jobset_waits_for_the_program_to_save(stub):
    (stub / "does").write_text(
        "def save(number, frame):\n"
        "    time.sleep(0.5)\n"
        "    (here / 'saved').touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(here / 'listens').touch()\n"
        "time.sleep(60)"
    )
    with subprocess.Popen(_container(), env=_environment(stub)) as pod:
        _wait_until(lambda: (stub / "listens").exists())
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(10) == 143
        assert (stub / "saved").exists()


@pytest.mark.parametrize(("code", "at_once"), [(0, True), (2, True), (143, True), (134, False)])
def test_jobset_shows_first_what_says_why(stub, tmp_path, code, at_once):
    waited = tmp_path / "bin"
    waited.mkdir()
    _executable(waited / "sleep", f"#!{BASH}\ntouch '{tmp_path}/waited'\n")
    (stub / "does").write_text(f"os._exit({code})")
    path = _environment(stub)["PATH"]
    ended = _run(_container(), env=_environment(stub) | {"PATH": f"{waited}{os.pathsep}{path}"})
    assert ended.returncode == code
    assert (tmp_path / "waited").exists() != at_once


def test_jobset_is_filled_in_by_envsubst():
    if shutil.which("envsubst") is None:
        pytest.skip("envsubst is not installed")
    text = (LAUNCH / "gke_jobset.yaml").read_text()
    filled = _run(["envsubst"], input=text, env=_environment(**FILLED)).stdout
    assert yaml.safe_load(filled) == _manifest()
