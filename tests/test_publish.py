"""Publishing over HTTP: one pull request and one commit whatever fails, the same command goes on, no token is told."""

import json
import shutil
import time
from pathlib import Path

import pytest
from hub_server import FAULTS, Blob, Hub, User, hub_of_this_process
from huggingface_hub import constants

from llava_llama31.trainer import cli
from llava_llama31.trainer.errors import UserError
from llava_llama31.trainer.publishing import publish as publishing
from llava_llama31.trainer.publishing.doors import Doors
from llava_llama31.trainer.publishing.gate import check_folder
from llava_llama31.trainer.publishing.publish import publish
from llava_llama31.trainer.publishing.release import Release
from llava_llama31.trainer.publishing.staging import named_copy, public_copy


TOKEN = "hf_" + "q" * 34
REPO = "me/Llama-mine"
COLLECTION = "me/models-0123456789abcdef01234567"
RESUME = f"llava-llama31 publish model --repo-id {REPO}"
DOORS = Doors("0" * 64, [{"question": "what?", "answer": "that"}])
# every kind of call of a first publication
KINDS = ["whoami", "validate_yaml", "model_info", "create_repo", "tree", "discussions", "preupload", "lfs_batch"]
KINDS += ["lfs_upload", "lfs_verify", "commit", "merge", "tag", "settings", "collection", "collection_item"]
# every fault at a call of the Hub's API, at one of its storage and at the last that changes the repository; at each
# other kind of call one that is tried again, one that is not and a lost answer, and the others in torture
SEVERE = ("commit", "lfs_upload", "tag")
FAULTS_AT_KINDS = [
    pytest.param(
        kind,
        fault,
        marks=[pytest.mark.torture] * (kind not in SEVERE and fault not in (500, 403, "lost")),
    )
    for kind in KINDS
    for fault in FAULTS
]
DROPPED_OR_IN_TORTURE = [pytest.param(fault, marks=[pytest.mark.torture] * (fault != "drop")) for fault in FAULTS]
PASSING = (429, 500, 503, 412, "drop", "slow", "lost")


@pytest.fixture
def hub(monkeypatch):
    """A Hub that this process talks to, with pauses that take no time."""
    with hub_of_this_process(TOKEN, monkeypatch) as hub:
        hub.pauses = []
        hub.collections[COLLECTION] = []
        monkeypatch.setattr(time, "sleep", hub.pauses.append)
        yield hub


@pytest.fixture
def release(exported):
    return Release(exported / "llama", REPO, private=False, resume=RESUME, collection=COLLECTION)


def run(release: Release, **options) -> dict:
    return publish(release, check_local=lambda folder: DOORS, check_published=lambda *_: DOORS, **options)


def assert_published(hub: Hub, release: Release, private: bool = False) -> None:
    """Once and whole: main holds exactly the folder, by one commit in one merged pull request."""
    repo = hub.repos[REPO]
    held = {name: blob.content for name, blob in repo.find("main").files.items() if name != ".gitattributes"}
    assert held == {name: file.path.read_bytes() for name, file in release.files.items()}
    assert [(d.title, d.status) for d in repo.discussions] == [(release.title, "merged")]
    assert len(repo.history()) == 2 and len(repo.history("refs/pr/1")) == 2
    assert repo.find(release.tag).oid == repo.find("main").oid and repo.private is private
    assert hub.collections[COLLECTION] == ([REPO] if release.collection else [])


def test_a_first_publication_and_a_second_of_the_same(hub, release):
    result = run(release)
    assert_published(hub, release)
    main = hub.repos[REPO].find("main").oid
    assert (result["repo"], result["revision"], result["tag"]) == (REPO, main, release.tag)
    assert result["url"] == f"{hub.endpoint}/{REPO}/tree/{main}" and result["checks"]["logits_sha256"] == "0" * 64
    assert set(KINDS) == set(hub.counts())
    hub.calls.clear()
    again = run(release)
    assert again | {"pull_request": 1} == result
    assert not {"commit", "merge", "create_repo", "open_discussion", "lfs_upload"} & set(hub.counts())
    assert_published(hub, release)


@pytest.mark.parametrize(("kind", "fault"), FAULTS_AT_KINDS)
def test_a_fault_at_each_call(hub, release, caplog, kind, fault):
    hub.faults.append((kind, fault))
    try:
        run(release)
        first_try = True
    except UserError as error:
        first_try = False
        assert str(error).endswith(f"{RESUME})") and "(fix: " in str(error)
        assert TOKEN not in str(error)
        run(release)
    assert first_try or fault not in PASSING
    assert not hub.faults
    assert_published(hub, release)
    assert TOKEN not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("fault", DROPPED_OR_IN_TORTURE)
