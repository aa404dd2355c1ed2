"""What `make test-versions` reads from setup.cfg, and the table it prints."""

from tests.versions import ROOT, floors, table


def test_a_floor_is_the_lowest_version_of_every_requirement_that_has_one(tmp_path):
    setup = tmp_path / "setup.cfg"
    setup.write_text(
        "[options]\ninstall_requires =\n    # a reason\n    torch>=2.6\n    transformers>=5.24,<6\n    evaluate\n"
        "[options.extras_require]\nserve =\n    transformers[serving]>=5.24,<6\n"
        'liger =\n    liger-kernel>=0.8.5; sys_platform == "linux"\n'
    )
    assert floors(setup) == ["liger-kernel==0.8.5", "torch==2.6", "transformers==5.24"]


def test_our_own_floors_name_every_package_of_the_core_once():
    names = [floor.partition("==")[0] for floor in floors(ROOT / "setup.cfg")]
    assert len(names) == len(set(names))  # two extras that disagree would be two
    assert {"transformers", "torch", "datasets", "peft", "evaluate", "accelerate", "timm", "deepspeed"} <= set(names)


def test_a_run_that_could_not_be_installed_is_a_row_too():
    rows = [
        {"python": "python3.11", "end": "floors", "torch": "2.6.0", "result": "9 passed, 0 failed, 1 skipped"},
        {"python": "python3.13", "end": "newest", "result": "not installed, see x.log"},
    ]
    lines = table(rows).splitlines()
    assert lines[0].startswith("| python | end | transformers | torch |") and lines[2].endswith(
        "| 9 passed, 0 failed, 1 skipped |"
    )
    assert lines[3].startswith("| python3.13 | newest |  |") and len({line.count("|") for line in lines}) == 1
