"""Classes of requests in the topology: read, written back, and refused by the place of what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.core.config import DEFAULT_CLASSES, ClassConfig, dump_topology, load_topology, parse_topology
from penstock.core.errors import ConfigError


def test_classes_are_read_and_written_back(tmp_path: Path) -> None:
    rows = [{"name": "chat", "weight": 3, "target_ttft_s": 0.5}, {"name": "night"}]
    topology = parse_topology({"router": {"classes": rows, "default_class": "chat", "refuse_late": "always"}})
    assert topology.router.classes == (ClassConfig("chat", 3.0, 0.5), ClassConfig("night"))
    dump_topology(topology, tmp_path / "topology.yaml")
    assert load_topology(tmp_path / "topology.yaml") == topology


def test_classes_without_a_word_have_no_targets() -> None:
    router = parse_topology({}).router
    assert router.classes == DEFAULT_CLASSES
    assert [(one.target_ttft_s, one.target_tpot_s) for one in router.classes] == [(None, None)] * 3
    assert (router.refuse_late, router.max_promised_blocks) == ("auto", None)


@pytest.mark.parametrize(
    ("router", "what"),
    [
        ({"classes": "batch"}, r"router\.classes: must be a list of mappings"),
        ({"classes": ["batch"]}, r"router\.classes\[0\]: must be a mapping"),
        ({"classes": [{"weight": 2}]}, r"router\.classes\[0\]\.name: missing"),
        ({"classes": [{"name": "standard", "weight": 0}]}, r"router\.classes\[0\]\.weight: must be between"),
        ({"classes": [{"name": "standard", "wieght": 1}]}, r'did you mean "weight"'),
        ({"classes": [{"name": "standard"}, {"name": "standard"}]}, "standard is there twice"),
        ({"classes": [{"name": "My Class"}], "default_class": "My Class"}, "give 1 to 32 of"),
        ({"classes": []}, r"router\.default_class: 'standard' is not one of no classes"),
        ({"default_class": "vip"}, "'vip' is not one of interactive, standard, batch"),
        ({"refuse_late": "sometimes"}, r"router\.refuse_late"),
        ({"max_queued_tokens": 0}, r"router\.max_queued_tokens"),
    ],
)
def test_wrong_classes_are_refused_by_their_place(router: dict[str, object], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        parse_topology({"router": router})
