"""Hosts without a shared disk, in namespaces of this machine: the trials of `make test-hosts` that say the most."""

import re

import pytest

from tests.hosts.__main__ import run_trial
from tests.hosts.machines import reason_against

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of the trials, which share the undisturbed command."""
    if reason := reason_against():
        pytest.skip(f"no hosts on this machine: {reason}")
    return tmp_path_factory.mktemp("hosts")


def test_hosts_without_a_shared_disk_make_a_store(folder):
    outcome = run_trial("precompute", folder)

    assert outcome.codes == [0]
    assert outcome.compared > 100


def test_a_lost_host_changes_no_byte_of_the_store(folder):
    outcome = run_trial("lost-worker", folder)

    assert outcome.codes[-1] == 0, outcome
    assert outcome.differing == []


def test_hosts_without_a_gpu_decode_for_the_one_that_has_some(folder):
    outcome = run_trial("decode", folder)

    assert outcome.codes[-1] == 0, outcome
    assert outcome.differing == []
    (line,) = [line for line in outcome.said if "hosts were to decode" in line]
    batches = {host: int(count) for count, host in re.findall(r"(\d+) by ([^\s,]+)", line)}
    # Ray keeps to a process that is free again, so that one host may decode all.
    elsewhere = sum(batches.get(host, 0) for host in ("worker2", "worker3"))
    assert elsewhere >= 0.8 * sum(batches.values()) > 0
