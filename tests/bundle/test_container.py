"""The safetensors container: it reads others' files, others read its own, it finds damage, and it writes atomically."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from mogle_rt.bundle import container as storage
from mogle_rt.bundle.container import MappedFile, TensorInfo, header_room, read_chunks, read_header, write_header
from mogle_rt.bundle.files import atomic_write, replace_together
from mogle_rt.errors import CheckpointError, OutputError
from tests.conftest import examples

KINDS = (
    *(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool),
)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
CONTENTS = st.dictionaries(NAMES, st.tuples(st.sampled_from(KINDS), SHAPES), max_size=6)
quick = examples(60)


def made(contents: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(len(contents))
    return {n: (torch.randn(shape, generator=g) * 9).to(dtype) for n, (dtype, shape) in contents.items()}


def equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())


@pytest.mark.quick
@quick
@given(contents=CONTENTS, metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=20), max_size=3))
def test_what_safetensors_writes_is_read(
    contents: dict[str, tuple[torch.dtype, tuple[int, ...]]], metadata: dict[str, str], tmp_path: Path
) -> None:
    tensors, path = made(contents), tmp_path / "x.safetensors"
    path.write_bytes(save(tensors, metadata or None))
    infos, found = read_header(path)
    assert found == metadata
    assert infos.keys() == tensors.keys()
    mapped = MappedFile(path)
    for name, tensor in tensors.items():
        assert infos[name].numel == tensor.numel()
        assert equal(mapped.tensor(infos[name]), tensor)
        chunks = [c.clone() for c in read_chunks(path, infos[name])]
        assert equal(torch.cat(chunks).view(tensor.shape) if chunks else mapped.tensor(infos[name]), tensor)


@pytest.mark.quick
@quick
@given(contents=CONTENTS)
def test_what_is_written_safetensors_reads(
    contents: dict[str, tuple[torch.dtype, tuple[int, ...]]], tmp_path: Path
) -> None:
    tensors, path = made(contents), tmp_path / "x.safetensors"
    start = position = header_room(list(tensors), {"a": "b"})
    assert start % 4096 == 0
    infos = {}
    with atomic_write(path) as f:
        for name, tensor in tensors.items():
            infos[name] = TensorInfo(tensor.dtype, tuple(tensor.shape), position, position + tensor.nbytes)
            f.seek(position)
            f.write(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
            position += tensor.nbytes
        f.truncate(position)
        write_header(f, infos, {"a": "b"}, start)
    assert read_header(path) == (infos, {"a": "b"})
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(equal(found[n], t) for n, t in tensors.items())


def test_a_header_without_room() -> None:
    info = TensorInfo(torch.float32, (1,), 64, 68)
    with open(os.devnull, "wb") as f, pytest.raises(CheckpointError, match=r"header of .* bytes does not fit into 56"):
        write_header(f, {"a name of some length": info}, {}, 64)


def small_file(path: Path) -> Path:
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path, {"k": "v"})
    return path


def test_every_truncation_is_found(tmp_path: Path) -> None:
    data = small_file(tmp_path / "x").read_bytes()
    for length in range(len(data)):
        (tmp_path / "x").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut short|not a safetensors file"):
            read_header(tmp_path / "x")
    (tmp_path / "x").write_bytes(data + b"\0")
    with pytest.raises(CheckpointError, match=f"too long: .* {len(data)} bytes, the file has {len(data) + 1}"):
        read_header(tmp_path / "x")


@examples(300)
@given(edits=st.lists(st.tuples(st.integers(0, 250), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_headers_are_refused_or_fit_the_file(edits: list[tuple[int, int]], tmp_path: Path) -> None:
    """Whatever bytes a header has, reading it raises an error of this package or gives tensors within the file."""
    path = small_file(tmp_path / "x")
    data = bytearray(path.read_bytes())
    for position, value in edits:
        data[position % len(data)] = value
    path.write_bytes(data)
    try:
        infos, metadata = read_header(path)
    except CheckpointError as error:
        message = str(error)
    else:
        assert all(0 <= i.begin <= i.end <= len(data) for i in infos.values())
        assert all(isinstance(v, str) for v in metadata.values())
        mapped = MappedFile(path)
        assert all(mapped.tensor(i).shape == i.shape for i in infos.values())
        return
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4"]) | JSON,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(-1, 30), st.integers(-1, 30)) | JSON,
    },
)


@examples(300)
@given(header=st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]), ENTRY | JSON, max_size=3) | JSON)
def test_headers_of_any_json_are_refused_or_fit_the_file(header: object, tmp_path: Path) -> None:
    path = tmp_path / "x"
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(24))
    try:
        infos, _ = read_header(path)
    except CheckpointError:
        return
    assert sum(i.end - i.begin for i in infos.values()) == 24
    with path.open("rb") as f:
        assert load(f.read()).keys() == infos.keys()  # the safetensors package agrees that it is a file of the format


def test_a_tensor_of_very_many_dimensions_is_refused_at_once(tmp_path: Path) -> None:
    """The product of so many sizes would take minutes to compute, and an error with it would be megabytes long."""
    entry = {"dtype": "F32", "shape": [2**62] * 200_000, "data_offsets": [0, 4]}
    raw = json.dumps({"x": entry}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(4))
    with pytest.raises(CheckpointError, match="'x' has 200000 dimensions") as caught:
        read_header(tmp_path / "x.safetensors")
    assert len(str(caught.value)) < 500


def test_chunks_are_small_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "CHUNK", 64)
    tensor = torch.arange(1000, dtype=torch.int16)
    save_file({"other": torch.ones(3), "x": tensor}, tmp_path / "x")
    infos, _ = read_header(tmp_path / "x")
    for once in (False, True):
        chunks = [c.clone() for c in read_chunks(tmp_path / "x", infos["x"], once=once)]
        assert len(chunks) == 32
        assert max(c.nbytes for c in chunks) == 64
        assert torch.equal(torch.cat(chunks), tensor)


# Views


@pytest.mark.quick
def test_neighbours_are_one_view(tmp_path: Path) -> None:
    tensors = {x: torch.full((4, 2), float(i)) for i, x in enumerate("abc")}
    save_file(tensors | {"d": torch.ones(4, 2, dtype=torch.float16)}, tmp_path / "x")
    infos, _ = read_header(tmp_path / "x")
    mapped = MappedFile(tmp_path / "x")
    view = mapped.view([infos["a"], infos["b"], infos["c"]])
    assert view is not None
    assert torch.equal(view.view(3, 4, 2), torch.stack(list(tensors.values())))
    assert view.data_ptr() == mapped.tensor(infos["a"]).data_ptr()
    assert mapped.view([infos["a"], infos["c"]]) is None  # not neighbours
    assert mapped.view([infos["b"], infos["a"]]) is None  # not in this order
    for other in "abc":
        assert mapped.view([infos[other], infos["d"]]) is None  # not of one dtype


@pytest.mark.parametrize("padding", range(8))
def test_tensors_that_the_file_does_not_align(padding: int, tmp_path: Path) -> None:
    """The format asks for no alignment, so in others' files the data may begin at any byte."""
    tensor = torch.randn(5, 3, dtype=torch.float64)
    header = json.dumps({"x": {"dtype": "F64", "shape": [5, 3], "data_offsets": [0, 120]}}).encode() + b" " * padding
    path = tmp_path / "x"
    path.write_bytes(struct.pack("<Q", len(header)) + header + tensor.numpy().tobytes())
    infos, _ = read_header(path)
    mapped = MappedFile(path)
    assert (mapped.view([infos["x"]]) is None) == bool((8 + len(header)) % 8)
    assert torch.equal(mapped.tensor(infos["x"]), tensor)