def test_a_fault_at_every_single_call(hub, release, fault):
    run(release)
    calls = [kind for kind, _, _ in hub.calls]
    for number, kind in enumerate(calls):
        hub.repos.clear()
        hub.objects.clear()
        hub.collections[COLLECTION] = []
        # the fault strikes at this call and not at those of its kind before it
        hub.faults = [(kind, None)] * calls[:number].count(kind) + [(kind, fault)]
        try:
            run(release)
        except UserError:
            hub.faults.clear()
            run(release)
        assert_published(hub, release)


@pytest.mark.parametrize("status", [s for s in FAULTS if isinstance(s, int)])
def test_a_fault_that_stays_is_named_with_its_fix(hub, release, status):
    hub.faults = [("commit", status)] * 50
    with pytest.raises(UserError) as caught:
        run(release)
    message = str(caught.value)
    assert f"the Hub answered {status}" in message and message.endswith(f"then: {RESUME})") and TOKEN not in message
    assert hub.counts()["commit"] == (5 if status in (412, 429, 500, 503) else 1)
    assert sum(hub.pauses) < 60
    hub.faults.clear()
    run(release)
    assert_published(hub, release)


def test_the_rate_limits_pause_is_kept(hub, release):
    hub.faults = [("whoami", 429)]
    run(release)
    assert 2.0 in hub.pauses  # the Hub asked for one second, and rounds


def test_a_dry_run_writes_nothing(hub, release):
    plan = run(release, dry_run=True)
    assert set(hub.counts()) <= {"whoami", "validate_yaml", "model_info", "tree", "collection"} and not hub.repos
    assert plan["files"] == {name: file.size for name, file in release.files.items()} and plan["removed"] == []
    assert plan["steps"][1] == f"create {REPO}, private"
    repo = hub.create(REPO)
    repo.commit("refs/heads/main", "old", {"old.bin": Blob(b"x")})
    assert run(release, dry_run=True)["removed"] == ["old.bin"]
    assert len(repo.history()) == 2


def test_what_was_there_before_goes(hub, release):
    """A stale model.safetensors beside an index would be loaded in its place."""
    repo = hub.create(REPO, private=False)
    repo.commit("refs/heads/main", "old", {".gitattributes": Blob(b""), "pytorch_model.bin": Blob(b"x", is_lfs=True)})
    run(release)
    assert set(repo.find("main").files) == {*release.files, ".gitattributes"}
    assert "pytorch_model.bin" in repo.history()[1].files


def test_a_collection_that_is_not_there(hub, release):
    hub.collections.clear()
    with pytest.raises(UserError, match="collection: the Hub answered 404"):
        run(release)
    assert not hub.repos


def test_private_stays_private(hub, exported):
    release = Release(exported / "llama", REPO, private=True, resume=RESUME)
    run(release)
    assert_published(hub, release, private=True)
    assert "settings" not in hub.counts()


def test_what_comes_down_otherwise_is_not_merged(hub, release):
    other = Doors("1" * 64, DOORS.samples)
    with pytest.raises(UserError, match="answers differently from the local one"):
        publish(release, check_local=lambda folder: DOORS, check_published=lambda *_: other)
    repo = hub.repos[REPO]
    assert repo.discussions[0].status == "open" and len(repo.history()) == 1 and repo.private
    run(release)
    assert_published(hub, release)


def test_a_pull_request_that_somebody_changed_is_put_right(hub, release):
    with pytest.raises(UserError):
        publish(release, check_local=lambda folder: DOORS, check_published=lambda *_: Doors("", []))
    repo = hub.repos[REPO]
    repo.commit("refs/pr/1", "fiddled", repo.find("refs/pr/1").files | {"more.txt": Blob(b"x")})
    repo.discussions[0].status = "draft"
    run(release)
    assert set(repo.find("main").files) == {*release.files, ".gitattributes"} and len(repo.discussions) == 1


def test_somebody_else_commits_between_check_and_merge(hub, release):
    def check(*_):
        repo = hub.repos[REPO]
        repo.commit("refs/heads/main", "theirs", repo.find("main").files | {"theirs.txt": Blob(b"x")})
        return DOORS

    with pytest.raises(UserError, match="main has other files too"):
        publish(release, check_local=lambda folder: DOORS, check_published=check)
    run(release)
    assert set(hub.repos[REPO].find("main").files) == {*release.files, ".gitattributes"}


