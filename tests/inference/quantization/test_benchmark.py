"""What docs/quantization.md says was measured is what the results file says."""

import importlib.util
import json
from pathlib import Path

ROOT = Path(__file__).parents[3]


def benchmark():
    spec = importlib.util.spec_from_file_location("quantization_benchmark", ROOT / "benchmarks" / "quantization.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_results():
    module = benchmark()
    results, page = json.loads(module.RESULTS.read_text()), module.DOCS.read_text()
    assert module.with_table(page, results) == page, "run: python benchmarks/quantization.py --docs"
    results["schemes"]["int8"]["kl"] += 0.01
    assert module.with_table(page, results) != page
