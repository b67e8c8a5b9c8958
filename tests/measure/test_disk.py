import pytest

from overparam.measure.disk import disk_bytes


def test_a_folder_counts_each_file_once(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "a").write_bytes(b"x" * 1000)
    (tmp_path / "deep" / "er" / "b").write_bytes(b"x" * 234)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    (tmp_path / "hard").hardlink_to(tmp_path / "a")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    assert disk_bytes(tmp_path) == 1234
    assert disk_bytes(tmp_path / "a") == disk_bytes(str(tmp_path / "link")) == 1000
    assert disk_bytes(tmp_path / "deep" / "er") == 234


def test_a_link_out_of_the_folder_counts_what_it_points_to(tmp_path):
    (tmp_path / "blob").write_bytes(b"x" * 77)
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "weights").symlink_to(tmp_path / "blob")
    assert disk_bytes(tmp_path / "snapshot") == 77


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file or folder at .*gone"):
        disk_bytes(tmp_path / "gone")
