"""Buckets are read, written and locked like folders, against a server that speaks the JSON API."""

import threading

import pytest

from mtp_jax import storage
from mtp_jax.errors import UserError

pytestmark = pytest.mark.quick


def test_a_local_path_stays_what_it_is(tmp_path):
    assert storage.local(str(tmp_path)) == tmp_path


def test_a_folder_is_copied_once_and_anew_when_it_changed(bucket):
    for name, content in {"m/config.json": b"{}", "m/sub/w": b"1", "m/checkpoints/5/x": b"2", "mm/other": b"3"}.items():
        storage.write(f"gs://b/{name}", content)
    copy = storage.local("gs://b/m")
    assert {p.relative_to(copy).as_posix() for p in copy.rglob("*") if p.is_file()} == {"config.json", "sub/w"}
    asked = len([r for r in bucket.requests if r[2].get("alt") == "media"])
    assert storage.local("gs://b/m/") == copy
    assert len([r for r in bucket.requests if r[2].get("alt") == "media"]) == asked
    storage.write("gs://b/m/config.json", b"[]")
    changed = storage.local("gs://b/m")
    assert changed != copy and (changed / "config.json").read_bytes() == b"[]"


def test_an_object_and_a_pattern_are_copied(bucket):
    storage.write("gs://b/texts/a.txt", b"a")
    storage.write("gs://b/texts/b.md", b"b")
    assert storage.local("gs://b/texts/a.txt").read_bytes() == b"a"
    assert storage.local("gs://b/texts/*.txt").parent.joinpath("a.txt").is_file()


def test_what_is_not_there_or_forbidden_is_one_line(bucket):
    with pytest.raises(UserError, match="gs://b/none: there is no such object"):
        storage.local("gs://b/none")
    bucket.refuse = lambda method, path: 403
    with pytest.raises(UserError, match="needs the role Storage Object Admin"):
        storage.write("gs://b/x", b"")


def test_the_file_that_says_that_all_is_there_comes_last(bucket, tmp_path):
    for name in ("a", "mtp_config.json", "z"):
        (tmp_path / name).write_text(name)
    storage.write("gs://b/out/stale", b"")
    storage.replace(tmp_path, "gs://b/out", "mtp_config.json")
    assert bucket.names("b", "out/") == ["out/a", "out/mtp_config.json", "out/z"]
    order = [content[1] for name, content in sorted(bucket.buckets["b"].objects.items())]
    assert max(order) == bucket.buckets["b"].generation("out/mtp_config.json")


def test_only_one_of_many_gets_the_lock(bucket, monkeypatch):
    monkeypatch.setenv(storage.LOCK_SECONDS, "0.6")
    got, refused, started, done = [], [], threading.Barrier(4), threading.Event()

    def want():
        started.wait()
        try:
            with storage.BucketLock("gs://b/run", say=lambda _: None):
                got.append(1)
                done.wait(10)
        except UserError as error:
            refused.append(str(error))
            if len(refused) == 3:
                done.set()

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 1 and len(refused) == 3 and "is in use by another run" in refused[0]
    assert bucket.names("b") == []


def test_a_lock_whose_holder_is_gone_is_taken_over_with_a_message(bucket, monkeypatch):
    monkeypatch.setenv(storage.LOCK_SECONDS, "0.4")
    storage.write("gs://b/run/.lock", b'{"host": "gone", "process": 7}')
    said = []
    with storage.BucketLock("gs://b/run", say=said.append):
        assert any("process 7 on gone was not renewed for 0.4 s and is taken over" in line for line in said)
    assert bucket.names("b") == []


def test_a_lock_whose_answer_got_lost_is_still_ours(bucket, monkeypatch):
    lock = storage.BucketLock("gs://b/run")
    assert lock._put("0") and lock._put("0")


def test_content_that_ends_like_a_line_arrives_whole(bucket):
    for content in (b"x\r", b"x\n", b"x\r\n", b"\r\n\r\nx", b""):
        storage.write("gs://b/x", content)
        assert storage.read("gs://b/x") == content


def test_large_files_arrive_whole(bucket, tmp_path):
    content = bytes(range(256)) * (6 << 12)
    (tmp_path / "large").write_bytes(content)
    storage.upload(tmp_path, ["large"], "gs://b")
    storage.write("gs://b/too", content)
    storage.download("gs://b", ["large", "too"], tmp_path / "back")
    assert {(tmp_path / "back" / name).read_bytes() for name in ("large", "too")} == {content}


def test_many_objects_come_in_pages(bucket):
    for i in range(1003):
        bucket.buckets["b"].put(f"many/{i:04}", b"x", None)
    assert len(storage.filesystem().find("b/many")) == 1003


def test_what_may_come_back_by_itself_ends_with_another_code_than_what_is_wrong(bucket, capsys):
    from gcsfs.retry import HttpError

    from mtp_jax.errors import run_command

    for status, code in ((503, 75), (400, 2), (401, 2)):

        def ask(status=status):
            raise HttpError({"code": status, "message": "no"})

        with pytest.raises(SystemExit) as end:
            run_command(lambda: storage._asked("gs://b/x", ask))
        assert end.value.code == code and capsys.readouterr().err.startswith("error: gs://b/x: the bucket cannot be")


def test_a_folder_is_moved_and_removed(bucket):
    for name in ("a", "sub/b", "last"):
        storage.write(f"gs://b/old/{name}", name.encode())
    storage.write("gs://b/older/c", b"c")
    storage.move("gs://b/old", "gs://b/new", "last")
    assert bucket.names("b") == ["new/a", "new/last", "new/sub/b", "older/c"]
    assert bucket.buckets["b"].generation("new/last") == max(e[1] for e in bucket.buckets["b"].objects.values())
    storage.remove("gs://b/new", "last", storage.listing("gs://b/new"))
    assert bucket.names("b") == ["older/c"]
