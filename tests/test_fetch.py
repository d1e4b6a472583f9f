"""`fetch`: whole files or none under every fault of a server, safe archives, licences and disk first, closure last."""

import hashlib
import io
import json
import os
import random
import signal
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from file_server import serving
from hub_server import MAIN, Blob, Repo, hub_of_this_process

from llava_llama31.trainer.cli import main
from llava_llama31.trainer.data.fetch import downloading, fetching
from llava_llama31.trainer.data.fetch.downloading import Download, new_client, sha256_of
from llava_llama31.trainer.data.fetch.hub_files import fetch_checkpoint
from llava_llama31.trainer.data.fetch.items import items_of_dataset, items_of_recipe
from llava_llama31.trainer.data.fetch.unpacking import unpack
from llava_llama31.trainer.data.registry.registry import (
    NOT_VERIFIED,
    Dataset,
    dataset_at,
    dataset_named,
    shipped_datasets,
    weights,
    with_needs,
)
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.planning.model_sizes import published
from llava_llama31.trainer.recipes.loading import SHIPPED, load_recipe


EVIDENCE = dict.fromkeys(
    ("where", "rows", "images", "bytes", "license", "holes", "evaluation_images"), "made by a test"
)
CONTENT = random.Random(0).randbytes(3_000_000)


@pytest.fixture(scope="module")
def server():
    with serving() as files:
        yield files


@pytest.fixture
def files(server):
    server.contents, server.faults, server.etags = {"/file.bin": CONTENT}, [], True
    server.calls.clear()
    return server


def download(files, path: Path, **more) -> Download:
    return Download(f"{files.url}/file.bin", path, wait=lambda seconds: None, **more)


