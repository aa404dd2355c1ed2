"""What `make test-versions` reads from setup.cfg, and the table it prints."""

from tests.versions import ROOT, counts_of, floors, table


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


def test_the_counts_are_those_of_the_closing_line_of_pytest():
    closing = "== 3 failed, 900 passed, 2 skipped, 5 warnings in 845.98s (0:14:05) =="
    assert counts_of(f"...\n{closing}\nException ignored in atexit callback\n") == "900 passed, 3 failed, 2 skipped"
    assert counts_of("9 passed in 1.20s\n") == "9 passed, 0 failed, 0 skipped"
    assert counts_of("== 1 passed, 1 error in 3.10s ==\n") is None and counts_of("Killed\n") is None
