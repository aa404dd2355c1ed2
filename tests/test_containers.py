"""Dockerfile and compose.yaml, without a daemon: the linter, what is copied, the steps in a clean environment."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from kcfi_cli import build_parser
from tests.test_packaging import FILES, FOLDERS, own_files

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
LIBRARIES = ROOT / "kcfi/scenes/libraries"
BUILT = "import kcfi.scenes.site as site; assert (site.LIBRARIES / site.LICENCES).is_file(); print(site.__file__)"


def stages():
    """The instructions of each stage, as (word, rest), by the stage's name; the last one's is "image"."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.M)
    found = {}
    for line in filter(None, re.sub(r"\\\n\s*", " ", text).splitlines()):
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            name = rest.partition(" AS ")[2] or "image"
        found.setdefault(name, []).append((word, rest))
    return found


STAGES = stages()


def steps(name):
    """The commands of a stage, without the mounts, which a build alone has."""
    return [re.sub(r"^--mount=\S+ ", "", rest) for word, rest in STAGES[name] if word == "RUN"]


def passes(path):
    """Whether .dockerignore lets a file into the build: the last pattern that fits it or a folder above it decides."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    passed = True
    for line in (line for line in lines if line and not line.startswith("#")):
        pattern = line.removeprefix("!")
        names = [path, *(parent.as_posix() for parent in Path(path).parents if parent != Path("."))]
        if any(fnmatch(name, pattern.removeprefix("**/")) or fnmatch(name, pattern) for name in names):
            passed = line.startswith("!")
    return passed


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    """The files of the repository that `COPY . .` copies."""
    folder = tmp_path_factory.mktemp("context")
    for top in filter(passes, (path.name for path in ROOT.iterdir())):
        if (ROOT / top).is_file():
            shutil.copy(ROOT / top, folder)
            continue
        for place, folders, files in os.walk(ROOT / top):
            links = [name for name in folders if (Path(place) / name).is_symlink()]
            for path in ((Path(place) / name).relative_to(ROOT) for name in [*files, *links]):
                if passes(path.as_posix()):
                    (folder / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(ROOT / path, folder / path, follow_symlinks=False)
    return folder


def execute(step, folder, **settings):
    done = subprocess.run(
        ["sh", "-ec", step], cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, **settings}
    )
    assert done.returncode == 0, f"{step}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_the_linter_finds_nothing():
    linter = Path(sys.executable).with_name("hadolint")
    if not linter.is_file():
        pytest.skip("no hadolint")
    done = subprocess.run([linter, ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_image_runs_as_a_user_without_rights_and_says_whether_it_is_well():
    last = dict(STAGES["image"])
    assert list(STAGES) == ["libraries", "wheel", "image"] and last["FROM"] == STAGES["wheel"][0][1].split()[0]
    assert int(last["USER"]) > 0 and f"--uid {last['USER']}" in steps("image")[0]
    words = [word for word, _ in STAGES["image"]]
    assert words.index("USER") > max(index for index, step in enumerate(STAGES["image"]) if "install" in step[1])
    assert "urlopen('http://127.0.0.1:7860/'" in last["HEALTHCHECK"] and last["EXPOSE"] == "7860 8000"
    assert not any(word == "ADD" for stage in STAGES.values() for word, _ in stage)


def test_what_changes_often_is_copied_after_what_takes_long():
    order = [rest for word, rest in STAGES["image"] if word in ("COPY", "RUN")]
    places = [next(k for k, rest in enumerate(order) if text in rest) for text in ("torch", "setup.cfg", "dist/*.whl")]
    assert places == sorted(places) and not any(rest.startswith(". ") for rest in order)


def test_the_build_sees_the_files_of_the_wheel_and_no_others(context):
    seen = {path.relative_to(context).parts[0] for path in context.iterdir()}
    assert seen == {*FOLDERS, *FILES, "libraries", "constraints.txt"}
    assert not passes("kcfi/scenes/libraries/geotiff.js") and not passes("libraries/node_modules/geotiff/LICENSE")
    assert not passes("kcfi/scenes/__pycache__/site.cpython-312.pyc") and not passes("runs/paper/model.safetensors")
    assert not passes(".git/config") and not passes(".env") and passes("kcfi/scenes/site.js")


def test_every_copied_path_is_there(context):
    for stage in STAGES.values():
        for _, rest in filter(lambda step: step[0] == "COPY" and "--from" not in step[1], stage):
            assert all((context / path).exists() for path in rest.split()[:-1]), rest


def test_the_requirements_are_those_of_the_package_and_its_three_extras(context, tmp_path):
    shutil.copy(context / "setup.cfg", tmp_path)
    [step] = [step for step in steps("image") if "requirements.txt" in step]
    execute(step.partition(" && ")[0], tmp_path, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    lines = list(filter(None, (tmp_path / "requirements.txt").read_text().splitlines()))
    assert {"torch>=2.14", "transformers[serving]>=5.24,<6", "rasterio>=1.4", "pyyaml>=6.0.2"} <= set(lines)
    assert not any(line.startswith(("#", " ")) or "pytest" in line for line in lines)


def test_the_step_that_builds_the_wheel_builds_it_with_the_libraries(context, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(context, project, symlinks=True)
    libraries = {f"kcfi/scenes/libraries/{path.name}" for path in LIBRARIES.glob("*")}
    if libraries:
        shutil.copytree(LIBRARIES, project / "kcfi/scenes/libraries")
    [step] = steps("wheel")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    execute(step, project, PATH=path, PIP_NO_BUILD_ISOLATION="0")  # with the setuptools of here, not a download
    [wheel] = (project / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == set().union(*map(own_files, FOLDERS)) and libraries <= names


@pytest.mark.slow  # installs gigabytes
@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm")
@pytest.mark.timeout(3600)
def test_the_steps_make_a_kcfi_that_captions_in_a_clean_environment(context, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(context, project, symlinks=True)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    inside = {"PATH": f"{tmp_path / 'venv/bin'}:{os.environ['PATH']}", "PYTHONPATH": "", "TORCH_INDEX": ""}
    installing = [step for step in steps("image") if "pip install" in step]
    assert len(installing) == 3
    for step in [*steps("libraries"), *steps("wheel"), *installing]:
        execute(step, project, **inside)
    before, after = (str(ROOT / f"kcfi/example/{date}.png") for date in ("before", "after"))
    execute(f"kcfi caption {before} {after} --output out > said.txt", tmp_path, **inside)
    assert "houses" in (tmp_path / "said.txt").read_text()
    execute(f'python -c "{BUILT}" > where.txt', tmp_path, **inside)
    assert "site-packages" in (tmp_path / "where.txt").read_text()


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_a_service_runs_a_command_that_there_is_and_listens_to_this_machine_alone(name):
    service = COMPOSE["services"][name]
    program, *arguments = service["command"]
    if not (ROOT / f"kcfi_cli/{arguments[0]}.py").is_file():
        pytest.skip(f"no kcfi {arguments[0]} in this checkout")
    options, more = build_parser().parse_known_args(arguments)
    host = options.host if "host" in options else more[more.index("--host") + 1]
    assert (program, host, service["image"], service["build"]["context"]) == ("kcfi", "0.0.0.0", "kcfi", ".")
    assert all(("ARG", f"{name}=") in STAGES["image"] for name in service["build"]["args"])
    [port] = service["ports"]
    inside = port.rpartition(":")[2]
    assert port == f"127.0.0.1:{inside}:{inside}" and inside in dict(STAGES["image"])["EXPOSE"].split()
    check = service.get("healthcheck", {"test": [dict(STAGES["image"])["HEALTHCHECK"]]})["test"][-1]
    assert f"http://127.0.0.1:{inside}/" in check
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]


def test_the_image_starts_what_compose_calls_the_demo():
    assert yaml.safe_load(dict(STAGES["image"])["CMD"]) == COMPOSE["services"]["demo"]["command"]


def test_compose_takes_the_file():
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) and not subprocess.run([*command, "version"], capture_output=True).returncode:
            done = subprocess.run([*command, "config"], cwd=ROOT, capture_output=True, text=True, check=True)
            assert set(yaml.safe_load(done.stdout)["services"]) == {"demo", "serve"}
            return
    pytest.skip("no docker compose")
