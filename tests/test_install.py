"""The wheel holds what the package needs at run time."""

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_wheel_holds_the_index_the_manifest_and_the_command(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    wheel, = tmp_path.glob("selectbench-*.whl")
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        entry, = [n for n in names if n.endswith("entry_points.txt")]
        assert "selectbench = selectbench.report.cli:main" in z.read(entry).decode()
    kinds = (".py", ".json", ".jsonl", ".csv")
    here = {str(p.relative_to(ROOT)) for p in (ROOT / "selectbench").rglob("*") if p.suffix in kinds}
    assert here <= names and "selectbench/index.json" in names and "selectbench/pools/manifest.csv" in names
