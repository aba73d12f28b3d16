"""What the tests on clusters share with those of the harness."""

from tests.bench.conftest import _tiny, bench, unmeasured

__all__ = ["_tiny", "bench", "unmeasured"]
