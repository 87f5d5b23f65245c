"""Statements of SECURITY.md, RELEASING.md and CONTRIBUTING.md: each has a test that fails if it is not true."""

import ast
import os
import re
import stat

import pytest

from permafrost.config.compose import compose
from permafrost.config.verbs import build_verb_config
from permafrost.core.errors import UserError
from permafrost.sources.source import build_source
from permafrost.storage.files import file_at
from permafrost.storage.rooted_paths import RootedPath
from permafrost_sources.options import WebDatasetDataConfig
from tests.support.items import for_each
from tests.support.paths import ROOT

STATEMENTS = {
    "No store, share, table, tar": (
        "store/test_hostile.py::test_an_array_that_names_pickle_runs_nothing",
        "sources/test_webdataset_source.py::test_pickled_members_are_refused_by_name",
        "sources/test_published_sets.py::test_a_batch_with_another_checksum_is_never_unpickled",
        "exchange/test_ingest.py::test_a_pickle_that_runs_code_is_refused_and_does_not_run",
    ),
    "Torch files of targets": (
        "exchange/test_ingest.py::test_code_is_refused_in_every_protocol",
        "exchange/test_ingest.py::test_an_array_of_objects_is_not_unpickled",
        "exchange/test_share.py::test_the_hub_gets_a_folder_and_its_kind",
    ),
    "`logger=wandb`": (
        "loggers/test_loggers.py::test_a_training_goes_on_where_the_server_is_not_reached",
    ),
    "Ray and loader processes": (
        "sources/test_sources.py::test_every_source_can_be_planned_pickled_and_fingerprinted",
    ),
    "A store or a share from": (
        "exchange/test_hostile_shares.py::test_a_share_that_no_pass_writes_is_refused",
        "exchange/test_hostile_shares.py::test_the_fingerprint_of_another_pass_is_not_taken",
        "exchange/test_share.py::test_a_pass_comes_back_with_its_bytes_in_a_store_that_was_packed_again",
        "store/test_hostile.py::test_a_manifest_that_is_a_pipe_is_refused",
    ),
    "Nothing outside the folder": (
        "store/test_links.py::test_no_link_is_read_through_and_verify_names_it",
        "store/test_links.py::test_nothing_is_written_through_a_link",
        "store/test_links.py::test_the_links_of_an_own_store_may_be_allowed",
        "exchange/test_hostile_shares.py::test_a_share_that_no_pass_writes_is_refused",
    ),
    "A path in a table": (
        "test_named_paths.py::test_a_cell_of_a_table_names_no_file_outside",
        "hub/test_huggingface.py::test_a_cell_names_no_file_outside_of_the_data_set",
        "sources/test_image_folder.py::test_a_link_to_another_folder_is_followed",
    ),
    "Cached copies of columns": (
        "exchange/test_ingest.py::test_files_of_one_name_size_and_time_are_two_files",
        "exchange/test_ingest.py::test_a_damaged_copy_is_named_when_it_is_read",
        "sources/test_webdataset_in_place.py::test_a_download_that_was_changed_is_named",
    ),
    "A tar that a store's manifest": ("store/test_hostile.py::test_*tar*",),
    "Credentials of a bucket": (
        "storage/test_buckets.py::test_an_address_that_cannot_be_used_is_one_line_without_its_secret",
        "storage/test_buckets.py::test_bytes_that_arrive_damaged_are_an_error_and_leave_nothing",
    ),
    "What a store or a source claims": (
        "store/test_bombs.py::test_a_bomb_is_refused_before_it_takes_memory",
    ),
    "A hard link cannot": ("docs/test_project_pages.py::test_a_hard_link_is_read_as_a_file",),
    "The files of a run": (
        "training/test_run_files.py::test_no_damaged_file_of_a_run_is_trained_on_evaluated_or_reported",
        "training/test_run_files.py::test_what_is_signed_is_checked_for_its_form",
    ),
    "Control characters": (
        "stages/test_terminal.py::test_names_in_a_source_are_printed_as_escapes",
        "stages/test_terminal.py::test_names_in_a_store_are_printed_as_escapes",
    ),
    "No option runs a command": (
        "docs/test_project_pages.py::test_an_option_is_not_replaced_by_a_variable",
        "config/test_composition.py::test_yaml_of_a_stranger_is_refused_in_one_line_before_it_grows",
        "docs/test_project_pages.py::test_a_pipe_of_webdataset_is_no_path",
    ),
    "Downloads happen for": (
        "sources/test_published_sets.py::test_a_download_happens_only_where_the_set_is_not_there",
        "sources/test_odd_input.py::test_weights_may_be_given_their_digest",
    ),
    "Stores and runs are written": (
        "docs/test_project_pages.py::test_modes_of_files_follow_the_umask",
    ),
    "Usage statistics of Ray": (
        "config/test_cluster_config.py::test_a_local_ray_is_made_large_enough_and_has_what_the_options_say",
    ),
}
"""Tests of each statement of SECURITY.md by its first words; tests/cluster/test_listeners.py has the table."""


