"""The tests' own Hub, asked by huggingface_hub itself in a process that knows only its address."""

import os
import subprocess
import sys
import textwrap

import pytest
from hub_server import Blob, running_hub


TOKEN = "hf_" + "t" * 34


@pytest.fixture
def hub():
    with running_hub(TOKEN) as hub:
        yield hub


def ask(hub, code: str, home) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
    }
    start = "from huggingface_hub import *\nimport io, pathlib\napi = HfApi()\n"
    return subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(code)], env=environment, capture_output=True, text=True
    )


def test_a_folder_goes_up_as_a_pull_request_and_comes_down_by_revision(hub, tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for i in range(12):  # more than one page of the tree
        (folder / "deep" / f"{i}.txt").write_text(f"text {i}")
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "README.md").write_text("---\nbase_model: a/b\n---\n# Model\n")
    done = ask(
        hub,
        f"""
        folder = pathlib.Path({str(folder)!r})
        assert api.whoami()["name"] == "me"
        api.create_repo("me/m", private=True)
        api.create_repo("me/m", private=True, exist_ok=True)
        adds = [CommitOperationAdd(str(p.relative_to(folder)), str(p)) for p in folder.rglob("*") if p.is_file()]
        head = api.model_info("me/m").sha
        made = api.create_commit("me/m", adds, commit_message="first", create_pr=True, parent_commit=head)
        assert made.pr_num == 1
        (found,) = api.get_repo_discussions("me/m")
        assert (found.title, found.status, found.git_reference) == ("first", "open", "refs/pr/1")
        local = pathlib.Path(snapshot_download("me/m", revision="refs/pr/1"))
        assert local.name == made.oid
        for path in folder.rglob("*"):
            assert path.is_dir() or (local / path.relative_to(folder)).read_bytes() == path.read_bytes(), path
        api.merge_pull_request("me/m", 1)
        merged = api.model_info("me/m").sha
        api.create_tag("me/m", tag="v1", revision=merged)
        api.create_tag("me/m", tag="v1", revision=merged, exist_ok=True)
        api.create_branch("me/m", branch="side")
        api.create_commit("me/m", [CommitOperationDelete("README.md")], commit_message="x", revision="side")
        refs = api.list_repo_refs("me/m", include_pull_requests=True)
        assert {{ref.name for ref in refs.branches}} == {{"main", "side"}} and refs.tags[0].target_commit == merged
        drafted = api.create_pull_request("me/m", "second")
        api.comment_discussion("me/m", drafted.num, "hello")
        assert drafted.status == "draft"
        api.change_discussion_status("me/m", drafted.num, "closed")
        api.update_repo_settings("me/m", private=False)
        """,
        tmp_path / "home",
    )
    assert done.returncode == 0, done.stderr
    repo = hub.repos["me/m"]
    assert [commit.title for commit in repo.history()] == ["first (#1)", "initial commit"]
    assert set(repo.find("main").files) - set(repo.find("side").files) == {"README.md"}
    assert repo.find("v1").oid == repo.find("main").oid and not repo.private and not hub.leaks


def test_refusals_are_the_hubs(hub, tmp_path):
    repo = hub.create("me/m")
    hub.create("you/m")
    repo.commit("refs/heads/main", "second", {"a.txt": Blob(b"a")})
    done = ask(
        hub,
        f"""
        from huggingface_hub.errors import *
        def refusal(call, *arguments, **options):
            try:
                call(*arguments, **options)
            except HfHubHTTPError as error:
                return type(error).__name__, error.response.status_code
            return None
        first = {repo.history()[1].oid!r}
        add = lambda: [CommitOperationAdd("b.txt", b"b")]
        assert refusal(api.model_info, "me/none") == ("RepositoryNotFoundError", 404)
        assert refusal(api.model_info, "you/m") == ("RepositoryNotFoundError", 404)
        assert refusal(HfApi(token=False).model_info, "me/m") == ("RepositoryNotFoundError", 401)
        assert refusal(api.model_info, "me/m", revision="no") == ("RevisionNotFoundError", 404)
        assert refusal(api.create_commit, "me/m", add(), commit_message="x", parent_commit=first)[1] == 412
        assert refusal(api.create_repo, "you/other") == ("HfHubHTTPError", 403)
        assert refusal(HfApi(token="hf_wrong").whoami) == ("HfHubHTTPError", 401)
        drafted = api.create_pull_request("me/m", "drafted")
        assert refusal(api.merge_pull_request, "me/m", drafted.num)[1] == 409
        try:
            card = [CommitOperationAdd("README.md", b"---\\nbase_model: ../x\\n---\\n")]
            api.create_commit("me/m", card, commit_message="x")
        except ValueError as error:
            assert "base_model" in str(error)
        else:
            assert False
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr


def test_faults_come_when_asked_for(hub, tmp_path):
    """One after the other, each at the first call that it meets."""
    hub.create("me/m")
    hub.faults += [("tag", fault) for fault in (500, 429, "drop", "lost")]
    done = ask(
        hub,
        """
        from huggingface_hub.errors import HTTPError
        for fault in ("500", "429", "drop", "lost"):
            try:
                api.create_tag("me/m", tag=fault)
            except HTTPError:
                made = [tag.name for tag in api.list_repo_refs("me/m").tags]
                assert (fault in made) == (fault == "lost"), (fault, made)
            else:
                assert False, fault
        for fault in ("500", "429", "drop", "lost"):
            api.create_tag("me/m", tag=fault, exist_ok=True)
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert {f"refs/tags/{fault}" for fault in ("500", "429", "drop", "lost")} <= set(hub.repos["me/m"].refs)
    assert not hub.faults
