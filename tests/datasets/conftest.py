from __future__ import annotations

import functools
import http.server
import io
import os
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

Archives = Mapping[str, Mapping[str, int]]


@pytest.fixture(autouse=True, scope="session")
def _cache_away_from_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def omniglot_root(tmp_path: Path) -> Path:
    """A root with archives in Omniglot's layout: two alphabets of three characters in each, every
    character drawn six times."""
    archives: Archives = {
        "images_background": {"Aurek": 3, "Besh_(old)": 3},
        "images_evaluation": {"Cresh": 3, "Dorn": 3},
    }
    (tmp_path / "omniglot").mkdir()
    for seed, (name, alphabets) in enumerate(archives.items()):
        rng = np.random.default_rng(seed)
        with zipfile.ZipFile(tmp_path / "omniglot" / f"{name}.zip", "w") as archive:
            archive.writestr(f"{name}/", "")
            for alphabet, characters in alphabets.items():
                for number in range(1, characters + 1):
                    shape = np.kron(rng.random((7, 7)) < 0.3, np.ones((15, 15), dtype=bool))
                    for drawer in range(1, 7):
                        drawing = np.roll(shape, rng.integers(-4, 5, 2), (0, 1))
                        member = f"{alphabet}/character{number:02}/{number:04}_{drawer:02}.png"
                        archive.writestr(f"{name}/{member}", png(~drawing))
    return tmp_path


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="session")
def real_root() -> Path:
    """The folder of real data sets, where there is one."""
    root = os.environ.get("BENCH_DATA")
    if not root or not Path(root, "omniglot", "images_background.zip").is_file():
        pytest.skip("$BENCH_DATA is unset or has no omniglot/images_background.zip")
    return Path(root)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str, bytes], str]]:
    """Puts content on a web server of our own and returns its address."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        def put(name: str, content: bytes) -> str:
            (folder / name).write_bytes(content)
            return f"http://127.0.0.1:{server.server_port}/{name}"

        yield put
        server.shutdown()
        thread.join()