def section_of(page, first, last):
    text = (ROOT / page).read_text()
    return text[text.index(first) : text.index(last)]


def bullets():
    text = section_of("SECURITY.md", "## Untrusted input", "## Dependencies")
    return [" ".join(b.split()) for b in re.split(r"\n(?:- |\n##)", text) if not b.startswith("#")]


def functions_in(path):
    tree = ast.parse(path.read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]


def test_every_statement_of_the_security_page_has_a_test():
    statements = [bullet for bullet in bullets() if not bullet.startswith("Files")]
    matched = {
        key: [s for s in statements if s.replace("- ", "", 1).startswith(key) or s.startswith(key)]
        for key in STATEMENTS
    }

    assert {key: len(found) for key, found in matched.items()} == dict.fromkeys(STATEMENTS, 1)
    assert len(statements) == len(STATEMENTS)


@for_each("statement", STATEMENTS)
def test_the_tests_of_a_statement_exist(statement):
    for name in STATEMENTS[statement]:
        file, _, pattern = name.partition("::")
        expression = re.compile(re.escape(pattern).replace(r"\*", ".*"))
        found = [f for f in functions_in(ROOT / "tests" / file) if expression.fullmatch(f)]
        assert found, name


@for_each("text", ["${oc.env:HOME}", "${HOME}", "$HOME", "${env:HOME}"])
def test_an_option_is_not_replaced_by_a_variable(text):
    words = [f"run={text}", "store.path=stores/digits", "data=digits", "teacher=none"]

    assert build_verb_config("precompute", compose("precompute", words)).run == text


def test_a_pipe_of_webdataset_is_no_path():
    with pytest.raises(UserError, match="pipe:"):
        list(build_source(WebDatasetDataConfig(path="pipe:touch /tmp/x.tar")).records())


def test_a_hard_link_is_read_as_a_file(tmp_path):
    (tmp_path / "outside").write_bytes(b"x")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "file").hardlink_to(tmp_path / "outside")

    assert file_at(RootedPath(tmp_path / "store") / "file").read() == b"x"


@pytest.mark.parametrize("umask", [0o002, 0o022, 0o077])
def test_modes_of_files_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        file_at(tmp_path / "folder").make_folder()
        file_at(tmp_path / "folder" / "file").write(b"x")
    finally:
        os.umask(before)

    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o777 & ~umask
    assert stat.S_IMODE((tmp_path / "folder" / "file").stat().st_mode) == 0o666 & ~umask


def targets_of_the_makefile():
    text = (ROOT / "Makefile").read_text()
    stages = re.search(r"^STAGES := (.*)$", text, re.MULTILINE)[1].split()
    return {*stages, *re.findall(r"^([a-z-]+):.*##", text, re.MULTILINE)}


@for_each("page", ["RELEASING.md", "CONTRIBUTING.md"])
def test_every_target_of_a_page_is_in_the_makefile(page):
    text = (ROOT / page).read_text()
    named = {
        target
        for words in re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)", text, re.MULTILINE)
        for target in words.split()
    }

    assert named
    assert named <= targets_of_the_makefile()


@for_each("page", ["RELEASING.md", "CONTRIBUTING.md"])
def test_every_module_that_a_page_runs_exists(page):
    for module in re.findall(r"python -m ([\w.]+)", (ROOT / page).read_text()):
        path = module.replace(".", "/")
        bases = (ROOT, ROOT / "pipeline")
        assert any(
            (base / f"{path}.py").is_file() or (base / path / "__main__.py").is_file()
            for base in bases
        ), module


def test_the_tree_of_both_pages_is_one_and_that_of_the_repository():
    pages = ("CONTRIBUTING.md", "docs/development/architecture.md")
    trees = [
        re.search(r"```text\n(pipeline/.*?)```", (ROOT / page).read_text(), re.S)[1]
        for page in pages
    ]
    named = set(re.findall(r"(\w+)/", trees[0]))
    packages = {path.parent.name for path in ROOT.glob("pipeline/permafrost_*/__init__.py")}
    folders = {
        *(path.parent.name for path in ROOT.glob("pipeline/permafrost/*/__init__.py")),
        *(path.parent.name for path in ROOT.glob("pipeline/permafrost_papers/*/__init__.py")),
        *(name.removeprefix("permafrost_") for name in packages),
    }

    assert trees[0] == trees[1]
    assert trees[0].count("\n") <= 13
    assert named - {"pipeline", "permafrost"} == folders | {"stages", "conf", "tests", "docs"}


def test_the_release_says_where_the_version_is():
    text = (ROOT / "RELEASING.md").read_text()

    assert "[CITATION.cff](CITATION.cff)" in text
    assert "config/version.py" in text
    assert "permafrost-kd" in text
    assert 'name = "permafrost-kd"' in (ROOT / "pyproject.toml").read_text()


def test_the_lock_pins_every_package_with_its_hash():
    text = (ROOT / "requirements.lock").read_text()
    packages = [line for line in text.splitlines() if re.match(r"[a-z0-9]", line)]

    assert len(packages) > 50
    assert all("==" in line and line.rstrip().endswith("\\") for line in packages)