def mapped_bytes() -> int:
    """How many bytes of the files that this process has mapped are in memory."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssFile:"))
    return 1024 * int(line.split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads its memory from /proc")
def test_released_pages_leave_memory_and_are_read_again(tmp_path: Path) -> None:
    tensor = torch.randn(8_000_000)
    save_file({"x": tensor}, tmp_path / "x")
    infos, _ = read_header(tmp_path / "x")
    mapped = MappedFile(tmp_path / "x")
    view = mapped.tensor(infos["x"])
    assert torch.equal(view, tensor)
    before = mapped_bytes()
    mapped.release(infos["x"])
    assert before - mapped_bytes() > 0.9 * tensor.nbytes
    assert torch.equal(view, tensor)


# Atomic writing


@pytest.mark.quick
def test_a_file_appears_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "x"
    with atomic_write(path) as f:
        f.write(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert list(path.parent.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_name_may_be_as_long_as_the_system_takes(tmp_path: Path) -> None:
    path = tmp_path / ("x" * os.pathconf(tmp_path, "PC_NAME_MAX"))
    with atomic_write(path) as f:
        f.write(b"whole")
    assert path.read_bytes() == b"whole"


def test_threads_may_write_one_file(tmp_path: Path) -> None:
    """Whether threads write one after the other or at once, each writes a whole file, and the last one stays."""

    def write(number: int) -> None:
        with atomic_write(tmp_path / "x") as f:
            for _ in range(10):
                f.write(bytes([number]) * 1000)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(40)))
    written = (tmp_path / "x").read_bytes()
    assert written == written[:1] * 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
@pytest.mark.parametrize("existing", [False, True])
def test_an_error_leaves_what_was_there(error: type[BaseException], existing: bool, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if existing:
        path.write_bytes(b"older")

    def interrupted() -> None:
        with atomic_write(path) as f:
            f.write(b"half")
            assert len(list(tmp_path.iterdir())) == 1 + existing
            raise error

    with pytest.raises(error):
        interrupted()
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"older"] * existing


def test_errors_of_this_package_pass_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"^its own words$"), atomic_write(tmp_path / "x"):
        raise OutputError("its own words")
    with pytest.raises(CheckpointError, match=r"^a source$"), atomic_write(tmp_path / "x"):
        raise CheckpointError("a source")
    assert list(tmp_path.iterdir()) == []


def test_a_link_s_target_is_not_written_through(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"older")
    link.symlink_to(target)
    with atomic_write(link) as f:
        f.write(b"new")
    assert (link.read_bytes(), target.read_bytes()) == (b"new", b"older")


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize("make", [Path.mkdir, a_pipe])
def test_only_ordinary_files_are_replaced(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "x")
    mode = (tmp_path / "x").stat().st_mode
    with pytest.raises(OutputError, match=r"is a (folder|device or pipe)"), atomic_write(tmp_path / "x"):
        pytest.fail("was opened")
    assert (tmp_path / "x").stat().st_mode == mode
    assert len(list(tmp_path.iterdir())) == 1


def contents(folder: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in folder.iterdir()}


def fill(folder: Path, names: str, text: str) -> None:
    for name in names:
        (folder / name).write_text(text)


def test_replace_together(tmp_path: Path) -> None:
    """New files replace those of their names, all other files stay, and the file given as `last` is replaced last."""
    fill(tmp_path, "abx", "old")
    with replace_together(tmp_path, last="a") as new:
        fill(new, "abc", "new")
        assert (tmp_path / "a").read_text() == "old"
    assert contents(tmp_path) == {"a": "new", "b": "new", "c": "new", "x": "old"}


@pytest.mark.quick
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "interrupt"]
)
def test_replace_together_or_not_at_all(
    error: BaseException, number: int, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any of the renames may fail, or be interrupted right after it was done: the folder is as it was before."""
    fill(tmp_path, "abx", "old")
    replace, calls = Path.replace, iter(range(100))

    def failing(path: Path, target: Path) -> Path:
        now = next(calls) == number
        if now and not after:
            raise error
        moved = replace(path, target)
        if now:
            raise error
        return moved

    monkeypatch.setattr(Path, "replace", failing)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    if number < 3:  # the first three renames put the new files in place
        with pytest.raises(expected), replace_together(tmp_path, last="a") as new:
            fill(new, "abc", "new")
        assert contents(tmp_path) == {"a": "old", "b": "old", "x": "old"}
    else:
        with replace_together(tmp_path, last="a") as new:
            fill(new, "abc", "new")
        assert contents(tmp_path) == {"a": "new", "b": "new", "c": "new", "x": "old"}


def test_replace_together_keeps_folders(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    fill(tmp_path / "a", "x", "precious")
    with (
        pytest.raises(OutputError, match=rf"^{tmp_path}/a: is a folder; a file name is needed$"),
        replace_together(tmp_path, last="a") as new,
    ):
        fill(new, "a", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert contents(tmp_path / "a") == {"x": "precious"}


def test_too_few_addresses(tmp_path: Path) -> None:
    """Under `ulimit -v` a large file can't be mapped: one line says why, and what to do."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.truncate(24 * 10**9)  # a hole, which takes no room on the disk
    code = (
        "import resource, sys; from pathlib import Path; from mogle_rt.bundle.container import MappedFile\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 * 10**9,) * 2); MappedFile(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    expected = f"InsufficientMemoryError: {path}: this process may not have the 24.0 GB of addresses for the file"
    assert expected in done.stderr