@pytest.mark.parametrize(
    ("user", "message"),
    [
        (User("me", role="read"), "token: the token can only read"),
        (User("somebody"), "somebody cannot write to me .fix: publish under one of somebody"),
        (User("somebody", orgs={"me": "read"}), "somebody cannot write to me"),
    ],
)
def test_rights_are_checked_before_anything_is_written(hub, release, user, message):
    hub.users[TOKEN] = user
    with pytest.raises(UserError, match=message):
        run(release)
    assert set(hub.counts()) == {"whoami"}


def test_an_organisations_repository(hub, release):
    hub.users[TOKEN] = User("somebody", orgs={"me": "write"})
    run(release)
    assert_published(hub, release)


def test_no_space_for_the_check(hub, release, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(UserError, match="free some space, or set TMPDIR"):
        run(release)


def test_what_the_gate_refuses_never_reaches_the_hub(hub, exported, tmp_path):
    folder = Path(shutil.copytree(exported / "llama", tmp_path / "model"))
    (folder / "training_args.bin").write_bytes(b"x")
    with pytest.raises(UserError, match=r"training_args.bin: is training state \(fix: remove training_args.bin"):
        run(Release(folder, REPO, False, RESUME))
    assert not hub.calls


@pytest.mark.slow
@pytest.mark.parametrize("fault", DROPPED_OR_IN_TORTURE)
def test_faults_while_what_was_published_comes_down(hub, release, monkeypatch, fault):
    # what comes down whole opens: processes/test_publish_processes.py
    monkeypatch.setattr(publishing, "open_doors", lambda *_, **__: DOORS)
    for kind in ("resolve_head", "resolve_get", "cdn"):
        hub.repos.clear()
        hub.collections[COLLECTION] = []
        hub.faults = [(kind, fault)]
        try:
            publish(release, check_local=lambda folder: DOORS)
        except UserError as error:
            assert str(error).endswith(f"{RESUME})") and TOKEN not in str(error)
            publish(release, check_local=lambda folder: DOORS)
        assert_published(hub, release)
        assert not hub.leaks


# --- the command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{folder}", "--repo-id", "Llama-x"], "has no owner"),
        (["{folder}", "--repo-id", "me/Llama x"], "--repo-id"),
        (["nowhere", "--repo-id", "me/Llama-x"], "no such folder"),
        (["{folder}", "--repo-id", "me/mine"], "must begin with 'Llama'"),
    ],
)
def test_the_command_refuses(hub, exported, capsys, arguments, message):
    folder = str(exported / "llama")
    assert cli.main(["publish", *(argument.format(folder=folder) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err and not hub.calls


def test_without_a_token_or_online(hub, exported, capsys, monkeypatch):
    command = ["publish", str(exported / "llama"), "--repo-id", REPO, "--dry-run"]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.main(command) == 2 and "unset it, then: llava-llama31 publish" in capsys.readouterr().err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    hub.calls.clear()
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "there is no token, so your rights" in shown and "model.safetensors" in shown
    assert not hub.calls  # what needs no token needs no Hub either
    assert cli.main(command[:-1]) == 2 and "set HF_TOKEN to a valid token" in capsys.readouterr().err


def test_the_commands_plan(hub, exported, capsys):
    command = ["publish", str(exported / "llama"), "--repo-id", REPO, "--private", "--dry-run"]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out
    assert "nothing was written" in shown and "model.safetensors" in shown and "leave the repository private" in shown
    assert cli.main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dry_run"] is True


def test_what_a_person_wrote_into_the_card_is_published(exported, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(exported / "llama", run / "export")
    base = {"role": "language_model", "id": "meta/base", "licence": "llama3.1"}
    (run / "record.json").write_text(json.dumps({"name": "llama", "licence": "llama3.1", "base_models": [base]}))
    card = run / "export" / "README.md"
    text = card.read_text()
    card.write_text(text.replace("for research", "for my thesis"))
    published = (public_copy(run, REPO) / "README.md").read_text()
    assert "for my thesis" in published and f'repo = "{REPO}"' in published and "# Llama-mine\n" in published
    assert card.read_text() == text.replace("for research", "for my thesis")
    card.write_text("---\nlicense: llama3.1\n---\n\n# All mine\n")
    assert (public_copy(run, REPO) / "README.md").read_text() == card.read_text()


def test_the_card_of_a_published_folder_names_the_repository(exported):
    folder = exported / "other"
    copy = named_copy(folder, REPO)
    assert copy == exported / "other-publish" and check_folder(copy, "Llama-mine") == []
    card = (copy / "README.md").read_text()
    assert f'repo = "{REPO}"' in card and 'repo = "Llama-other"' not in card
    assert f'repo = "{REPO}"' not in (folder / "README.md").read_text()  # the folder is as it was
    assert (copy / "model.safetensors").samefile(folder / "model.safetensors")
    assert named_copy(copy, REPO) == copy
    shutil.rmtree(copy)