FAULTS = {
    "cut": ["cut:100", "cut:1500000", "cut:0"],
    "cut at every attempt": [f"cut:{n}" for n in (1, 10, 100, 1000, 10_000, 100_000, 1_000_000)],
    "short": ["short:5"],
    "long": ["long:7"],
    "429 and 503": [429, 503, "cut:1000000", 429, 500, 502, 504],
    "stale": ["cut:1000000", "stale"],
    "stale that claims to be the same": ["cut:1000000", "silent-stale"],
    "range ignored": ["cut:1000000", "no-range"],
    "resumed at the end": ["cut:2999999"],
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_ends_with_the_same_bytes(files, tmp_path, name):
    files.faults = list(FAULTS[name])
    expected = bytes(255 - byte for byte in CONTENT) if name == "stale" else CONTENT  # replaced while it was fetched
    seen = []
    path = tmp_path / "file.bin"
    with new_client() as client:
        assert download(files, path, advance=seen.append, bytes=len(CONTENT)).run(client) == len(CONTENT)
    assert path.read_bytes() == expected
    assert sum(seen) == len(CONTENT) and not list(tmp_path.glob(".part-*")) and not files.faults


def test_a_cut_download_asks_for_the_rest_alone(files, tmp_path):
    files.faults = ["cut:1000000"]
    with new_client() as client:
        download(files, tmp_path / "file.bin").run(client)
    (_, _, first), (_, _, second) = files.calls
    assert first == "" and second.startswith("bytes=") and 0 < int(second[6:-1]) <= 1_000_000


def test_without_etag_and_date_a_download_starts_again(files, tmp_path):
    files.etags, files.faults = False, ["cut:1000000"]
    with new_client() as client:
        download(files, tmp_path / "file.bin").run(client)
    assert [asked for _, _, asked in files.calls] == ["", ""] and (tmp_path / "file.bin").read_bytes() == CONTENT


def test_what_cannot_be_fetched_says_why_and_keeps_what_arrived(files, tmp_path):
    path = tmp_path / "file.bin"
    with new_client() as client:
        files.faults = ["cut:1000000"] + [503] * 20
        with pytest.raises(UserError, match="not complete after 8 attempts: HTTP 503.*what has arrived is kept"):
            download(files, path).run(client)
        assert not path.exists() and download(files, path).num_bytes() > 0
        files.faults = [403]
        with pytest.raises(UserError, match="the server answers 403 .*accept its terms"):
            download(files, path).run(client)
        files.faults = []
        with pytest.raises(UserError, match="its sha256 is"):
            download(files, path, sha256="0" * 64).run(client)
        assert not path.exists() and download(files, path).num_bytes() == 0
        sha256 = hashlib.sha256(CONTENT).hexdigest()
        download(files, path, sha256=sha256).run(client)
    assert sha256_of(path) == sha256


def make_zip(members: dict[str, bytes], **entry) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            for key, value in entry.items():
                setattr(info, key, value)
            archive.writestr(info, content)
    return buffer.getvalue()


def make_tar(name: str, kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info, io.BytesIO())
    return buffer.getvalue()


UNSAFE = {
    "absolute": make_zip({"/etc/x": b"1"}),
    "parent": make_zip({"a/../../x": b"1"}),
    "drive": make_zip({"C:/x": b"1"}),
    "link": make_zip({"x": b"/etc/passwd"}, external_attr=0o120777 << 16),
    "tar link": make_tar("x", tarfile.SYMTYPE),
    "tar hard link": make_tar("x", tarfile.LNKTYPE),
    "tar device": make_tar("x", tarfile.CHRTYPE),
    "tar parent": make_tar("../x"),
}


@pytest.mark.parametrize("name", UNSAFE)
def test_an_unsafe_member_is_refused_before_anything_is_unpacked(tmp_path, name):
    (tmp_path / "archive").write_bytes(UNSAFE[name])
    with pytest.raises(UserError, match="nothing was unpacked"):
        unpack(tmp_path / "archive", tmp_path / "into" / "deep")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["archive"]


def test_a_damaged_archive_leaves_nothing_and_a_whole_one_its_files(tmp_path):
    members = {f"train/{i}.jpg": random.Random(i).randbytes(5000) for i in range(20)} | {"__MACOSX/._0.jpg": b"x"}
    whole = make_zip(members)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    for content in (bytes(damaged), whole[:-100], b"no archive"):
        (tmp_path / "archive").write_bytes(content)
        with pytest.raises(UserError, match="the archive is damaged"):
            unpack(tmp_path / "archive", tmp_path / "into")
        assert not (tmp_path / "into" / "train").exists()
    (tmp_path / "archive").write_bytes(whole)
    assert unpack(tmp_path / "archive", tmp_path / "into") == {"train": 20}
    assert {path.name: path.read_bytes() for path in (tmp_path / "into" / "train").iterdir()} == {
        name[6:]: content for name, content in members.items() if name.startswith("train")
    }
    assert sorted(os.listdir(tmp_path / "into")) == ["train"]


@pytest.fixture
def own_set(files, tmp_path, make_image):
    """A data set on the server: an archive with 6 images and rows that name 7, one of them a known hole."""
    members = {}
    for i in range(6):
        buffer = io.BytesIO()
        make_image(20, 30, seed=i).save(buffer, "PNG")
        members[f"images/{i}.png"] = buffer.getvalue()
    rows = [
        {
            "id": str(i),
            "image": f"images/{i}.png",
            "conversations": [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "that"}],
        }
        for i in range(7)
    ]
    files.contents = {"/images.zip": make_zip(members), "/rows.json": json.dumps(rows).encode()}
    entry = {
        "title": "a set",
        "page": files.url,
        "license": "CC0",
        "path": "own/rows.json",
        "image_root": "own",
        "rows": 7,
        "files": [
            {"url": f"{files.url}/rows.json", "to": "own", "bytes": len(files.contents["/rows.json"]), "exact": True},
            {"url": f"{files.url}/images.zip", "to": "own", "unpack": True, "images": 6, "makes": ["images"]},
        ],
        "known_holes": [{"folder": "images", "names": ["6.png"], "reason": "lost"}],
        "evidence": EVIDENCE,
    }
    registry = tmp_path / "registry.yaml"
    registry.write_text(yaml.safe_dump({"own": entry}))
    return registry, entry, members


def fetch(registry: Path, root: Path, *more: str) -> int:
    return main(["fetch", "own", "--to", str(root), "--registry", str(registry), *more])


