"""The trace benchmark from end to end, with the bundled model and seconds instead of minutes."""

import json
from pathlib import Path

import pytest

from benchmarks.slo import __main__ as slo
from benchmarks.slo import results
from tests.bundled import FULL

pytestmark = pytest.mark.slow


def test_one_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = tmp_path / "mooncake.jsonl"
    rows = [{"timestamp": 40 * n, "input_length": 100 + n % 300, "output_length": 40 + n % 50} for n in range(3000)]
    trace.write_text("\n".join(json.dumps(row) for row in rows))
    flags = ["--policies", "slack", "--loads", "0.5", "--seconds", "2", "--capacity-seconds", "2", "--clients", "8"]
    flags += ["--rungs", "ends", "--drain-seconds", "20", "--name", "try", "--tightness", "50"]
    monkeypatch.setattr("sys.argv", ["benchmarks/slo/__main__.py", "--trace", str(trace), *flags])
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # put back at the end
    slo.main()
    found = json.loads((tmp_path / "slo-try.json").read_text())
    assert [rung["submodel"] for rung in found["capacity"]] == [found["floor"], FULL]
    assert found["command"].startswith("python -m benchmarks.slo --trace")
    [point] = found["points"]
    assert (point["policy"], point["load"]) == ("slack", 0.5)
    assert point["requests"] == round(point["requests_per_second"] * 2)
    # half of what it can do, and budgets that nothing misses: whatever the machine does, each is answered and kept
    assert (point["complete"], point["refused"]) == (point["requests"], 0)
    assert point["attainment"] == point["attainment_by_client"] == 1.0
    assert point["mean_quality"] == 1.0, "there is no reason for less than the full model"
    assert point["counters"][f"generation_tokens{{submodel={FULL}}}"] > 0
    assert point["total_ms"]["p50"] > point["ttft_ms"]["p50"] > 0
    page = (tmp_path / "slo-try.md").read_text()
    assert "| 0.50 |" in page
    assert f"| {FULL} | 1.0000 |" in page