def test_a_set_is_fetched_unpacked_and_closed_and_fetched_once(files, own_set, tmp_path, capsys, monkeypatch):
    registry, _, members = own_set
    monkeypatch.setattr(downloading, "FIRST_WAIT_S", 0.0)
    files.faults = [503, "cut:40", "cut:10"]
    root = tmp_path / "root"
    assert fetch(registry, root, "--dry-run", "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert [item["name"] for item in shown["items"]] == ["own/images.zip", "own/rows.json"]  # rows after their images
    assert {item["license"] for item in shown["items"]} == {"CC0"} and not any(i["have"] for i in shown["items"])
    assert not root.exists() and not files.calls and shown["free"] > 0
    assert fetch(registry, root, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert all(item["have"] for item in shown["items"]) and shown["bytes"] == 0
    (closure,) = shown["closure"]
    assert closure["missing"] == {"missing_image": 1} and closure["known_holes"] == 1 and not closure["unexplained"]
    (line,) = Path(closure["listed"]).read_text().splitlines()
    assert json.loads(line)["image"] == "images/6.png" and json.loads(line)["known"] == "lost"
    for name, content in members.items():
        assert (root / "own" / name).read_bytes() == content
    assert not list(root.rglob(".part-*")) and not list((root / ".fetched" / "archives").iterdir())
    num_calls = len(files.calls)
    assert fetch(registry, root) == 0 and len(files.calls) == num_calls


def test_missing_images_that_nobody_explains_are_an_error(own_set, tmp_path, capsys):
    registry, _, _ = own_set
    root = tmp_path / "root"
    assert fetch(registry, root) == 0
    (root / "own" / "images" / "2.png").write_bytes(b"")
    (root / "own" / "images" / "3.png").write_bytes(b"\x89PNG cut")
    assert fetch(registry, root) == 2
    assert "the images of 2 rows are not there or can't be read: images/2.png" in capsys.readouterr().err


def test_licences_and_disk_come_before_the_first_byte(files, own_set, tmp_path, capsys, monkeypatch):
    registry, entry, _ = own_set
    registry.write_text(yaml.safe_dump({"own": entry | {"accept": "for research"}}))
    assert fetch(registry, tmp_path / "root") == 2
    assert "licences to be accepted first: own: CC0 (for research)" in capsys.readouterr().err and not files.calls
    assert fetch(registry, tmp_path / "root", "--accept-licence", "other") == 2
    monkeypatch.setattr(fetching, "free_bytes", lambda folder: 100)
    assert fetch(registry, tmp_path / "root", "--accept-licence", "own") == 2
    assert "only 100 are free; nothing was fetched" in capsys.readouterr().err
    assert not [call for call in files.calls if call[0] == "GET"]
    monkeypatch.undo()
    assert fetch(registry, tmp_path / "root", "--accept-licence", "all") == 0


def test_a_set_that_the_user_has_already_is_not_fetched(files, own_set, tmp_path):
    registry, _, members = own_set
    root = tmp_path / "root"
    for name, content in members.items():
        (root / "own" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "own" / name).write_bytes(content)
    (root / "own" / "rows.json").write_bytes(files.contents["/rows.json"])
    assert fetch(registry, root) == 0 and not files.calls


def killed_at(step: int, work) -> bool:
    """Run `work` in a fork that is killed at its `step`-th write or move; whether it was."""
    pid = os.fork()
    if not pid:
        count = 0

        def tick() -> None:
            nonlocal count
            count += 1
            if count > step:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            work(tick)
            os._exit(0)
        except BaseException:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.slow
def test_a_kill_at_any_step_never_leaves_half_a_set(files, own_set, tmp_path):
    registry, entry, members = own_set
    known = {"own": Dataset.model_validate(entry)}
    client = new_client()  # which each fork opens by itself

    def work(tick) -> None:
        replace, write = os.replace, fetching.write_json

        def ticking_replace(*arguments) -> None:
            tick()
            replace(*arguments)
            tick()

        def ticking_write(*arguments) -> None:
            tick()
            write(*arguments)

        os.replace = ticking_replace
        fetching.write_json = ticking_write
        fetcher = fetching.Fetcher(lambda line: None, advance=lambda n: tick(), client=client)
        fetcher.fetch(items_of_dataset("own", root, known))

    step = 0
    while True:
        root = tmp_path / str(step)
        killed = killed_at(step, work)
        for _ in range(2):
            folder = root / "own" / "images"
            images = sorted(folder.glob("*")) if folder.exists() else []
            assert len(images) in (0, 6) and all(members[f"images/{p.name}"] == p.read_bytes() for p in images)
            if (root / "own" / "rows.json").exists():  # rows come last
                assert len(images) == 6 and (root / "own" / "rows.json").read_bytes() == files.contents["/rows.json"]
            fetching.Fetcher(lambda line: None, client=client).fetch(items_of_dataset("own", root, known))
        assert all(item.have for item in items_of_dataset("own", root, known))
        if not killed:
            break
        step += 1
    assert step > 12


def test_a_kill_at_any_byte_of_a_download_is_resumed_to_the_same_bytes(files, tmp_path):
    path = tmp_path / "file.bin"
    rng = random.Random(1)

    client = new_client()

    def work(tick) -> None:
        download(files, path, advance=lambda num_bytes: tick()).run(client)

    files.faults = [f"cut:{rng.randrange(1, 2_000_000)}" for _ in range(3)]
    while killed_at(rng.randrange(16), work):
        assert not path.exists() and CONTENT.startswith(download(files, path).part.read_bytes())
    assert path.read_bytes() == CONTENT


def test_the_registry_says_where_each_fact_is_from():
    known = shipped_datasets()
    wanted = {
        "llava-pretrain",
        "llava-instruct-150k",
        "llava-v1.5-mix665k",
        "open-llava-next-mix1m",
        "llava-next-data",
    }
    wanted |= {"llava-onevision-data", "finevision", "pixmo-cap", "textvqa-val", "textvqa-images", "coco-train2017"}
    assert wanted | {"gqa-images", "ocr-vqa-images", "visual-genome-images"} <= set(known)
    for name, dataset in known.items():
        assert all(dataset.evidence.values()), name  # that all facts are there is the schema's
        for file in dataset.files:
            assert file.url.startswith(("https://", "http://", "hf://", "pypi:")), name
    assert any(NOT_VERIFIED in source for dataset in known.values() for source in dataset.evidence.values())
    for name, entry in published()["data"].items():  # what `plan` counts with
        assert known[name].rows == entry["rows"]
    onevision = known["llava-onevision-data"]
    assert NOT_VERIFIED in onevision.evidence["rows"] and sum(onevision.subset_rows.values()) < 3_900_000
    charts = dataset_named("llava-onevision-data:chartqa(cauldron,llava_format)", known)
    assert (charts.rows, charts.images) == (18265, None)
    assert dataset_named("llava-onevision-data:tqa(cauldron,llava_format)", known).rows is None


def test_what_the_registry_says_of_textvqa_adds_up():
    """mix665k holds TextVQA's training images, which lie beside those of the evaluation."""
    known = shipped_datasets()
    mix, images, questions = (known[name] for name in ("llava-v1.5-mix665k", "textvqa-images", "textvqa-val"))
    (train,) = mix.evaluation_images
    assert (train.evaluation, train.split, train.images) == ("textvqa", "train", mix.rows_of["textvqa"])
    assert images.images - train.images == questions.images == questions.evaluation_images[0].images
    assert list(with_needs("llava-v1.5-mix665k", known))[-1] == "llava-v1.5-mix665k"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_recipe_names_all_its_files_with_size_and_licence(name, tmp_path, capsys):
    assert main(["fetch", name, "--dry-run", "--json", "--output", str(tmp_path)]) == 0
    shown = json.loads(capsys.readouterr().out)
    for item in shown["items"]:
        assert item["license"] and item["bytes"] and item["url"], item["name"]
        assert {"name", "url", "bytes", "license", "rows", "have"} <= item.keys()
    assert shown["bytes"] == sum(item["bytes"] for item in shown["items"] if not item["have"])
    recipe = load_recipe(name, output=tmp_path)
    items, unknown = items_of_recipe(recipe, None, shipped_datasets())
    assert not unknown and len(items) == len(shown["items"]) and (items or recipe.prepare is not None)
    for stage in recipe.stages.values():
        for source in stage.data:
            at = dataset_at(source.path, shipped_datasets())
            if at is not None:
                dataset = dataset_named(at[0], shipped_datasets())
                assert source.hub_id == dataset.hub_id
                if ":" not in at[0]:  # a subset has a name and a licence of its own
                    assert (source.name, source.license) == (at[0], dataset.license)


def test_every_checkpoint_of_a_shipped_recipe_is_in_the_registry():
    for name in SHIPPED:
        model = load_recipe(name).model
        for part in (model.vision_tower, model.language_model, model.checkpoint):
            assert part is None or "runs/" in part or "{output}" in part or part.partition("@")[0] in weights(), part


def test_names_that_the_registry_lacks_are_said_with_the_nearest(capsys):
    assert main(["fetch", "finevison", "--dry-run"]) == 2
    assert "did you mean finevision?" in capsys.readouterr().err
    assert main(["fetch", "finevision", "--dry-run"]) == 2
    assert "name one, as its page lists them: finevision:SUBSET" in capsys.readouterr().err
    assert main(["fetch", "--list"]) == 0 and NOT_VERIFIED in capsys.readouterr().out


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_of_this_process("hf_token", monkeypatch) as running:
        yield running


def upload(hub, name: str, files: dict[str, bytes]) -> None:
    blobs = {path: Blob(content, is_lfs=path.endswith((".zip", ".safetensors"))) for path, content in files.items()}
    hub.objects |= {blob.sha256: blob.content for blob in blobs.values() if blob.is_lfs}
    hub.repos[name] = Repo(private=False)
    hub.repos[name].commit(MAIN, "files", blobs)


def test_files_of_the_hub_are_found_fetched_and_verified(hub, own_set, files, tmp_path, capsys, monkeypatch):
    registry, entry, members = own_set
    upload(hub, "me/set", {"images.zip": files.contents["/images.zip"], "rows.json": files.contents["/rows.json"]})
    for file in entry["files"]:
        file["url"] = "hf://me/set/" + file["url"].rpartition("/")[2]
    parts = {"url": "hf://me/set/*.json", "to": "all"}
    registry.write_text(yaml.safe_dump({"own": entry, "all": entry | {"path": "", "files": [parts]}}))
    root = tmp_path / "root"
    assert fetch(registry, root) == 0
    assert (root / "own" / "images" / "3.png").read_bytes() == members["images/3.png"]
    assert main(["fetch", "all", "--to", str(root), "--registry", str(registry)]) == 0
    assert (root / "all" / "rows.json").read_bytes() == files.contents["/rows.json"]
    assert not list(root.rglob(".part-*")) and not list(root.rglob(".staging-*"))
    num_calls = len(hub.calls)
    assert main(["fetch", "all", "--to", str(root), "--registry", str(registry)]) == 0 and len(hub.calls) == num_calls

    hub.objects[next(iter(hub.objects))] = bytes(len(files.contents["/images.zip"]))  # another file, as long
    assert fetch(registry, tmp_path / "other") == 2
    assert "length or sha256 is not the Hub's" in capsys.readouterr().err
    assert not (tmp_path / "other" / "own").exists()


def test_checkpoints_are_fetched_into_the_cache_and_their_sums_verified(hub, tmp_path):
    files = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}
    upload(hub, "me/model", files)
    fetch_checkpoint("me/model")
    (stored,) = (tmp_path / "hub").rglob("snapshots/*/model.safetensors")
    stored.resolve().write_bytes(bytes(7000))
    with pytest.raises(UserError, match="its sha256 is not the Hub's; it was removed"):
        fetch_checkpoint("me/model")
    fetch_checkpoint("me/model")
    (stored,) = (tmp_path / "hub").rglob("snapshots/*/model.safetensors")
    assert stored.read_bytes() == files["model.safetensors"]
